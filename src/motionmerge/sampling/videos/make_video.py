"""One video of any image-to-video pipeline: the call in the words of its family, and its frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from PIL import Image

from motionmerge.errors import ConfigError
from motionmerge.io.video import fit_image, rgb_image
from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.sampling.families.families import configs_of, family_of
from motionmerge.sampling.families.limits import Limits, VideoFamily
from motionmerge.sampling.pipelines.encoded import Conditions
from motionmerge.sampling.pipelines.encoders import EncodingPipeline
from motionmerge.sampling.request.step_plan import (
    check_steps,
    shifted,
    sigmas_argument,
    with_shift,
)
from motionmerge.sampling.videos.checks import check_settings
from motionmerge.sampling.videos.settings import VideoSettings, table

_ENCODED = ("image", "last_image", "prompt", "negative_prompt", "height", "width", "num_frames")

_GUIDANCE_OPTIONS = {"guidance_scale", "true_cfg_scale", "audio_guidance_scale"}

_CPU_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")

_FAILING_UNGUIDED = (
    "LTXModularPipeline",
    "Wan22Image2VideoModularPipeline",
    "WanImage2VideoModularPipeline",
)


class Guider(Protocol):
    """What holds the guidance scale of a pipeline that does not take it with each call."""

    def new(self, **settings: float) -> Guider: ...


def make_video(
    pipeline: VideoPipeline,
    image: Image.Image,
    settings: VideoSettings,
    *,
    last_image: Image.Image | None = None,
    conditions: Conditions | None = None,
    **options: object,
) -> torch.Tensor:
    """Call a pipeline for one video.

    Args:
        pipeline: A pipeline of one of `VIDEO_FAMILIES`.
        image: The first frame, of any mode; it is made upright RGB and cut to the video's shape.
        settings: The video. With `prompt_embeds` (or the like) in `options` it needs no prompt.
        last_image: What the video ends with, if the model can do that.
        conditions: What `encode_ahead` gave for it, if it did.
        options: Arguments of the pipeline's own `__call__`, which count more than the settings.

    Returns:
        `[frames, 3, height, width]` in [0, 1].

    Raises:
        ConfigError: The family cannot make it, or memory ran out.
        DataError: The image cannot be read.
    """
    family, limits = family_and_limits(pipeline)
    if not any(name.startswith("prompt_embeds") for name in options):
        is_guided_by_options = not _GUIDANCE_OPTIONS.isdisjoint(options)
        unread = {"negative_prompt": None, "guidance_scale": None}
        asked = settings.changed(**unread) if is_guided_by_options else settings
        check_settings(asked, family, limits, has_last_image=last_image is not None)
    if settings.sigmas is not None or settings.shift is not None:
        check_steps(getattr(pipeline, "scheduler", None), settings)
    arguments = pipeline_arguments(pipeline, image, settings, last_image=last_image)
    if conditions is not None:
        arguments = with_conditions(arguments, conditions)
    with prepared(pipeline, settings), named_memory_errors(limits):
        return frames_of(pipeline(**{**arguments, **options}))


def encode_ahead(
    pipeline: VideoPipeline,
    image: Image.Image,
    wanted: Sequence[VideoSettings],
    *,
    last_image: Image.Image | None = None,
) -> list[Conditions | None]:
    """Run the encoders of a pipeline of ours for all videos of an image, then free them.

    Args:
        pipeline: A pipeline; its encoders are gone afterwards, if it is one of ours.
        image: The first frame of all videos.
        wanted: The videos.
        last_image: What all of them end with, if anything.

    Returns:
        What `make_video` takes for each; None for other pipelines, which keep their encoders.

    Raises:
        ConfigError: Memory ran out.
    """
    if not isinstance(pipeline, EncodingPipeline):
        return [None] * len(wanted)
    seedless = [settings.changed(seed=0) for settings in wanted]
    encoded = {
        settings: conditions_of(
            pipeline, pipeline_arguments(pipeline, image, settings, last_image=last_image)
        )
        for settings in dict.fromkeys(seedless)
    }
    pipeline.free_encoders()
    return [encoded[settings] for settings in seedless]


def conditions_of(pipeline: EncodingPipeline, arguments: Mapping[str, Any]) -> Conditions:
    """Encode what the arguments of a call say of its prompt and image."""
    _, limits = family_and_limits(pipeline)
    own = {name: arguments[name] for name in _ENCODED if name in arguments}
    scale = arguments.get("guidance_scale")  # the pipeline's own guides
    with named_memory_errors(limits):
        return pipeline.encode(**own, guided=scale is None or scale > 1)


def with_conditions(arguments: dict[str, object], conditions: Conditions) -> dict[str, object]:
    """Replace what was encoded in the arguments of a call."""
    kept = {name: value for name, value in arguments.items() if name not in _ENCODED}
    return {**kept, "conditions": conditions}


def family_and_limits(pipeline: VideoPipeline) -> tuple[VideoFamily, Limits]:
    """Find the family of a loaded pipeline, and what it can make."""
    family = family_of(type(pipeline).__name__)
    return family, family.limits(configs_of(pipeline))


def pipeline_arguments(
    pipeline: VideoPipeline,
    image: Image.Image,
    settings: VideoSettings,
    *,
    last_image: Image.Image | None = None,
) -> dict[str, object]:
    """Translate settings into the arguments of a pipeline's `__call__`."""
    family, limits = family_and_limits(pipeline)
    settings = settings.resolved(family, limits)
    given = {"image": image} | ({} if last_image is None else {"last_image": last_image})
    images, size = {name: rgb_image(one) for name, one in given.items()}, {}
    if settings.height is not None and settings.width is not None:
        size = {"height": settings.height, "width": settings.width}
        images = {name: fit_image(one, **size) for name, one in images.items()}
    arguments: dict[str, object] = {
        **images,
        **size,
        "num_frames": settings.num_frames,
        "num_inference_steps": settings.num_inference_steps,
        "generator": torch.Generator().manual_seed(settings.seed),
        "output_type": "pt",
    }
    if settings.frame_rate is not None and family.frame_rate_argument is not None:
        rate = settings.frame_rate
        arguments[family.frame_rate_argument] = int(rate) if family.has_whole_frame_rate else rate
    if settings.guidance_scale is not None and family.guidance_argument is not None:
        name = family.guidance_argument
        is_hunyuan = family.name in ("hunyuan-video", "framepack")
        if is_hunyuan and not pipeline.components["transformer"].config.guidance_embeds:
            name = "true_cfg_scale"
        arguments[name] = settings.guidance_scale
    if settings.sigmas is not None:
        scheduler = with_shift(pipeline.scheduler, settings.shift)
        arguments["sigmas"] = sigmas_argument(scheduler, settings.sigmas)
    for name, one in table().items():
        is_given = one.is_argument and getattr(settings, name) is not None
        if is_given and family.modular is None:
            arguments[name] = getattr(settings, name)
    if family.takes_text and settings.prompt is not None:
        arguments |= _text(pipeline, family, settings, arguments)
    if family.modular is not None:
        arguments["output"] = "videos"
    return family.call(pipeline, arguments)


