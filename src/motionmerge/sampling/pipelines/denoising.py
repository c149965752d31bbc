"""One denoising step of DynamiCrafter: its U-Net under guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from motionmerge.models.cuda_graphs import CapturedUNet
from motionmerge.models.dynamicrafter.cross_attention import ContextCache
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet
from motionmerge.sampling.pipelines.guidance import guided_prediction

Half: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""Latents and image latents, and the tokens that go with them."""


def guided_unet(
    unet: DynamiCrafterUNet,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    *,
    conditional_sample: torch.Tensor | None = None,
    context: torch.Tensor,
    context_caches: Sequence[ContextCache],
    frame_rate: float,
    guidance_scale: float,
    guidance_rescale: float,
    batches_guidance: bool | None,
    captured: CapturedUNet | None,
) -> torch.Tensor:
    """Run the U-Net on the halves of guidance, in one call or one by one; combine them.

    With a sample of its own for the conditional half, the result is that of three passes (ALG):
    u(I) + g (c(L I) - u(L I)).

    Args:
        unet: A `DynamiCrafterUNet`.
        sample: Latents and image latents, `[videos, channels, frames, height, width]`.
        timestep: That of all videos.
        conditional_sample: What the conditional half has instead of `sample`.
        context: Text and image tokens, `[videos, halves, tokens, dim]`.
        context_caches: What cross-attention keeps of each half.
        frame_rate: Frames per second that the model is told.
        guidance_scale, guidance_rescale: See `guided_prediction`.
        batches_guidance: See `DynamiCrafterPipeline`.
        captured: Replays the U-Net instead of calling it.
    """

    def predict(parts: Sequence[Half], context_cache: ContextCache | None) -> list[torch.Tensor]:
        """Run the U-Net on samples with their tokens in one call."""
        batch = torch.cat([sample.to(unet.dtype) for sample, _ in parts])
        tokens = torch.cat([tokens for _, tokens in parts])
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
        return list(predicted.float().chunk(len(parts)))

    *unconditional_tokens, conditional_tokens = context.to(unet.dtype).unbind(1)
    changed = sample if conditional_sample is None else conditional_sample
    halves = [*((sample, tokens) for tokens in unconditional_tokens), (changed, conditional_tokens)]
    at_once = sample.device.type != "cpu" if batches_guidance is None else batches_guidance
    calls = [halves] if at_once or captured is not None else [[half] for half in halves]
    predictions: list[torch.Tensor] = []
    for parts, context_cache in zip(calls, context_caches, strict=False):
        predictions += predict(parts, context_cache)
    if len(predictions) == 1:
        return predictions[0]
    unconditional, conditional = predictions
    if conditional_sample is not None:
        [both] = predict([(conditional_sample, unconditional_tokens[0])], None)
        conditional = conditional + (unconditional - both)
    return guided_prediction(
        conditional,
        unconditional,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
    )
