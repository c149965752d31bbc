"""Noise levels agree between schedulers; a schedule names one expert for every step."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from motionmerge.errors import ConfigError, RecipeError
from motionmerge.schedule import ExpertSchedule, ScheduleEntry, noise_level

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def ddim():
    return DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def svd_scheduler():
    return EulerDiscreteScheduler(
        **BETAS,
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )


def test_timestep_500_of_dynamicrafter_is_noise_level_0640(ddim):
    assert noise_level(ddim, 500) == pytest.approx(0.640, abs=5e-4)
    assert noise_level(ddim, 200) == pytest.approx(0.374, abs=5e-4)
    assert noise_level(ddim, 900) == pytest.approx(0.948, abs=5e-4)


def test_pure_noise_is_1(ddim):
    assert noise_level(ddim, 999) == 1.0


def test_of_several_timesteps_the_noisiest_counts(ddim):
    assert noise_level(ddim, torch.tensor([[0, 500], [3, 2]])) == noise_level(ddim, 500)


def test_the_timesteps_of_svd_are_a_quarter_of_the_log_of_sigma():
    scheduler = svd_scheduler()
    scheduler.set_timesteps(6)
    levels = [noise_level(scheduler, t) for t in scheduler.timesteps]
    assert levels == pytest.approx([0.999, 0.995, 0.976, 0.840, 0.227, 0.002], abs=6e-4)
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        sigma = math.exp(4 * float(t))
        assert level == pytest.approx(sigma / (1 + sigma), abs=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True), EDMEulerScheduler()],
    ids=["dpm-karras", "edm"],
)
def test_sigma_and_alpha_bar_give_the_same_level(scheduler):
    scheduler.set_timesteps(7)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert noise_level(scheduler, t) == pytest.approx(float(sigma / (1 + sigma)), abs=2e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    ],
    ids=["flow-euler", "unipc-flow"],
)
def test_the_level_of_a_flow_scheduler_is_its_sigma(scheduler):
    scheduler.set_timesteps(5)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert noise_level(scheduler, t) == pytest.approx(float(sigma), abs=1e-6)


def test_an_inverted_flow_starts_at_noise_too():
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(5)
    levels = [noise_level(scheduler, t) for t in scheduler.timesteps]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 0.99


def test_a_timestep_between_two_steps_is_interpolated():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert noise_level(scheduler, 640) == pytest.approx(0.64, abs=1e-6)


def test_a_scheduler_without_noise_levels_is_refused(ddim):
    with pytest.raises(ConfigError, match="Fix"):
        noise_level(object(), 5)
    with pytest.raises(ConfigError, match="finite"):
        noise_level(ddim, float("nan"))


def expert_at(schedule, *, noise_level=0.5, timestep=500.0, step_fraction=0.5):
    return schedule.expert_at(
        noise_level=noise_level, timestep=timestep, step_fraction=step_fraction
    )


def test_the_dynamics_expert_is_used_strictly_above_the_boundary():
    schedule = ExpertSchedule.two("dynamics", "consistency", boundary=0.64)
    assert expert_at(schedule, noise_level=0.641) == "dynamics"
    assert expert_at(schedule, noise_level=0.64) == "consistency"
    assert schedule.experts == ("dynamics", "consistency")


def test_timesteps_and_step_fractions_are_conditions_too():
    by_timestep = ExpertSchedule((ScheduleEntry("a", timestep=500), ScheduleEntry("b")))
    assert [expert_at(by_timestep, timestep=t) for t in (501, 500)] == ["a", "b"]
    by_step = ExpertSchedule((ScheduleEntry("a", step_fraction=0.5), ScheduleEntry("b")))
    assert [expert_at(by_step, step_fraction=f) for f in (0.49, 0.5)] == ["a", "b"]


def test_an_expert_may_come_back():
    schedule = ExpertSchedule.from_list(
        [{"expert": "a", "above": 0.8}, {"expert": "b", "above": 0.3}, {"expert": "a"}]
    )
    assert [expert_at(schedule, noise_level=x) for x in (0.9, 0.5, 0.1)] == ["a", "b", "a"]
    assert schedule.experts == ("a", "b")


def test_a_list_is_read_and_given_back():
    entries = [{"expert": "a", "above": 0.64}, {"expert": "b", "timestep": 100}, {"expert": "c"}]
    assert ExpertSchedule.from_list(entries).to_list() == entries


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([], "empty"),
        ("dynamics", "not a list"),
        (["dynamics"], "schedule entry 1 is 'dynamics', not a mapping"),
        ([{"expert": "a", "above": 0.5}, {"above": 0.3}], "schedule entry 2 has no `expert`"),
        ([{"expert": "a", 5: 0.5}], "schedule entry 1 has no setting `5`"),
        ([{"expert": "a", "above": 10**400}, {"expert": "b"}], "Write a number"),
        ([{"expert": "a", "abov": 0.5}, {"expert": "b"}], "`above`"),
        ([{"expert": "", "above": 0.5}, {"expert": "b"}], "names the expert"),
        ([{"expert": "a", "above": 500}, {"expert": "b"}], "outside"),
        ([{"expert": "a", "above": -0.1}, {"expert": "b"}], "outside"),
        ([{"expert": "a", "above": True}, {"expert": "b"}], "Write a number"),
        ([{"expert": "a", "above": "0.5"}, {"expert": "b"}], "Write a number"),
        ([{"expert": "a", "timestep": math.nan}, {"expert": "b"}], "Write a number"),
        ([{"expert": "a", "above": 0.5, "timestep": 500}, {"expert": "b"}], "2 conditions"),
        ([{"expert": "a", "above": 0.5}], "have no expert"),
        ([{"expert": "a"}, {"expert": "b"}], "never reached"),
        ([{"expert": "a", "above": 0.3}, {"expert": "b", "above": 0.6}, {"expert": "c"}], "Sort"),
        (
            [
                {"expert": "a", "step_fraction": 0.6},
                {"expert": "b", "step_fraction": 0.3},
                {"expert": "c"},
            ],
            "Sort",
        ),
    ],
)
def test_a_schedule_that_leaves_doubt_is_refused_with_a_fix(entries, complaint):
    with pytest.raises(RecipeError, match="Fix:") as refused:
        ExpertSchedule.from_list(entries)
    assert complaint in str(refused.value)


def test_a_schedule_is_drawn_as_one_line():
    schedule = ExpertSchedule.two("dynamics", "consistency", boundary=0.64)
    assert schedule.draw(width=30) == "1.0 |dynamics===|0.64 consistency========| 0.0"
    by_step = ExpertSchedule((ScheduleEntry("a", step_fraction=0.5), ScheduleEntry("b")))
    assert by_step.draw(width=8) == "1.0 |a===|50% of steps b===| 0.0"
