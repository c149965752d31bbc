"""Flow matching: Wan, LTX, Hunyuan and their relatives.

    x = (1 - sigma) x0 + sigma noise,    target = noise - x0,    timestep = 1000 sigma

Paper: Lipman et al. 2022 (arXiv 2210.02747); logit-normal sigmas and the shift: Esser et al. 2024
(arXiv 2403.03206).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .noised import Noised, along

_INSIDE = 1e-7


@dataclass(frozen=True, kw_only=True)
class StraightLines:
    """Flow matching with shifted sigmas, sigma = shift u / (1 + (shift - 1) u).

    Args:
        shift: More than 1 trains on noisier samples, as sampling with this shift visits them.
        density: What u is: "uniform", or "logit-normal" (the sigmoid of a standard normal number).
        num_timesteps: The timestep of pure noise.
    """

    shift: float = 1.0
    density: Literal["uniform", "logit-normal"] = "uniform"
    num_timesteps: int = 1000

    def times_at(self, shares: torch.Tensor) -> torch.Tensor:
        u = shares.double().clamp(_INSIDE, 1 - _INSIDE)
        if self.density == "logit-normal":
            u = torch.special.ndtri(u).sigmoid()
        return (self.shift * u / (1 + (self.shift - 1) * u)).float()

    def share_up_to(self, level: float) -> float:
        if not 0 < level < 1:
            return float(level >= 1)
        u = level / (self.shift - (self.shift - 1) * level)
        if self.density == "uniform":
            return u
        return 0.5 * (1 + math.erf(math.log(u / (1 - u)) / math.sqrt(2)))

    def time_shares(self, times: torch.Tensor) -> torch.Tensor:
        return times

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> Noised:
        sigma = along(times, clean)
        return Noised(
            sample=(1 - sigma) * clean + sigma * noise,
            timesteps=times * self.num_timesteps,
            target=noise - clean,
            weight=torch.ones(len(clean), device=clean.device),
        )
