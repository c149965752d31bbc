"""What a pipeline makes of a clip before it denoises: the condition, and clean latents.

The condition is what the pipeline itself tells its network. So the pipeline is called for a video
without guidance, and stopped when it first calls the network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from PIL import Image
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.io.decoding import Picture
from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.sampling.families.limits import Limits, VideoFamily
from motionmerge.sampling.videos.checks import check_settings
from motionmerge.sampling.videos.make_video import (
    family_and_limits,
    named_memory_errors,
    pipeline_arguments,
    prepared,
)
from motionmerge.sampling.videos.settings import VideoSettings

from .condition import DenoiserCondition
from .family import FamilyDenoiser


def encode_condition(
    pipeline: VideoPipeline,
    denoiser: FamilyDenoiser,
    frames: Picture,
    caption: str,
    *,
    frame_rate: float,
    seed: int = 0,
    **options: object,
) -> DenoiserCondition:
    """Run a pipeline's encoders for a clip, a batch of one.

    Args:
        pipeline: Of a family of `FAMILY_DENOISERS`.
        denoiser: Of the pipeline.
        frames: `[frames, height, width, 3]`, of which the first is the image.
        caption: What happens; models without text do not read it.
        frame_rate: Frames per second, told to models that know frame rates.
        seed: Of what the pipeline draws: SVD adds noise to the image, others draw its latents.
        options: Arguments of the pipeline's own `__call__`, such as `prompt_embeds`.

    Raises:
        ConfigError: The family makes no videos of this size and length, or memory ran out.
    """
    family, limits = family_and_limits(pipeline)
    num_frames, height, width, _ = frames.shape
    settings = settings_like(
        family,
        limits,
        prompt=caption,
        num_frames=num_frames,
        height=height,
        width=width,
        frame_rate=frame_rate,
        num_inference_steps=2,
        seed=seed,
    )
    check_settings(settings, family, limits)
    is_read = any(name.startswith("prompt_embeds") for name in options)
    unguided = settings.changed(guidance_scale=1.0, **({"prompt": None} if is_read else {}))
    arguments = pipeline_arguments(pipeline, Image.fromarray(frames[0]), unguided)
    with prepared(pipeline, unguided), named_memory_errors(limits):
        condition = _stopped(pipeline, denoiser, lambda: pipeline(**{**arguments, **options}))
    if limits.height is None:
        _check_size((height, width), condition.latents.shape[-2:], limits)
    return condition


def settings_like(family: VideoFamily, limits: Limits, **clip: Any) -> VideoSettings:
    """Return the settings of a video like a clip, without what its family is not told.

    Args:
        family, limits: Of the pipeline that makes the video.
        clip: Settings by name: all of prompt, height, width and frame_rate.
    """
    is_told = {
        "prompt": family.takes_text,
        "height": limits.height is not None,
        "width": limits.height is not None,
        "frame_rate": family.frame_rate_argument is not None,
    }
    told = {name: value for name, value in clip.items() if is_told.get(name, True)}
    return VideoSettings.model_validate(told)


def _check_size(pixels: tuple[int, int], latents: Sequence[int], limits: Limits) -> None:
    """Refuse a clip that a pipeline, which takes its size from the image, resized."""
    (high, over), (wide, across) = (
        divmod(side, of) for side, of in zip(pixels, latents, strict=True)
    )
    if over or across or high != wide:
        raise ConfigError(
            f"The model makes videos of {latents[0]}x{latents[1]} latents of an image of "
            f"{pixels[0]}x{pixels[1]} pixels, so it would be resized.",
            fix="Train on clips of a size that the model keeps, with sides that are multiples of "
            f"{limits.size_multiple}.",
        )


class _Called(Exception):
    """Carries out of a pipeline what it told its network."""

    def __init__(self, condition: DenoiserCondition) -> None:
        self.condition = condition


def _stopped(
    pipeline: VideoPipeline, denoiser: FamilyDenoiser, run: Callable[[], object]
) -> DenoiserCondition:
    """Return what a pipeline tells its network when it calls it for the first time."""
    try:
        with _stopped_at_a_network(denoiser), _without_bar(pipeline):
            run()
    except _Called as called:
        getattr(pipeline, "maybe_free_model_hooks", lambda: None)()
        return called.condition
    raise ConfigError(
        f"A {type(pipeline).__name__} did not call the network that is to be trained.",
        fix="Pass the denoiser that `denoiser_for` made of this very pipeline.",
    )


@contextmanager
def _stopped_at_a_network(denoiser: FamilyDenoiser) -> Iterator[None]:
    def stop(network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> NoReturn:
        bound = inspect.signature(type(network).forward).bind(network, *arguments, **named)
        raise _Called(denoiser.condition_of(bound.arguments))

    networks = denoiser.children()
    hooks = [network.register_forward_pre_hook(stop, with_kwargs=True) for network in networks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _NoBar:
    """Takes the place of a progress bar, which a video that is not made would leave at 0."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None: ...
    def update(self, *_: object) -> None: ...


@contextmanager
def _without_bar(pipeline: VideoPipeline) -> Iterator[None]:
    own = vars(pipeline).get("progress_bar")
    pipeline.progress_bar = _NoBar
    try:
        yield
    finally:
        if own is None:
            del pipeline.progress_bar  # the class has one
        else:
            pipeline.progress_bar = own
