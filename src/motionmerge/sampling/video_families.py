"""How each family's pipeline is called: sizes, lengths and rates it can make, names of arguments.

Sizes follow from the configurations of the pipeline's parts, so that they are known before any
weights are loaded. Numbers are those of the pipelines of diffusers 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from motionmerge.errors import ConfigError
from motionmerge.models.pocket.world import FRAME_RATE, NUM_FRAMES, SIZE
from motionmerge.sampling.pipeline_inputs import MAX_FRAMES
from motionmerge.sampling.video_limits import Configs, Limits, VideoFamily

# Whether a pipeline with this guidance scale reads a negative prompt; None is its own scale.


def _only_if_told(scale: float | None) -> bool:
    return scale is not None and scale > 1


def _all_but_one(scale: float | None) -> bool:
    return scale != 1


def _always(scale: float | None) -> bool:
    return True


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
    multiple = math.lcm(8, _unet_multiple(configs))
    return Limits(576, 1024, multiple, frames, 7, min_frames=2)  # guidance rises over the frames


def _i2vgen_xl(configs: Configs) -> Limits:
    return Limits(704, 1280, math.lcm(8, _unet_multiple(configs)), 16, 16, min_frames=2)


def _cogvideox(configs: Configs) -> Limits:
    model, vae = _part(configs, "transformer"), _part(configs, "vae")
    scale = _halvings(vae, 4)
    # Its VAE decodes latents in pairs, the first of which takes an odd one along. Where all are
    # paired, as the 2 of 5 frames, nobody knows that the first stands for one frame: it makes 8.
    temporal = 2 * int(vae.get("temporal_compression_ratio", 4))
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


def _of_last_image(configs: Configs) -> dict[str, bool]:
    """Tell whether the videos of a Wan can end with an image.

    One that looks at images with CLIP tells two of them apart by the positions of their tokens: it
    needs two if it has these, and cannot take a second otherwise.
    """
    model = _part(configs, "transformer", "transformer_2")
    looks = model.get("image_dim") is not None
    is_of_two = looks and model.get("pos_embed_seq_len") is not None
    is_fixed = bool(configs.get("", {}).get("expand_timesteps"))  # Wan 2.2-5B reads no other frame
    return {
        "takes_last_image": is_of_two or not (looks or is_fixed),
        "needs_last_image": is_of_two,
    }


def _wan(configs: Configs) -> Limits:
    vae, own = _part(configs, "vae"), configs.get("", {})
    multiple = math.lcm(16, vae.get("scale_factor_spatial", 8) * _patch(configs, 2))
    temporal = vae.get("scale_factor_temporal", 4)
    more: dict[str, bool] = {
        "has_second_guidance": own.get("boundary_ratio") is not None,
        **_of_last_image(configs),
    }
    if own.get("expand_timesteps"):  # Wan 2.2-5B
        return Limits(704, 1280, multiple, 121, 24, temporal, **more)
    return Limits(480, 832, multiple, 81, 16, temporal, **more)


def _skyreels_v2(configs: Configs) -> Limits:
    down = _part(configs, "vae").get("temperal_downsample", (False, True, True))
    multiple = math.lcm(16, 2 ** len(down) * _patch(configs, 2))
    return Limits(544, 960, multiple, 97, 24, 2 ** sum(down), **_of_last_image(configs))


def _ltx_temporal(configs: Configs) -> int:
    vae = _part(configs, "vae")
    halvings = sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
    own = vae.get("temporal_compression_ratio")
    return int(own or vae.get("patch_size_t", 1) * 2**halvings)


def video_compression(configs: Configs) -> tuple[int, int]:
    """Return how many frames and how many pixels of a side one latent of an LTX stands for."""
    vae = _part(configs, "vae")
    halvings = sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
    own = vae.get("spatial_compression_ratio")
    return _ltx_temporal(configs), int(own or vae.get("patch_size", 4) * 2**halvings)


def _ltx(configs: Configs) -> Limits:
    return Limits(512, 704, 32, 161, 25, _ltx_temporal(configs))


def _ltx_2(configs: Configs) -> Limits:
    return Limits(512, 768, 32, 121, 24, _ltx_temporal(configs))


def _hunyuan_video(configs: Configs) -> Limits:
    vae = _part(configs, "vae")
    model, temporal = _part(configs, "transformer"), vae.get("temporal_compression_ratio", 4)
    # With the image beside the first latent, the pipeline cuts the frames of that latent off.
    dropped = 4 if model.get("image_condition_type") == "latent_concat" else 0
    return Limits(
        720,
        1280,
        math.lcm(16, vae.get("spatial_compression_ratio", 8) * _patch(configs, 2)),
        129,
        24,
        temporal,
        min_frames=1 + math.ceil(dropped / temporal) * temporal,
        dropped_frames=dropped,
        is_distilled=bool(model.get("guidance_embeds", True)),
    )


def _hunyuan_video_15(configs: Configs) -> Limits:
    vae = _part(configs, "vae")
    multiple = vae.get("spatial_compression_ratio", 16)
    return Limits(None, None, multiple, 121, 24, vae.get("temporal_compression_ratio", 4))


def _kandinsky_5(configs: Configs) -> Limits:
    vae = _part(configs, "vae")
    multiple = math.lcm(16, vae.get("spatial_compression_ratio", 8) * _patch(configs, 2))
    if _part(configs, "transformer").get("attention_type") == "nabla":
        multiple *= 8  # its attention looks at squares of 8 patches
    temporal = vae.get("temporal_compression_ratio", 4)
    # The first 4 latent frames get mean and deviation of those that follow, so there must be some.
    return Limits(512, 768, multiple, 121, 24, temporal, min_frames=4 * temporal + 1)


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
        takes_last_image=True,
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
    "pocket",
    ("PocketPipeline",),
    _pocket,
    num_inference_steps=12,
    guidance_scale=1.0,
    takes_start_step=True,
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
        takes_sigmas=True,
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
        takes_sigmas=True,
    ),
    VideoFamily(
        "hunyuan-video",
        ("HunyuanVideoImageToVideoPipeline",),
        _hunyuan_video,
        is_guided=_only_if_told,
        takes_sigmas=True,
    ),
    VideoFamily(
        "hunyuan-video-1.5",
        ("HunyuanVideo15ImageToVideoPipeline",),
        _hunyuan_video_15,
        guidance_argument=None,
        is_guided=_all_but_one,
        takes_sigmas=True,
    ),
    VideoFamily("kandinsky-5", ("Kandinsky5I2VPipeline",), _kandinsky_5),
    VideoFamily(
        "dynamicrafter",
        ("DynamiCrafterPipeline",),
        _dynamicrafter,
        frame_rate_argument="frame_rate",
        takes_start_step=True,
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
