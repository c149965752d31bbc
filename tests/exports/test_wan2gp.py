"""Recipes of LoRAs as Wan2GP's multipliers and phases, and what it cannot say."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import RecipeError
from motionmerge.exports.wan2gp import wan2gp_settings
from motionmerge.merging.recipes.recipe import Recipe

THREE = """
inputs: {base: memory:base, style: loras/style.safetensors, fast: fast.safetensors}
experts:
  opening: base - 0.5 * lora(style, 0.5)
  middle: base + lora(fast, 1.0) + lora(style, 0.25)
  end: base + lora(fast, 0.5) + lora(fast, 0.5)
schedule: [{expert: opening, above: 0.95}, {expert: middle, timestep: 600}, {expert: end}]
"""


def test_each_phase_has_the_weights_of_its_expert():
    assert wan2gp_settings(Recipe.parse(THREE)).to_dict() == {
        "activated_loras": ["style.safetensors", "fast.safetensors"],
        "loras_multipliers": "-0.25;0.25;0 0;1;1",
        "guidance_phases": 3,
        "switch_threshold": 950.0,
        "switch_threshold2": 600.0,
    }


def test_the_command_prints_what_to_type():
    result = CliRunner().invoke(app, ["export", "wan2gp", "lora-rescue", "--motion", "0.5"])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "Choose style, in this order.",
        "Loras Multipliers: -0.5;1",
        "Guidance phases: 2",
        "Phase 1 to 2 at timestep 640",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (THREE.replace("timestep: 600", "step_fraction: 0.5"), "phases change at timesteps"),
        (THREE.replace("memory:base", "base.safetensors"), "does nothing else"),
        (THREE.replace("lora(style, 0.5)", "dare(lora(style, 0.5), drop_rate=0.5, seed=0)"),
         "does nothing else"),
        (THREE.replace("schedule: [", "schedule: [{expert: end, above: 0.99}, "), "4 entries"),
        ("inputs: {base: memory:base}\nexperts: {plain: base}", "no LoRAs"),
    ],
)  # fmt: skip
def test_what_wan2gp_cannot_say_is_refused(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        wan2gp_settings(Recipe.parse(text))
    assert caught.value.fix
