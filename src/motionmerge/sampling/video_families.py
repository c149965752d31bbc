"""How each family's pipeline is called: sizes, lengths and rates it can make, names of arguments.

Sizes follow from the configurations of the pipeline's parts, so that they are known before any
weights are loaded. Numbers are those of the pipelines of diffusers 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from motionmerge.errors import ConfigError
from motionmerge.models.pocket.world import FRAME_RATE, NUM_FRAMES, SIZE
from motionmerge.sampling.pipeline_inputs import MAX_FRAMES

Configs = Mapping[str, Mapping[str, Any]]
"""The configuration of each part of a pipeline by its name, and of the pipeline itself as `""`."""

MAX_FRAME_RATE = 120.0


@dataclass(frozen=True)
class Limits:
    """What a pipeline can make.

    Attributes:
        height, width: Its own size in pixels; None if it takes that from the image.
        size_multiple: What both must divide by.
        num_frames: Its own length.
        frame_rate: Its own frames per second.
        frame_multiple: The number of frames is a multiple of this, plus one; 1 allows any.
        min_frames, max_frames: Its shortest and longest video.
        is_fixed_size: It makes its own size only.
        is_square: Height and width must be equal.
        is_distilled: Guidance is built into its weights, and a negative prompt is not read.
    """

    height: int | None
    width: int | None
    size_multiple: int
    num_frames: int
    frame_rate: float
    frame_multiple: int = 1
    min_frames: int = 1
    max_frames: int | None = None
    is_fixed_size: bool = False
    is_square: bool = False
    is_distilled: bool = False

    def nearest_size(self, height: int, width: int) -> tuple[int | None, int | None]:
        """Give the nearest height and width that can be made."""
        if self.is_fixed_size or self.height is None:
            return self.height, self.width
        if self.is_square:
            height = width = round((height + width) / 2)
        near = [
            max(1, round(side / self.size_multiple)) * self.size_multiple
            for side in (height, width)
        ]
        return near[0], near[1]

    def nearest_num_frames(self, num_frames: int) -> int:
        """Give the nearest number of frames that can be made."""
        steps = max(0, round((num_frames - 1) / self.frame_multiple))
        return min(max(steps * self.frame_multiple + 1, self.min_frames), self._longest)

    @property
    def _longest(self) -> int:
        return 10**9 if self.max_frames is None else self.max_frames


# Whether a pipeline with this guidance scale reads a negative prompt; None is its own scale.


def _above_one(scale: float | None) -> bool:
    return scale is None or scale > 1


def _only_if_told(scale: float | None) -> bool:
    return scale is not None and scale > 1


def _all_but_one(scale: float | None) -> bool:
    return scale != 1


def _always(scale: float | None) -> bool:
    return True


@dataclass(frozen=True)
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
        is_guided: Whether its pipeline reads a negative prompt, at a guidance scale or, with None,
            at its own.
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
    is_guided: Callable[[float | None], bool] = _above_one

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
    ) -> None:
        """Refuse what the family cannot make.

        Raises:
            ConfigError: Names the setting and the nearest right values.
        """
        if not self.takes_text and (prompt or negative_prompt):
            raise ConfigError(
                f"{self.name} makes videos from the image alone; it has no prompts.",
                fix="leave --prompt and --negative-prompt out.",
            )
        if self.takes_text and prompt is None:
            raise ConfigError(f"{self.name} needs a prompt.", fix="say what happens with --prompt.")
        if negative_prompt:
            self._check_guidance(limits, guidance_scale)
        self._check_size(limits, height, width)
        if num_frames is not None and limits.nearest_num_frames(num_frames) != num_frames:
            raise ConfigError(
                f"{num_frames} frames were asked of {self.name}; it makes {_lengths(limits)}.",
                fix=f"use {limits.nearest_num_frames(num_frames)} frames.",
            )
        if frame_rate is not None:
            near = self._nearest_frame_rate(frame_rate, limits)
            if near != frame_rate:
                kind = "whole numbers" if self.has_whole_frame_rate else "values"
                raise ConfigError(
                    f"The frame rate {frame_rate:g} was asked of {self.name}; it takes {kind} from "
                    f"1 to {MAX_FRAME_RATE:g}.",
                    fix=f"use {near:g} frames per second.",
                )

    def _check_guidance(self, limits: Limits, guidance_scale: float | None) -> None:
        """Refuse a negative prompt that would do nothing."""
        if limits.is_distilled:
            raise ConfigError(
                f"This model of {self.name} has guidance built in; a negative prompt does nothing.",
                fix="leave --negative-prompt out.",
            )
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if not self.is_guided(scale):
            what = "its own guidance" if scale is None else f"a guidance_scale of {scale:g}"
            raise ConfigError(
                f"With {what}, {self.name} ignores a negative prompt.",
                fix="raise guidance_scale (--guidance) above 1, or leave --negative-prompt out.",
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
                fix="leave height and width out; crop the image to change the shape.",
            )
        asked = (
            limits.height if height is None else height,
            limits.width if width is None else width,
        )
        near = limits.nearest_size(*asked)
        if near == asked:
            return
        rule = f"both must divide by {limits.size_multiple}"
        if limits.is_fixed_size:
            rule = "it makes one size only"
        elif limits.is_square:
            rule = f"it makes squares of a multiple of {limits.size_multiple}"
        raise ConfigError(
            f"{asked[0]} x {asked[1]} pixels were asked of {self.name}; {rule}.",
            fix=f"use height {near[0]} and width {near[1]}.",
        )


def _lengths(limits: Limits) -> str:
    if limits.min_frames == limits.max_frames:
        return f"{limits.min_frames}"
    most = f" up to {limits.max_frames}" if limits.max_frames is not None else ""
    if limits.frame_multiple == 1:
        return f"{limits.min_frames} or more{most}"
    return f"a multiple of {limits.frame_multiple} plus 1{most}"


# One function a family; a part that a folder lacks has the values of its class.


def _part(configs: Configs, *names: str) -> Mapping[str, Any]:
    """Give the configuration of the first of these parts that there is."""
    return next((configs[name] for name in names if configs.get(name)), {})


def _halvings(config: Mapping[str, Any], default: int) -> int:
    """By what a network of so many stages shrinks an axis."""
    return 2 ** (len(config.get("block_out_channels", (0,) * default)) - 1)


def _unet_multiple(configs: Configs) -> int:
    return _halvings(_part(configs, "vae"), 4) * _halvings(_part(configs, "unet"), 4)


def _patch(configs: Configs, default: int) -> int:
    """The pixels of a transformer's patch on an axis, in latents."""
    patch = _part(configs, "transformer", "transformer_2").get("patch_size", default)
    return patch if isinstance(patch, int) else patch[-1]


