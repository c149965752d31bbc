"""SVD: the image latents in every frame, its CLIP embedding, and three numbers about the clip."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .condition import DenoiserCondition, plain_condition
from .family import FamilyDenoiser, NetworkCall


class SvdDenoiser(FamilyDenoiser):
    """Predict F of EDM's preconditioning.

    The condition's frame rate is that of the clip minus one, as SVD was trained.

    Args:
        unet: The network.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @classmethod
    def of_pipeline(cls, pipeline: Any) -> SvdDenoiser:
        """Take the network of a pipeline."""
        return cls(pipeline.unet)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: DenoiserCondition
    ) -> torch.Tensor:
        rest = condition.more["motion_and_noise"]
        predicted: torch.Tensor = self.unet(
            torch.cat([noisy, condition.latents], 1).transpose(1, 2),
            timesteps,
            encoder_hidden_states=condition.noised_tokens(condition.image_embeds),
            added_time_ids=torch.cat([condition.frame_rate[:, None].to(rest), rest], 1),
            return_dict=False,
        )[0]
        return predicted.transpose(1, 2)

    def condition_of(self, call: NetworkCall) -> DenoiserCondition:
        seen = call["sample"].transpose(1, 2)
        ids = call["added_time_ids"]
        return plain_condition(
            latents=seen[:, seen.shape[1] // 2 :],
            image_embeds=call["encoder_hidden_states"],
            frame_rate=ids[:, 0],
            # Motion bucket, and strength of the noise on the image.
            more={"motion_and_noise": ids[:, 1:]},
        )
