"""A noised batch and its loss, and what every kind of noise process answers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Noised(NamedTuple):
    """A batch as the denoiser sees it, and what it is asked for.

    Args:
        sample: The noisy latents as the denoiser takes them (SVD: scaled), `[batch, ...]`.
        timesteps: As the denoiser takes them, `[batch]`.
        target: What it has to predict, as `sample`.
        weight: Of each sample's squared error, `[batch]`.
    """

    sample: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


class NoiseProcess(Protocol):
    """How clean latents become noisy ones. A *time* is in the process's own unit, `[batch]`.

    Times grow with the noise: timesteps (vp), sigmas (edm), or sigmas from 0 to 1 (flow).
    """

    def times_at(self, shares: torch.Tensor) -> torch.Tensor:
        """Return the times below which these shares of all training samples lie.

        Args:
            shares: In [0, 1), `[batch]`. Uniform shares give the times that training draws.
        """
        ...

    def share_up_to(self, level: float) -> float:
        """Return the share of all training samples whose noise level is at most `level`."""
        ...

    def time_shares(self, times: torch.Tensor) -> torch.Tensor:
        """Return how far times are from clean (0) to noise (1), as TimeNoise counts."""
        ...

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> Noised:
        """Mix clean latents with standard normal noise, both `[batch, ...]`."""
        ...


def denoising_losses(
    predicted: torch.Tensor, noised: Noised, *, given_frames: int = 0
) -> torch.Tensor:
    """Compute each sample's weighted mean squared error, in fp32: `[batch]`.

    Args:
        predicted: `[batch, channels, frames, height, width]`.
        noised: What was asked for.
        given_frames: How many first frames the denoiser is given clean; they do not count.
    """
    error = (predicted.float() - noised.target.float()).square()[:, :, given_frames:]
    return noised.weight * error.flatten(1).mean(1)


def along(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape `[batch]` values so that they broadcast over the other dimensions of `like`."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
