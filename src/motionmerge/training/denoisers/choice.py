"""Which denoiser a pipeline has in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.models.video_pipeline import VideoPipeline

from .cogvideox import CogVideoXDenoiser
from .dynamicrafter import DynamiCrafterDenoiser
from .family import FamilyDenoiser
from .hunyuan import HunyuanDenoiser
from .i2vgen_xl import I2VGenXLDenoiser
from .ltx import LtxDenoiser
from .svd import SvdDenoiser
from .wan import WanDenoiser

FAMILY_DENOISERS: Mapping[str, Callable[[Any], FamilyDenoiser]] = {
    "StableVideoDiffusionPipeline": SvdDenoiser.of_pipeline,
    "I2VGenXLPipeline": I2VGenXLDenoiser.of_pipeline,
    "CogVideoXImageToVideoPipeline": CogVideoXDenoiser.of_pipeline,
    "WanImageToVideoPipeline": WanDenoiser.of_pipeline,
    "SkyReelsV2ImageToVideoPipeline": WanDenoiser.of_pipeline,
    "LTXImageToVideoPipeline": LtxDenoiser.of_pipeline,
    "HunyuanVideoImageToVideoPipeline": HunyuanDenoiser.of_pipeline,
    "HunyuanVideo15ImageToVideoPipeline": HunyuanDenoiser.of_pipeline,
}
"""By the pipeline's class. DynamiCrafter's is ours, and so are its encoders."""


def denoiser_for(pipeline: VideoPipeline) -> nn.Module:
    """Return the denoiser of a pipeline, around its own networks.

    Raises:
        ConfigError: No denoiser was tried against a pipeline of this class.
    """
    name = type(pipeline).__name__
    if name == "DynamiCrafterPipeline":
        parts = pipeline.components
        return DynamiCrafterDenoiser(parts["unet"], parts["image_projector"])
    if name not in FAMILY_DENOISERS:
        known = ("DynamiCrafterPipeline", *FAMILY_DENOISERS)
        raise ConfigError(
            f"Training for a `{name}` is unknown.",
            fix=f"Train a model of one of {', '.join(known)}.",
        )
    return FAMILY_DENOISERS[name](pipeline)
