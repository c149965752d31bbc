"""What a run would take: parameters, memory, steps, and time as far as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.merging.inputs.sources import MODULES

from .clip_run import ClipRun
from .run_log import LOG, read_log

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run would take.

    Attributes:
        trained: Parameters that are trained, by group.
        frozen: How many others the denoiser has.
        memory: Bytes of what stays while it trains; what a step computes comes on top.
        shots, views: What there is to train on.
        left_out: Shots that are too short.
        steps, samples, epochs: How long.
        hours: What is left of it, by the rate of the run's own log; None before it has one.
    """

    trained: Mapping[str, int]
    frozen: int
    memory: Mapping[str, int]
    shots: int
    views: int
    left_out: int
    steps: int
    samples: int
    epochs: float
    hours: float | None


def plan_run(run: ClipRun) -> RunPlan:
    """Compute what a run takes, without memory for its weights.

    Raises:
        ConfigError: What is to be trained is not there.
    """
    settings = run.config.settings
    trained, num_parameters = run.count_parameters()
    own = sum(trained.counts.values())
    memory = {
        "weights": _FP32 * own + run.frozen_dtype.itemsize * (num_parameters - own),
        "gradients": _FP32 * own,
        "optimizer": 2 * own * (_FP32 if settings.optimizer == "adamw" else 1),
    }
    if settings.ema_decay is not None:
        memory["average"] = _FP32 * own
    memory |= _beside_the_denoiser(run)
    samples = settings.steps * settings.batch_size
    shots = len(run.views.shots)
    return RunPlan(
        trained=trained.counts,
        frozen=num_parameters - own,
        memory=memory,
        shots=shots,
        views=shots * run.views.num_views,
        left_out=len(run.left_out),
        steps=settings.steps,
        samples=samples,
        epochs=samples / shots,
        hours=hours_left(run.config.output / LOG, settings.steps),
    )


def _beside_the_denoiser(run: ClipRun) -> dict[str, int]:
    """Return the bytes of what else stays: encoders without a cache, the decoder for videos."""
    config, sizes = run.config, run.folder.num_bytes(run.frozen_dtype)
    others = {name: size for name, size in sizes.items() if name not in MODULES}
    if not config.data.cache:
        return {"encoders": sum(others.values())}
    if not run.num_videos:
        return {}
    if run.folder.family.is_ours:  # its encoders are freed
        return {"autoencoder of videos": others.get("vae", 0)}
    return {"encoders of videos": sum(others.values())}


def hours_left(log: Path, steps: int) -> float | None:
    """Return how long a run still takes by its log; None if it has none yet."""
    lines = list(read_log(log))
    line: Mapping[str, Any] = lines[-1] if lines else {}
    step, seconds = line.get("step", 0), line.get("seconds")
    if step < 1 or not isinstance(seconds, (int, float)):
        return None
    return max(0, steps - step) * seconds / step / 3600
