"""I2VGen-XL: the image latents in the first frame, its CLIP embedding, the prompt and the rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .condition import DenoiserCondition, plain_condition
from .family import FamilyDenoiser, NetworkCall


class I2VGenXLDenoiser(FamilyDenoiser):
    """Predict what the scheduler asks for.

    Args:
        unet: The network.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @classmethod
    def of_pipeline(cls, pipeline: Any) -> I2VGenXLDenoiser:
        """Take the network of a pipeline."""
        return cls(pipeline.unet)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: DenoiserCondition
    ) -> torch.Tensor:
        predicted: torch.Tensor = self.unet(
            noisy,
            timesteps,
            fps=condition.frame_rate,
            image_latents=condition.latents,
            image_embeddings=condition.noised_tokens(condition.image_embeds),
            encoder_hidden_states=condition.prompt_embeds,
            return_dict=False,
        )[0]
        return predicted

    def condition_of(self, call: NetworkCall) -> DenoiserCondition:
        return plain_condition(
            latents=call["image_latents"],
            prompt_embeds=call["encoder_hidden_states"],
            image_embeds=call["image_embeddings"],
            frame_rate=call["fps"],
        )
