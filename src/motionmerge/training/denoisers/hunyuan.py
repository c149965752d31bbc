"""HunyuanVideo, of both kinds, and 1.5: the image beside the latents, or in their first frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from motionmerge.errors import ConfigError

from .condition import DenoiserCondition, plain_condition
from .family import FamilyDenoiser, NetworkCall

_TEXT = (
    "encoder_attention_mask",
    "pooled_projections",
    "guidance",
    "encoder_hidden_states_2",
    "encoder_attention_mask_2",
)
"""What the networks are told besides, where they are."""


class HunyuanDenoiser(FamilyDenoiser):
    """Predict the velocity.

    Args:
        transformer: The network, of HunyuanVideo or HunyuanVideo 1.5.
        given_frames: 1 where the image is the first frame of the latents, 0 where it stands beside.

    Raises:
        ConfigError: The network is distilled to few steps.
    """

    def __init__(self, transformer: nn.Module, *, given_frames: int = 0) -> None:
        super().__init__()
        config: Any = transformer.config
        if config.get("use_meanflow"):
            raise ConfigError(
                "This HunyuanVideo 1.5 is distilled to few steps and reads two timesteps in each; "
                "plain training would undo that.",
                fix="Train the model that is not distilled.",
            )
        self.transformer, self.given_frames = transformer, given_frames

    @classmethod
    def of_pipeline(cls, pipeline: Any) -> HunyuanDenoiser:
        """Return the denoiser around a pipeline's network."""
        kind = pipeline.transformer.config.get("image_condition_type")
        return cls(pipeline.transformer, given_frames=int(kind == "token_replace"))

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: DenoiserCondition
    ) -> torch.Tensor:
        inputs = dict(condition.more)
        if condition.image_embeds.shape[1]:
            inputs["image_embeds"] = condition.noised_tokens(condition.image_embeds)
        predicted: torch.Tensor = self.transformer(
            hidden_states=self.seen(noisy, condition),
            timestep=timesteps.to(noisy.dtype),
            encoder_hidden_states=condition.prompt_embeds,
            return_dict=False,
            **inputs,
        )[0]
        return predicted

    def condition_of(self, call: NetworkCall) -> DenoiserCondition:
        seen, config = call["hidden_states"], self.transformer.config
        channels: int = config.out_channels  # type: ignore[union-attr, assignment]
        return plain_condition(
            latents=self.image_latents(seen, channels),
            prompt_embeds=call["encoder_hidden_states"],
            image_embeds=call.get("image_embeds"),
            more={name: call[name] for name in _TEXT if call.get(name) is not None},
        )
