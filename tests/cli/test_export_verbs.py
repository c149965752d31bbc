"""`compare` and `export` on files, as a user calls them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.io.weights import open_weights
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.lora.task_vector import lora
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.dynamicrafter import convert_unet_state_dict

from ..models.reference_weights import official_weights

PREFIX = "model.diffusion_model."
RECIPE = """
inputs: {base: weights, tuned: tuned.safetensors}
experts:
  dynamics: base - 0.25 * (tuned - base)
schedule: [{expert: dynamics}]
"""


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted folder, its U-Net alone and after a change, and a recipe of both."""
    place = tmp_path_factory.mktemp("converted")
    unet = {PREFIX + k: v for k, v in official_weights("unet_tiny").items()}
    save_file(unet | {"betas": torch.ones(4)}, place / "official.safetensors")
    assert call("convert", place / "official.safetensors", "-o", place / "folder")[0] == 0
    shutil.copytree(place / "folder/unet", place / "weights/unet")
    with open_weights(place / "folder/unet") as reader:
        tuned = {f"unet.{name}": reader.read(name) * 1.5 for name in reader.keys()}  # noqa: SIM118
    save_file(tuned, place / "tuned.safetensors")
    (place / "recipe.yaml").write_text(RECIPE)
    return place


@pytest.fixture
def work(converted, tmp_path, monkeypatch):
    """A copy of the converted folder and what goes with it, to work in."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(converted, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_an_expert_becomes_an_official_file_again(work, ending):
    words = ("export", "original", "recipe.yaml", "--model", "folder", "-o", "out")
    code, output, error = call(*words, "--format", ending, "--json")
    assert code == 0, error
    path = f"out/dynamics.{ending}"
    assert json.loads(output) == {path: len(load_file("official.safetensors"))}
    read = load_file(path) if ending == "safetensors" else torch.load(path)["state_dict"]
    assert torch.equal(read["betas"], torch.ones(4))
    ours = convert_unet_state_dict(
        {k.removeprefix(PREFIX): v for k, v in read.items() if k.startswith(PREFIX)}
    )
    expected = realise(Recipe.load("recipe.yaml"))["dynamics"]
    assert all(torch.equal(ours[name.removeprefix("unet.")], v) for name, v in expected.items())
    assert [path.name for path in (work / "out").iterdir()] == [f"dynamics.{ending}"]
    assert call(*words, "--format", ending)[0] == 2


def test_a_place_for_official_files_that_cannot_be_written_is_refused(work):
    words = ("export", "original", "recipe.yaml", "--model", "folder", "--overwrite", "-o")
    (work / "out" / "dynamics.ckpt").mkdir(parents=True)
    for output in ("recipe.yaml", "/dev/null/out", "out"):
        code, _, error = call(*words, output)
        assert code == 2, output
        assert "Cannot write" in error and "Fix:" in error
    assert (work / "recipe.yaml").read_text() == RECIPE


def test_loras_are_written_with_a_table_of_what_they_hold(work):
    code, output, error = call("export", "loras", "recipe.yaml", "-o", "out", "--rank", 2)
    assert code == 0, error
    assert "dynamics = base - 0.25 * (tuned - base), as a LoRA of rank 2 for base" in output
    assert "rank 90%" in output and "of the change" in output
    assert "motionmerge loads it" in output
    words = ("export", "loras", "recipe.yaml", "-o", "for", "--rank", 2, "--for", "diffusers")
    code, output, error = call(*words)
    assert code == 0, error
    assert "Left out, as diffusers loads none" in output and "pipe.load_lora_weights(" in output
    with open_weights("out/dynamics.safetensors") as reader:
        assert all(name.startswith("unet.") for name in reader.keys())  # noqa: SIM118


def test_a_lora_in_official_keys_fits_the_official_file(work):
    words = ("export", "loras", "recipe.yaml", "--keys", "original", "--rank", 200, "-o", "out")
    code, _, error = call(*words)
    assert code == 0, error
    assert call("export", "original", "recipe.yaml", "--model", "folder", "-o", "whole")[0] == 0
    unet = {
        name: value
        for name, value in load_file("official.safetensors").items()
        if name.startswith(PREFIX)
    }
    with open_weights("out/dynamics.safetensors") as reader:
        assert all(name.startswith("diffusion_model.") for name in reader.keys())  # noqa: SIM118
    merged = (
        Checkpoint.from_tensors(unet, name="official") + lora("out/dynamics.safetensors", 1.0)
    ).tensors()
    expert = torch.load("whole/dynamics.ckpt")["state_dict"]
    changed = [name for name in unet if not torch.equal(merged[name], unet[name])]
    assert changed == list(unet)
    for name in changed:
        torch.testing.assert_close(merged[name], expert[name], atol=1e-5, rtol=1e-4)


def test_a_dry_run_of_an_export_writes_nothing(work):
    for words in (("loras",), ("original", "--model", "folder")):
        code, output, error = call("export", *words, "recipe.yaml", "-o", "out", "--dry-run")
        assert code == 0, error
        assert "dry run" in output and not (work / "out").exists()


def test_an_official_file_may_lack_no_tensor_of_the_folder(work):
    with open_weights("folder/unet") as reader:
        names = reader.keys()
        part = {f"unet.{name}": reader.read(name) for name in names if "fps" not in name}
    save_file(part, "part.safetensors")
    save_file({name: 2 * value for name, value in part.items()}, "tuned.safetensors")
    words = ("export", "original", "recipe.yaml", "--model", "folder", "-o", "out")
    code, _, error = call(*words, "--input", "base=part.safetensors")
    assert code == 2 and "does not give the tensors of" in error and "Fix:" in error
    assert not list((work / "out").iterdir()) if (work / "out").exists() else True


def test_names_are_chosen_once_and_only_where_they_are_known(work):
    words = ("export", "loras", "recipe.yaml", "-o", "out")
    code, _, error = call(*words, "--for", "comfyui", "--keys", "original")
    assert code == 2 and "both choose the names" in error
    code, _, error = call(*words, "--for", "comfyui")
    assert code == 2 and "No original names are known" in error
    code, _, error = call("export", "comfyui", "recipe.yaml", "-o", "out")
    assert code == 2 and "No original names are known" in error
    assert "`motionmerge export loras --for diffusers`" in error
    code, _, error = call(*words, "--for", "diffusers", "--dry-run")
    assert code == 0, error


def test_a_wan_expert_is_exported_for_comfyui_and_wan2gp(work):
    torch.manual_seed(0)
    base = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=8, num_layers=1,
    ).state_dict()  # fmt: skip
    save_file(base, "weights.safetensors")
    save_file({name: value + 0.1 for name, value in base.items()}, "tuned.safetensors")
    (work / "recipe.yaml").write_text(RECIPE.replace("base: weights", "base: weights.safetensors"))
    code, output, error = call("export", "comfyui", "recipe.yaml", "-o", "whole")
    assert code == 0, error
    assert "head.modulation" in load_file("whole/dynamics.safetensors")
    assert "models/diffusion_models" in output
    for tool, text in (("comfyui", "models/loras"), ("wan2gp", "Loras Multipliers: 1")):
        words = ("export", "loras", "recipe.yaml", "--for", tool, "--rank", 2, "-o", tool)
        code, output, error = call(*words)
        assert code == 0, error
        assert text in output
        assert json.loads(call(*words, "--overwrite", "--json")[1])["dynamics"]["rank"] == 2


def test_an_export_lists_what_it_keeps_as_merge_does(work):
    torch.manual_seed(0)
    base = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=8, num_layers=1,
    ).state_dict()  # fmt: skip
    save_file(base, "weights.safetensors")
    less = {name: value + 0.1 for name, value in base.items() if "attn1.to_q" not in name}
    save_file(less, "tuned.safetensors")
    (work / "recipe.yaml").write_text(RECIPE.replace("base: weights", "base: weights.safetensors"))
    for number, verb in enumerate((("merge",), ("export", "comfyui"), ("export", "loras"))):
        words = (*verb, "recipe.yaml", "-o", str(number))
        code, _, error = call(*words)
        assert code == 2 and "missing on one side" in error
        code, output, error = call(*words, "--missing", "keep")
        assert code == 0, error
        assert "Warning: 2 tensors were not in every input and were kept: `blocks.0." in output


def test_two_experts_of_a_model_that_has_no_place_for_them_are_refused(work):
    words = ("export", "two-experts", "recipe.yaml", "--model", "folder", "-o", "out")
    code, _, error = call(*words)
    assert code == 2
    assert "no Wan pipeline" in error and "Fix:" in error
    assert not (work / "out").exists()


def test_compare_prints_groups_and_draws(work):
    code, output, error = call("compare", "folder/unet", "folder/unet", "--plot", "plot.svg")
    assert code == 0, error
    assert "temporal" in output and "100.00%" not in output
    assert (work / "plot.svg").exists()
    code, output, _ = call("compare", "weights", "tuned.safetensors", "--json")
    found = json.loads(output)
    assert found["total"]["relative"] == pytest.approx(0.5, rel=1e-5)
    assert found["total"]["cosine"] == pytest.approx(1)


def test_compare_of_nothing_in_common_ends_with_a_fix(work):
    save_file({"layers.0.weight": torch.ones(4, 4)}, "another.safetensors")
    code, _, error = call("compare", "another.safetensors", "tuned.safetensors")
    assert code == 2
    assert "Fix:" in error


def test_show_counts_the_groups_of_a_pipeline_folder(work):
    code, output, _ = call("show", "weights", "--groups", "--json")
    assert code == 0
    found = json.loads(output)["groups"]
    assert {"temporal", "spatial", "cross_attention", "residual", "embeddings"} <= found.keys()
    assert "other" not in found


def test_show_cites_what_a_recipe_calls(work):
    formula = 'base + ties(lora("a.safetensors", 1.0), tuned - base, keep=0.5)'
    (work / "many.yaml").write_text(RECIPE.replace("base - 0.25 * (tuned - base)", f"'{formula}'"))
    code, output, error = call("show", "many.yaml", "--cite")
    assert code == 0, error
    assert all(name in output for name in ("tian2025", "yadav2023ties", "hu2022lora"))
    assert "yu2024" not in output
