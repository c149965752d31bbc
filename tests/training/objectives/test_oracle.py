"""A denoiser that returns the objective's own target ends at the clean latents, in each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import pytest
import torch

from motionmerge.errors import ConfigError
from motionmerge.models.dynamicrafter import DynamicRescaleDDIMScheduler
from motionmerge.noise_levels import noise_level
from motionmerge.training.objectives.choice import process_for
from motionmerge.training.objectives.edm import ContinuousSigmas
from motionmerge.training.objectives.noised import NoiseProcess
from motionmerge.training.objectives.vp import VariancePreserving
from motionmerge.training.samples import NoiseRange, shares_within

SVD = {
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "timestep_spacing": "leading",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COGVIDEOX = {
    **SCALED,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
}
LTX = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DynamiCrafter-512": DynamicRescaleDDIMScheduler,
    "DynamiCrafter-1024": lambda: DynamicRescaleDDIMScheduler(base_scale=0.3),
    "DynamiCrafter-256": lambda: DynamicRescaleDDIMScheduler(
        prediction_type="epsilon", rescale_betas_zero_snr=False, base_scale=None
    ),
    "SVD": lambda: d.EulerDiscreteScheduler(**SCALED, **SVD),
    "I2VGen-XL": lambda: d.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "CogVideoX": lambda: d.CogVideoXDDIMScheduler(**COGVIDEOX),
    "Wan 2.1": lambda: d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "Wan 2.2": lambda: d.FlowMatchEulerDiscreteScheduler(shift=5.0),
    "LTX": lambda: d.FlowMatchEulerDiscreteScheduler(**LTX),
    "Hunyuan": lambda: d.FlowMatchEulerDiscreteScheduler(shift=7.0),
    "Kandinsky 5": lambda: d.FlowMatchEulerDiscreteScheduler(shift=10.0),
}


def generated(seed: int) -> torch.Tensor:
    return torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).double()


def time_of(process: NoiseProcess, scheduler: Any, index: int) -> torch.Tensor:
    if isinstance(process, VariancePreserving):
        return scheduler.timesteps[index][None].long()
    return scheduler.sigmas[index][None].float()


@pytest.mark.parametrize("family", SCHEDULERS)
def test_an_oracle_in_the_pipelines_own_scheduler_ends_at_the_clean_latents(family: str) -> None:
    scheduler = SCHEDULERS[family]()
    process = process_for(scheduler)
    shift = {"mu": 1.2} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(20, **shift)
    clean, zeros = generated(0), torch.zeros(1, 2, 3, 4, 4).double()
    x = generated(1) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    scale_input = getattr(scheduler, "scale_model_input", lambda x, _: x)
    for index, timestep in enumerate(scheduler.timesteps):
        seen, time = scale_input(x, timestep), time_of(process, scheduler, index)
        # What the denoiser sees is linear in the noise.
        rate = process.noised(zeros, zeros + 1, time).sample
        noised = process.noised(
            clean, (seen - process.noised(clean, zeros, time).sample) / rate, time
        )
        torch.testing.assert_close(noised.sample, seen, atol=1e-5, rtol=1e-5)
        # UniPC rounds its timesteps.
        assert float(noised.timesteps) == pytest.approx(float(timestep), abs=1.0)
        x, *estimates = scheduler.step(noised.target, timestep, x, return_dict=False)
    if isinstance(scheduler, DynamicRescaleDDIMScheduler):  # its last step keeps abar[0]
        x = estimates[0] / float(scheduler.rescale_factors[int(scheduler.timesteps[-1])])
    torch.testing.assert_close(x, clean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", SCHEDULERS)
def test_a_range_of_noise_levels_is_that_of_recipes(family: str) -> None:
    scheduler = SCHEDULERS[family]()
    process = process_for(scheduler)
    shares = (torch.arange(100) + 0.5) / 100
    times = process.times_at(shares_within(shares, process, NoiseRange(above=0.4, below=0.6)))
    if isinstance(process, ContinuousSigmas):
        levels = process.time_shares(times)
    elif isinstance(process, VariancePreserving):
        levels = torch.tensor([noise_level(scheduler, float(time)) for time in times])
    else:
        levels = times
    assert levels.min() > 0.4 - 1e-6
    assert levels.max() <= 0.6 + 1e-6
    assert levels.max() - levels.min() > 0.19


def test_uniform_shares_give_each_timestep_equally_often() -> None:
    times = process_for(DynamicRescaleDDIMScheduler()).times_at((torch.arange(2000) + 0.5) / 2000)
    assert times.tolist() == [index // 2 for index in range(2000)]


def test_a_range_without_any_noise_level_is_refused() -> None:
    process = process_for(d.DDIMScheduler())
    with pytest.raises(ConfigError, match="No noise level"):
        shares_within(torch.zeros(1), process, NoiseRange(above=0.6, below=0.6))


def test_a_scheduler_of_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(ConfigError, match="EDMEulerScheduler"):
        process_for(d.EDMEulerScheduler())
