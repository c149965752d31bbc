"""How to optimize, and what the training loop tells of it."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How to optimize. Ranges are checked where settings come from a file.

    Args:
        steps: Optimizer steps.
        batch_size: Samples a step, over all processes and accumulated batches.
        accumulate: In how many batches a process computes its samples of a step.
        learning_rate: At the end of the warm-up.
        decay: Of the learning rate after that: along a cosine to zero, or none.
        warmup_steps: Linear warm-up.
        optimizer: "adamw", or "adamw8bit", whose moments take a quarter of the memory (extra
            `adamw8bit`).
        weight_decay: Of AdamW.
        ema_decay: Of the running average of the weights, which is what is kept; None keeps the
            weights themselves.
        max_grad_norm: Gradients are clipped to this norm.
        seed: Seeds samples, noise and initial weights.
        precision: "bf16" (autocast) or "fp32".
        shard: Spread parameters, gradients and moments over the processes (FSDP) instead of having
            all in each (DDP).
        gradient_checkpointing: Compute what a block computes a second time for its gradients,
            instead of keeping it: less memory, a third more time, the same bits.
        save_every, log_every: In steps.
        save_minutes: Save a state too when the last is this old.
        keep_states: How many of the newest states stay.
    """

    steps: Annotated[int, Field(ge=1, le=10**9)]
    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 16
    accumulate: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(ge=0, le=1e6)] = 1e-3
    decay: Literal["cosine", "none"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.01
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    shard: bool = False
    gradient_checkpointing: bool = False
    save_every: Annotated[int, Field(ge=1)] = 100
    log_every: Annotated[int, Field(ge=1)] = 25
    save_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    keep_states: Annotated[int, Field(ge=1)] = 2


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run did.

    Args:
        steps: Optimizer steps, in all.
        loss: Mean loss over the last tenth of the run; None where its log has none of it.
        seconds: Wall time, over all sittings.
        num_processes: Of the last sitting.
        is_main_process: Whether this process is the one to write files.
        device: "cpu", or the name of the GPU.
    """

    steps: int
    loss: float | None
    seconds: float
    num_processes: int
    is_main_process: bool
    device: str


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """One line of the log: `step` of `steps` done in `seconds`.

    Loss and gradient norm (before clipping) are means since the line before, the loss over all
    processes. A step of this sitting takes `step_seconds` without validations; `seconds_left`
    includes the validations to come.
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    step_seconds: float
    seconds_left: float


class RunStopped(SystemExit):
    """The run was asked to stop and has saved its state: exit code 0, or 130 after Ctrl-C."""

    def __init__(self, step: int, folder: Path, asked_by: int | None = None) -> None:
        super().__init__(128 + signal.SIGINT if asked_by == signal.SIGINT else 0)
        self.step, self.folder = step, folder


Measure = Callable[[nn.Module, int], Mapping[str, Any]]
"""Takes the network and the step; returns JSON values."""


@dataclass(frozen=True)
class Validation:
    """What is measured while a run goes on.

    Attributes:
        every: After how many steps; and once before the first.
        measure: See there.
    """

    every: int
    measure: Measure


def learning_rate_at(step: int, settings: TrainerSettings) -> float:
    """Compute the learning rate: warm-up, then cosine to zero, or constant."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.decay == "none":
        return settings.learning_rate
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
