"""Exported folders are whole or absent, stand on their own, and replace only earlier exports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.exports.two_experts import export_two_experts
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.merge import merge
from motionmerge.merging.recipes.recipe import Recipe

RECIPE = (
    "inputs: {base: base/transformer, tuned: tuned.safetensors}\n"
    "experts: {a: base - 0.25 * (tuned - base), b: tuned + 0.25 * (tuned - base)}\n"
    "schedule: [{expert: a, above: 0.9}, {expert: b}]\n"
)


@pytest.fixture
def folder(tmp_path):
    """A Wan pipeline as the hub's cache has it: links to blobs without endings."""
    files = {
        "model_index.json": {
            "_class_name": "WanImageToVideoPipeline",
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
        "transformer/config.json": {"num_layers": 1},
        "vae/config.json": {"z_dim": 16},
    }
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    weights = {"transformer": torch.zeros(4, 4), "vae": torch.ones(2)}
    for module, tensor in weights.items():
        name = f"{module}/diffusion_pytorch_model.safetensors"
        save_weights(blobs / module, {"w": tensor})
        files[name] = None
    for number, (name, content) in enumerate(files.items()):
        blob = blobs / (str(number) if content else name.split("/")[0])
        if content:
            blob.write_text(json.dumps(content))
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).symlink_to(blob)
    save_weights(tmp_path / "tuned.safetensors", {"w": torch.ones(4, 4)})
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def run(folder, name="out", **options):
    return export_two_experts(
        Recipe.load(folder / "r.yaml"), folder / "base", folder / name, **options
    )


def as_pipeline(folder, name):
    recipe = Recipe.parse("inputs: {base: base, tuned: base}\nexperts: {a: base}\n", folder=folder)
    merge(recipe, folder / name, layout="pipeline")
    return folder / name / "a"


@pytest.mark.parametrize("verb", ["two-experts", "pipeline"])
def test_editing_a_result_edits_no_source(folder, verb):
    run(folder) if verb == "two-experts" else as_pipeline(folder, "merged")
    made = folder / "out" if verb == "two-experts" else folder / "merged" / "a"
    assert not any(path.is_symlink() for path in made.rglob("*"))
    before = {path: path.read_bytes() for path in (folder / "base").rglob("*.json")}
    for path in made.rglob("*.json"):
        with path.open("r+") as file:
            file.write("edited")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (made / "vae/diffusion_pytorch_model.safetensors").samefile(folder / "blobs/vae")


def test_a_failed_export_leaves_nothing_and_blocks_nothing(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match=r"No space left.*\n.*Fix"):
        run(folder)
    monkeypatch.undo()
    assert not (folder / "out").exists()
    run(folder)
    assert not [path for path in folder.iterdir() if path.name.endswith((".tmp", ".old"))]


def test_a_killed_export_leaves_nothing_that_blocks_the_next(folder):
    code = (
        "import os, signal\n"
        "from motionmerge.exports import two_experts as export\n"
        "export.stream = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"export.export_two_experts({str(folder / 'r.yaml')!r}, {str(folder / 'base')!r}, "
        f"{str(folder / 'out')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "out").exists()
    run(folder)
    with open_weights(folder / "out/transformer_2") as reader:
        assert reader.read("w").unique().tolist() == [1.25]


def test_only_an_export_is_replaced_and_never_what_it_is_made_from(folder):
    run(folder)
    with pytest.raises(ConfigError, match="exists already"):
        run(folder)
    (folder / "out/vae/left").touch()
    run(folder, overwrite=True)
    assert not (folder / "out/vae/left").exists()
    for name in ("base", "base/transformer", "base/out", "."):
        with pytest.raises(ConfigError, match="lie in each other"):
            run(folder, name, overwrite=True)
    (folder / "papers").mkdir()
    (folder / "papers/thesis.doc").touch()
    with pytest.raises(ConfigError, match="other things"):
        run(folder, "papers", overwrite=True)
