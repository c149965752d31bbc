"""What the denoiser of any family answers, beside predicting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .condition import DenoiserCondition

NetworkCall = Mapping[str, Any]
"""The arguments of a network's `forward`, by name."""


class FamilyDenoiser(nn.Module, ABC):
    """A denoiser as its pipeline uses it: the networks have the names that they have there.

    Attributes:
        given_frames: How many first frames of the latents it is given clean, as in the pipeline;
            what it is shown there does not matter, and there is no loss.
    """

    given_frames = 0

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
