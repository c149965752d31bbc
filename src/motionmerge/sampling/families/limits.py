"""What a family of models can make, and how its pipelines are called; `known_limits` has each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from motionmerge.models.video_pipeline import Config, VideoPipeline

Configs = Mapping[str, Config]
"""The configuration of each part of a pipeline by its name, and of the pipeline itself as `""`."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a pipeline can make.

    Attributes:
        height, width: Its own size in pixels; None if it takes that from the image.
        size_multiple: What both must divide by.
        min_side: The smallest height and width.
        num_frames: Its own length.
        frame_rate: Its own frames per second.
        frame_multiple: The number of frames is a multiple of this, plus one; 1 allows any.
        min_frames, max_frames: Its shortest and longest video.
        lengths: All numbers of frames that it makes, where no multiple says which; ascending.
        dropped_frames: How many of the frames asked for it makes, and then leaves out.
        is_fixed_size: It makes its own size only.
        is_square: Height and width must be equal.
        is_distilled: Guidance is built into its weights, and a negative prompt is not read.
        has_guidance: It has a guidance scale.
        has_second_guidance: Its second denoiser, for low noise, has a guidance scale of its own.
        takes_last_image, needs_last_image: Its videos can, or must, end with a given image.
    """

    height: int | None
    width: int | None
    size_multiple: int
    num_frames: int
    frame_rate: float
    frame_multiple: int = 1
    min_frames: int = 1
    max_frames: int | None = None
    min_side: int = 1
    lengths: tuple[int, ...] = ()
    dropped_frames: int = 0
    is_fixed_size: bool = False
    is_square: bool = False
    is_distilled: bool = False
    has_guidance: bool = True
    has_second_guidance: bool = False
    takes_last_image: bool = False
    needs_last_image: bool = False

    def nearest_size(self, height: int, width: int) -> tuple[int | None, int | None]:
        """Return the nearest height and width that can be made."""
        if self.is_fixed_size or self.height is None:
            return self.height, self.width
        if self.is_square:
            height = width = round((height + width) / 2)
        least = math.ceil(self.min_side / self.size_multiple)
        near = [
            max(least, round(side / self.size_multiple)) * self.size_multiple
            for side in (height, width)
        ]
        return near[0], near[1]

    def nearest_num_frames(self, num_frames: int) -> int:
        """Return the nearest number of frames that can be made."""
        if self.lengths:
            return min(self.lengths, key=lambda length: abs(length - num_frames))
        steps = math.floor((num_frames - 1) / self.frame_multiple + 0.5)
        return min(max(steps * self.frame_multiple + 1, self.min_frames), self._longest)

    @property
    def _longest(self) -> int:
        return 10**9 if self.max_frames is None else self.max_frames


def above_one(scale: float | None) -> bool:
    """Check whether a pipeline reads a negative prompt at a guidance scale, None being its own."""
    return scale is None or scale > 1


def _unchanged(pipeline: VideoPipeline, arguments: dict[str, object]) -> dict[str, object]:
    return arguments


@dataclass(frozen=True)
class Modular:
    """What is particular to a modular pipeline of diffusers, which is a chain of blocks.

    Attributes:
        workflow: The part of its blocks that makes videos from images; None for all blocks, which
            choose by what they are given.
        optional_parts: Components that it can do without.
    """

    workflow: str | None = None
    optional_parts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VideoFamily:
    """How the pipelines of a family of models are called.

    Attributes:
        name: As in `families.FAMILIES`.
        pipelines: Class names; the first is the one that makes videos from images, the others are
            text-to-video pipelines with the same parts.
        limits: Derives what a pipeline can make from its parts' configurations.
        num_inference_steps: Its own number of denoising steps.
        guidance_scale: Its own, where it is ours to say.
        frame_rate_argument: What its `__call__` calls the frame rate; None if it is not told.
        has_whole_frame_rate: The frame rate must be a whole number.
        guidance_argument: What its `__call__` calls the guidance scale; None if a part holds it.
        takes_text: It has prompts.
        takes_start_step: Denoising can begin late.
        takes_sigmas: Its `__call__` takes the sigmas of the steps.
        is_guided: Whether its pipeline reads a negative prompt, at a guidance scale or, with None,
            at its own.
        call: Rewrites the arguments of a call where its words are others than everybody's.
        modular: Set if its pipeline is a modular one.
        packages: Packages besides ours that its pipeline needs.
        makes_sound: It makes sound as well, which is not written.
        home: The module of its pipelines.
    """

    name: str
    pipelines: tuple[str, ...]
    limits: Callable[[Configs], Limits]
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    frame_rate_argument: str | None = None
    has_whole_frame_rate: bool = False
    guidance_argument: str | None = "guidance_scale"
    takes_text: bool = True
    takes_start_step: bool = False
    takes_sigmas: bool = False
    is_guided: Callable[[float | None], bool] = above_one
    call: Callable[[VideoPipeline, dict[str, object]], dict[str, object]] = _unchanged
    modular: Modular | None = None
    packages: tuple[str, ...] = ()
    makes_sound: bool = False
    home: str = "diffusers"

    @property
    def is_ours(self) -> bool:
        """Whether its pipelines are of this package: they can encode ahead of their U-Net."""
        return self.home != "diffusers"
