"""`motionmerge generate`: a photo, a prompt, an mp4 that says how it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.io.video import read_video, read_video_metadata
from motionmerge.models.pocket.world import load_photo


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    load_photo("coffee").save(path)
    return path


def generate(photo: Path, *options: str, prompt: str = "the camera pans left"):
    return CliRunner().invoke(app, ["generate", str(photo), "--prompt", prompt, *options])


def test_a_photo_becomes_a_video_that_says_how_it_was_made(photo: Path, tmp_path: Path):
    output = tmp_path / "out.mp4"
    result = generate(photo, "-o", str(output), "--steps", "2", "--size", "128", "--seed", "3")
    assert result.exit_code == 0, result.output
    video, fps = read_video(output)
    assert video.shape == (16, 3, 128, 128)
    assert fps == 8
    about = read_video_metadata(output)
    assert about["prompt"] == "the camera pans left"
    assert about["seed"] == 3
    assert "experts:" in about["recipe"]


def test_the_pocket_model_can_start_late_and_the_ending_may_be_in_capitals(
    photo: Path, tmp_path: Path
):
    output, options = tmp_path / "OUT.MP4", ("--steps", "2", "--size", "64")
    assert generate(photo, "-o", str(output), *options).exit_code == 0
    early = read_video(output)[0]
    late = ("--start-step", "900", "--overwrite")
    result = generate(photo, "-o", str(output), *options, *late)
    assert result.exit_code == 0, result.output
    assert not torch.equal(read_video(output)[0], early)
    assert read_video_metadata(output)["start_step"] == 900


def test_the_same_seed_gives_the_same_video_and_another_seed_another(photo: Path, tmp_path: Path):
    videos = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        output = tmp_path / f"{name}.mp4"
        generate(photo, "-o", str(output), "--steps", "2", "--size", "64", "--seed", seed)
        videos.append(read_video(output)[0])
    assert torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[0], videos[2])


def test_an_object_that_the_photo_lacks_is_drawn_on_request(photo: Path, tmp_path: Path):
    options = ("--steps", "1", "--size", "64", "--seed", "5")
    prompt = "the green ball moves up"
    plain = generate(photo, "-o", str(tmp_path / "plain.mp4"), *options, prompt=prompt)
    assert "The photo shows no green ball: --draw paints" in plain.stderr
    videos = []
    for name in ("a", "b"):
        output = tmp_path / f"{name}.mp4"
        result = generate(photo, "--draw", "-o", str(output), *options, prompt=prompt)
        assert result.exit_code == 0, result.output
        assert "shows no" not in result.stderr
        videos.append(read_video(output)[0])
    assert torch.equal(*videos)
    x, y = (int(value) for value in read_video_metadata(output)["drawn"]["green ball"])
    red, green, blue = videos[0][0, :, y, x]
    assert green > 0.6 > 0.4 > max(red, blue)


def test_what_cannot_be_drawn_is_named_before_anything_is_made(photo: Path, tmp_path: Path):
    output = tmp_path / "out.mp4"
    result = generate(photo, "--draw", "-o", str(output))
    assert result.exit_code == 2
    assert "names no ball and no box" in result.stderr
    assert not output.exists()


def test_the_motion_knob_and_single_weights_run_and_report_as_json(photo: Path, tmp_path: Path):
    for options in (["--motion", "0.5"], ["--weights", "tuned"], ["--recipe", "edg-official"]):
        output = tmp_path / "out.mp4"
        result = generate(
            photo,
            "-o",
            str(output),
            *["--steps", "1", "--size", "64", "--json", "--overwrite"],
            *options,
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["output"] == str(output)


def test_a_dry_run_writes_nothing_and_says_what_a_run_then_makes(photo: Path, tmp_path: Path):
    output = tmp_path / "new" / "out.mp4"
    options = ("-o", str(output), "--steps", "1", "--size", "64", "--num-videos", "2")
    result = generate(photo, *options, "--dry-run")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1].replace(str(output.parent), "")
    assert last == "would write /out-01-seed1.mp4: 16 frames of 64 x 64, 1 steps, seed 1"
    plan = json.loads(generate(photo, *options, "--dry-run", "--json").stdout)
    assert not list(tmp_path.iterdir())
    made = json.loads(generate(photo, *options, "--json").stdout)
    assert all(video.pop("seconds") > 0 for video in made)
    assert plan == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "/dev/null/out.mp4"], "Cannot write to the folder /dev/null"),
        (["--prompt", "the dragon flies"], "does not know the word 'dragon'"),
    ],
)
def test_a_dry_run_finds_what_a_run_would_refuse(photo: Path, options: list[str], message: str):
    for more in ([], ["--dry-run"]):
        result = generate(photo, *options, *more)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_a_contact_sheet_is_written_on_request(photo: Path, tmp_path: Path):
    sheet = tmp_path / "sheet.png"
    options = ["-o", str(tmp_path / "out.mp4"), "--steps", "1", "--size", "64"]
    assert generate(photo, *options, "--sheet", str(sheet)).exit_code == 0
    assert Image.open(sheet).width > 8 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--motion", "1", "--weights", "tuned"], "--motion is for recipes"),
        (["--set", "speed=1"], "no parameter `speed`"),
        (["--set", "motion"], "--set motion is not NAME=NUMBER"),
        (["--set", "motion=1", "--motion", "2"], "`motion` is given twice"),
        (["--motion", "1", "--recipe", "wan22-lightning"], "no parameter `motion`"),
        (["--motion", "nan"], "--motion is nan, which is no number"),
        (["--loop"], "cannot end a video with an image"),
        (["--guidance-2", "1"], "no second denoiser"),
        (["--size", "100"], "64"),
        (["--weights", "huge"], "no weights named 'huge'"),
        (["--weights", "base", "--boundary", "0.5"], "--boundary needs experts"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(
    photo: Path, tmp_path: Path, options: list[str], message: str
):
    output = tmp_path / "out.mp4"
    result = generate(photo, "-o", str(output), *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Fix:" in result.output
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "."], "it is a folder"),
        (["-o", "/"], "it is a folder"),
        (["-o", ""], "it is a folder"),
        (["-o", "", "--num-videos", "2"], "it is a folder"),
        (["-o", "folder"], "it is a folder"),
        (["-o", "file/out.mp4"], "Cannot write to the folder file"),
        (["-o", "/dev/null"], "it is no file"),
        (["-o", f"{'x' * 245}.mp4", "--num-videos", "2"], "File name too long"),
        (["-o", "photo.png"], "is the photo already"),
        (["-o", "film.mkv"], "film.mkv is no name of an mp4"),
        (["-o", "film"], "Write e.g. --output film.mp4"),
        (["-o", "film.mkv", "--num-videos", "2"], "is no name of an mp4"),
        (["-o", "same.mp4", "--sheet", "./same.mp4"], "is a video already"),
        (["--sheet", "folder"], "it is a folder"),
        (["--sheet", "file/sheet.png"], "Cannot write to the folder file"),
        (["--sheet", "/dev/null/sheet.png"], "Cannot write to the folder /dev/null"),
        (["--sheet", "photo.png"], "is the photo already"),
        (["--num-videos", "2", "--sheet", "out-01-seed1.mp4"], "is a video already"),
    ],
    ids=str,
)
def test_files_that_cannot_be_written_are_named_before_the_model_is_loaded(
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("motionmerge.cli.generate.loaded", None)
    shutil.copy(photo, "photo.png")
    Path("folder").mkdir()
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    result = generate(Path("photo.png"), *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Fix:" in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_word_lists_the_known_ones(photo: Path, tmp_path: Path):
    result = generate(photo, "-o", str(tmp_path / "out.mp4"), prompt="the dragon breathes fire")
    assert result.exit_code == 2
    assert "does not know the word 'dragon'" in result.output
    assert "pans tilts zooms" in result.output
