"""`motionmerge evaluate pocket`: the shipped weights or one's own, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import ConfigError
from motionmerge.models.pocket.components import weights_path


def evaluate(*arguments: str):
    return CliRunner().invoke(app, ["evaluate", "pocket", *arguments])


def measure(folder: Path, *arguments: str) -> dict[str, object]:
    short = ["--num", "6", "--steps", "1", "--condition", "tuned", "--json", "-o", str(folder)]
    result = evaluate(*short, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["conditions"][0]


def test_weights_of_ones_own_take_the_place_of_shipped_ones(tmp_path: Path):
    shipped = measure(tmp_path)
    own = measure(tmp_path, "--input", f"tuned={weights_path('base')}")
    again = measure(tmp_path, "--input", f"tuned={weights_path('tuned')}")
    assert again == shipped
    assert own != shipped
    page = (tmp_path / "index.html").read_text()  # of the last run
    assert "6 prompts of the test split" in page
    assert page.count(">not measured<") == 14


@pytest.mark.parametrize("pair", ["tuned", "other=x", "tuned=nowhere.safetensors"])
def test_weights_that_are_no_pair_of_name_and_file_are_refused(tmp_path: Path, pair: str):
    result = evaluate("--input", pair, "-o", str(tmp_path / "out"))
    assert result.exit_code != 0
    assert isinstance(result.exception, ConfigError) or pair in result.stderr
    assert not (tmp_path / "out").exists()


def test_docs_are_not_written_from_weights_that_are_not_shipped(tmp_path: Path):
    own = f"tuned={weights_path('base')}"
    result = evaluate("--input", own, "--write-docs", "-o", str(tmp_path / "out"))
    assert result.exit_code != 0
    assert not (tmp_path / "out").exists()