def _svd(configs: Configs) -> Limits:
    frames = _part(configs, "unet").get("num_frames", 25)
    return Limits(576, 1024, _unet_multiple(configs), frames, 7)


def _i2vgen_xl(configs: Configs) -> Limits:
    return Limits(704, 1280, _unet_multiple(configs), 16, 16, min_frames=2)


def _cogvideox(configs: Configs) -> Limits:
    model, vae = _part(configs, "transformer"), _part(configs, "vae")
    scale = _halvings(vae, 4)
    temporal = int(vae.get("temporal_compression_ratio", 4))
    if model.get("patch_size_t") is not None:  # CogVideoX 1.5
        return Limits(768, 1360, scale * _patch(configs, 2), 81, 16, temporal)
    return Limits(
        model.get("sample_height", 60) * scale,
        model.get("sample_width", 90) * scale,
        scale * _patch(configs, 2),
        model.get("sample_frames", 49),
        8,
        temporal,
        is_fixed_size=bool(model.get("use_learned_positional_embeddings")),
    )


def _wan(configs: Configs) -> Limits:
    vae = _part(configs, "vae")
    multiple = math.lcm(16, vae.get("scale_factor_spatial", 8) * _patch(configs, 2))
    temporal = vae.get("scale_factor_temporal", 4)
    if configs.get("", {}).get("expand_timesteps"):  # Wan 2.2-5B
        return Limits(704, 1280, multiple, 121, 24, temporal)
    return Limits(480, 832, multiple, 81, 16, temporal)


def _skyreels_v2(configs: Configs) -> Limits:
    down = _part(configs, "vae").get("temperal_downsample", (False, True, True))
    return Limits(
        544, 960, math.lcm(16, 2 ** len(down) * _patch(configs, 2)), 97, 24, 2 ** sum(down)
    )


def _ltx_temporal(configs: Configs) -> int:
    vae = _part(configs, "vae")
    halvings = sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
    own = vae.get("temporal_compression_ratio")
    return int(own or vae.get("patch_size_t", 1) * 2**halvings)


def _ltx(configs: Configs) -> Limits:
    return Limits(512, 704, 32, 161, 25, _ltx_temporal(configs))


def _ltx_2(configs: Configs) -> Limits:
    return Limits(512, 768, 32, 121, 24, _ltx_temporal(configs))


def _hunyuan_video(configs: Configs) -> Limits:
    vae = _part(configs, "vae")
    multiple = math.lcm(16, vae.get("spatial_compression_ratio", 8) * _patch(configs, 2))
    return Limits(
        720,
        1280,
        multiple,
        129,
        24,
        vae.get("temporal_compression_ratio", 4),
        is_distilled=bool(_part(configs, "transformer").get("guidance_embeds", True)),
    )


