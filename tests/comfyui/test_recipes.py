"""The node Recipe: its experts are those that `merge` writes, masks and all."""

from __future__ import annotations

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from motionmerge.errors import MotionMergeError
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.recipe import Recipe

from ..comfyui_pack.load import load_pack
from . import tiny
from .test_switch import same, side_by_side, unpatched, weights, with_lora

nodes = load_pack().nodes
TEXT = """
parameters: {motion: 0.5}
inputs: {base: memory:base, tuned: tuned.safetensors, style: style.safetensors}
experts:
  dynamics: base + dare(-motion * (tuned - base), drop_rate=0.5, seed=3)
  middle: base + only(tuned - base, 'blocks.0.*') + lora(style, 0.5)
  consistency: tuned
schedule:
  - {expert: dynamics, above: 0.9}
  - {expert: middle, step_fraction: 0.6}
  - {expert: consistency}
"""


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    save_file(tiny.state_dict("wan", 1), tmp_path / "tuned.safetensors")
    save_file(tiny.lora("wan"), tmp_path / "style.safetensors")
    for folder in ("loras", "diffusion_models"):
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, folder, ([str(tmp_path)], {".safetensors"})
        )
    folder_paths.filename_list_cache.clear()
    return tmp_path


def merged(expert, **inputs):
    with torch.inference_mode(False):
        state = {name: tensor.clone() for name, tensor in realise(
            Recipe.parse(TEXT), inputs=inputs)[expert].items()}  # fmt: skip
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(state)


def test_experts_of_a_recipe_equal_those_that_merge_writes():
    model = tiny.model("wan")
    before = weights(model)
    turned = nodes.RecipeExperts.execute(model, TEXT, "")[0]
    ours = [tiny.sample(turned, "wan", steps=10) for _ in range(2)]
    with torch.inference_mode(False):
        inputs = {
            "base": {n: t.clone() for n, t in tiny.state_dict("wan").items()},
            "tuned": {n: t.clone() for n, t in tiny.state_dict("wan", 1).items()},
            "style": {n: t.clone() for n, t in tiny.lora("wan").items()},
        }
    experts = [merged(name, **inputs) for name in ("dynamics", "middle", "consistency")]
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 10)
    theirs = side_by_side(
        (experts[0], 0.9, 0), (experts[1], float(sigmas[6]), 0), (experts[2], -1, 0)
    )
    expected = tiny.sample(theirs, "wan", steps=10)
    assert torch.equal(ours[0], ours[1])
    assert (ours[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert same(before, unpatched(model))


def test_a_shipped_recipe_is_the_knob():
    turned = nodes.RecipeExperts.execute(
        tiny.model("wan"), "lora-rescue", "motion: 0.5\nstyle: style.safetensors"
    )[0]
    theirs = side_by_side(
        (with_lora(tiny.model("wan"), "wan", -0.5), 0.64, 0),
        (with_lora(tiny.model("wan"), "wan", 1.0), -1, 0),
    )
    ours, expected = (tiny.sample(one, "wan", steps=12) for one in (turned, theirs))
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("recipe", "values", "message"),
    [
        ("lora-rescue", "style: /etc/passwd", "in none of ComfyUI's folders"),
        ("lora-rescue", "stlye: style.safetensors", "no parameter and no input `stlye`"),
        ("lora-rescue", "motion: much\nstyle: style.safetensors", "no number"),
        ("lora-rescue", "motion", "is no value"),
        ("edg-official", "", "in none of ComfyUI's folders"),
        ("lora-rescue", "style: tuned.safetensors", "Fix"),
    ],
)
def test_refusals(recipe, values, message):
    with pytest.raises((ValueError, MotionMergeError), match=message):
        nodes.RecipeExperts.execute(tiny.model("wan"), recipe, values)


def test_a_recipe_on_codes_and_scales_is_that_of_their_values():
    """But for rounding to codes again, as for any patch of such weights."""
    turned, plain = (
        nodes.RecipeExperts.execute(model, "lora-rescue", "motion: 0.5\nstyle: style.safetensors")[
            0
        ]
        for model in (tiny.scaled_model(), tiny.model("wan"))
    )
    ours, expected = (tiny.sample(one, "wan", steps=12) for one in (turned, plain))
    assert (ours - expected).abs().mean() < 0.1 * expected.abs().mean()
