"""`motionmerge convert` on a checkpoint of the official form."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from motionmerge.cli import app

from ..models.reference_weights import official_weights


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "unet.safetensors"
    prefix = "model.diffusion_model."
    save_file({prefix + k: v for k, v in official_weights("unet_tiny").items()}, path)
    return path


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, words)])
    return result.exit_code, result.output


def test_convert_goes_there_and_back(original, tmp_path) -> None:
    code, output = run(original, "-o", tmp_path / "folder")
    assert code == 0
    assert "There is no tokenizer in it" in output
    assert f"Wrote {tmp_path / 'folder'}." in output.replace("\n", "")
    code, output = run(tmp_path / "folder", "--to-official", "-o", tmp_path / "back.safetensors")
    assert code == 0
    back, expected = load_file(tmp_path / "back.safetensors"), load_file(original)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_a_dry_run_tells_what_is_there_and_writes_nothing(original, tmp_path) -> None:
    code, output = run(original, "--dry-run", "--json")
    report = json.loads(output[output.index("{") :])
    assert code == 0
    assert report["parameters"].keys() == {"unet"}
    assert not report["has_adapter"]
    assert list(tmp_path.iterdir()) == []


def test_wrong_use_ends_with_a_fix_and_exit_code_two(original, tmp_path) -> None:
    for words in (
        (original,),
        (original, "--to-official", "-o", tmp_path / "x.safetensors", "--dtype", "fp16"),
        (original, "-o", tmp_path / "x", "--tokenizer", tmp_path),
    ):
        code, output = run(*words)
        assert code == 2
        assert "Fix:" in output


def test_a_number_format_that_is_not_there_is_answered_with_those_that_are(original, tmp_path):
    code, output = run(original, "-o", tmp_path / "x", "--dtype", "fp17")
    assert code == 2
    said = " ".join(output.replace("│", " ").split())
    assert "'fp17' is not one of 'fp32', 'fp16', 'bf16'" in said
    assert not (tmp_path / "x").exists()
