"""The scheduler against vectors of the official code, and for every number of steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from motionmerge.errors import ConfigError
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.schedule import noise_level

VECTORS = load_file(Path(__file__).parents[1] / "data" / "noise_schedule.safetensors")
SHAPE = (1, 2, 3, 4, 4)


def vectors_under(prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in VECTORS.items()
        if name.startswith(prefix)
    }


def sample(scheduler: DynamicRescaleDDIMScheduler, *, eta: float) -> torch.Tensor:
    """Run all steps with a model that predicts a bounded v."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(
            torch.tanh(latents), timestep, latents, eta=eta, generator=generator
        ).prev_sample
    return latents


def test_betas_and_cumulated_alphas_equal_the_official_ones() -> None:
    scheduler = DynamicRescaleDDIMScheduler()
    torch.testing.assert_close(scheduler.betas, VECTORS["betas"], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        scheduler.alphas_cumprod, VECTORS["alphas_cumprod"], atol=1e-6, rtol=0
    )
    assert scheduler.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(("base_scale", "name"), [(0.7, "scale_512"), (0.3, "scale_1024")])
def test_rescale_factors_equal_the_official_ones(base_scale: float, name: str) -> None:
    scheduler = DynamicRescaleDDIMScheduler(base_scale=base_scale)
    torch.testing.assert_close(scheduler.rescale_factors, VECTORS[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(vectors_under("timesteps/")))
def test_timesteps_equal_the_official_ones_without_minus_one(name: str) -> None:
    start_step, num_steps = (int(part[1:]) for part in name.split("_"))
    scheduler = DynamicRescaleDDIMScheduler()
    scheduler.set_timesteps(num_steps, start_step=start_step)
    official = VECTORS[f"timesteps/{name}"]
    assert scheduler.timesteps.tolist() == official[official >= 0].flip(0).tolist()


@pytest.mark.parametrize("start_step", [1000, 980, 960, 940, 920, 900, 500])
def test_analytic_start_equals_the_official_one(start_step: int) -> None:
    latents = DynamicRescaleDDIMScheduler().analytic_init(
        VECTORS["analytic/Expectation_X0"],
        variance=VECTORS["analytic/Tr_Cov_d"].item(),
        noise=VECTORS["analytic/eps"],
        start_step=start_step,
    )
    expected = VECTORS[f"analytic/M{start_step}/init"]
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)


def test_training_inputs_and_targets_equal_the_official_ones() -> None:
    scheduler = DynamicRescaleDDIMScheduler()
    ops = vectors_under("ops/")
    clean = ops["x0"] * scheduler.rescale_factors[ops["t"]].reshape(-1, 1, 1, 1, 1)
    noisy = scheduler.add_noise(clean, ops["noise"], ops["t"])
    target = scheduler.get_velocity(clean, ops["noise"], ops["t"])
    torch.testing.assert_close(clean, ops["x0_rescaled"], atol=1e-6, rtol=0)
    torch.testing.assert_close(noisy, ops["train_x_noisy"], atol=1e-6, rtol=0)
    torch.testing.assert_close(target, ops["train_v_target"], atol=1e-6, rtol=0)


def test_nothing_but_noise_is_left_at_the_last_timestep() -> None:
    clean, noise = torch.randn(2, *SHAPE).unbind(0)
    noisy = DynamicRescaleDDIMScheduler().add_noise(clean, noise, torch.tensor([999]))
    assert torch.equal(noisy, noise)


@pytest.mark.parametrize("num_steps", range(1, 61))
def test_every_number_of_steps_is_finite(num_steps: int) -> None:
    scheduler = DynamicRescaleDDIMScheduler()
    scheduler.set_timesteps(num_steps)
    assert sample(scheduler, eta=1.0).isfinite().all()


