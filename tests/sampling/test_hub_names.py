"""`hub:owner/name` stands wherever `generate` and `batch` take weights; a cache is enough."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from motionmerge.cli.video_flags import VideoFlags
from motionmerge.io.weights import save_weights
from motionmerge.merging.recipes.recipe import Recipe

COMMIT = "a" * 40
KEY = "transformer.blocks.0.attn1.to_q"


@pytest.fixture
def cache(tmp_path: Path, stored_wan: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of links to blobs with a LoRA, a denoiser's weights and a pipeline; no connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    width = 24
    lora = {
        f"{KEY}.lora_A.weight": torch.ones(1, width),
        f"{KEY}.lora_B.weight": torch.ones(width, 1),
    }
    save_weights(tmp_path / "l.safetensors", lora)
    weights = stored_wan / "transformer" / "diffusion_pytorch_model.safetensors"
    files = {"l.safetensors": tmp_path / "l.safetensors", "w.safetensors": weights}
    files |= {
        str(path.relative_to(stored_wan)): path for path in stored_wan.rglob("*") if path.is_file()
    }
    repo = tmp_path / "hub" / "models--o--n"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    for number, (name, file) in enumerate(files.items()):
        link = repo / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, repo / "blobs" / f"{number:064x}")
        link.symlink_to(repo / "blobs" / f"{number:064x}")
    return repo / "snapshots" / COMMIT


def chosen(model: Path, **flags: object) -> Recipe:
    flags_ = VideoFlags(model=str(model), device="cpu", **flags)  # type: ignore[arg-type]
    choice = flags_.chosen_experts(flags_.request.open_model())
    assert choice.recipe is not None
    assert "sha256" in str(choice.fingerprint())
    return choice.recipe


@pytest.mark.parametrize("model", ["folder", "hub"])
def test_every_flag_takes_names_on_the_hub(
    cache: Path, stored_wan: Path, tmp_path: Path, model: str
) -> None:
    where = stored_wan if model == "folder" else Path("hub:o/n")
    file = tmp_path / "r.yaml"
    file.write_text("inputs: {base: 'memory:base', l: x}\nexperts: {m: 'base + lora(l, 1.0)'}\n")
    name = "hub:o/n/l.safetensors"
    assert chosen(where, recipe=str(file), replaced=[f"l={name}"]).inputs["l"].path == name
    assert chosen(where, lora=[name]).inputs["lora_1"].path == name
    assert (
        chosen(where, lora=[str(cache / "l.safetensors")])
        .inputs["lora_1"]
        .path.endswith("l.safetensors")
    )
    assert chosen(where, weights="hub:o/n/w.safetensors").inputs["merged"].path.startswith("hub:")
    assert chosen(where, base=Path("hub:o/n/w.safetensors"), motion=0.5).inputs
    assert chosen(where, base=Path("hub:o/n"), motion=0.5).inputs
