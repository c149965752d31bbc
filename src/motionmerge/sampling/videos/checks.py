"""What a family of models cannot make is refused, with the nearest right values."""

from __future__ import annotations

import math

from motionmerge.errors import ConfigError
from motionmerge.sampling.families.limits import Limits, VideoFamily
from motionmerge.sampling.videos.settings import VideoSettings

MAX_FRAME_RATE = 120.0


def check_settings(
    asked: VideoSettings, family: VideoFamily, limits: Limits, *, has_last_image: bool = False
) -> None:
    """Refuse what the family cannot make.

    Args:
        asked: The video.
        family: How the pipeline is called.
        limits: What it can make.
        has_last_image: The video is to end with a given image.

    Raises:
        ConfigError: Names the setting and the nearest right values.
    """
    if not family.takes_text and (asked.prompt or asked.negative_prompt):
        raise ConfigError(
            f"{family.name} makes videos from the image alone; it has no prompts.",
            fix="Leave `prompt` and `negative_prompt` out.",
        )
    if family.takes_text and asked.prompt is None:
        raise ConfigError(f"{family.name} needs a prompt.", fix="Say what happens: `prompt`.")
    if asked.guidance_scale is not None and not limits.has_guidance:
        raise ConfigError(
            f"This model of {family.name} has guidance built in, and no guidance scale.",
            fix="Leave `guidance_scale` out.",
        )
    _check_negative_prompt(asked, family, limits)
    _check_second_guidance(asked, family, limits)
    _check_start_step(asked, family)
    _check_first_frame(asked, family)
    _check_sigmas(asked, family)
    _check_last_image(asked, family, limits, has_last_image=has_last_image)
    _check_size(asked, family, limits)
    _check_length(asked, family, limits)


def _check_negative_prompt(asked: VideoSettings, family: VideoFamily, limits: Limits) -> None:
    """Refuse a negative prompt that would do nothing."""
    if not asked.negative_prompt:
        return
    if limits.is_distilled:
        raise ConfigError(
            f"This model of {family.name} has guidance built in; a negative prompt does nothing.",
            fix="Leave `negative_prompt` out.",
        )
    scale = family.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    if not family.is_guided(scale):
        what = "its own guidance" if scale is None else f"a guidance_scale of {scale:g}"
        raise ConfigError(
            f"With {what}, {family.name} ignores a negative prompt.",
            fix="Raise `guidance_scale` above 1, or leave `negative_prompt` out.",
        )


def _check_second_guidance(asked: VideoSettings, family: VideoFamily, limits: Limits) -> None:
    """Refuse a guidance scale for low noise that nothing would read."""
    first, second = asked.guidance_scale, asked.guidance_scale_2
    if second is None:
        return
    if not limits.has_second_guidance:
        raise ConfigError(
            f"This model of {family.name} has no second denoiser with a guidance of its own, as "
            "Wan 2.2-A14B has.",
            fix="Leave `guidance_scale_2` out.",
        )
    if second > 1 and first is not None and first <= 1:
        raise ConfigError(
            f"With a guidance_scale of {first:g}, {family.name} has no guidance at any noise "
            f"level, and ignores a guidance_scale_2 of {second:g}.",
            fix="Raise `guidance_scale` above 1, or leave `guidance_scale_2` out.",
        )


def _check_start_step(asked: VideoSettings, family: VideoFamily) -> None:
    """Refuse to begin late where that is not possible."""
    if asked.start_step is None:
        return
    if not family.takes_start_step:
        raise ConfigError(
            f"{family.name} always begins with pure noise; it has no start_step.",
            fix="Leave `start_step` out, or use a DynamiCrafter.",
        )
    steps = asked.num_inference_steps or family.num_inference_steps
    if asked.start_step < steps:
        raise ConfigError(
            f"From start_step {asked.start_step} on there are not {steps} steps to take.",
            fix="Begin earlier, with a larger start_step (e.g. 940), or ask for fewer steps.",
        )


def _check_first_frame(asked: VideoSettings, family: VideoFamily) -> None:
    """Refuse a frame stride and a guidance by the image that the pipeline would not take."""
    for name in ("image_guidance_scale", "frame_stride"):
        if getattr(asked, name) is not None and not family.sees_first_frame:
            raise ConfigError(
                f"{family.name} has no {name}, as ConsistI2V has.", fix=f"Leave `{name}` out."
            )


