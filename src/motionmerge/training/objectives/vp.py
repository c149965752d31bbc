"""Variance-preserving diffusion in discrete timesteps: DynamiCrafter, I2VGen-XL, CogVideoX.

    x_t = sqrt(abar) x0 + sqrt(1 - abar) noise
    v   = sqrt(abar) noise - sqrt(1 - abar) x0        (or the noise itself: epsilon prediction)

DynamiCrafter trains on x0 = scale[t] * latents, with scale falling from 1 to `base_scale`.
Paper: Xing et al. 2023 (arXiv 2310.12190). Official: `lvdm/models/ddpm3d.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from motionmerge.errors import ConfigError
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler

from .noised import Noised, along

PREDICTIONS = ("v_prediction", "epsilon", "sample")


class VariancePreserving:
    """Every timestep of a DDPM or DDIM scheduler, equally often; the plain squared error.

    Args:
        scheduler: Of the pipeline: its noise schedule, prediction type and rescale are used.

    Raises:
        ConfigError: The scheduler asks for another prediction.
    """

    def __init__(self, scheduler: Any) -> None:
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise ConfigError(
                f"The scheduler's `prediction_type` is {self.prediction!r}.",
                fix=f"Use a scheduler that predicts one of {', '.join(PREDICTIONS)}.",
            )
        self.num_timesteps = int(scheduler.config.num_train_timesteps)
        alphas = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
        self._signal = getattr(scheduler, "signal_rates", alphas.sqrt()).float().cpu()
        self._noise = getattr(scheduler, "noise_rates", (1 - alphas).sqrt()).float().cpu()
        self._scale = torch.ones(self.num_timesteps)
        if isinstance(scheduler, DynamicRescaleDDIMScheduler):
            self._scale = scheduler.rescale_factors.float().cpu()

    def to(self, device: torch.device) -> None:
        """Move the noise schedule, so that no step has to copy it."""
        self._signal, self._noise = self._signal.to(device), self._noise.to(device)
        self._scale = self._scale.to(device)

    def times_at(self, shares: torch.Tensor) -> torch.Tensor:
        last = self.num_timesteps - 1
        return (shares.double() * self.num_timesteps).long().clamp(0, last)

    def share_up_to(self, level: float) -> float:
        levels = self._noise / (self._signal + self._noise)
        return float((levels <= level).double().mean())

    def time_shares(self, times: torch.Tensor) -> torch.Tensor:
        return times / self.num_timesteps

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> Noised:
        clean = along(self._scale[times], clean) * clean
        signal_rate, noise_rate = (
            along(self._signal[times], clean),
            along(self._noise[times], clean),
        )
        targets = {
            "v_prediction": lambda: signal_rate * noise - noise_rate * clean,
            "epsilon": lambda: noise,
            "sample": lambda: clean,
        }
        return Noised(
            sample=signal_rate * clean + noise_rate * noise,
            timesteps=times,
            target=targets[self.prediction](),
            weight=torch.ones(len(clean), device=clean.device),
        )