def _hunyuan_video_15(configs: Configs) -> Limits:
    vae = _part(configs, "vae")
    multiple = vae.get("spatial_compression_ratio", 16)
    return Limits(None, None, multiple, 121, 24, vae.get("temporal_compression_ratio", 4))


def _kandinsky_5(configs: Configs) -> Limits:
    vae = _part(configs, "vae")
    multiple = math.lcm(16, vae.get("spatial_compression_ratio", 8) * _patch(configs, 2))
    return Limits(512, 768, multiple, 121, 24, vae.get("temporal_compression_ratio", 4))


def _dynamicrafter(configs: Configs) -> Limits:
    own, frames = configs.get("", {}), _part(configs, "image_projector").get("num_frames", 16)
    return Limits(
        own.get("height", 320),
        own.get("width", 512),
        _unet_multiple(configs),
        16 if frames == 1 else frames,
        8,
        min_frames=frames,
        max_frames=MAX_FRAMES if frames == 1 else frames,
    )


def _pocket(configs: Configs) -> Limits:
    return Limits(
        256,
        256,
        SIZE,
        NUM_FRAMES,
        FRAME_RATE,
        min_frames=NUM_FRAMES,
        max_frames=NUM_FRAMES,
        is_square=True,
    )


POCKET = VideoFamily(
    "pocket", ("PocketPipeline",), _pocket, num_inference_steps=12, guidance_scale=1.0
)

VIDEO_FAMILIES: tuple[VideoFamily, ...] = (
    VideoFamily(
        "svd",
        ("StableVideoDiffusionPipeline",),
        _svd,
        num_inference_steps=25,
        frame_rate_argument="fps",
        has_whole_frame_rate=True,
        guidance_argument="max_guidance_scale",
        takes_text=False,
    ),
    VideoFamily(
        "i2vgen-xl",
        ("I2VGenXLPipeline",),
        _i2vgen_xl,
        frame_rate_argument="target_fps",
        has_whole_frame_rate=True,
    ),
    VideoFamily("cogvideox", ("CogVideoXImageToVideoPipeline",), _cogvideox),
    VideoFamily("wan", ("WanImageToVideoPipeline", "WanPipeline"), _wan),
    VideoFamily("skyreels-v2", ("SkyReelsV2ImageToVideoPipeline",), _skyreels_v2),
    VideoFamily(
        "ltx",
        ("LTXImageToVideoPipeline", "LTXPipeline", "LTXConditionPipeline"),
        _ltx,
        frame_rate_argument="frame_rate",
        has_whole_frame_rate=True,
    ),
    VideoFamily(
        "ltx-2",
        ("LTX2ImageToVideoPipeline", "LTX2Pipeline"),
        _ltx_2,
        num_inference_steps=30,
        frame_rate_argument="frame_rate",
        is_guided=_always,  # the sound has a scale of its own, and reaches the frames
    ),
    VideoFamily(
        "hunyuan-video",
        ("HunyuanVideoImageToVideoPipeline",),
        _hunyuan_video,
        is_guided=_only_if_told,
    ),
    VideoFamily(
        "hunyuan-video-1.5",
        ("HunyuanVideo15ImageToVideoPipeline",),
        _hunyuan_video_15,
        guidance_argument=None,
        is_guided=_all_but_one,
    ),
    VideoFamily("kandinsky-5", ("Kandinsky5I2VPipeline",), _kandinsky_5),
    VideoFamily(
        "dynamicrafter",
        ("DynamiCrafterPipeline",),
        _dynamicrafter,
        frame_rate_argument="frame_rate",
    ),
    POCKET,
)
"""Every family of `families.FAMILIES`, and the pocket model."""


def family_of(pipeline_class: str) -> VideoFamily:
    """Find the family of a pipeline's class.

    Raises:
        ConfigError: The class makes no videos from images, or is unknown; the known ones are named.
    """
    for family in VIDEO_FAMILIES:
        if pipeline_class in family.pipelines:
            return family
    known = [family.pipelines[0] for family in VIDEO_FAMILIES]
    raise ConfigError(
        f"`{pipeline_class}` is no image-to-video pipeline that can be called from here.",
        fix=f"use a model of one of {', '.join(known)}, or `motionmerge.experts` in Python.",
    )


def configs_of(pipeline: Any) -> dict[str, Mapping[str, Any]]:
    """Read the configurations of a loaded pipeline's parts."""
    found: dict[str, Mapping[str, Any]] = {"": dict(pipeline.config)}
    for name, part in pipeline.components.items():
        config = getattr(part, "config", None)
        if isinstance(config, Mapping):
            found[name] = dict(config)
    return found
