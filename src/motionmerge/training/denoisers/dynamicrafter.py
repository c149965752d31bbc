"""DynamiCrafter's denoiser for training: image projector and U-Net in one forward pass."""

from __future__ import annotations

import torch
from torch import nn

from motionmerge.models.dynamicrafter.image_projector import ImageProjector
from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet

from .condition import DenoiserCondition


class DynamiCrafterDenoiser(nn.Module):
    """Predict from noisy latents, text, and image tokens that are projected anew in each step.

    Args:
        unet, image_projector: Both are trained, where their parameters are chosen.
    """

    given_frames = 0

    def __init__(self, unet: DynamiCrafterUNet, image_projector: ImageProjector) -> None:
        super().__init__()
        self.unet, self.image_projector = unet, image_projector

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: DenoiserCondition
    ) -> torch.Tensor:
        tokens = condition.noised_tokens(self.image_projector(condition.image_embeds))
        return self.unet(
            torch.cat([noisy, condition.latents], 1),
            timesteps,
            torch.cat([condition.prompt_embeds, tokens], 1),
            condition.frame_rate,
            return_dict=False,
        )[0]
