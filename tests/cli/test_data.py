"""`data check` finds what can be trained on and how much it moves, and says why the rest cannot."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.evaluation.clips import read_clip
from motionmerge.evaluation.motion import measure_motion
from motionmerge.io.video import write_video
from motionmerge.training.clips_manifest import read_clips_manifest


def picture(seed, height=64, width=192):
    small = np.random.default_rng(seed).integers(0, 256, (8, 24, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def moving(seed, num, step):
    wide = picture(seed)
    return np.stack([np.roll(wide, step * index, axis=1)[:, :96] for index in range(num)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "fast.mp4", moving(1, 6, 3), fps=8)
    write_video(folder / "still.mp4", moving(2, 5, 0), fps=8)
    write_video(folder / "two.mp4", np.concatenate([moving(3, 5, 1), moving(4, 3, 1)]), fps=8)
    (folder / "again.mp4").write_bytes((folder / "fast.mp4").read_bytes())
    (folder / "torn.mp4").write_bytes((folder / "fast.mp4").read_bytes()[:900])
    lines = [
        {"file_name": name, "text": f"<b>{name}</b>"}
        for name in ("fast.mp4", "still.mp4", "two.mp4", "again.mp4", "torn.mp4", "gone.mp4")
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_video(folder / "mute.mp4", moving(5, 5, 1), fps=8)
    return folder


def check(*words):
    words = ["data", "check", *map(str, words), "--num-frames", "5"]
    return CliRunner().invoke(app, words)


@pytest.fixture(scope="module")
def checked(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("checked")
    result = check(folder, "-o", output)
    assert result.exit_code == 0, result.output
    return output, result


def test_what_is_kept_has_its_motion_as_measure_has_it(folder, checked):
    output, result = checked
    clips = {clip.name: clip for clip in read_clips_manifest(output / "clips.jsonl", folder=folder)}
    assert list(clips) == ["again.mp4", "still.mp4", "two.mp4"]
    assert [(shot.first, shot.end) for shot in clips["two.mp4"].shots] == [(0, 5)]
    assert clips["still.mp4"].shots[0].motion == pytest.approx(0, abs=0.5)
    expected = measure_motion(read_clip(folder / "fast.mp4"))["motion_degree"]
    assert clips["again.mp4"].shots[0].motion == pytest.approx(expected, rel=0.02)
    assert clips["again.mp4"].caption == "<b>again.mp4</b>"
    assert "3 clips, 3 shots, 16 frames" in result.stdout
    assert "33% of the shots move less than 5 px/s" in result.stdout


def test_everything_that_is_left_out_has_its_reason(checked):
    output, result = checked
    rows = [json.loads(line) for line in (output / "left-out.jsonl").read_text().splitlines()]
    reasons = {row["name"]: row["reason"] for row in rows}
    assert reasons["metadata.jsonl, line 6"] == "There is no video gone.mp4."
    assert reasons["mute.mp4"] == "It has no caption."
    assert reasons["fast.mp4"] == "It has the same bytes as again.mp4."
    assert reasons["two.mp4, frames 5 to 7"] == "The shot has fewer than 5 frames."
    assert "no frame" in reasons["torn.mp4"]
    assert len(reasons) == len(rows) == 5
    assert "mute.mp4: It has no caption." in result.stdout


def test_the_page_needs_nothing_else_and_runs_nothing(checked):
    page = (checked[0] / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "<svg" in page and "&lt;b&gt;still.mp4" in page and "<b>still.mp4</b>" not in page
    assert 'src="http' not in page and "<script" not in page


def test_what_was_found_is_not_looked_for_again_and_parts_make_a_whole(folder, checked, tmp_path):
    rows = [json.loads(line) for line in (checked[0] / "checks.jsonl").read_text().splitlines()]
    for row in rows:
        row["found"]["motions"] = [77.0] * len(row["found"]["motions"])
    (tmp_path / "checks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    for number in (1, 2):
        assert check(folder, "-o", tmp_path, "--shard", f"{number}/2").exit_code == 0
    assert not (tmp_path / "clips.jsonl").exists()
    result = check(folder, "-o", tmp_path, "--json")
    content = json.loads(result.stdout)
    motions = [shot[2] for clip in content["clips"] for shot in clip["shots"]]
    assert motions.count(77.0) == 2 and content["summary"]["left_out"] == 5
    added = "".join(path.read_text() for path in tmp_path.glob("checks-*"))
    assert len(added.splitlines()) == len(rows) - 2


def test_a_caption_for_the_rest_and_what_cannot_be_asked(folder, checked, tmp_path):
    result = check(folder, "--caption", "", "--json", "-o", checked[0])
    assert "mute.mp4" in [clip["name"] for clip in json.loads(result.stdout)["clips"]]
    for words in ((folder, "--shard", "1/2"), (folder, "-o", folder / "x"), (tmp_path,)):
        failed = check(*words)
        assert failed.exit_code == 2 and "Fix:" in failed.stderr
    assert check(folder, "-o", folder).exit_code == 2 and not (folder / "x").exists()
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    failed = check(tmp_path, "--caption", "x")
    assert failed.exit_code == 2 and "Nothing in" in failed.stderr
    assert "x.mp4: It cannot be decoded" in failed.stdout


def test_a_folder_without_any_caption_is_told_how_to_give_some(folder, tmp_path):
    (tmp_path / "mute.mp4").write_bytes((folder / "mute.mp4").read_bytes())
    refused = check(tmp_path)
    assert refused.exit_code == 2 and "or pass --caption" in refused.stderr
    assert check(tmp_path, "--caption", "").exit_code == 0