def _text(
    pipeline: VideoPipeline,
    family: VideoFamily,
    settings: VideoSettings,
    arguments: dict[str, object],
) -> dict[str, object]:
    if family.name == "i2vgen-xl":
        embeds = _i2vgen_xl_embeds(pipeline, [settings.prompt, settings.negative_prompt or ""])
        return {"prompt_embeds": embeds[:1], "negative_prompt_embeds": embeds[1:]}
    text: dict[str, object] = {"prompt": settings.prompt}
    if settings.negative_prompt is not None or "true_cfg_scale" in arguments:
        text["negative_prompt"] = settings.negative_prompt or ""
    return text


@torch.no_grad()
def _i2vgen_xl_embeds(pipeline: VideoPipeline, prompts: list[str | None]) -> torch.Tensor:
    """Encode prompts as the checkpoint expects: the last layer but one, normalised.

    The pipeline does this itself, but looks for the norm where transformers had it before 5.6.

    Returns:
        `[prompts, tokens, dim]`.
    """
    tower, tokenizer = pipeline.components["text_encoder"], pipeline.components["tokenizer"]
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    states = tower(tokens.to(pipeline._execution_device), output_hidden_states=True).hidden_states
    normed: torch.Tensor = getattr(tower, "text_model", tower).final_layer_norm(states[-2])
    return normed


def frames_of(output: Any) -> torch.Tensor:
    """Take the frames of the first video, `[frames, 3, height, width]` in [0, 1], on the CPU."""
    videos = getattr(output, "frames", output)  # a modular pipeline gives just what it is asked for
    return torch.as_tensor(videos[0]).detach().float().cpu()


@contextmanager
def prepared(pipeline: VideoPipeline, settings: VideoSettings) -> Iterator[None]:
    """Prepare, for the block, what settings need besides arguments.

    The global generators are seeded, as I2VGen-XL draws its image latents from them; the scheduler
    has the shift; and guiders, which Hunyuan 1.5 and modular pipelines have, know the guidance
    scale, the second that of the second denoiser.
    """
    device = getattr(pipeline, "_execution_device", torch.device("cpu"))
    first, second = settings.guidance_scale, settings.guidance_scale_2
    scales = {"guider": first, "guider_2": first if second is None else second}
    found: dict[str, Guider | None] = {name: getattr(pipeline, name, None) for name in scales}
    guiders = {name: guider for name, guider in found.items() if guider is not None}
    try:
        for name, guider in guiders.items():
            if (scale := scales[name]) is not None:
                setattr(pipeline, name, _guider_of(pipeline, guider, scale))
        with (
            shifted(pipeline, settings.shift),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(settings.seed)
            yield
    finally:
        for name, guider in guiders.items():
            setattr(pipeline, name, guider)


def _guider_of(pipeline: VideoPipeline, guider: Guider, scale: float) -> Guider:
    """Make a guider of another scale.

    Some modular pipelines fail where there is no guidance. There, no guidance is guidance in none
    of the steps: the denoiser is called as often, with the same result.
    """
    if scale == 1 and type(pipeline).__name__ in _FAILING_UNGUIDED:
        return guider.new(stop=0.0)
    return guider.new(guidance_scale=scale)


@contextmanager
def named_memory_errors(limits: Limits) -> Iterator[None]:
    """Turn torch's out-of-memory errors inside the block into one with a `Fix:` line.

    Raises:
        ConfigError: Memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error, limits) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _CPU_OUT_OF_MEMORY):
            raise
        raise _out_of_memory(error, limits) from error


def _out_of_memory(error: BaseException, limits: Limits) -> ConfigError:
    first_line = str(error).partition("\n")[0] or type(error).__name__
    smaller = "smaller `height` and `width`" if limits.height is not None else "a smaller image"
    frames = limits.nearest_num_frames(limits.num_frames // 2)
    return ConfigError(
        f"Memory ran out while the video was made: {first_line[:200]}",
        fix=f"Ask for fewer frames ({frames}: `num_frames`) or {smaller}, or load the model in "
        "bf16 (`dtype`).",
    )
