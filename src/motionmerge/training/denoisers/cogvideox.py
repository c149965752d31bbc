"""CogVideoX: the image latents beside the first frame, zeros beside the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from motionmerge.errors import ShapeError
from motionmerge.models.diffusers_state import rotary_embeddings_of_cogvideox

from .condition import DenoiserCondition, plain_condition
from .family import FamilyDenoiser, NetworkCall

_OFFSET = 2.0
"""What the pipeline tells CogVideoX 1.5 as `ofs`."""


class CogVideoXDenoiser(FamilyDenoiser):
    """Predict the velocity of variance-preserving diffusion.

    Args:
        transformer: The network.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    @classmethod
    def of_pipeline(cls, pipeline: Any) -> CogVideoXDenoiser:
        """Return the denoiser around a pipeline's network."""
        return cls(pipeline.transformer)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: DenoiserCondition
    ) -> torch.Tensor:
        config: Any = self.transformer.config
        frames, height, width = noisy.shape[2:]
        if frames % (config.patch_size_t or 1):
            raise ShapeError(
                f"The latents have {frames} frames; this model takes {config.patch_size_t} at once "
                "and repeats the first one where some are over.",
                fix=f"Train on clips with a multiple of {config.patch_size_t} frames of latents.",
            )
        rotary = None
        if config.use_rotary_positional_embeddings:
            rotary = rotary_embeddings_of_cogvideox(
                self.transformer, frames, height, width, device=noisy.device
            )
        predicted: torch.Tensor = self.transformer(
            hidden_states=self.seen(noisy, condition).transpose(1, 2),
            encoder_hidden_states=condition.prompt_embeds,
            timestep=timesteps,
            ofs=None if config.ofs_embed_dim is None else noisy.new_full((1,), _OFFSET),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return predicted.transpose(1, 2)

    def condition_of(self, call: NetworkCall) -> DenoiserCondition:
        seen = call["hidden_states"].transpose(1, 2)
        return plain_condition(
            latents=seen[:, seen.shape[1] // 2 :], prompt_embeds=call["encoder_hidden_states"]
        )
