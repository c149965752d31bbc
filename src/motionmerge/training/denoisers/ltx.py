"""LTX: latents as a row of tokens, those of the first frame clean, with timestep 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from motionmerge.errors import ConfigError

from .condition import DenoiserCondition, plain_condition
from .family import FamilyDenoiser, NetworkCall


class LtxDenoiser(FamilyDenoiser):
    """Predict the velocity.

    Args:
        transformer: The network.
        frames_per_latent, pixels_per_latent: By how much the autoencoder shrinks a video.

    Raises:
        ConfigError: The network takes several latents a token, which no published one does.
    """

    given_frames = 1

    def __init__(
        self, transformer: nn.Module, *, frames_per_latent: int, pixels_per_latent: int
    ) -> None:
        super().__init__()
        config: Any = transformer.config
        if config.patch_size != 1 or config.patch_size_t != 1:
            raise ConfigError(
                "This LTX transformer takes several latents a token, which is not trained here.",
                fix="Use a published LTX-Video model, whose `patch_size` is 1.",
            )
        self.transformer = transformer
        self.frames_per_latent = frames_per_latent
        self.pixels_per_latent = pixels_per_latent

    @classmethod
    def of_pipeline(cls, pipeline: Any) -> LtxDenoiser:
        """Return the denoiser around a pipeline's network."""
        return cls(
            pipeline.transformer,
            frames_per_latent=pipeline.vae_temporal_compression_ratio,
            pixels_per_latent=pipeline.vae_spatial_compression_ratio,
        )

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: DenoiserCondition
    ) -> torch.Tensor:
        frames, height, width = noisy.shape[2:]
        rate = _along_grid(self.frames_per_latent / condition.frame_rate.float())
        predicted: torch.Tensor = self.transformer(
            hidden_states=_tokens(self.seen(noisy, condition)),
            encoder_hidden_states=condition.prompt_embeds,
            timestep=timesteps[:, None] * self.asked(noisy).flatten(),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(rate, self.pixels_per_latent, self.pixels_per_latent),
            return_dict=False,
            **condition.more,
        )[0]
        return predicted.transpose(1, 2).unflatten(2, (frames, height, width))

    def condition_of(self, call: NetworkCall) -> DenoiserCondition:
        seen, size = call["hidden_states"], [call["num_frames"], call["height"], call["width"]]
        rate = self.frames_per_latent / call["rope_interpolation_scale"][0]
        return plain_condition(
            latents=seen.transpose(1, 2).unflatten(2, size)[:, :, :1],
            prompt_embeds=call["encoder_hidden_states"],
            frame_rate=seen.new_full((len(seen),), rate),
            more={"encoder_attention_mask": call["encoder_attention_mask"]},
        )


def _tokens(latents: torch.Tensor) -> torch.Tensor:
    return latents.flatten(2).transpose(1, 2)


def _along_grid(values: torch.Tensor) -> torch.Tensor:
    """Reshape `[batch]` values to multiply a grid `[batch, 1, frames, height, width]`."""
    return values[:, None, None, None, None]
