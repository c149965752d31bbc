"""Classifier-free guidance with rescale, as every pipeline of ours combines its predictions."""

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
    return _rescaled(guided, conditional, guidance_rescale)


def doubly_guided_prediction(
    conditional: torch.Tensor,
    without_text: torch.Tensor,
    without_any: torch.Tensor,
    *,
    guidance_scale: float,
    image_guidance_scale: float,
    guidance_rescale: float,
) -> torch.Tensor:
    """Combine the predictions with both conditions, without the text, and without either.

        v = v_none + g_i (v_image - v_none) + g (v_both - v_image),   then as `guided_prediction`

    Args:
        conditional, without_text, without_any: `[batch, channels, frames, height, width]`.
        guidance_scale: g, of the text.
        image_guidance_scale: g_i, of the image.
        guidance_rescale: phi in [0, 1].

    Source: InstructPix2Pix, Brooks et al. 2023 (arXiv 2211.09800), section 3.2.1.
    """
    of_image = image_guidance_scale * (without_text - without_any)
    guided = without_any + of_image + guidance_scale * (conditional - without_text)
    return _rescaled(guided, conditional, guidance_rescale)


def _rescaled(guided: torch.Tensor, conditional: torch.Tensor, share: float) -> torch.Tensor:
    """Move the deviation of each video to that of the conditional prediction."""
    if share == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return share * guided * ratio + (1 - share) * guided
