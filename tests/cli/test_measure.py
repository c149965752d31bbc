"""`measure` prints the worst first, fails where it should, and says what it lacks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.cli.printing import quoted
from motionmerge.io.video import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=(64, 64), mode="bicubic")[0].clamp(0, 1)
    still = smooth.expand(4, -1, -1, -1)
    moving = torch.stack([smooth.roll(3 * step, dims=2) for step in range(4)])
    write_video(folder / "still.mp4", still, metadata={"prompt": "a thing, camera static"})
    write_video(folder / "moving.mp4", moving)
    return folder


def run(*words):
    return CliRunner().invoke(app, ["measure", *map(str, words)])


def test_every_video_has_a_line_and_the_stillest_comes_first(folder, tmp_path):
    result = run(folder, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    first, second, *rest = result.stdout.splitlines()
    assert first.startswith("! still.mp4") and "FROZEN" in first and "as asked" in first
    assert second.startswith("  moving.mp4") and "px/s" in second
    assert any("2 measured, 0 cannot be measured, 1 with warnings" in line for line in rest)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["metrics"]["motion_degree"]["num_videos"] == 2
    again = run(folder, "-o", tmp_path / "out", "--json")
    videos = json.loads(again.stdout)["videos"]
    assert [video["warnings"] != [] for video in videos] == [True, False]
    assert videos[0]["values"]["frozen_share"] == 1


def test_seeds_of_a_prompt_are_said_to_count_once_in_intervals(folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.mp4").write_bytes((folder / "still.mp4").read_bytes())
    assert "intervals are over 1 prompt, each with its photo" in run(tmp_path).stdout
    assert "intervals are over" not in run(folder).stdout, "every video has its own prompt"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--fail-when", "motion_degree < 2"], 1),
        (["--fail-when", "motion_degree < 0"], 0),
        (["--fail-when", "motion < 2"], 2),
        (["--fail-when", "first_frame_psnr < 20"], 2),
        (["--shard", "1/2"], 2),
        (["--shard", "3/2"], 2),
        (["--images", "nowhere"], 2),
    ],
)
def test_the_exit_code_is_for_scripts(words, code, folder):
    result = run(folder / "still.mp4", *words)
    assert result.exit_code == code, result.output
    assert ("Fix:" in result.stderr) == (code == 2)


def test_a_video_that_cannot_be_measured_is_named_and_fails(folder, tmp_path):
    (tmp_path / "empty.mp4").touch()
    result = run(folder / "moving.mp4", tmp_path / "empty.mp4")
    assert result.exit_code == 1
    assert result.stdout.startswith("! empty.mp4")
    assert "1 measured, 1 cannot be" in result.stdout
    assert run(tmp_path / "none.mp4").exit_code == 2


def test_a_name_from_a_stranger_does_not_command_the_terminal(folder, tmp_path):
    video = tmp_path / "\x1b[2Jx.mp4"
    video.write_bytes((folder / "still.mp4").read_bytes())
    result = run(video, "--fail-when", "motion_degree < 2")
    assert result.exit_code == 1
    assert "fail when motion_degree < 2: ?[2Jx.mp4" in result.stdout
    assert "\x1b" not in result.output


def test_the_summary_of_the_whole_does_not_stay_beside_a_part(folder, tmp_path):
    assert run(folder, "-o", tmp_path).exit_code == 0
    assert (tmp_path / "summary.json").is_file()
    assert run(folder, "-o", tmp_path, "--shard", "1/2").exit_code == 0
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-here/x", "\x1b[2J"])
def test_a_name_that_leads_nowhere_is_an_error_of_the_user(name):
    result = run(name)
    assert result.exit_code == 2
    assert "There is no video at" in result.stderr and "\x1b" not in result.stderr
    assert run("x.mp4", "--images", name).exit_code == 2


def test_a_name_in_another_encoding_is_printed_and_written(folder, tmp_path):
    video = tmp_path / os.fsdecode(b"\xff.mp4")
    video.write_bytes((folder / "still.mp4").read_bytes())
    video.with_suffix(".txt").write_bytes(b"caf\xe9, camera static")
    for words in ((), ("--json",), ("-o", tmp_path / "out")):
        result = run(video, *words)
        assert result.exit_code == 0, result.output


def test_renames_are_commands_without_what_a_terminal_obeys():
    assert quoted(Path("a b")) == "'a b'"
    assert quoted(Path("it's\x1b\xe9")) == r"$'it\x27s\x1b\xc3\xa9'"
