"""The pocket model's own prompts as a bench for any weights: how far, how obedient, how whole."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from motionmerge.evaluation.pocket.runs import FORMAT, ClipResult, KeptRun, Protocol
from motionmerge.evaluation.row_files import config_hash
from motionmerge.evaluation.sweeps.observed import Goal, Observed
from motionmerge.evaluation.sweeps.pace import Pace
from motionmerge.sampling.batch.variants import Variant
from motionmerge.sampling.pipelines.pocket import load_pocket

OBJECTIVES = {
    "motion": Goal(metric="degree", unit="px"),
    "obedience": Goal(metric="obeyed"),
    "intact": Goal(metric="intact"),
    "camera": Goal(metric="camera_right"),
    "direction": Goal(metric="direction_right"),
    "whole": Goal(metric="whole"),
    "first_frame": Goal(metric="first_frame_db", unit="dB"),
    "background": Goal(metric="background_db", unit="dB"),
}
"""What is measured with the scene known: docs/pocket.md has the definitions."""


class PocketBench:
    """Validation prompts of the pocket model's world, on which weights are tried; see `Bench`.

    Args:
        folder: Where results and timings are kept.
        num_clips, num_steps: Of a full measurement.
        seed: Of prompts and noise.
        split: `validation`, or `test`, which is not for choosing.
    """

    objectives: Mapping[str, Goal] = OBJECTIVES

    def __init__(
        self,
        folder: Path,
        *,
        num_clips: int,
        num_steps: int,
        seed: int = 0,
        split: str = "validation",
    ) -> None:
        self._folder, self._seed, self._split = folder, seed, split
        self._pace = Pace(folder, "pocket prompts")
        self.num_clips, self.num_steps = num_clips, num_steps
        self.about = f"{num_clips} {split} prompts of the pocket model's world"

    def observe(self, variant: Variant, *, num_clips: int, num_steps: int) -> Observed:
        """Make and measure the clips of the first prompts that are not kept."""
        protocol = Protocol(self._split, num_clips, self._seed, num_steps)
        run, key = self._run, self._key(variant, num_steps)
        num_kept = min(num_clips, run.num_kept(key))
        started = time.monotonic()
        clips = run.clips(
            partial(variant.experts.attach, self._pipeline, restore=True),
            name=variant.name,
            key=key,
            protocol=protocol,
        )
        if num_made := num_clips - num_kept:
            self._pace.add(num_made * num_steps, time.monotonic() - started)
        return observed_of(clips)

    def seconds(self, *, num_clips: int, num_steps: int) -> float | None:
        """Estimate the time of so many clips; None where none was timed in this folder."""
        return self._pace.seconds(num_clips * num_steps)

    def key(self, variant: Variant, *, num_clips: int, num_steps: int) -> str:
        """Hash all that decides the clips."""
        return f"{self._key(variant, num_steps)}-{num_clips}"

    @cached_property
    def _pipeline(self) -> Any:
        return load_pocket("base")

    @cached_property
    def _run(self) -> KeptRun:
        return KeptRun(self._pipeline, self._folder)

    def _key(self, variant: Variant, num_steps: int) -> str:
        return config_hash(
            format=FORMAT,
            frozen=self._run.frozen,
            split=self._split,
            seed=self._seed,
            steps=num_steps,
            **variant.experts.fingerprint(),
        )


def observed_of(clips: tuple[ClipResult, ...]) -> Observed:
    """Return the measures of clips; motion only where the prompt leaves the camera free to move."""
    values: dict[str, dict[Any, float]] = {
        objective.metric: {
            clip.prompt: float(value)
            for clip in clips
            if (value := getattr(clip, objective.metric)) is not None
        }
        for objective in OBJECTIVES.values()
    }
    values["degree"] = {clip.prompt: clip.degree for clip in clips if clip.camera_moves}
    return Observed(values=values, clusters={clip.prompt: clip.prompt for clip in clips})
