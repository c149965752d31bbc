"""Many videos with one switch of experts: all their noisy halves, then all their clean halves.

A video is still denoised alone, with its own generator, so its bytes are those of a single run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeGuard

import torch
from PIL import Image

from motionmerge.errors import MotionMergeError
from motionmerge.models.video_pipeline import Scheduler, VideoPipeline
from motionmerge.sampling.families.limits import Limits
from motionmerge.sampling.pipelines.loop import DenoisingPipeline, VideoPipelineOutput
from motionmerge.sampling.videos.checks import check_settings
from motionmerge.sampling.videos.make_video import (
    conditions_of,
    family_and_limits,
    frames_of,
    make_video,
    named_memory_errors,
    pipeline_arguments,
    prepared,
    with_conditions,
)
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.switching.bank import Bank

VIDEO_ERRORS = (
    MotionMergeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What one video can fail with, while the others go on."""


@dataclass(frozen=True)
class Outcome:
    """What became of one of several videos.

    Attributes:
        index: Which one.
        video: `[frames, 3, height, width]` in [0, 1]; None if it failed.
        error: Why it failed.
    """

    index: int
    video: torch.Tensor | None = None
    error: BaseException | None = None


VideoRequest = tuple[Image.Image, VideoSettings]
"""The first frame of a video, and how it is made."""


@dataclass
class _Run:
    """A video on its way: the arguments of its next call, and the steps of each expert."""

    index: int
    settings: VideoSettings
    arguments: dict[str, object]
    parts: list[tuple[str, range]] = field(default_factory=list)


def make_videos(
    pipeline: VideoPipeline, requests: Sequence[VideoRequest], bank: Bank | None = None
) -> Iterator[Outcome]:
    """Make videos, each as soon as it is ready; one that fails does not stop the others.

    With experts on a pipeline of ours, the noisy part of all videos comes first, then one switch,
    then the rest. Other pipelines, and schedules with knobs, make one video after another.

    Args:
        pipeline: A pipeline of one of `VIDEO_FAMILIES`.
        requests: The videos.
        bank: The experts that are attached to it, if any.
    """
    # Guidance by the image needs the start noise of frame 0, which a cut does not hand on.
    needs_start = any((asked.image_guidance_scale or 1) > 1 for _, asked in requests)
    # A part of the steps does not tell which share of all steps is done, as knobs must know.
    has_experts_alone = bank is not None and not bank.schedule.has_knobs
    is_whole = len(requests) == 1 or needs_start or not has_experts_alone
    if bank is not None and not is_whole and can_be_cut(pipeline):
        yield from _in_phases(pipeline, requests, bank)
        return
    for index, (image, settings) in enumerate(requests):
        try:
            outcome = Outcome(index, video=make_video(pipeline, image, settings))
        except VIDEO_ERRORS as error:
            outcome = Outcome(index, error=error)
        yield outcome


def can_be_cut(pipeline: VideoPipeline) -> TypeGuard[DenoisingPipeline]:
    """Return whether a pipeline can stop after any step and go on from its latents later.

    Ours can with a scheduler that keeps nothing between steps, as DDIM does.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    is_ddim = "DDIM" in type(scheduler).__name__
    return isinstance(pipeline, DenoisingPipeline) and is_ddim


def _in_phases(
    pipeline: DenoisingPipeline, requests: Sequence[VideoRequest], bank: Bank
) -> Iterator[Outcome]:
    family, limits = family_and_limits(pipeline)
    runs: list[_Run] = []
    for index, (image, settings) in enumerate(requests):
        try:
            check_settings(settings, family, limits)
            arguments = pipeline_arguments(pipeline, image, settings)
            arguments = with_conditions(arguments, conditions_of(pipeline, arguments))
            run = _Run(index, settings, arguments)
            run.parts = _parts(pipeline, bank, settings.resolved(family, limits))
            runs.append(run)
        except VIDEO_ERRORS as error:
            yield Outcome(index, error=error)
    for phase in range(max((len(run.parts) for run in runs), default=0)):
        due = [run for run in runs if len(run.parts) > phase]
        for expert in dict.fromkeys(run.parts[phase][0] for run in due):
            with bank.with_expert(expert):
                for run in [run for run in due if run.parts[phase][0] == expert]:
                    outcome = _advance(pipeline, run, phase, limits)
                    if outcome is not None and outcome.error is not None:
                        runs.remove(run)
                    if outcome is not None:
                        yield outcome


def _advance(pipeline: DenoisingPipeline, run: _Run, phase: int, limits: Limits) -> Outcome | None:
    """Do one part of a video; give its outcome if that was the last part or failed."""
    is_last = phase == len(run.parts) - 1
    try:
        with prepared(pipeline, run.settings), named_memory_errors(limits):
            frames = _denoise(pipeline, run.arguments, run.parts[phase][1], is_last=is_last)
    except VIDEO_ERRORS as error:
        return Outcome(run.index, error=error)
    if is_last:
        return Outcome(run.index, video=frames)
    run.arguments["latents"] = frames
    return None


def _parts(
    pipeline: DenoisingPipeline, bank: Bank, settings: VideoSettings
) -> list[tuple[str, range]]:
    """Cut the steps of a video into runs of one expert each."""
    assert settings.num_inference_steps is not None  # `resolved` filled it in
    pipeline.set_timesteps(settings.num_inference_steps, settings.start_step)
    experts = [bank.expert_for(timestep) for timestep in pipeline.scheduler.timesteps]
    parts = []
    for expert, group in groupby(range(len(experts)), key=experts.__getitem__):
        steps = list(group)
        parts.append((expert, range(steps[0], steps[-1] + 1)))
    return parts


def _denoise(
    pipeline: DenoisingPipeline, arguments: dict[str, Any], steps: range, *, is_last: bool
) -> torch.Tensor:
    """Do some of the steps of a video: latents with a batch axis, or its frames after the last."""
    with _only_steps(pipeline, steps):
        if is_last:
            return frames_of(pipeline(**arguments))
        made = pipeline(**{**arguments, "output_type": "latent"})
        assert isinstance(made, VideoPipelineOutput)
        assert isinstance(made.frames, torch.Tensor)
        return made.frames


class _PartOfSteps:
    """A scheduler of which a pipeline sees some of the timesteps; everything else is its own."""

    def __init__(self, scheduler: Scheduler, steps: range) -> None:
        self._scheduler, self._steps = scheduler, steps

    def __getattr__(self, name: str) -> object:
        value: object = getattr(self._scheduler, name)
        return value

    @property
    def timesteps(self) -> torch.Tensor:
        return self._scheduler.timesteps[self._steps.start : self._steps.stop]


@contextmanager
def _only_steps(pipeline: DenoisingPipeline, steps: range) -> Iterator[None]:
    scheduler = pipeline.scheduler
    pipeline.scheduler = _PartOfSteps(scheduler, steps)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
