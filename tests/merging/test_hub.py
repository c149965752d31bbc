"""Inputs on the hub: what is in the cache is merged without a connection."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import constants

from motionmerge.errors import CheckpointError
from motionmerge.io.weights import save_weights
from motionmerge.merging.inputs.hub import hub_weights
from motionmerge.merging.merge import merge, realise
from motionmerge.merging.recipes.recipe import Recipe

from .conftest import same_bits

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, as it lays downloads out, of a pipeline and a LoRA; no connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files = {
        ("maker", "video", "unet/diffusion_pytorch_model.safetensors"): {"w": torch.ones(4, 4)},
        ("maker", "tuned", "unet/diffusion_pytorch_model.safetensors"): {"w": torch.zeros(4, 4)},
        ("maker", "single", "weights/tuned.safetensors"): {"unet.w": torch.full((4, 4), 3.0)},
    }
    for (owner, name, path), tensors in files.items():
        repo = tmp_path / "hub" / f"models--{owner}--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        save_weights(repo / "snapshots" / COMMIT / path, tensors)
        index = '{"unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}'
        (repo / "snapshots" / COMMIT / "model_index.json").write_text(index)
    return tmp_path


def test_what_the_cache_holds_is_merged_without_a_connection(cache):
    recipe = Recipe.parse(
        "inputs: {base: 'hub:maker/video', tuned: 'hub:maker/tuned@main'}\n"
        "experts: {merged: base - 0.25 * (tuned - base)}\n"
    )
    assert torch.equal(realise(recipe)["merged"]["unet.w"], torch.full((4, 4), 1.25))
    merge(recipe, cache / "out")
    again = Recipe.load(cache / "out" / "recipe.yaml")
    assert again.inputs["base"].path == "hub:maker/video" and again.inputs["base"].sha256


def test_one_file_or_folder_of_a_repository_is_meant_by_its_path(cache):
    assert hub_weights("maker/single/weights/tuned.safetensors").is_file()
    assert hub_weights("maker/video/unet").name == "unet"
    recipe = Recipe.parse(
        "inputs: {base: 'hub:maker/video', tuned: 'hub:maker/single/weights/tuned.safetensors'}\n"
        "experts: {merged: base + 0.5 * (tuned - base)}\n"
    )
    assert same_bits(realise(recipe)["merged"]["unet.w"], torch.full((4, 4), 2.0))


def test_an_input_that_is_replaced_by_one_on_the_hub_is_recorded_by_its_name(cache):
    recipe = Recipe.parse("inputs: {base: 'memory:base'}\nexperts: {same: base}\n")
    merge(recipe, cache / "out", inputs={"base": "hub:maker/video"})
    assert Recipe.load(cache / "out" / "recipe.yaml").inputs["base"].path == "hub:maker/video"


def test_what_is_not_in_the_cache_is_refused_with_a_fix(cache):
    for name in ("nobody/nothing", "maker/single/weights/other.safetensors"):
        with pytest.raises(CheckpointError, match="not in the cache") as caught:
            hub_weights(name)
        assert "hf auth login" in str(caught.value.fix)


@pytest.mark.parametrize("name", ["video", "", "maker/video/../../x", "maker/video@", "a b/c"])
def test_what_is_no_name_on_the_hub_is_refused(name):
    with pytest.raises(CheckpointError, match="is no name on the hub"):
        hub_weights(name)


def test_a_part_of_a_pipeline_is_not_written_as_a_whole_one(cache):
    recipe = Recipe.parse("inputs: {base: 'hub:maker/video'}\nexperts: {same: base}\n")
    with pytest.raises(CheckpointError, match="without its vae"):
        merge(recipe, cache / "out", layout="pipeline")
