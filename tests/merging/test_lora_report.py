"""The doctor's note on a LoRA file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from motionmerge.io.weights import save_weights
from motionmerge.merging.lora.report import describe_lora


def file_of(path: Path, metadata: dict[str, str], *, rank: int = 64) -> Path:
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(rank, 24),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(24, rank),
        "diffusion_model.blocks.0.cross_attn.k.lora_down.weight": torch.ones(4, 24),
        "diffusion_model.blocks.0.cross_attn.k.lora_up.weight": torch.ones(24, 4),
        "diffusion_model.blocks.0.cross_attn.k.alpha": torch.tensor(2.0),
        "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 24),
        "lora_te_layer.lora_down.weight": torch.ones(1, 2),
        "lora_te_layer.lora_up.weight": torch.ones(2, 1),
        "patch_embedding.weight": torch.ones(2),
    }
    save_weights(path / "style.safetensors", tensors, metadata)
    return path / "style.safetensors"


def test_strength_is_told_by_group_with_where_it_stands(tmp_path: Path) -> None:
    found = describe_lora(file_of(tmp_path, {"lora_alpha": "8"}))
    joint, cross = found.groups["joint"], found.groups["cross_attention"]
    assert (joint.layers, joint.ranks, joint.alphas) == (2, (64, 64), (8.0, 8.0))
    assert joint.scales == (0.125, 0.125)
    assert joint.origins == ("`lora_alpha` in the header", "plain differences")
    assert (cross.ranks, cross.scales, cross.origins) == ((4, 4), (0.5, 0.5), ("the file's alpha",))
    assert "ComfyUI and original code (diffusion_model.)" in found.styles
    assert found.reached is None
    assert list(found.strangers) == ["patch_embedding.weight"]
    assert not found.warnings


@pytest.mark.parametrize(("rank", "warned"), [(32, False), (33, True)])
def test_a_high_rank_without_alpha_is_warned_of(tmp_path: Path, rank: int, warned: bool) -> None:
    found = describe_lora(file_of(tmp_path, {}, rank=rank))
    assert any(f"rank of {rank}" in warning for warning in found.warnings) is warned


def test_a_base_tells_what_is_reached_and_how_large_the_change_is(tmp_path: Path) -> None:
    base = {"blocks.0.attn1.to_q.weight": torch.full((24, 24), 4.0), "other": torch.ones(2)}
    shapes = {name: tuple(value.shape) for name, value in base.items()}
    file = file_of(tmp_path, {"lora_alpha": "8"})
    found = describe_lora(file, shapes, read_base=base.__getitem__)
    assert found.reached == ("blocks.0.attn1.to_q.weight",)
    assert found.groups["joint"].change == pytest.approx(64 / 8 / 4)
    assert "2.0 times as large" in found.warnings[0]
    assert set(found.strangers) == {
        "diffusion_model.blocks.0.cross_attn.k", "diffusion_model.blocks.0.diff_m",
        "lora_te_layer", "patch_embedding.weight",
    }  # fmt: skip
