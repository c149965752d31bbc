"""Every scheduler of diffusers: its noise levels are what it really mixes, or it is refused."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pkgutil
import sys
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from motionmerge.errors import ConfigError
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.noise_levels import _NO_LEVEL, _RULES, counts_up, level_of_step, noisiest
from motionmerge.schedule import ExpertSchedule, noise_level

STEPS = (1, 2, 4, 9, 20)
SHIFTS = (1.0, 3.0, 8.0)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LOG = {
    "timestep_type": "continuous",
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}


def scheduler_classes() -> dict[str, type]:
    """Import every scheduler; `torchsde`, which is not installed, only draws noise for two."""
    before = sys.modules.get("torchsde")
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    found: dict[str, type] = {}
    try:
        for info in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                if inspect.isclass(value) and issubclass(value, SchedulerMixin):
                    found[name] = value
    finally:
        if before is None:
            del sys.modules["torchsde"]
    del found["SchedulerMixin"]
    return found


CLASSES = {**scheduler_classes(), "DynamicRescaleDDIMScheduler": DynamicRescaleDDIMScheduler}


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every class with every kind of sigmas that it can be configured for."""
    for name in _RULES:
        known = inspect.signature(CLASSES[name].__init__).parameters
        if name == "SASolverScheduler":
            yield name, {"use_flow_sigmas": True}
        yield name, {}
        for shift in SHIFTS:
            if "use_flow_sigmas" in known and "flow_shift" in known:
                yield name, {**FLOW, "flow_shift": shift}
            elif "shift" in known and not name.startswith("Helios"):
                yield name, {"shift": shift}
        for kind in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if kind in known:
                yield name, {kind: True}
        if "invert_sigmas" in known:
            yield name, {"invert_sigmas": True}
        if "rescale_betas_zero_snr" in known:
            yield name, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "final_sigmas_type" in known and name.startswith("DPM"):
            yield name, {"final_sigmas_type": "sigma_min", "algorithm_type": "dpmsolver++"}
        if "timestep_spacing" in known:
            yield name, {"timestep_spacing": "leading"}
        if "snr_shift_scale" in known:
            yield name, {"snr_shift_scale": 1.0}
    yield "EulerDiscreteScheduler", LOG
    yield "DDPMWuerstchenScheduler", {"scaler": 2.0}


@cache
def built(name: str, config: tuple[tuple[str, Any], ...]) -> Any:
    """Build a scheduler once: some compute a schedule of 1000 steps for half a second."""
    return CLASSES[name](**dict(config))


def started(name: str, config: dict[str, Any], steps: int) -> Any:
    """Give a new scheduler with its timesteps set; None where it has no such number of steps."""
    scheduler = copy.deepcopy(built(name, tuple(config.items())))
    if name == "SCMScheduler":
        scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    elif name.startswith("Helios"):
        scheduler.set_timesteps(steps + 1, stage_index=0)
    elif name == "MiniMaxH3Scheduler":
        scheduler.set_timesteps(steps + 1)
    elif name == "PNDMScheduler" and steps < 4:
        return None
    elif name == "RePaintScheduler":
        scheduler.set_timesteps(steps, jump_length=1, jump_n_sample=1)
    else:
        scheduler.set_timesteps(steps)
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(steps)
    return scheduler


def measured(scheduler: Any, timestep: torch.Tensor, index: int) -> float | None:
    """Measure the share of noise in what its own forward process makes, if it has one."""
    name = type(scheduler).__name__
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    if name == "SASolverScheduler" and scheduler.config.use_flow_sigmas:
        return float(scheduler.sigmas[index])  # its `add_noise` knows no flow, its `step` does
    if name.startswith("KDPM2") and scheduler.config.use_karras_sigmas:
        sigma = float(scheduler.sigmas[index])  # rounded timesteps repeat: `add_noise` takes a twin
        return sigma / (1 + sigma)
    mix = getattr(scheduler, "add_noise", None)
    if hasattr(scheduler, "scale_noise"):

        def mix(x0: Any, noise: Any, t: Any) -> Any:  # its arguments are in another order
            return scheduler.scale_noise(x0, t, noise)

    if mix is None or name in ("ScoreSdeVeScheduler", "RePaintScheduler", "HeliosDMDScheduler"):
        return None
    if name == "FlowMatchHeunDiscreteScheduler":  # its `scale_noise` remembers the step
        scheduler._step_index = None
        return float(scheduler.scale_noise(zero, timestep, one))
    times = torch.as_tensor(timestep).reshape(1)
    noise, signal = float(mix(zero, one, times)), float(mix(one, zero, times))
    assert noise >= 0 and signal >= 0
    return noise / (noise + signal)


