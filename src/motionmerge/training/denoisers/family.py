"""What the denoiser of any family answers, beside predicting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .condition import DenoiserCondition

if TYPE_CHECKING:
    from typing_extensions import Self

NetworkCall = Mapping[str, Any]
"""The arguments of a network's `forward`, by name."""


class FamilyDenoiser(nn.Module, ABC):
    """A denoiser as its pipeline uses it: the networks have the names that they have there.

    Attributes:
        given_frames: How many first frames of the latents it is given clean, as in the pipeline;
            what it is shown there does not matter, and there is no loss.
    """

    given_frames = 0

    def seen(self, noisy: torch.Tensor, condition: DenoiserCondition) -> torch.Tensor:
        """Return noisy latents with the image's: beside them, or in place of the given frames."""
        if not self.given_frames:
            return torch.cat([noisy, condition.latents], 1)
        return torch.cat([condition.latents.to(noisy), noisy[:, :, self.given_frames :]], 2)

    def asked(self, noisy: torch.Tensor) -> torch.Tensor:
        """Return 1 where latents are predicted, 0 where given: `[frames, height, width]`."""
        is_asked = noisy.new_ones(noisy.shape[2:])
        is_asked[: self.given_frames] = 0
        return is_asked

    def image_latents(self, seen: torch.Tensor, channels: int) -> torch.Tensor:
        """Return the image's latents of what `seen` made of noisy ones with `channels` channels."""
        return seen[:, :, : self.given_frames] if self.given_frames else seen[:, channels:]

    @abstractmethod
    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: DenoiserCondition
    ) -> torch.Tensor:
        """Predict what the family's objective asks for.

        Args:
            noisy: `[batch, channels, frames, height, width]`, as the noise process gives them.
            timesteps: As the noise process gives them, `[batch]`.
            condition: Of the batch.

        Returns:
            As `noisy`.
        """

    @abstractmethod
    def condition_of(self, call: NetworkCall) -> DenoiserCondition:
        """Return what the pipeline tells its network in a step, without guidance."""


class UNetDenoiser(FamilyDenoiser):
    """A denoiser of one network, the pipeline's U-Net.

    Args:
        unet: The network.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @classmethod
    def of_pipeline(cls, pipeline: Any) -> Self:
        """Return the denoiser around a pipeline's network."""
        return cls(pipeline.unet)