def _check_sigmas(asked: VideoSettings, family: VideoFamily) -> None:
    """Refuse sigmas that the pipeline would not take, or of another number of steps."""
    if asked.sigmas is None:
        return
    if not family.takes_sigmas:
        raise ConfigError(
            f"The pipeline of {family.name} takes no sigmas.",
            fix="Leave `sigmas` out; `num_inference_steps` and, of flow "
            "models, `shift` change them.",
        )
    number, steps = len(asked.sigmas), asked.num_inference_steps
    if steps not in (None, number):
        raise ConfigError(
            f"{steps} steps and {number} sigmas were asked for, and each step has one.",
            fix=f"Ask for {number} steps, or leave `num_inference_steps` out.",
        )


def _check_last_image(
    asked: VideoSettings, family: VideoFamily, limits: Limits, *, has_last_image: bool
) -> None:
    """Refuse a last image that nothing would read, and a missing one that is needed."""
    if has_last_image and not limits.takes_last_image:
        raise ConfigError(
            f"This model of {family.name} cannot end a video with an image of your choice.",
            fix="Leave `last_image` out, or use a model for it, such as DynamiCrafter's "
            "for interpolation, Wan2.1-FLF2V or Wan2.2-I2V-A14B.",
        )
    if limits.needs_last_image and not has_last_image:
        raise ConfigError(
            f"This model of {family.name} makes what is between two images; there is one.",
            fix="Give it with `last_image` (`batch` cannot), or use an image-to-video model.",
        )
    if has_last_image and asked.num_frames == 1:
        raise ConfigError(
            "A video of 1 frame cannot begin and end with an image.", fix="Ask for more frames."
        )


def _check_size(asked: VideoSettings, family: VideoFamily, limits: Limits) -> None:
    """Refuse a height and a width that the model cannot make."""
    if asked.height is None and asked.width is None:
        return
    if limits.height is None or limits.width is None:
        raise ConfigError(
            f"{family.name} takes the video's size from the image.",
            fix="Leave height and width out; crop the image to change the shape.",
        )
    size = (
        limits.height if asked.height is None else asked.height,
        limits.width if asked.width is None else asked.width,
    )
    near = limits.nearest_size(*size)
    if near == size:
        return
    raise ConfigError(
        f"{size[0]} x {size[1]} pixels were asked of {family.name}; {_size_rule(limits)}.",
        fix=f"Use height {near[0]} and width {near[1]}.",
    )


def describe_limits(family: VideoFamily, limits: Limits) -> str:
    """Return in a few sentences what a model makes by itself, and what it takes."""
    needs = "needs a prompt" if family.takes_text else "has no prompts: the photo alone"
    own = "the photo's size"
    rule = ""
    if limits.width is not None and limits.height is not None:
        own = f"{limits.width} x {limits.height} pixels"
        rule = f"Width and height: {_size_rule(limits)}. "
        if limits.is_fixed_size or limits.is_square:
            rule = f"{_size_rule(limits).capitalize()}. "
    return (
        f"{family.name} {needs}. By itself it makes {own}, {limits.num_frames} frames at "
        f"{limits.frame_rate:g} per second, in {family.num_inference_steps} steps. {rule}"
        f"Frames: {_lengths(limits)}."
    )


def _size_rule(limits: Limits) -> str:
    if limits.is_fixed_size:
        return "it makes one size only"
    if limits.is_square:
        return f"it makes squares of a multiple of {limits.size_multiple}"
    rule = f"both must divide by {limits.size_multiple}"
    if limits.min_side > limits.size_multiple:
        rule += f", and be {limits.min_side} or more"
    return rule


def _check_length(asked: VideoSettings, family: VideoFamily, limits: Limits) -> None:
    """Refuse a number of frames and a frame rate that the model cannot make."""
    frames, rate = asked.num_frames, asked.frame_rate
    if frames is not None and limits.nearest_num_frames(frames) != frames:
        raise ConfigError(
            f"{frames} frames were asked of {family.name}; it makes {_lengths(limits)}.",
            fix=f"Use {limits.nearest_num_frames(frames)} frames.",
        )
    if rate is not None and (near := _nearest_frame_rate(rate, family, limits)) != rate:
        kind = "whole numbers" if family.has_whole_frame_rate else "values"
        raise ConfigError(
            f"The frame rate {rate:g} was asked of {family.name}; it takes {kind} from 1 to "
            f"{MAX_FRAME_RATE:g}.",
            fix=f"Use {near:g} frames per second.",
        )


def _nearest_frame_rate(rate: float, family: VideoFamily, limits: Limits) -> float:
    if not math.isfinite(rate):
        return limits.frame_rate
    near = min(max(rate, 1.0), MAX_FRAME_RATE)
    return float(round(near)) if family.has_whole_frame_rate else near


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
