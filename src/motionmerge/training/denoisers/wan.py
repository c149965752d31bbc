"""Wan 2.1 and 2.2: the image beside the latents, or in their first frame; one network or two.

Wan 2.2-A14B has a network for noisy latents and one for the others. Both are trained, or one alone
(a pattern such as `transformer.*`) with the noise range that it is used in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .condition import DenoiserCondition, plain_condition
from .family import FamilyDenoiser, NetworkCall


class WanDenoiser(FamilyDenoiser):
    """Predict the velocity.

    Args:
        transformer: The network, or that of noisy latents.
        transformer_2: The network of the others, where there are two.
        boundary: Timesteps from here on are noisy.
        given_frames: 1 where the image is the first frame of the latents, with timestep 0
            (Wan 2.2-5B); 0 where it stands beside them.
    """

    def __init__(
        self,
        transformer: nn.Module | None,
        transformer_2: nn.Module | None = None,
        *,
        boundary: float = 0.0,
        given_frames: int = 0,
    ) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.boundary, self.given_frames = boundary, given_frames

    @classmethod
    def of_pipeline(cls, pipeline: Any) -> WanDenoiser:
        """Return the denoiser around a pipeline's networks."""
        config = pipeline.config
        ratio = config.get("boundary_ratio")
        steps = pipeline.scheduler.config.num_train_timesteps
        return cls(
            pipeline.transformer,
            None if ratio is None else pipeline.transformer_2,
            boundary=0.0 if ratio is None else ratio * steps,
            given_frames=int(bool(config.get("expand_timesteps"))),
        )

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: DenoiserCondition
    ) -> torch.Tensor:
        image_embeds = condition.noised_tokens(condition.image_embeds)
        inputs = {
            "hidden_states": self.seen(noisy, condition),
            "timestep": self._timesteps(noisy, timesteps),
            "encoder_hidden_states": condition.prompt_embeds,
            "encoder_hidden_states_image": image_embeds if image_embeds.shape[1] else None,
        }
        if self.transformer_2 is None:
            return _predict(self.transformer, inputs)
        is_noisy = timesteps >= self.boundary
        if is_noisy.all():
            return _predict(self.transformer, inputs)
        if not is_noisy.any():
            return _predict(self.transformer_2, inputs)
        parts = [
            _predict(network, {name: None if x is None else x[rows] for name, x in inputs.items()})
            for network, rows in ((self.transformer, is_noisy), (self.transformer_2, ~is_noisy))
        ]
        order = torch.cat([is_noisy.nonzero(), (~is_noisy).nonzero()]).flatten()
        return torch.cat(parts)[order.argsort()]

    def _timesteps(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return `[batch]`, or where the first frame is given `[batch, patches]`."""
        if not self.given_frames:
            return timesteps
        # A patch is two by two latents, as the pipeline counts them.
        return timesteps[:, None] * self.asked(noisy)[:, ::2, ::2].flatten()

    def condition_of(self, call: NetworkCall) -> DenoiserCondition:
        seen = call["hidden_states"]
        network: Any = self.transformer or self.transformer_2
        return plain_condition(
            latents=self.image_latents(seen, network.config.out_channels),
            prompt_embeds=call["encoder_hidden_states"],
            image_embeds=call.get("encoder_hidden_states_image"),
        )


def _predict(network: Any, inputs: NetworkCall) -> torch.Tensor:
    predicted: torch.Tensor = network(**inputs, return_dict=False)[0]
    return predicted
