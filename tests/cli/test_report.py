"""`report` uses what `measure` kept, and refuses to replace files unasked."""

from __future__ import annotations

import json
import shutil

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


@pytest.fixture(scope="module")
def run_folder(folder, tmp_path_factory):
    """A training run of 200 steps that loses motion; its captions are not to be trusted."""
    run = tmp_path_factory.mktemp("training") / "mine"
    lines = []
    for step, name, share in ((0, "full", 1.0), (100, "full", 0.9), (200, "base", 0.31)):
        place = f"videos/step-{step:06d}/1-x.mp4"
        (run / place).parent.mkdir(parents=True)
        shutil.copy(folder / name / "x.mp4", run / place)
        video = {
            "name": "1-x", "file": place, "prompt": "<script>alert(1)</script>",
            "motion_degree": 90 * share, "relative_motion": share, "first_frame_psnr": 31.0,
        }  # fmt: skip
        outside = {**video, "file": "videos/step-000000/../../../x.mp4"}
        held_out = {"0-0.25": 0.5 - step / 1000, "0.75-1": 0.01, "bad": float("nan")}
        figures = {"relative_motion": share, "warn_below": 0.7, "videos": [video, outside]}
        lines.append({"step": step, "held_out": held_out, **figures})
    (run / "validation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    losses = [{"step": s, "steps": 200, "loss": 1 / s} for s in range(1, 201)]
    text = "".join(json.dumps(one) + "\n" for one in losses)
    (run / "log.jsonl").write_text(text + '{"step": 20')  # torn, as by a kill
    return run


def test_a_training_run_has_a_page_of_its_curves_and_of_its_videos_step_beside_step(
    run_folder, tmp_path
):
    page = tmp_path / "run.html"
    result = run("report", run_folder, "-o", page)
    assert result.exit_code == 0, result.output
    assert "the videos of 1 clip, step beside step" in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "Training run mine" in text and "after step 200 of 200" in text
    assert (text.count("<svg"), text.count("<video")) == (4, 3)
    assert "motion is being lost" in text and "step 0: the base" in text
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    assert "noise<br>0.75-1" in text and "noise<br>bad" not in text  # NaN is no loss


def test_a_training_run_takes_no_options_of_sets_and_needs_a_line_of_its_log(run_folder, tmp_path):
    page = ["-o", tmp_path / "run.html"]
    for words, fix in (
        ([run_folder, "--images", tmp_path], "Leave --images out."),
        ([run_folder, tmp_path], "Give it alone"),
    ):
        refused = run("report", *words, *page)
        assert refused.exit_code == 2 and fix in refused.stderr
    (tmp_path / "log.jsonl").touch()
    assert "has logged nothing yet" in run("report", tmp_path, *page).stderr
