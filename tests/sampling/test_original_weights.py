"""Experts from original files: put into a live denoiser as if they had been converted."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from motionmerge import experts
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.switching.rehearsal import check_fit

from ..merging.test_renamed import assert_same, in_original_names, noisy
from ..tiny.denoisers import DENOISERS, state_of

STYLES = {"wan": "original Wan", "hunyuan-video": "ComfyUI's HunyuanVideo"}


@pytest.fixture(params=STYLES)
def case(request, tmp_path):
    """A denoiser with its tensors, and two original files of fine-tuned ones."""
    kind = request.param
    base = state_of(kind)
    module = DENOISERS[kind]()
    module.load_state_dict(base)
    tuned = {name: noisy(base, seed) for seed, name in enumerate(("first", "second"))}
    paths = {name: tmp_path / f"{name}.safetensors" for name in tuned}
    for name, state in tuned.items():
        named = in_original_names(state, STYLES[kind])
        save_file({f"model.diffusion_model.{n}": t for n, t in named.items()}, paths[name])
    return module, base, tuned, paths


def test_a_weights_file_is_put_into_a_denoiser(case):
    module, base, tuned, paths = case
    with experts(module, {"all": paths["first"]}):
        assert_same(dict(module.state_dict()), tuned["first"])
    assert_same(dict(module.state_dict()), base)


@pytest.mark.parametrize("placement", ["resident", "recompute"])
def test_a_recipe_of_original_files_gives_the_bits_of_converted_ones(case, placement, tmp_path):
    module, base, tuned, paths = case
    text = {
        "inputs": {name: str(path) for name, path in paths.items()},
        "experts": {
            "noisy": "first + -0.25 * (second - first)",
            "details": "second + 0.5 * dare(second - first, drop_rate=0.5, seed=1)",
        },
        "schedule": [{"expert": "noisy", "timestep": 500}, {"expert": "details"}],
    }
    recipe = Recipe.parse(json.dumps(text))
    check_fit(BoundRecipe.of(recipe), {"transformer": module})
    converted = {}
    for name, state in tuned.items():
        save_file(state, tmp_path / f"{name}-converted.safetensors")
        converted[name] = str(tmp_path / f"{name}-converted.safetensors")
    pipeline = SimpleNamespace(transformer=module, scheduler=None)
    wanted = {}
    for inputs in (converted, None):
        with experts(pipeline, recipe=recipe, inputs=inputs, placement=placement) as bank:
            for expert in bank.experts:
                bank.put_in_place(expert)
                held = {name: t.clone() for name, t in module.state_dict().items()}
                assert_same(held, wanted.setdefault(expert, held))
    assert not torch.equal(*(state["proj_out.weight"] for state in wanted.values()))
    assert_same(dict(module.state_dict()), base)
