"""`report` uses what `measure` kept, and refuses to replace files unasked."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.io.video import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=(64, 64), mode="bicubic")[0].clamp(0, 1)
    for name, step in (("base", 1), ("full", 3)):
        video = torch.stack([smooth.roll(step * index, dims=2) for index in range(4)])
        write_video(folder / name / "x.mp4", video, metadata={"prompt": "a thing", "seed": 0})
    return folder


def run(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def test_sets_are_measured_once_and_compared(folder, tmp_path):
    assert run("measure", folder / "full", "-o", tmp_path / "kept").exit_code == 0
    # A value that only the kept rows have shows that they are used.
    rows = tmp_path / "kept" / "rows.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        line["value"] = 77.0 if line["metric"] == "motion_degree" else line["value"]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["report", folder / "base", f"full={tmp_path / 'kept'}", "-o", tmp_path / "r.html"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "1 scenes" not in result.stdout and "1 scene side by side" in result.stdout
    content = json.loads((tmp_path / "r.json").read_text())
    degrees = {
        row["set"]: row["mean"] for row in content["table"] if row["metric"] == "motion_degree"
    }
    assert degrees["full"] == 77.0 and 0 < degrees["base"] < 77
    assert not (folder / "base" / "rows.jsonl").exists()
    again = run(*words)
    assert again.exit_code == 2 and "--overwrite" in again.output
    wrong = run(*words, "--overwrite", "--baseline", "nobody")
    assert wrong.exit_code == 2 and "base, full" in wrong.output
    wrong = run(*words, "--overwrite", "--vbench", "nobody=x.json")
    assert wrong.exit_code == 2 and "--vbench base=PATH" in wrong.output