def computed(scheduler: Any, index: int) -> float:
    """Compute it from the arrays that `step` uses, where there is no forward process."""
    name, t = type(scheduler).__name__, float(scheduler.timesteps[index])
    if name in ("LTXEulerAncestralRFScheduler", "PiflowScheduler"):
        return float(scheduler.sigmas[index])
    if name == "ScoreSdeVeScheduler":
        return float(scheduler.sigmas[index] / (1 + scheduler.sigmas[index]))
    if name == "IPNDMScheduler":
        noise, signal = float(scheduler.betas[index]), float(scheduler.alphas[index])
        return noise / (noise + signal)
    if name == "SCMScheduler":
        return math.sin(t) / (math.sin(t) + math.cos(t))
    if name.startswith("Helios"):
        start, end = scheduler.start_sigmas[0], scheduler.end_sigmas[0]
        return float(end + scheduler.sigmas[index] * (start - end))
    abar = float(scheduler.alphas_cumprod[round(t)])
    return math.sqrt(1 - abar) / (math.sqrt(1 - abar) + math.sqrt(abar))


def test_every_scheduler_of_diffusers_has_a_row() -> None:
    assert set(CLASSES) == set(_RULES) | set(_NO_LEVEL)
    assert not set(_RULES) & set(_NO_LEVEL)


@pytest.mark.parametrize(
    ("name", "config"), list(variants()), ids=lambda value: str(value).replace(" ", "")
)
def test_the_noise_level_is_the_share_that_the_scheduler_mixes(
    name: str, config: dict[str, Any]
) -> None:
    # Timesteps that are whole numbers stand for sigmas between them.
    tolerance = 4e-3 if any(key.endswith("sigmas") for key in config) else 2e-3
    for steps in STEPS:
        try:
            scheduler = started(name, config, steps)
        except (ValueError, IndexError, ZeroDivisionError):
            continue  # refused by diffusers: too few steps for this kind of sigmas
        if scheduler is None:
            continue
        for index, timestep in enumerate(scheduler.timesteps):
            if name == "SCMScheduler" and index == len(scheduler.timesteps) - 1:
                continue
            truth = measured(scheduler, timestep, index)
            truth = computed(scheduler, index) if truth is None else truth
            if config.get("invert_sigmas"):  # Mochi begins at sigma 0 with pure noise
                truth = 1 - truth
            level = level_of_step(scheduler, index)
            is_between = name.startswith(("KDPM2", "DPMSolverSDE")) and index % 2 == 1
            if not is_between:
                assert level == pytest.approx(truth, abs=tolerance), (steps, index)
                twins = (scheduler.timesteps == timestep).nonzero().flatten().tolist()
                is_repeated = any(
                    abs(level_of_step(scheduler, twin) - level) > 1e-3 for twin in twins
                )
                if not is_repeated:
                    assert noise_level(scheduler, timestep) == pytest.approx(truth, abs=tolerance)


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"]
)
def test_the_second_call_of_a_step_has_the_level_that_its_input_is_scaled_for(name: str) -> None:
    for steps in STEPS[1:]:
        scheduler = started(name, {}, steps)
        zero = torch.zeros(1)
        for index, timestep in enumerate(scheduler.timesteps):
            factor = float(scheduler.scale_model_input(torch.ones(1), timestep))
            sigma = math.sqrt(1 / factor**2 - 1)
            level = level_of_step(scheduler, index)
            assert level == pytest.approx(sigma / (1 + sigma), abs=2e-3), (steps, index)
            scheduler.step(zero, timestep, zero)


@pytest.mark.parametrize("name", ["HeliosScheduler", "HeliosDMDScheduler"])
def test_the_levels_of_helios_fall_through_all_stages_but_for_the_noise_it_adds(name: str) -> None:
    scheduler = CLASSES[name]()
    for stage in range(3):
        scheduler.set_timesteps(20, stage_index=stage)
        levels = [level_of_step(scheduler, index) for index in range(len(scheduler.timesteps))]
        assert levels == sorted(levels, reverse=True)
        # The stage begins at sigma 0.999 of the way, and its noise is known in advance.
        start, end = scheduler.start_sigmas[stage], scheduler.end_sigmas[stage]
        assert levels[0] == pytest.approx(end + 0.999 * (start - end), abs=1e-6)
        assert end <= levels[-1] < end + 0.1