@pytest.mark.parametrize("start_step", range(900, 1001))
def test_every_start_step_is_finite_and_has_exactly_the_steps_asked_for(start_step: int) -> None:
    scheduler = DynamicRescaleDDIMScheduler()
    for num_steps in (1, 7, 15, 25, 30, 33, start_step):
        scheduler.set_timesteps(num_steps, start_step=start_step)
        timesteps = scheduler.timesteps.tolist()
        assert len(set(timesteps)) == num_steps
        assert timesteps == sorted(timesteps, reverse=True)
        assert timesteps[0] == start_step - 1
        assert timesteps[-1] >= 0
        if num_steps < 100:
            assert sample(scheduler, eta=1.0).isfinite().all()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_all_predictions_of_one_denoiser_lead_to_the_same_latents(
    prediction_type: str, eta: float
) -> None:
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    results = []
    for kind in ("v_prediction", prediction_type):
        scheduler = DynamicRescaleDDIMScheduler(prediction_type=kind)
        scheduler.set_timesteps(7, start_step=960)
        generator = torch.Generator().manual_seed(2)
        latents = torch.randn(SHAPE, generator=generator)
        for timestep in scheduler.timesteps:
            alpha = scheduler.alphas_cumprod[timestep]
            noise = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            output = {"v_prediction": velocity, "epsilon": noise, "sample": clean}[kind]
            latents = scheduler.step(
                output, timestep, latents, eta=eta, generator=generator
            ).prev_sample
        results.append(latents)
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


def test_a_base_scale_of_none_or_one_is_plain_ddim() -> None:
    finals = []
    for base_scale in (None, 1.0):
        scheduler = DynamicRescaleDDIMScheduler(base_scale=base_scale)
        scheduler.set_timesteps(10)
        finals.append(sample(scheduler, eta=0.0))
    assert torch.equal(*finals)
    scheduler = DynamicRescaleDDIMScheduler(base_scale=0.7)
    scheduler.set_timesteps(10)
    assert not torch.allclose(finals[0], sample(scheduler, eta=0.0), atol=1e-2)


def test_half_precision_samples_stay_half_and_close() -> None:
    scheduler = DynamicRescaleDDIMScheduler()
    scheduler.set_timesteps(10)
    output, latents = torch.randn(2, *SHAPE).unbind(0)
    exact = scheduler.step(output, 499, latents).prev_sample
    half = scheduler.step(output.half(), 499, latents.half()).prev_sample
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, atol=5e-3, rtol=0)


def test_given_noise_and_a_generator_that_draws_it_agree() -> None:
    scheduler = DynamicRescaleDDIMScheduler()
    scheduler.set_timesteps(10)
    output, latents = torch.randn(2, *SHAPE).unbind(0)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    given = scheduler.step(output, 499, latents, eta=1.0, variance_noise=noise).prev_sample
    drawn = scheduler.step(
        output, 499, latents, eta=1.0, generator=torch.Generator().manual_seed(3)
    ).prev_sample
    assert torch.equal(given, drawn)


def test_timestep_500_is_noise_level_0_640() -> None:
    assert math.isclose(noise_level(DynamicRescaleDDIMScheduler(), 500), 0.640, abs_tol=1e-3)


def test_settings_survive_saving_and_loading(tmp_path: Path) -> None:
    DynamicRescaleDDIMScheduler(base_scale=0.3, rescale_steps=100).save_pretrained(tmp_path)
    loaded = DynamicRescaleDDIMScheduler.from_pretrained(tmp_path)
    assert loaded.config.rescale_steps == 100
    assert loaded.rescale_factors[-1] == pytest.approx(0.3)
    assert loaded.alphas_cumprod[-1] == 0


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"base_scale": 0.0}, {"base_scale": 1.5}, {"rescale_steps": 0}):
        with pytest.raises(ConfigError, match="Fix:"):
            DynamicRescaleDDIMScheduler(**settings)
    scheduler = DynamicRescaleDDIMScheduler()
    for num_steps, start_step in ((0, None), (1001, None), (10, 0), (10, 1001), (11, 10)):
        with pytest.raises(ConfigError, match="Fix:"):
            scheduler.set_timesteps(num_steps, start_step=start_step)
    with pytest.raises(ConfigError, match="start_step below 1000"):
        DynamicRescaleDDIMScheduler(prediction_type="epsilon").set_timesteps(10)
    scheduler.set_timesteps(10)
    latents = torch.zeros(SHAPE)
    with pytest.raises(ConfigError, match="not among the 10 timesteps"):
        scheduler.step(latents, 498, latents)
