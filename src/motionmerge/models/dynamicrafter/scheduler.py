"""DDIM as DynamiCrafter and VideoCrafter sample: dynamic rescale, zero terminal SNR, any start.

Paper: Xing et al. 2023 (arXiv 2310.12190); start step and analytic start: Zhao et al. 2024 (arXiv
2406.15735). Official: `lvdm/models/samplers/ddim.py` of both.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import (
    SchedulerMixin,  # noqa: F401  (a pipeline that loads this module's class looks for it here)
)
from diffusers.utils.torch_utils import randn_tensor

from motionmerge.errors import ConfigError


class DynamicRescaleDDIMScheduler(DDIMScheduler):
    """DDIM whose clean estimate is rescaled at every step, finite for any number of steps.

        x0    <- x0 * scale[t_prev] / scale[t]             (last step: see `last_step_to_zero`)
        sigma  = eta * sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        x_prev = sqrt(a_prev) x0 + sqrt(max(0, 1 - a_prev - sigma^2)) eps + sigma * noise

    with `scale = concat(linspace(1, base_scale, rescale_steps), base_scale, ...)`. The previous
    timestep is the next entry of `timesteps`; after the last one `a_prev = abar[0]`, or 1 with
    `set_alpha_to_one`. The noise schedule is computed in float64 and stored in float32.

    The defaults are those of DynamiCrafter-512. What is not listed is as in `DDIMScheduler`.

    Args:
        base_scale: Factor on the clean latents at noisy timesteps, in (0, 1]; `None` or 1 turns the
            rescale off. 0.7 for the 512 model, 0.3 for the 1024 model.
        rescale_steps: Number of timesteps over which the factor falls from 1 to `base_scale`.
        last_step_to_zero: The last step goes to timestep 0 and rescales the clean estimate by
            `scale[0] / scale[t]` (VideoCrafter); by 1 otherwise.

    Raises:
        ConfigError: `base_scale` or `rescale_steps` is out of range.
    """

    betas: torch.Tensor

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = False,
        steps_offset: int = 0,
        prediction_type: str = "v_prediction",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        rescale_betas_zero_snr: bool = True,
        base_scale: float | None = 0.7,
        rescale_steps: int = 400,
        last_step_to_zero: bool = False,
    ) -> None:
        if base_scale is not None and not 0 < base_scale <= 1:
            raise ConfigError(
                f"`base_scale` is {base_scale}; it must lie in (0, 1].",
                fix="Use 0.7 (512 model), 0.3 (1024 model), or None for no rescale.",
            )
        if not 1 <= rescale_steps <= num_train_timesteps:
            raise ConfigError(
                f"`rescale_steps` is {rescale_steps}; there are {num_train_timesteps} timesteps.",
                fix=f"Use a value from 1 to {num_train_timesteps}.",
            )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=False,
        )
        # The parent registers the settings it was called with, and ours is computed below.
        self.register_to_config(rescale_betas_zero_snr=rescale_betas_zero_snr)
        self._set_noise_schedule()
        floor = 1.0 if base_scale is None else base_scale
        self.rescale_factors = torch.cat(
            [
                torch.linspace(1.0, floor, rescale_steps),
                torch.full((num_train_timesteps - rescale_steps,), floor),
            ]
        )

    def _set_noise_schedule(self) -> None:
        """Recompute betas and cumulated alphas in float64; zero terminal SNR if configured."""
        config = self.config
        betas: torch.Tensor = self.betas.double()
        if config.trained_betas is None and config.beta_schedule in ("linear", "scaled_linear"):
            power = 2 if config.beta_schedule == "scaled_linear" else 1
            first, last = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
            count = config.num_train_timesteps
            betas = torch.linspace(first, last, count, dtype=torch.float64) ** power
        signal = torch.cumprod(1 - betas, dim=0).sqrt()
        if config.rescale_betas_zero_snr:
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
            ratio = signal[1:] / signal[:-1]
            betas = 1 - torch.cat([signal[:1], ratio]).square()
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = signal.square().float()
        # Training mixes with these: at t = 0, 1 - abar has lost four digits in float32.
        self.signal_rates = signal.float()
        self.noise_rates = (1 - signal.square()).sqrt().float()
        self.final_alpha_cumprod = (
            torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]
        )

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        start_step: int | None = None,
    ) -> None:
        """Choose the timesteps, from noisy to clean, that sampling visits.

            trailing   timesteps = round(M - i * M / n) - 1,             i = 0 .. n - 1
            leading    timesteps = floor(i * M / n) + steps_offset,      i = n - 1 .. 0

        There are exactly `n` of them, all different and all in [0, M - 1]; where a leading one
        would be M, there is no offset. M is `start_step`.

        Args:
            num_inference_steps: n, at most `start_step`.
            device: Where `timesteps` is put.
            start_step: M; with trailing timesteps sampling starts at M - 1. `None`: at the noisiest
                timestep.

        Raises:
            ConfigError: A number is out of range; a start step is asked of a spacing other than
                these; or epsilon prediction would start where no signal is left.
        """
        num_train = self.config.num_train_timesteps
        last = num_train if start_step is None else start_step
        if not 1 <= last <= num_train:
            raise ConfigError(
                f"`start_step` is {last}; the model was trained on {num_train} timesteps.",
                fix=f"Use a value from 1 to {num_train}.",
            )
        if not 1 <= num_inference_steps <= last:
            raise ConfigError(
                f"`num_inference_steps` is {num_inference_steps}; {last} timesteps are available.",
                fix=f"Use a value from 1 to {last}.",
            )
        if self.config.timestep_spacing == "trailing":
            # arange may give an entry too many, which would be timestep -1.
            values = np.arange(last, 0, -last / num_inference_steps)[:num_inference_steps]
            timesteps = np.round(values).astype(np.int64) - 1
            self.num_inference_steps = num_inference_steps
            self.timesteps = torch.from_numpy(timesteps).to(device)
        elif self.config.timestep_spacing == "leading":
            timesteps = np.arange(num_inference_steps)[::-1] * last // num_inference_steps
            timesteps = timesteps + min(self.config.steps_offset, last - 1 - int(timesteps[0]))
            self.num_inference_steps = num_inference_steps
            self.timesteps = torch.from_numpy(timesteps).to(device)
        elif start_step is None:
            super().set_timesteps(num_inference_steps, device)
        else:
            raise ConfigError(
                f"`start_step` needs trailing or leading timesteps, not "
                f"{self.config.timestep_spacing!r}.",
                fix='Build the scheduler with timestep_spacing="trailing".',
            )
        if self.config.prediction_type == "epsilon" and not self._alpha(int(self.timesteps[0])):
            raise ConfigError(
                "Epsilon prediction cannot start at a timestep without any signal.",
                fix="Pass rescale_betas_zero_snr=False or a start_step below "
                f"{num_train}, or use v_prediction.",
            )

    def _alpha(self, timestep: int) -> float:
        return float(self.alphas_cumprod[timestep])

    def _clean_and_noise(
        self, model_output: torch.Tensor, sample: torch.Tensor, alpha: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn what the model predicts into the clean sample x0 and the noise eps."""
        signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
        kind = self.config.prediction_type
        if kind == "v_prediction":
            clean = signal * sample - noise * model_output
            return clean, signal * model_output + noise * sample
        if kind == "epsilon":
            return (sample - noise * model_output) / signal, model_output
        if kind == "sample":
            return model_output, (sample - signal * model_output) / noise
        raise ConfigError(
            f"`prediction_type` {kind!r} is unknown.",
            fix='Use "v_prediction", "epsilon" or "sample".',
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Step from one timestep to the next entry of `timesteps`; the formula is in the class.

        Computed in float32 (float64 for float64 samples), returned in the sample's dtype.

        Args:
            model_output: What the model predicts, of the sample's shape.
            timestep: An entry of `timesteps`.
            sample: Latents, any shape `[batch, ...]`.
            eta: 0 deterministic .. 1 as much fresh noise as the forward process.
            use_clipped_model_output: Derive eps again from the clipped clean estimate.
            generator: Draws the noise; a list has one for each item of the batch.
            variance_noise: Standard normal noise to use instead, of the sample's shape.
            return_dict: Return a plain tuple if false.

        Returns:
            `prev_sample`, and `pred_original_sample` after the rescale.

        Raises:
            ConfigError: `set_timesteps` was not called, `timestep` is not in `timesteps`, or both
                sources of noise are given.
        """
        timesteps = self.timesteps.tolist()
        current = int(timestep)
        if self.num_inference_steps is None or current not in timesteps:
            raise ConfigError(
                f"Timestep {current} is not among the {len(timesteps)} timesteps of this run.",
                fix="Call set_timesteps first and pass the entries of scheduler.timesteps.",
            )
        if generator is not None and variance_noise is not None:
            raise ConfigError(
                "Both generator and variance_noise were given.", fix="Pass one of the two."
            )
        following = timesteps[timesteps.index(current) + 1 :][:1]
        alpha = self._alpha(current)
        alpha_prev = self._alpha(following[0]) if following else float(self.final_alpha_cumprod)

        dtype = torch.promote_types(sample.dtype, torch.float32)
        output, latents = model_output.to(dtype), sample.to(dtype)
        clean, noise = self._clean_and_noise(output, latents, alpha)
        if self.config.thresholding:
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            noise = (latents - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)
        if following or self.config.last_step_to_zero:
            factors = self.rescale_factors
            clean = clean * float(factors[following[0] if following else 0] / factors[current])

        sigma = eta * math.sqrt(max(0.0, (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)))
        direction = math.sqrt(max(0.0, 1 - alpha_prev - sigma**2))
        previous = math.sqrt(alpha_prev) * clean + direction * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            previous = previous + sigma * variance_noise.to(dtype)
        result = previous.to(sample.dtype), clean.to(sample.dtype)
        return DDIMSchedulerOutput(*result) if return_dict else result

    def rescale_original(
        self, original_samples: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Multiply clean samples by `scale[t]`, as training does before `add_noise`.

        Args:
            original_samples: Clean latents `[batch, ...]`.
            timesteps: Integer timesteps `[batch]`.
        """
        factors = self.rescale_factors.to(original_samples.device, original_samples.dtype)
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        return original_samples * factors[timesteps.to(factors.device)].reshape(shape)

    def analytic_init(
        self,
        expectation: torch.Tensor,
        *,
        variance: float,
        noise: torch.Tensor,
        start_step: int,
    ) -> torch.Tensor:
        """Start latents that have the mean and variance of noised data at `start_step`.

            x_M = sqrt(a) E[x0] + sqrt(1 - a + a * variance) * noise,   a = abar[M - 1]

        Args:
            expectation: E[x0], mean of clean latents, broadcastable to `noise`.
            variance: Trace of the data's covariance divided by its dimension.
            noise: Standard normal noise `[batch, channels, frames, height, width]`.
            start_step: M, as given to `set_timesteps`.

        Raises:
            ConfigError: `start_step` is out of range or `variance` is negative.

        Source: Analytic-Init, Zhao et al. 2024 (arXiv 2406.15735).
        """
        if not 1 <= start_step <= self.config.num_train_timesteps or variance < 0:
            raise ConfigError(
                f"`start_step` is {start_step}, variance is {variance}.",
                fix=f"Use 1 <= start_step <= {self.config.num_train_timesteps}, variance >= 0.",
            )
        signal = self._alpha(start_step - 1)
        return analytic_latents(expectation, variance=variance, noise=noise, signal=signal)


def analytic_latents(
    expectation: torch.Tensor, *, variance: float, noise: torch.Tensor, signal: float
) -> torch.Tensor:
    """Compute latents with the mean and variance of noised data.

    Args:
        expectation, variance, noise: See `DynamicRescaleDDIMScheduler.analytic_init`.
        signal: abar of the timestep.
    """
    scale = math.sqrt(1 - signal + signal * variance)
    return math.sqrt(signal) * expectation + scale * noise
