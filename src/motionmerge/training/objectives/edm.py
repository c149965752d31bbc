"""Diffusion in continuous sigmas with EDM's preconditioning: SVD.

    x = x0 + sigma noise,    sigma = exp(mean + std n)
    the network sees x / sqrt(sigma^2 + 1) and ln(sigma) / 4, and predicts F:
    D    = x / (sigma^2 + 1) - sigma / sqrt(sigma^2 + 1) F
    loss = (sigma^2 + s^2) / (sigma s)^2 |D - x0|^2       (s = 1: the plain error of F)

Papers: Karras et al. 2022 (arXiv 2206.00364); Blattmann et al. 2023 (arXiv 2311.15127); the
settings are those of Zhao et al. 2024 (arXiv 2406.15735). Faults of its official code that are not
repeated: the noise on the condition is one number a sample, a shift of all latents alike; what
should depend on time, through sigma / 700, does not (TimeNoise here follows the noise level); fps
is passed where SVD reads fps - 1; clips are mirrored, which makes captions with "left" wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .noised import Noised, along

_INSIDE = 1e-7
"""Shares closer to 0 or 1 than this are moved inside: the normal's quantiles there are infinite."""


@dataclass(frozen=True, kw_only=True)
class ContinuousSigmas:
    """SVD's noise: log-normal sigmas, and the error of the clean estimate.

    Args:
        log_sigma_mean, log_sigma_std: Of ln(sigma), which is normal.
        sigma_data: s in the weight of the loss.
    """

    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    sigma_data: float = 1.0

    def times_at(self, shares: torch.Tensor) -> torch.Tensor:
        inside = shares.double().clamp(_INSIDE, 1 - _INSIDE)
        normal = torch.special.ndtri(inside)
        return (self.log_sigma_mean + self.log_sigma_std * normal).exp().float()

    def share_up_to(self, level: float) -> float:
        if not 0 < level < 1:
            return float(level >= 1)
        normal = (math.log(level / (1 - level)) - self.log_sigma_mean) / self.log_sigma_std
        return 0.5 * (1 + math.erf(normal / math.sqrt(2)))

    def time_shares(self, times: torch.Tensor) -> torch.Tensor:
        return times / (1 + times)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> Noised:
        sigma = along(times, clean)
        norm = (sigma.square() + 1).sqrt()
        noisy = clean + sigma * noise
        data = self.sigma_data
        # The error of D is sigma / sqrt(sigma^2 + 1) times that of F.
        weight = (times.square() + data**2) / (data**2 * (times.square() + 1))
        return Noised(
            sample=noisy / norm,
            timesteps=times.log() / 4,
            target=(noise - sigma * clean) / norm,  # the F for which D is x0
            weight=weight,
        )
