"""What a family of models can make, and how what it cannot make is refused.

`known_limits` has each family's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from motionmerge.errors import ConfigError
from motionmerge.models.video_pipeline import Config, VideoPipeline

Configs = Mapping[str, Config]
"""The configuration of each part of a pipeline by its name, and of the pipeline itself as `""`."""

MAX_FRAME_RATE = 120.0


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

    def check(
        self,
        limits: Limits,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_inference_steps: int | None = None,
        start_step: int | None = None,
        sigmas: Sequence[float] | None = None,
        has_last_image: bool = False,
    ) -> None:
        """Refuse what the family cannot make.

        Args:
            limits: What its pipeline can make.
            height, width, num_frames, frame_rate, prompt, negative_prompt, guidance_scale,
                guidance_scale_2, num_inference_steps, start_step, sigmas: See `VideoSettings`.
            has_last_image: The video is to end with a given image.

        Raises:
            ConfigError: Names the setting and the nearest right values.
        """
        if not self.takes_text and (prompt or negative_prompt):
            raise ConfigError(
                f"{self.name} makes videos from the image alone; it has no prompts.",
                fix="Leave `prompt` and `negative_prompt` out.",
            )
        if self.takes_text and prompt is None:
            raise ConfigError(f"{self.name} needs a prompt.", fix="Say what happens: `prompt`.")
        if guidance_scale is not None and not limits.has_guidance:
            raise ConfigError(
                f"This model of {self.name} has guidance built in, and no guidance scale.",
                fix="Leave `guidance_scale` out.",
            )
        if negative_prompt:
            self._check_guidance(limits, guidance_scale)
        if guidance_scale_2 is not None:
            self._check_second_guidance(limits, guidance_scale, guidance_scale_2)
        if start_step is not None:
            self._check_start_step(start_step, num_inference_steps or self.num_inference_steps)
        if sigmas is not None:
            self._check_sigmas(sigmas, num_inference_steps)
        self._check_last_image(limits, has_last_image=has_last_image, num_frames=num_frames)
        self._check_size(limits, height, width)
        if num_frames is not None and limits.nearest_num_frames(num_frames) != num_frames:
            raise ConfigError(
                f"{num_frames} frames were asked of {self.name}; it makes {_lengths(limits)}.",
                fix=f"Use {limits.nearest_num_frames(num_frames)} frames.",
            )
        if frame_rate is not None:
            near = self._nearest_frame_rate(frame_rate, limits)
            if near != frame_rate:
                kind = "whole numbers" if self.has_whole_frame_rate else "values"
                raise ConfigError(
                    f"The frame rate {frame_rate:g} was asked of {self.name}; it takes {kind} from "
                    f"1 to {MAX_FRAME_RATE:g}.",
                    fix=f"Use {near:g} frames per second.",
                )

    def _check_guidance(self, limits: Limits, guidance_scale: float | None) -> None:
        """Refuse a negative prompt that would do nothing."""
        if limits.is_distilled:
            raise ConfigError(
                f"This model of {self.name} has guidance built in; a negative prompt does nothing.",
                fix="Leave `negative_prompt` out.",
            )
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if not self.is_guided(scale):
            what = "its own guidance" if scale is None else f"a guidance_scale of {scale:g}"
            raise ConfigError(
                f"With {what}, {self.name} ignores a negative prompt.",
                fix="Raise `guidance_scale` above 1, or leave `negative_prompt` out.",
            )

    def _check_second_guidance(
        self, limits: Limits, guidance_scale: float | None, guidance_scale_2: float
    ) -> None:
        """Refuse a guidance scale for low noise that nothing would read."""
        if not limits.has_second_guidance:
            raise ConfigError(
                f"This model of {self.name} has no second denoiser with a guidance of its own, as "
                "Wan 2.2-A14B has.",
                fix="Leave `guidance_scale_2` out.",
            )
        if guidance_scale_2 > 1 and guidance_scale is not None and guidance_scale <= 1:
            raise ConfigError(
                f"With a guidance_scale of {guidance_scale:g}, {self.name} has no guidance at any "
                f"noise level, and ignores a guidance_scale_2 of {guidance_scale_2:g}.",
                fix="Raise `guidance_scale` above 1, or leave `guidance_scale_2` out.",
            )

    def _check_start_step(self, start_step: int, num_inference_steps: int) -> None:
        """Refuse to begin late where that is not possible."""
        if not self.takes_start_step:
            raise ConfigError(
                f"{self.name} always begins with pure noise; it has no start_step.",
                fix="Leave `start_step` out, or use a DynamiCrafter.",
            )
        if start_step < num_inference_steps:
            raise ConfigError(
                f"From start_step {start_step} on there are not {num_inference_steps} steps to "
                "take.",
                fix="Begin earlier, with a larger start_step (e.g. 940), or ask for fewer steps.",
            )

    def _check_sigmas(self, sigmas: Sequence[float], num_inference_steps: int | None) -> None:
        """Refuse sigmas that the pipeline would not take, or of another number of steps."""
        if not self.takes_sigmas:
            raise ConfigError(
                f"The pipeline of {self.name} takes no sigmas.",
                fix="Leave `sigmas` out; `num_inference_steps` and, of flow "
                "models, `shift` change them.",
            )
        if num_inference_steps not in (None, len(sigmas)):
            raise ConfigError(
                f"{num_inference_steps} steps and {len(sigmas)} sigmas were asked for, and each "
                "step has one.",
                fix=f"Ask for {len(sigmas)} steps, or leave `num_inference_steps` out.",
            )

    def _check_last_image(
        self, limits: Limits, *, has_last_image: bool, num_frames: int | None
    ) -> None:
        """Refuse a last image that nothing would read, and a missing one that is needed."""
        if has_last_image and not limits.takes_last_image:
            raise ConfigError(
                f"This model of {self.name} cannot end a video with an image of your choice.",
                fix="Leave `last_image` out, or use a model for it, such as DynamiCrafter's "
                "for interpolation, Wan2.1-FLF2V or Wan2.2-I2V-A14B.",
            )
        if limits.needs_last_image and not has_last_image:
            raise ConfigError(
                f"This model of {self.name} makes what is between two images; there is one.",
                fix="Give it with `last_image` (`batch` cannot), or use an image-to-video model.",
            )
        if has_last_image and num_frames == 1:
            raise ConfigError(
                "A video of 1 frame cannot begin and end with an image.", fix="Ask for more frames."
            )

    def _nearest_frame_rate(self, frame_rate: float, limits: Limits) -> float:
        if not math.isfinite(frame_rate):
            return limits.frame_rate
        near = min(max(frame_rate, 1.0), MAX_FRAME_RATE)
        return float(round(near)) if self.has_whole_frame_rate else near

    def _check_size(self, limits: Limits, height: int | None, width: int | None) -> None:
        if height is None and width is None:
            return
        if limits.height is None or limits.width is None:
            raise ConfigError(
                f"{self.name} takes the video's size from the image.",
                fix="Leave height and width out; crop the image to change the shape.",
            )
        asked = (
            limits.height if height is None else height,
            limits.width if width is None else width,
        )
        near = limits.nearest_size(*asked)
        if near == asked:
            return
        rule = f"both must divide by {limits.size_multiple}"
        if limits.min_side > limits.size_multiple:
            rule += f", and be {limits.min_side} or more"
        if limits.is_fixed_size:
            rule = "it makes one size only"
        elif limits.is_square:
            rule = f"it makes squares of a multiple of {limits.size_multiple}"
        raise ConfigError(
            f"{asked[0]} x {asked[1]} pixels were asked of {self.name}; {rule}.",
            fix=f"Use height {near[0]} and width {near[1]}.",
        )


def _lengths(limits: Limits) -> str:
    if limits.lengths:
        named = [str(length) for length in limits.lengths]
        return ", ".join(named if len(named) < 7 else [*named[:5], "...", named[-1]])
    if limits.min_frames == limits.max_frames:
        return f"{limits.min_frames}"
    least = f"{limits.min_frames} or more"
    most = f" up to {limits.max_frames}" if limits.max_frames is not None else ""
    if limits.frame_multiple == 1:
        return f"{least}{most}"
    least = f", {least}" if limits.min_frames > 1 else ""
    return f"a multiple of {limits.frame_multiple} plus 1{least}{most}"
