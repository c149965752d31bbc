"""TimeNoise: noise on the condition, so that the model cannot lean on the image alone.

    beta(s) = strength * sigmoid(n + 2 s^power - 1),   n ~ N(0, 1) a sample
    condition <- condition + beta(s) * noise            s: 0 clean .. 1 noise

With the paper's strength of 100 the image can hardly be seen at any time: on latents of unit scale
5, 50 and 95 percent of all beta are below 6.6, 27 and 66 at s = 0, and 19, 55 and 86 at s = 0.9.

Paper: Zhao et al. 2024 (arXiv 2406.15735). Faults of the official code that are not repeated: on
SVD the noise is one number a sample instead of the latents' shape; the condition is overwritten in
place, so that noise piles up over sampling steps. Coins are tossed a sample here, not a batch, so
that a sample does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from motionmerge.switching.image_functions import time_noise_center

from .noised import along


@dataclass(frozen=True, kw_only=True)
class TimeNoise:
    """How strong the noise is, and when.

    Args:
        strength: Of the noise, beta_m in the paper: 100 for DynamiCrafter, 15 for SVD.
        power: The larger, the later the noise grows; `a` in the paper.
    """

    strength: float = 100.0
    power: float = 5.0

    def scales(self, time_shares: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Compute beta.

        Args:
            time_shares: s, `[batch]`.
            normal: n, `[batch]`, drawn anew for each use.
        """
        center = time_noise_center(time_shares.to(normal), self.power)
        return self.strength * (normal + center).sigmoid()

    def on(
        self,
        condition: torch.Tensor,
        *,
        time_shares: torch.Tensor,
        normal: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Add noise to condition latents or tokens `[batch, ...]`; the input is left alone.

        Args:
            condition: What the noise is added to.
            time_shares, normal: As in `scales`.
            noise: Standard normal, of the condition's shape or broadcastable to it.
        """
        return condition + along(self.scales(time_shares, normal), condition) * noise
