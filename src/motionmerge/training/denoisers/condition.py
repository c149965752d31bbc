"""What a denoiser is told besides the noisy latents, in one form for all families."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch


class DenoiserCondition(NamedTuple):
    """The condition of a batch, in computed form.

    Args:
        latents: Of the image, `[batch, channels, frames, height, width]`, as the family lays them
            out over the frames.
        prompt_embeds: Text tokens, `[batch, tokens, dim]`; none for models without text.
        image_embeds: Of the image tower, `[batch, tokens, dim]`; none where there is no tower.
        frame_rate: As the family counts it, `[batch]`; not read where the model is not told.
        tokens_kept: 1, or 0 where noise takes the place of the image tokens, `[batch]`.
        token_noise: Added to the image tokens, `[batch, tokens, dim]`; zeros broadcast.
        more: What else the family's network is told, by its own names, `[batch, ...]`.
    """

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    image_embeds: torch.Tensor
    frame_rate: torch.Tensor
    tokens_kept: torch.Tensor
    token_noise: torch.Tensor
    more: Mapping[str, torch.Tensor] = MappingProxyType({})

    def noised_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return image tokens, noised or replaced as TimeNoise asks."""
        return self.tokens_kept.to(tokens)[:, None, None] * tokens + self.token_noise.to(tokens)


def plain_condition(
    *,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    frame_rate: torch.Tensor | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
) -> DenoiserCondition:
    """Return a condition without TimeNoise; what a family does not have is left out."""
    batch = len(latents)
    none = latents.new_zeros(batch, 0, 1)
    return DenoiserCondition(
        latents=latents,
        prompt_embeds=none if prompt_embeds is None else prompt_embeds,
        image_embeds=none if image_embeds is None else image_embeds,
        frame_rate=latents.new_zeros(batch) if frame_rate is None else frame_rate,
        tokens_kept=latents.new_ones(batch),
        token_noise=latents.new_zeros(1, 1, 1),
        more=more or {},
    )


def every_frame(latents: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Show one frame of each sample in all frames, as DynamiCrafter and SVD take their image.

    Args:
        latents: Clean latents `[batch, channels, frames, height, width]`.
        frames: The frame to show, `[batch]`.
    """
    rows = torch.arange(len(latents), device=latents.device)
    return latents[rows, :, frames][:, :, None].expand_as(latents)


def first_and_last(latents: torch.Tensor) -> torch.Tensor:
    """Show the first and the last frame, zeros between: DynamiCrafter's interpolation model."""
    shown = torch.zeros_like(latents)
    shown[:, :, [0, -1]] = latents[:, :, [0, -1]]
    return shown
