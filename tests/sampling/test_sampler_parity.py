"""The two-expert sampler against the official one: 17 runs with closed-form models.

The official runs used two models; ours is one, whose weights the expert bank switches:

    dynamics     v = tanh(0.8 x) (0.5 + t / 1000) + 0.3 c
    consistency  v = 0.6 sin(1.3 x) + 0.2 c cos(t / 1000) - 0.1
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.sampling.pipelines.guidance import guided_prediction
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.switching.expert_bank import ExpertBank

FILE = Path(__file__).parents[1] / "data" / "sampler_two_experts.safetensors"
VECTORS = load_file(FILE)
with safe_open(FILE, "pt") as file:
    RUNS = json.loads(file.metadata()["runs"])

FORMULAS = {
    "dynamics": {"tanh": [1.0, 0.8, 0.5, 1.0], "context": [0.3, 0.0], "sin": [0.0, 1.0, 0.0]},
    "consistency": {"tanh": [0.0, 1.0, 0.0, 0.0], "context": [0.0, 0.2], "sin": [0.6, 1.3, -0.1]},
}


class ClosedFormDenoiser(nn.Module):
    """A denoiser of nine weights that can be either of the two closed forms."""

    def __init__(self) -> None:
        super().__init__()
        self.tanh = nn.Parameter(torch.zeros(4))
        self.context = nn.Parameter(torch.zeros(2))
        self.sin = nn.Parameter(torch.zeros(3))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        time = timestep / 1000
        v = self.tanh[0] * torch.tanh(self.tanh[1] * sample) * (self.tanh[2] + self.tanh[3] * time)
        v = v + (self.context[0] + self.context[1] * torch.cos(time)) * context
        return v + self.sin[0] * torch.sin(self.sin[1] * sample) + self.sin[2]


class ConstantProjector(nn.Module):
    """An image projector whose tokens are its weights: `[unconditional | conditional, ...]`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(2, *VECTORS["x_T"].shape[1:]))

    def forward(self) -> torch.Tensor:
        return self.tokens.detach().clone()


def official_experts() -> dict[str, dict[str, torch.Tensor]]:
    experts = {}
    for name, formula in FORMULAS.items():
        weights = {f"unet.{key}": torch.tensor(value) for key, value in formula.items()}
        halves = [VECTORS[f"{half}/{name}"] for half in ("unconditional", "conditional")]
        experts[name] = {**weights, "image_projector.tokens": torch.cat(halves)}
    return experts


@torch.no_grad()
def sample(run: dict[str, Any], entry: ScheduleEntry) -> tuple[torch.Tensor, list[str]]:
    """Sample as a pipeline does; returns the latents and who denoised at each step."""
    model = SimpleNamespace(
        unet=ClosedFormDenoiser(),
        image_projector=ConstantProjector(),
        scheduler=DynamicRescaleDDIMScheduler(),
    )
    scheduler = model.scheduler
    scheduler.set_timesteps(run["steps"], start_step=run["start_step"])
    latents, used = VECTORS["x_T"], []
    schedule = ExpertSchedule((entry, ScheduleEntry("consistency")))
    with ExpertBank(model, official_experts(), schedule=schedule) as bank:
        contexts = {}
        for name in bank.experts:
            with bank.with_expert(name, modules=["image_projector"]):
                contexts[name] = model.image_projector()
        for step, timestep in enumerate(scheduler.timesteps):
            used.append(bank.expert_for(timestep))
            context = contexts[used[-1]]
            if run["guidance_scale"] > 1:
                v = guided_prediction(
                    model.unet(latents, timestep, context[1:]),
                    model.unet(latents, timestep, context[:1]),
                    guidance_scale=run["guidance_scale"],
                    guidance_rescale=run["guidance_rescale"],
                )
            else:
                v = model.unet(latents, timestep, context[1:])
            latents = scheduler.step(
                v, timestep, latents, eta=run["eta"], variance_noise=VECTORS["noise"][step][None]
            ).prev_sample
    return latents, used


@pytest.mark.parametrize("name", sorted(RUNS))
def test_every_official_run_is_reproduced(name: str) -> None:
    run = RUNS[name]
    latents, used = sample(run, ScheduleEntry("dynamics", timestep=run["timestep"]))
    dynamics_steps = run["dynamics_steps"]
    assert used == ["dynamics"] * dynamics_steps + ["consistency"] * (run["steps"] - dynamics_steps)
    if run["is_nan"]:  # the official sampler takes the root of a negative number here
        assert latents.isfinite().all()
    else:
        torch.testing.assert_close(latents, VECTORS[f"{name}/final"], atol=1e-4, rtol=0)


def test_a_boundary_as_noise_level_is_the_same_as_the_timestep() -> None:
    run = RUNS["s50_eta1_gr0.7"]
    latents, _ = sample(run, ScheduleEntry("dynamics", above=0.640))
    torch.testing.assert_close(latents, VECTORS["s50_eta1_gr0.7/final"], atol=1e-4, rtol=0)


def test_a_boundary_as_step_fraction_is_the_same_as_the_timestep() -> None:
    run = RUNS["s50_eta1_gr0.7"]
    latents, _ = sample(run, ScheduleEntry("dynamics", step_fraction=0.5))
    torch.testing.assert_close(latents, VECTORS["s50_eta1_gr0.7/final"], atol=1e-4, rtol=0)
