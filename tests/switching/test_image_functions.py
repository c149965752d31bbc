"""Knobs compute what the official code of each does, on its recorded inputs and outputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from motionmerge.errors import ShapeError
from motionmerge.knobs import Blur, Exponential, Linear, LowPass
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.switching.attention_bias import SelfAttention
from motionmerge.switching.denoiser_passes import Passes
from motionmerge.switching.denoising_steps import Moment
from motionmerge.switching.image_functions import (
    blur,
    filtered,
    low_pass,
    motion_amplitude,
    time_noise,
    time_noise_center,
)
from motionmerge.switching.knob_families import KNOB_FAMILIES

FILE = Path(__file__).parents[1] / "data" / "knobs.safetensors"
with safe_open(FILE, framework="pt") as opened:
    CASES = json.loads(opened.metadata()["cases"])
    TENSORS = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

close = {"atol": 1e-5, "rtol": 0}


@pytest.mark.parametrize("case", CASES["low_pass"], ids=lambda case: case["output"])
def test_filters_are_the_official_ones(case: dict[str, Any]) -> None:
    image = TENSORS[case["input"]]
    if case["kind"] == "down_up":
        made = low_pass(image, case["factor"])
    else:
        made = blur(image, case["sigma"], case["kernel_size"])
    torch.testing.assert_close(made, TENSORS[case["output"]], **close)


def strengths_of(case: dict[str, Any]) -> list[float]:
    """Express an official schedule of strengths as a recipe does, and return that of each step."""
    total, kind = case["steps"], case["kind"]
    if kind == "interval":
        entries = [
            ScheduleEntry("sharp", step_fraction=case["interval_start_time"]),
            ScheduleEntry("blurred", step_fraction=case["interval_end_time"]),
            ScheduleEntry("sharp"),
        ]
        schedule = ExpertSchedule(tuple(entries[case["interval_start_time"] == 0 :]))
        used = [
            schedule.expert_at(noise_level=0, timestep=0, step_fraction=step / total)
            for step in range(total)
        ]
        return [float(name == "blurred") for name in used]
    fades = {
        "linear": Linear(
            case["linear_start_weight"], case["linear_end_weight"], case["linear_end_time"]
        ),
        "exponential": Exponential(case["exp_decay_rate"]),
        "none": Linear(1, 1, 1),
    }
    return [fades[kind].at(step / max(total - 1, 1)) for step in range(total)]


@pytest.mark.parametrize("case", CASES["strength"], ids=lambda case: f"{case['kind']}")
def test_strengths_are_the_official_ones(case: dict[str, Any]) -> None:
    assert strengths_of(case) == pytest.approx(case["strengths"], abs=1e-9)
    if case["kind"] in ("linear", "exponential"):
        image = TENSORS["low_pass.2.input"]
        fade = Linear(1, 0, 0.5) if case["kind"] == "linear" else Exponential(10)
        keep = 1 - 0.6 * fade.at(0.2)
        made = filtered(image, [LowPass(0.4, strength=fade)], x=0.2)
        assert torch.equal(made, low_pass(image, keep))
        blurred = low_pass(blur(image, 1.5 * fade.at(0.2), 5), 0.4)
        both = [Blur(1.5, 5, strength=fade), LowPass(0.4)]
        assert torch.equal(filtered(image, both, x=0.2), blurred)


@pytest.mark.parametrize("case", CASES["motion_amplitude"], ids=lambda c: str(c["amplitude"]))
def test_motion_amplitude_is_the_official_one(case: dict[str, Any]) -> None:
    own = f"motion_amplitude.{case['case']}"
    raw = TENSORS[f"{own}.input_raw"]
    made = motion_amplitude(raw, case["amplitude"])
    torch.testing.assert_close(made, TENSORS[f"{own}.output_raw"], **close)
    mean, std = (TENSORS[f"wan.latents_{name}"].reshape(1, -1, 1, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close((made - mean) / std, TENSORS[f"{own}.output_normalised"], **close)


class Attention(nn.Module):
    """Self-attention that is told a mask as Wan's is."""

    def __init__(self, own: str, heads: int) -> None:
        super().__init__()
        self.processor, self._own, self._heads = object(), own, heads

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (TENSORS[f"{self._own}.{name}.{kind}"] for kind in ("weight", "bias"))
        return F.linear(x, weight, bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q, k, v = (
            self._project(name, hidden_states).unflatten(2, (self._heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self._project("o", mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("case", CASES["first_frame_bias"], ids=lambda case: str(case["gamma"]))
def test_a_bias_on_the_first_frame_is_the_official_one(case: dict[str, Any]) -> None:
    own, (_, height, width) = f"first_frame_bias.{case['case']}", case["grid"]
    block, denoiser = nn.Module(), nn.Module()
    block.attn1 = attention = Attention(own, case["heads"])
    denoiser.blocks = nn.ModuleList([block])
    place = SelfAttention(
        blocks=("blocks",),
        module="attn1",
        processors=("object",),
        first_frame=lambda arguments, config: height * width,
        has_head_axis=True,
    )
    hidden = TENSORS[f"{own}.input"]
    torch.testing.assert_close(attention(hidden), TENSORS[f"{own}.plain"], **close)
    seen = torch.arange(hidden.shape[1]) % 3 > 0  # a mask of the attention's own
    numbers = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    with place.biased(denoiser, -case["gamma"], {}, rows=slice(None)):
        torch.testing.assert_close(attention(hidden, None, None), TENSORS[f"{own}.biased"], **close)
        masked = attention(hidden, attention_mask=seen[None, None, None])
        assert torch.equal(masked, attention(hidden, attention_mask=numbers[None, None, None]))
    numbers[: height * width] -= case["gamma"]
    told = attention(hidden, attention_mask=numbers[None, None, None])
    torch.testing.assert_close(masked, told, **close)
    torch.testing.assert_close(attention(hidden), TENSORS[f"{own}.plain"], **close)


@pytest.mark.parametrize("case", CASES["three_term"], ids=lambda case: str(case["guidance"]))
@pytest.mark.parametrize("is_told", [True, False])
def test_three_passes_combine_as_in_the_official_code(case: dict[str, Any], is_told: bool) -> None:
    own = f"three_term.{case['case']}"
    low_c, low_u, sharp_u = (
        TENSORS[f"{own}.{name}"]
        for name in ("low_conditional", "low_unconditional", "sharp_unconditional")
    )
    answers = iter([sharp_u.clone(), low_u.clone()])
    entry = ScheduleEntry(
        "model", image=(LowPass(0.4),), guidance=case["guidance"] if is_told else None
    )
    passes = Passes(
        family=next(one for one in KNOB_FAMILIES if one.name == "Wan 2.2-5B"),
        vae={},
        denoiser=nn.Module(),
        moment=Moment(entry=entry),
        call=lambda arguments: (next(answers),),
    )
    first = (low_c.clone(),)
    [second] = passes.second({"hidden_states": torch.zeros(1, 4, 2, 8, 8)}, first)
    combined = second + 7.5 * (first[0] - second)  # as the pipeline does, by a scale of its own
    if not is_told:
        combined = second + case["guidance"] * (first[0] - second)
    torch.testing.assert_close(combined, TENSORS[f"{own}.combined"], **close)


@pytest.mark.parametrize("case", CASES["timenoise"], ids=lambda case: str(case["a"]))
def test_the_center_of_time_noise_is_the_official_one(case: dict[str, Any]) -> None:
    shares = torch.tensor(case["timesteps"], dtype=torch.float64) / 1000
    center = time_noise_center(shares, case["a"])
    torch.testing.assert_close(center, torch.tensor(case["mu"]).double(), atol=1e-6, rtol=0)


def test_time_noise_grows_with_the_noise_level_and_repeats_by_its_seed() -> None:
    image = torch.ones(2, 4, 3, 32, 32)
    options = {"strength": 10.0, "power": 5.0, "seed": 3}
    made = {level: time_noise(image, level=level, **options) for level in (0.0, 0.5, 1.0)}
    for level, noise in made.items():
        beta = 10 * torch.tensor(2 * level**5 - 1).sigmoid()
        assert noise.std().item() == pytest.approx(beta.item(), rel=0.03)
        assert torch.equal(noise[0], noise[1])
    assert torch.equal(time_noise(image, level=0.5, **options), made[0.5])
    drawn = torch.stack([noise[0].flatten() for noise in made.values()])
    assert torch.corrcoef(drawn).triu(1).abs().max() < 0.1  # new noise for each level
    assert not torch.equal(time_noise(image, level=0.5, **{**options, "seed": 4}), made[0.5])
    assert not time_noise(0 * image, level=0.5, **options).any()  # no image is none with noise


def test_a_kernel_wider_than_the_image_is_refused() -> None:
    with pytest.raises(ShapeError, match="has 31 pixels"):
        blur(torch.zeros(1, 4, 9, 14), 3, 31)