@pytest.mark.parametrize("steps", [4, 8, 50])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("boundary", [0.64, 0.9])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("FlowMatchEulerDiscreteScheduler", "shift"),
        ("FlowMatchLCMScheduler", "shift"),
        ("FlowMatchHeunDiscreteScheduler", "shift"),
        ("FlowMapEulerDiscreteScheduler", "shift"),
        ("PiflowScheduler", "shift"),
        ("MiniMaxH3Scheduler", "shift"),
        ("UniPCMultistepScheduler", "flow_shift"),
        ("DPMSolverMultistepScheduler", "flow_shift"),
        ("LTXEulerAncestralRFScheduler", None),
    ],
)
def test_the_dynamics_expert_denoises_where_sigma_is_above_the_boundary(
    name: str, setting: str | None, boundary: float, shift: float, steps: int
) -> None:
    config = {} if setting is None else {setting: shift}
    scheduler = started(name, {**config, **(FLOW if setting == "flow_shift" else {})}, steps)
    schedule = ExpertSchedule.two("dynamics", "consistency", boundary=boundary)
    for index, timestep in enumerate(scheduler.timesteps):
        expert = schedule.expert_at(
            noise_level=noise_level(scheduler, timestep), timestep=0.0, step_fraction=0.0
        )
        sigma = float(scheduler.sigmas[index])
        assert expert == ("dynamics" if sigma > boundary else "consistency")
    assert noise_level(scheduler, scheduler.timesteps[0]) > 0.9


def test_a_timestep_between_two_steps_has_the_level_between_theirs() -> None:
    for name, config in variants():
        if name in ("PNDMScheduler", "SCMScheduler", "UnCLIPScheduler", "RePaintScheduler"):
            continue
        scheduler = started(name, config, 9)
        grid = np.asarray(scheduler.timesteps, dtype=np.float64)
        if name.startswith("KDPM2Ancestral") or len(set(grid)) < 3:
            continue
        first, second = sorted(set(grid))[-2:]
        levels = sorted(noise_level(scheduler, one) for one in (first, second))
        assert levels[0] - 4e-3 <= noise_level(scheduler, (first + second) / 2) <= levels[1] + 4e-3


def test_of_several_modalities_the_noisiest_counts_whichever_way_timesteps_run() -> None:
    down, up = CLASSES["FlowMatchEulerDiscreteScheduler"](), CLASSES["MiniMaxH3Scheduler"]()
    several = torch.tensor([0.25, 0.5, 0.999])
    assert not counts_up(down) and counts_up(up)
    assert noisiest(down, several) == pytest.approx(0.999)
    assert noisiest(up, several) == 0.25
    assert noise_level(up, several) == 0.75
    assert counts_up(CLASSES["FlowMatchEulerDiscreteScheduler"](invert_sigmas=True))


@pytest.mark.parametrize("name", sorted(_NO_LEVEL))
def test_a_scheduler_without_noise_levels_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}(.|\n)*`step_fraction`"):
        noise_level(object.__new__(CLASSES[name]), 5)


def test_a_subclass_follows_its_parent_unless_it_computes_otherwise() -> None:
    parent = CLASSES["FlowMatchEulerDiscreteScheduler"]
    plain = type("Renamed", (parent,), {})(shift=3.0)
    plain.set_timesteps(4)
    assert noise_level(plain, plain.timesteps[1]) == pytest.approx(float(plain.sigmas[1]))

    def set_timesteps(self: Any, number: int) -> None:
        parent.set_timesteps(self, number)

    other = type("Changed", (parent,), {"set_timesteps": set_timesteps})()
    with pytest.raises(ConfigError, match=r"set_timesteps of its own(.|\n)*`step_fraction`"):
        noise_level(other, 500)

    class Stranger:
        timesteps, sigmas = torch.tensor([1000.0]), torch.tensor([1.0])

    with pytest.raises(ConfigError, match=r"Stranger(.|\n)*`step_fraction`"):
        noise_level(Stranger(), 1000)


def test_timesteps_that_are_not_set_are_named() -> None:
    with pytest.raises(ConfigError, match="set_timesteps"):
        noise_level(CLASSES["LTXEulerAncestralRFScheduler"](), 500)
