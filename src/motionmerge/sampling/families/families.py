"""How each family's pipeline is called: names of its arguments, and what it does by itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from motionmerge.errors import ConfigError
from motionmerge.models.video_pipeline import Config, VideoPipeline
from motionmerge.sampling.families import known_limits as family_limits
from motionmerge.sampling.families.limits import Modular, VideoFamily

# Whether a pipeline with this guidance scale reads a negative prompt; None is its own scale.


def _only_if_told(scale: float | None) -> bool:
    return scale is not None and scale > 1


def _all_but_one(scale: float | None) -> bool:
    return scale != 1


def _always(scale: float | None) -> bool:
    return True


def _never(scale: float | None) -> bool:
    return False


# How the arguments of a call are rewritten where a pipeline has words of its own.


def _call_anyflow(pipeline: VideoPipeline, arguments: dict[str, object]) -> dict[str, object]:
    """Return the photo as the first frame of a video, `[1, 1, 3, height, width]` in [0, 1]."""
    pixels = torch.from_numpy(np.array(arguments.pop("image"))).movedim(-1, 0)
    return {**arguments, "video": pixels[None, None] / 255}


def _call_chronoedit(pipeline: VideoPipeline, arguments: dict[str, object]) -> dict[str, object]:
    """Turn reasoning over the frames between on in every step, so that all frames are returned."""
    steps = arguments["num_inference_steps"]
    own = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": steps}
    return {**arguments, **own}


def _call_framepack(pipeline: VideoPipeline, arguments: dict[str, object]) -> dict[str, object]:
    """Ask for sections, of which it counts fewer frames than it makes."""
    temporal: int = pipeline.components["vae"].temporal_compression_ratio
    frames = arguments["num_frames"]
    assert isinstance(frames, int)
    sections = (frames - 1) // (9 * temporal)
    return {**arguments, "num_frames": sections * (8 * temporal + 1)}


def _call_kandinsky_6(pipeline: VideoPipeline, arguments: dict[str, object]) -> dict[str, object]:
    """Make sound where the parts for it are there; the distilled model knows no guidance."""
    parts = pipeline.components
    has_sound = parts["audio_vae"] is not None and parts["vocoder"] is not None
    is_distilled = type(pipeline.scheduler).__name__ == "PiflowScheduler"
    if is_distilled and arguments.setdefault("guidance_scale", 1.0) != 1:
        raise ConfigError(
            "This model of kandinsky-6 is distilled: its guidance scale is 1.",
            fix="Leave `guidance_scale` out.",
        )
    return {**arguments, "sample_audio": has_sound}


def _call_sana(pipeline: VideoPipeline, arguments: dict[str, object]) -> dict[str, object]:
    """Make the size that was asked for, not the nearest of its own that is then cut."""
    frames = arguments.pop("num_frames")
    return {**arguments, "frames": frames, "use_resolution_binning": False}


_OURS = "motionmerge.sampling.pipelines"

POCKET = VideoFamily(
    name="pocket",
    home=f"{_OURS}.pocket",
    pipelines=("PocketPipeline",),
    limits=family_limits.pocket,
    num_inference_steps=12,
    guidance_scale=1.0,
    takes_start_step=True,
)

MODULAR_FAMILIES: tuple[VideoFamily, ...] = (
    VideoFamily(
        name="wan",
        pipelines=("WanImage2VideoModularPipeline",),
        limits=family_limits.wan,
        guidance_argument=None,
        is_guided=_all_but_one,
        takes_sigmas=True,
        modular=Modular(optional_parts=("image_encoder", "image_processor")),
    ),
    VideoFamily(
        name="wan",
        pipelines=("Wan22Image2VideoModularPipeline",),
        limits=family_limits.wan_2_2_modular,
        guidance_argument=None,
        is_guided=_all_but_one,
        takes_sigmas=True,
        modular=Modular(),
    ),
    VideoFamily(
        name="ltx",
        pipelines=("LTXModularPipeline",),
        limits=family_limits.ltx,
        frame_rate_argument="frame_rate",
        has_whole_frame_rate=True,
        guidance_argument=None,
        is_guided=_all_but_one,
        takes_sigmas=True,
        modular=Modular(),
    ),
    *(
        VideoFamily(
            name="ltx-2",
            pipelines=(pipeline,),
            limits=limits,
            num_inference_steps=30,
            frame_rate_argument="frame_rate",
            guidance_argument=None,
            is_guided=_always,  # as the one that is not modular
            takes_sigmas=True,
            modular=Modular(optional_parts=("prompt_enhancer", "processor", "duration_head")),
            makes_sound=True,
        )
        for pipeline, limits in (
            ("LTX2ModularPipeline", family_limits.ltx_2),
            ("LTX25ModularPipeline", family_limits.ltx_2_5),
        )
    ),
    VideoFamily(
        name="hunyuan-video-1.5",
        pipelines=("HunyuanVideo15ModularPipeline",),
        limits=family_limits.hunyuan_video_15,
        guidance_argument=None,
        is_guided=_all_but_one,
        takes_sigmas=True,
        modular=Modular(),
    ),
    VideoFamily(
        name="helios",
        pipelines=("HeliosModularPipeline",),
        limits=family_limits.helios,
        guidance_argument=None,
        is_guided=_all_but_one,
        takes_sigmas=True,
        modular=Modular(),
    ),
    VideoFamily(
        name="minimax-h3",
        pipelines=("MiniMaxH3ModularPipeline",),
        limits=family_limits.minimax_h3,
        guidance_argument=None,
        is_guided=_never,
        modular=Modular(workflow="fl2va"),
        packages=("torchvision",),  # the processor of its text encoder
        makes_sound=True,
    ),
)
"""Modular pipelines of diffusers that make videos from images."""

REFUSED = {
    "WanAnimatePipeline": "it follows videos of poses and faces",
    "WanAnimate2ModularPipeline": "it follows a driving video",
    "WanAnimate2DistilledModularPipeline": "it follows a driving video",
    "WanVACEPipeline": "it follows a control video",
    "Wan22VaceModularPipeline": "it follows a control video",
    "AnyFlowPipeline": "it makes videos from text alone; AnyFlowFARPipeline takes an image",
    "HeliosPyramidPipeline": "it denoises at several sizes, each with timesteps of its own",
    "HeliosPyramidModularPipeline": "it denoises at several sizes, each with timesteps of its own",
    "HeliosPyramidDistilledModularPipeline": "it denoises at several sizes, each with timesteps of "
    "its own",
    "CosmosVideoToWorldPipeline": "it was not tried; Cosmos2VideoToWorldPipeline was",
    "Cosmos2_5_PredictBasePipeline": "it needs torchvision and NVIDIA's guardrail, and was not "
    "tried with them",
    "Cosmos3OmniPipeline": "it needs NVIDIA's guardrail, and was not tried with it",
    "Cosmos3OmniModularPipeline": "it needs NVIDIA's guardrail, and was not tried with it",
    "Cosmos3DistilledModularPipeline": "it needs NVIDIA's guardrail, and was not tried with it",
    "SanaWMPipeline": "it follows a camera's path",
    "Kandinsky6SRPipeline": "it enlarges videos",
}
"""Pipelines of videos that are not called from here, and why."""

VIDEO_FAMILIES: tuple[VideoFamily, ...] = (
    VideoFamily(
        name="svd",
        pipelines=("StableVideoDiffusionPipeline",),
        limits=family_limits.svd,
        num_inference_steps=25,
        frame_rate_argument="fps",
        has_whole_frame_rate=True,
        guidance_argument="max_guidance_scale",
        takes_text=False,
        takes_sigmas=True,
    ),
    VideoFamily(
        name="i2vgen-xl",
        pipelines=("I2VGenXLPipeline",),
        limits=family_limits.i2vgen_xl,
        frame_rate_argument="target_fps",
        has_whole_frame_rate=True,
    ),
    VideoFamily(
        name="cogvideox",
        pipelines=("CogVideoXImageToVideoPipeline",),
        limits=family_limits.cogvideox,
    ),
    VideoFamily(
        name="wan", pipelines=("WanImageToVideoPipeline", "WanPipeline"), limits=family_limits.wan
    ),
    VideoFamily(
        name="skyreels-v2",
        pipelines=("SkyReelsV2ImageToVideoPipeline",),
        limits=family_limits.skyreels_v2,
    ),
    VideoFamily(
        name="ltx",
        pipelines=("LTXImageToVideoPipeline", "LTXPipeline", "LTXConditionPipeline"),
        limits=family_limits.ltx,
        frame_rate_argument="frame_rate",
        has_whole_frame_rate=True,
    ),
    VideoFamily(
        name="ltx-2",
        pipelines=("LTX2ImageToVideoPipeline", "LTX2Pipeline"),
        limits=family_limits.ltx_2,
        num_inference_steps=30,
        frame_rate_argument="frame_rate",
        is_guided=_always,  # the sound has a scale of its own, and reaches the frames
        makes_sound=True,
        takes_sigmas=True,
    ),
    VideoFamily(
        name="hunyuan-video",
        pipelines=("HunyuanVideoImageToVideoPipeline",),
        limits=family_limits.hunyuan_video,
        is_guided=_only_if_told,
        takes_sigmas=True,
    ),
    VideoFamily(
        name="hunyuan-video-1.5",
        pipelines=("HunyuanVideo15ImageToVideoPipeline",),
        limits=family_limits.hunyuan_video_15,
        guidance_argument=None,
        is_guided=_all_but_one,
        takes_sigmas=True,
    ),
    VideoFamily(
        name="kandinsky-5", pipelines=("Kandinsky5I2VPipeline",), limits=family_limits.kandinsky_5
    ),
    VideoFamily(
        name="kandinsky-6",
        pipelines=("Kandinsky6TI2VAPipeline",),
        limits=family_limits.kandinsky_6,
        frame_rate_argument="frame_rate",
        call=_call_kandinsky_6,
        takes_sigmas=True,
        makes_sound=True,
    ),
    VideoFamily(
        name="skyreels-v2",
        pipelines=(
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
        ),
        limits=family_limits.skyreels_v2_forcing,
    ),
    VideoFamily(
        name="anyflow",
        pipelines=("AnyFlowFARPipeline",),
        limits=family_limits.anyflow,
        is_guided=_only_if_told,
        call=_call_anyflow,
        takes_sigmas=True,
    ),
    VideoFamily(
        name="chronoedit",
        pipelines=("ChronoEditPipeline",),
        limits=family_limits.chronoedit,
        call=_call_chronoedit,
    ),
    VideoFamily(
        name="cosmos-2",
        pipelines=("Cosmos2VideoToWorldPipeline",),
        limits=family_limits.cosmos_2,
        num_inference_steps=35,
        frame_rate_argument="fps",
        has_whole_frame_rate=True,
        packages=("cosmos_guardrail",),
    ),
    VideoFamily(
        name="helios", pipelines=("HeliosPipeline",), limits=family_limits.helios, takes_sigmas=True
    ),
    VideoFamily(
        name="framepack",
        pipelines=("HunyuanVideoFramepackPipeline",),
        limits=family_limits.framepack,
        is_guided=_only_if_told,
        call=_call_framepack,
        takes_sigmas=True,
    ),
    VideoFamily(
        name="motif",
        pipelines=("MotifVideoImage2VideoPipeline",),
        limits=family_limits.motif,
        guidance_argument=None,
        is_guided=_all_but_one,
    ),
    VideoFamily(
        name="sana-video",
        pipelines=("SanaImageToVideoPipeline", "SanaVideoPipeline"),
        limits=family_limits.sana_video,
        call=_call_sana,
        takes_sigmas=True,
    ),
    *MODULAR_FAMILIES,
    VideoFamily(
        name="dynamicrafter",
        home=f"{_OURS}.dynamicrafter",
        pipelines=("DynamiCrafterPipeline",),
        limits=family_limits.dynamicrafter,
        frame_rate_argument="frame_rate",
        takes_start_step=True,
    ),
    VideoFamily(
        name="videocrafter",
        home=f"{_OURS}.videocrafter",
        pipelines=("VideoCrafterPipeline",),
        limits=family_limits.videocrafter,
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
    if pipeline_class in REFUSED:
        raise ConfigError(
            f"`{pipeline_class}` cannot be called from here: {REFUSED[pipeline_class]}.",
            fix="Call it yourself, inside `with motionmerge.experts(pipeline, ...)` in Python.",
        )
    known = [family.pipelines[0] for family in VIDEO_FAMILIES if family.modular is None]
    raise ConfigError(
        f"`{pipeline_class}` is no image-to-video pipeline that can be called from here.",
        fix=f"Use a model of one of {', '.join(known)}, or `motionmerge.experts` in Python.",
    )


def configs_of(pipeline: VideoPipeline) -> dict[str, Config]:
    """Read the configurations of a loaded pipeline's parts."""
    found: dict[str, Config] = {"": dict(pipeline.config)}
    for name, part in pipeline.components.items():
        config = getattr(part, "config", None)
        if isinstance(config, Mapping):
            found[name] = dict(config)
    return found
