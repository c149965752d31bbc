"""Classifier-free guidance with rescale, as every pipeline of ours combines its two predictions."""

from __future__ import annotations

import torch


def guided_prediction(
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    *,
    guidance_scale: float,
    guidance_rescale: float,
) -> torch.Tensor:
    """Combine the predictions with and without the conditions.

        v = v_uncond + g (v_cond - v_uncond)
        v = phi * v * std(v_cond) / std(v) + (1 - phi) v

    Args:
        conditional, unconditional: `[batch, channels, frames, height, width]`; the standard
            deviation (unbiased) is that of each video.
        guidance_scale: g; 1 gives the conditional prediction.
        guidance_rescale: phi in [0, 1]; 0 turns the second line off.

    Source: classifier-free guidance; rescale by Lin et al. 2023, section 3.4.
    """
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if guidance_rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guidance_rescale * guided * ratio + (1 - guidance_rescale) * guided
