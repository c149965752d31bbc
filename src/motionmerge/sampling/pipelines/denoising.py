"""One denoising step of DynamiCrafter: its U-Net under guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from motionmerge.models.cuda_graphs import CapturedUNet
from motionmerge.models.dynamicrafter.cross_attention import ContextCache
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.pipelines.guidance import guided_prediction


def guided_unet(
    unet: DynamiCrafterUNet,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    *,
    context: torch.Tensor,
    context_caches: Sequence[ContextCache],
    frame_rate: float,
    guidance_scale: float,
    guidance_rescale: float,
    batches_guidance: bool | None,
    captured: CapturedUNet | None,
) -> torch.Tensor:
    """Run the U-Net on the halves of guidance, in one call or one by one; combine them.

    Args:
        unet: A `DynamiCrafterUNet`.
        sample: Latents and image latents, `[videos, channels, frames, height, width]`.
        timestep: That of all videos.
        context: Text and image tokens, `[videos, halves, tokens, dim]`.
        context_caches: What cross-attention keeps of each half.
        frame_rate: Frames per second that the model is told.
        guidance_scale, guidance_rescale: See `guided_prediction`.
        batches_guidance: See `DynamiCrafterPipeline`.
        captured: Replays the U-Net instead of calling it.
    """
    halves = context.to(unet.dtype).unbind(1)
    sample = sample.to(unet.dtype)
    at_once = sample.device.type != "cpu" if batches_guidance is None else batches_guidance
    calls = [halves] if at_once or captured is not None else [(half,) for half in halves]
    predictions: list[torch.Tensor] = []
    for parts, context_cache in zip(calls, context_caches, strict=False):
        batch, tokens = torch.cat([sample] * len(parts)), torch.cat(parts)
        if captured is not None:
            predicted = captured(batch, timestep, tokens, frame_rate)
        else:
            predicted = unet(
                batch,
                timestep,
                tokens,
                frame_rate=frame_rate,
                context_cache=context_cache,
                return_dict=False,
            )[0]
        predictions += predicted.float().chunk(len(parts))
    if len(predictions) == 1:
        return predictions[0]
    unconditional, conditional = predictions
    return guided_prediction(
        conditional,
        unconditional,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
    )
