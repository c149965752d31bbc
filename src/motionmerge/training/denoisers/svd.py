"""SVD: the image latents in every frame, its CLIP embedding, and three numbers about the clip."""

from __future__ import annotations

import torch

from motionmerge.models.text_adapters import SvdAdapterUNet

from .condition import DenoiserCondition, plain_condition
from .family import NetworkCall, UNetDenoiser


class SvdDenoiser(UNetDenoiser):
    """Predict F of EDM's preconditioning.

    The condition's frame rate is that of the clip minus one, as SVD was trained. Its text tokens
    are for the adapter, where the U-Net has one.
    """

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: DenoiserCondition
    ) -> torch.Tensor:
        rest = condition.more["motion_and_noise"]
        has_adapter = isinstance(self.unet, SvdAdapterUNet)
        predicted: torch.Tensor = self.unet(
            self.seen(noisy, condition).transpose(1, 2),
            timesteps,
            encoder_hidden_states=condition.noised_tokens(condition.image_embeds),
            added_time_ids=torch.cat([condition.frame_rate[:, None].to(rest), rest], 1),
            return_dict=False,
            **({"text": condition.prompt_embeds} if has_adapter else {}),
        )[0]
        return predicted.transpose(1, 2)

    def condition_of(self, call: NetworkCall) -> DenoiserCondition:
        seen = call["sample"].transpose(1, 2)
        ids = call["added_time_ids"]
        return plain_condition(
            prompt_embeds=getattr(self.unet, "text_tokens", None),
            latents=seen[:, seen.shape[1] // 2 :],
            image_embeds=call["encoder_hidden_states"],
            frame_rate=ids[:, 0],
            # Motion bucket, and strength of the noise on the image.
            more={"motion_and_noise": ids[:, 1:]},
        )
