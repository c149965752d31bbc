"""`merge`, `extrapolate` and `show` on files, as a user calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.io.video import write_video
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.compute.compiled import compiled_kernels
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.recipe import Recipe


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {
        "unet.temporal_in.proj_in.weight": torch.randn(8, 8, generator=generator),
        "unet.conv_in.bias": torch.randn(8, generator=generator),
    }
    save_weights("base.safetensors", base)
    save_weights("tuned.safetensors", {name: value + 0.1 for name, value in base.items()})
    return ["--input", "base=base.safetensors", "--input", "tuned=tuned.safetensors"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_merge_writes_every_expert_of_a_shipped_recipe(weights, tmp_path):
    result = call("merge", "edg-official", "-o", "out", *weights)
    assert result.exit_code == 0, result.output
    assert "survives rounding" in result.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"dynamics.safetensors", "consistency.safetensors", "recipe.yaml"}
    assert call("merge", "edg-official", "-o", "out", *weights).exit_code == 2


def test_merge_reports_as_json_and_a_dry_run_writes_nothing(weights, tmp_path):
    result = call("merge", "calm", "-o", "out", "--dry-run", "--json", *weights)
    report = json.loads(result.stdout)
    assert report["dry_run"] and report["experts"]["calm"]["computed"] == 2
    assert not (tmp_path / "out").exists()


def test_merge_changes_the_dtype_when_asked(weights):
    call("merge", "calm", "-o", "out", "--dtype", "fp16", *weights)
    with open_weights("out/calm.safetensors") as reader:
        assert reader.dtype("unet.conv_in.bias").torch == torch.float16


WITHOUT_TORCH = """
import json, os, sys
from motionmerge.cli import app
for folder in ("float32", "float16", "bfloat16"):
    os.chdir(folder)
    for words in json.loads(sys.argv[1]):
        print(folder, words, file=sys.stderr)
        app(words, standalone_mode=False)
        assert "torch" not in sys.modules
    os.chdir("..")
"""


def test_what_compiled_kernels_know_is_merged_without_torch(weights):
    if compiled_kernels() is None:
        pytest.skip("there was no C compiler when the package was installed")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folder = Path(str(dtype).removeprefix("torch."))
        folder.mkdir()
        for name in ("base", "tuned"):
            with open_weights(f"{name}.safetensors") as reader:
                tensors = {key: reader.read(key).to(dtype) for key in reader.keys()}  # noqa: SIM118
            save_weights(folder / f"{name}.safetensors", tensors)
    commands = [
        ["merge", "edg-official", *weights, "-o", "dry", "--dry-run"],
        ["merge", "edg-official", *weights, "-o", "out"],
        # Stochastic rounding takes other steps, which are not one pass.
        ["merge", "edg-official", *weights, "-o", "random", "--stochastic-rounding", "0"],
        ["extrapolate", "base.safetensors", "tuned.safetensors", "-o", "beyond"],
        ["show", "base.safetensors", "--groups"],
    ]
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


THREADS = """
import sys
from motionmerge.cli import app
from motionmerge.merging.algebra import functions
real = functions.keep_largest
def keep_largest(tensor, *, keep):
    import torch
    print("threads", torch.get_num_threads())
    return real(tensor, keep=keep)
