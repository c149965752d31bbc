"""I2VGen-XL: the image latents in the first frame, its CLIP embedding, the prompt and the rate."""

from __future__ import annotations

import torch

from .condition import DenoiserCondition, plain_condition
from .family import NetworkCall, UNetDenoiser


class I2VGenXLDenoiser(UNetDenoiser):
    """Predict what the scheduler asks for."""

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
