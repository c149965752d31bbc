"""`motionmerge show` on a LoRA: ranks, the scale in force, what it does to a base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from motionmerge.cli import app

QUERY = "diffusion_model.blocks.{}.self_attn.q"


def rn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of two blocks; a LoRA for the first of them, and for one that is not there."""
    monkeypatch.chdir(tmp_path)
    base = {f"blocks.{i}.attn1.to_{k}.weight": rn(48, 48, seed=i) for i in (0, 1) for k in "qkv"}
    save_file(base, "base.safetensors")
    lora = {}
    for block, rank in ((0, 40), (7, 4)):
        lora[f"{QUERY.format(block)}.lora_down.weight"] = rn(rank, 48, seed=1)
        lora[f"{QUERY.format(block)}.lora_up.weight"] = rn(48, rank, seed=2)
    lora[f"{QUERY.format(7)}.alpha"] = torch.tensor(2.0)
    save_file(lora, "lora.safetensors")
    return tmp_path


def show(*words: str):
    result = CliRunner().invoke(app, ["show", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_lora_has_ranks_alphas_and_a_warning_where_no_alpha_is_known(work):
    found = json.loads(show("lora.safetensors", "--json"))["lora"]
    ((name, group),) = found["groups"].items()
    assert (group["layers"], group["ranks"]) == (2, [4, 40])
    assert (group["alphas"], group["scales"]) == ([2.0, 2.0], [0.5, 1.0])
    assert found["reached"] is None and "rank of 40" in found["warnings"][0]
    printed = show("lora.safetensors")
    assert f"{name}  " in printed and "4 to 40" in printed and "Warning: No alpha" in printed
    assert "ComfyUI" in printed


def test_with_a_base_it_says_what_is_reached_missed_and_how_large_the_change_is(work):
    found = json.loads(show("lora.safetensors", "--base", "base.safetensors", "--json"))["lora"]
    assert found["reached"] == ["blocks.0.attn1.to_q.weight"]
    assert list(found["strangers"]) == [QUERY.format(7)]
    assert found["missed"] == {
        "blocks.*.attn1.to_k.weight": 2,
        "blocks.*.attn1.to_v.weight": 2,
        "blocks.*.attn1.to_q.weight": 1,
    }
    change = rn(48, 40, seed=2) @ rn(40, 48, seed=1)
    (group,) = found["groups"].values()
    assert group["change"] == pytest.approx(float(change.norm() / rn(48, 48).norm()), rel=1e-5)
    printed = show("lora.safetensors", "--base", "base.safetensors")
    assert "reaches 1 tensors of the base; of its 6 matrices it misses" in printed
    assert "times as large as the weights" in printed


def test_a_lora_that_reaches_every_matrix_misses_none(work):
    save_file({"blocks.0.attn1.to_q.weight": rn(4, 4, seed=3)}, "one.safetensors")
    matrices = {f"{QUERY.format(0)}.lora_{side}.weight": rn(4, 4) for side in ("down", "up")}
    save_file(matrices, "its-lora.safetensors")
    printed = show("its-lora.safetensors", "--base", "one.safetensors")
    assert "reaches 1 tensors of the base, all of its 1 matrices among them" in printed


def test_a_base_is_for_loras_and_is_none_itself(work):
    for words in (
        ["base.safetensors", "--base", "base.safetensors"],
        ["calm", "--base", "base.safetensors"],
        ["lora.safetensors", "--base", "lora.safetensors"],
    ):
        result = CliRunner().invoke(app, ["show", *words])
        assert result.exit_code == 2 and "--base" in result.stderr


def test_whole_weights_are_shown_as_before(work):
    assert "lora" not in json.loads(show("base.safetensors", "--json"))


def test_a_base_may_be_weights_that_are_shipped(work):
    result = CliRunner().invoke(app, ["show", "lora.safetensors", "--base", "pocket:nosuch"])
    assert result.exit_code == 2 and "No shipped weights are called `nosuch`" in result.stderr
    result = CliRunner().invoke(app, ["show", "lora.safetensors", "--base", "pocket:base"])
    assert "pocket:base" not in result.stderr, "it is found, whether or not the LoRA fits it"