functions.keep_largest = keep_largest
app(sys.argv[1:], standalone_mode=False)
"""


def test_all_whole_tensors_are_computed_by_as_many_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {f"{name}.weight": torch.ones(8, 8) for name in "abc"}
    save_weights("base.safetensors", base)
    save_weights("tuned.safetensors", {name: value + 0.1 for name, value in base.items()})
    Path("trimmed.yaml").write_text(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\n"
        "experts: {e: 'base + trim(tuned - base, keep=0.5)'}\n"
    )
    command = [sys.executable, "-c", THREADS, "merge", "trimmed.yaml", "-o", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    seen = [line for line in result.stdout.splitlines() if line.startswith("threads")]
    assert len(seen) == 3 and len(set(seen)) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "nothing.yaml", "-o", "out"),
        ("merge", "calm", "-o", "out", "--input", "base"),
        ("merge", "calm", "-o", "out", "--input", "bass=x"),
        ("extrapolate", "base.safetensors", "none.safetensors", "-o", "out"),
        ("extrapolate", "base.safetensors", "tuned.safetensors", "-o", "out.safetensors"),
        ("show", "none.safetensors"),
    ],
)
def test_bad_input_ends_with_a_fix_and_exit_code_2(weights, arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Fix:" in result.stderr


@pytest.mark.parametrize(
    ("motion", "formula"),
    [(0.25, "base - 0.25 * (tuned - base)"), (-0.5, "base + 0.5 * (tuned - base)")],
)
def test_extrapolate_prints_the_recipe_that_it_ran(weights, motion, formula):
    result = call(
        "extrapolate", "base.safetensors", "tuned.safetensors", "-o", "out", "--motion", motion
    )
    assert result.exit_code == 0, result.output
    recipe = Recipe.parse(result.stdout[: result.stdout.index("\n\n")])
    assert recipe.parameters == {"motion": motion}
    assert str(recipe.written_out().experts["extrapolated"]) == formula
    expected = realise(recipe)["extrapolated"]
    with open_weights("out/extrapolated.safetensors") as reader:
        assert all(torch.equal(reader.read(name), expected[name]) for name in expected)


def test_show_prints_the_recipe_that_made_a_file(weights):
    call("merge", "edg-official", "-o", "out", *weights)
    result = call("show", "out/dynamics.safetensors", "--groups", "--cite")
    assert result.exit_code == 0, result.output
    assert "formula: base + 0.75 * dare(-0.25 * (tuned - base)" in result.stdout
    assert "temporal: 64" in result.stdout
    assert "Super Mario" in result.stdout
    found = json.loads(call("show", "out/dynamics.safetensors", "--json").stdout)
    assert Recipe.parse(found["recipe"]) == Recipe.made("out/dynamics.safetensors")


def test_show_draws_the_schedule_of_a_recipe(weights):
    result = call("show", "edg-official")
    assert "schedule: 1.0 |dynamics" in result.stdout
    assert "consistency: tuned + gamma * dare(" in result.stdout


def test_show_says_which_inputs_of_a_shipped_recipe_are_to_be_given(weights):
    full, base = (f"missing until you give it: --input {name}=FILE" for name in ("full", "base"))
    assert full in call("show", "undistill").stdout
    assert f"{base} (generate takes its own model)" in call("show", "undistill-lora").stdout


def test_show_tells_how_weights_were_trained_and_keeps_escapes_from_the_terminal(weights):
    found = json.loads(call("show", "pocket:base", "--json").stdout)
    assert found["model_card"]["run"] == "base"
    card = json.dumps({"run": "\x1b[2Jgone", "result": {"steps": 3}})
    save_weights("own.safetensors", {"a": torch.zeros(1)}, {"model_card": card})
    printed = call("show", "own.safetensors").stdout
    assert "run: ?[2Jgone" in printed and "\x1b" not in printed
    save_weights("odd.safetensors", {"a": torch.zeros(1)}, {"model_card": "[1"})
    assert call("show", "odd.safetensors").exit_code == 0


def test_show_counts_the_tensors_of_any_weights(weights):
    found = json.loads(call("show", "base.safetensors", "--groups", "--json").stdout)
    assert (found["tensors"], found["parameters"], found["dtypes"]) == (2, 72, ["fp32"])
    assert found["groups"] == {"temporal": 64, "residual": 8}


def test_show_says_what_merging_a_recipe_takes_and_whether_its_inputs_fit(weights, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\n"
        "experts: {calm: base + 0.5 * (tuned - base)}\n"
    )
    found = json.loads(call("show", recipe, "--json").stdout)
    assert found["merging_takes"]["disk_bytes"] == 4 * 72
    assert "disk_bytes: 288" in call("show", recipe).stdout
    save_weights("tuned.safetensors", {"other": torch.ones(2)})
    found = json.loads(call("show", recipe, "--json").stdout)
    assert "in common" in found["merging_takes"]["impossible"]
    recipe.write_text(recipe.read_text().replace("tuned.safetensors", "gone.safetensors"))
    assert "merging_takes" not in json.loads(call("show", recipe, "--json").stdout)


def test_a_dry_run_says_that_it_reads_only_the_headers_of_checkpoints(weights, tmp_path):
    with open_weights("tuned.safetensors") as reader:
        tuned = {name: reader.read(name) / 0 for name in reader.keys()}  # noqa: SIM118
    save_weights("tuned.safetensors", tuned)
    assert call("merge", "calm", "-o", "out", "--dry-run", *weights).exit_code == 0
    result = call("merge", "calm", "-o", "out", *weights)
    assert result.exit_code == 2 and "infinity" in result.stderr
    assert not (tmp_path / "out").exists()
    said = "Of checkpoints only headers are read: NaN in them is found without this flag."
    for verb in (("merge",), ("extrapolate",), ("export", "comfyui")):
        shown = call(*verb, "--help").stdout.replace("│", " ")
        assert said in " ".join(shown.split())


def test_show_prints_the_recipe_and_the_settings_that_made_a_video(tmp_path):
    frames, recipe = np.zeros((2, 32, 32, 3), np.uint8), "experts: {e: base}\ninputs: {base: b}\n"
    deep = json.loads("[" * 400 + "]" * 400)
    about = {"motionmerge": "0.1.0", "prompt": "a\x1b[2Jcat", "seed": 7, "lora": 1, "deep": deep}
    write_video(tmp_path / "ours.mp4", frames, fps=8, metadata={**about, "recipe": recipe})
    write_video(tmp_path / "theirs.mp4", frames, fps=8)
    result = call("show", str(tmp_path / "ours.mp4"))
    assert result.exit_code == 0, result.output
    assert "seed: 7" in result.stdout and "a?[2Jcat" in result.stdout
    assert result.stdout.endswith("The recipe that made it:\n\n" + recipe)
    assert json.loads(call("show", str(tmp_path / "ours.mp4"), "--json").stdout)["recipe"] == recipe
    write_video(tmp_path / "plain.mp4", frames, fps=8, metadata=about)
    assert "that made it" not in call("show", str(tmp_path / "plain.mp4")).stdout
    refused = call("show", str(tmp_path / "theirs.mp4"))
    assert refused.exit_code == 2 and "does not say how it was made" in refused.stderr
