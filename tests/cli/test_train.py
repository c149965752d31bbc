"""`motionmerge train`: the runs of the pocket model, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.cli.train import PREFIX, Run
from motionmerge.io.weights import open_weights
from motionmerge.models.pocket.components import weights_path
from motionmerge.training.pocket.runs import RUNS
from motionmerge.training.pocket.video import VideoObjective


def train(*arguments: str):
    return CliRunner().invoke(app, ["train", *arguments])


def test_a_dry_run_shows_the_settings_and_trains_nothing(tmp_path: Path):
    folder = tmp_path / "run"
    result = train(
        "pocket-base", "--dry-run", "--json", "--steps", "7", "--run-folder", str(folder)
    )
    assert json.loads(result.stdout)["settings"]["steps"] == 7
    assert not folder.exists()


def test_a_base_and_its_stage_one_are_trained_and_say_so_in_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Drawing the 1500 pictures of the pool takes longer than a step; 20 do here.
    monkeypatch.setitem(VideoObjective.__init__.__kwdefaults__, "num_canvases", 20)
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    short = ["--steps", "1", "--batch-size", "2", "--precision", "no", "--json"]
    first = train("pocket-base", *short, "-o", str(base), "--run-folder", str(tmp_path / "b"))
    assert first.exit_code == 0, first.output
    spatial = "unet.down_stages.0.resnet.conv1.weight"
    temporal = "unet.temporal_in.proj_in.weight"
    for verb, name, trains, changed, kept in (
        ("pocket-tuned", "tuned", "adapter and U-Net", [spatial, temporal], []),
        ("pocket-equal", "equal", "adapter and U-Net", [spatial, temporal], []),
        ("pocket-temporal", "temporal", "adapter and temporal blocks", [temporal], [spatial]),
        ("pocket-temporal-naive", "temporal-naive", "temporal blocks", [temporal], [spatial]),
    ):
        run_folder = str(tmp_path / verb)
        second = train(
            verb,
            *short,
            *("-o", str(tuned), "--overwrite"),
            *("--run-folder", run_folder, "--base", str(base)),
        )
        assert second.exit_code == 0, second.output
        with open_weights(base) as before, open_weights(tuned) as after:
            assert before.keys() == after.keys()
            card = json.loads(after.metadata["model_card"])
            projector = [n for n in before.keys() if n.startswith("image_projector.")]  # noqa: SIM118
            assert projector
            for tensor in (*projector, *kept):
                assert before.read(tensor).equal(after.read(tensor))
            assert all(not before.read(n).equal(after.read(n)) for n in changed)
        assert (card["run"], card["trains"]) == (name, trains)
        assert card["settings"]["steps"] == 1


def test_the_shipped_weights_say_what_made_them():
    for name in ("towers", "decoder", "base", "tuned", "naive", "equal"):
        path = weights_path(name)
        assert path.stat().st_size < 12e6
        with open_weights(path) as reader:
            card = json.loads(reader.metadata["model_card"])
        assert card["run"] == name
        assert card["licence"] == "Apache-2.0"
    assert sum(p.stat().st_size for p in path.parent.iterdir()) < 30e6


def test_every_run_has_a_name_and_a_line_in_the_help():
    runs = [f"{PREFIX}{name}" for name in RUNS]
    assert list(get_args(Run)) == runs
    shown = train("--help").stdout
    for run in runs:
        assert re.search(rf"^ {run}  +[A-Z].*\.\s*$", shown, re.MULTILINE), run


def test_a_run_that_is_not_there_is_refused_with_the_names_of_all():
    result = train("pocket-adapter", "--dry-run")
    assert result.exit_code == 2
    assert "'pocket-tuned'" in result.stderr
