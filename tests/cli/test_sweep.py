"""`motionmerge sweep`: makes what is missing, measures it, and draws it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.models.pocket.world import load_photo
from motionmerge.sampling.batch.variants import VariantMaker

SMALL = ["--size", "64", "--steps", "2"]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    load_photo("chelsea").save("photos/my cat.png")
    Path("prompts.txt").write_text("the camera pans left\n")

    def run(*words):
        given = ["--photos", "photos", "--prompts", "prompts.txt", *SMALL, "-o", "out"]
        return CliRunner().invoke(app, ["sweep", "pocket", *given, *map(str, words)])

    return run


def test_a_sweep_makes_each_video_once_and_goes_on(sweep):
    words = ["--over", "motion=0,1", "--strategy", "dynamics-first,consistency-alone", "--json"]
    planned = json.loads(sweep(*words, "--dry-run").stdout)
    assert len(planned["points"]) == 4
    assert planned["missing"] == 3  # consistency alone knows no motion
    assert not Path("out").exists()
    first = sweep(*words)
    assert first.exit_code == 0, first.output
    videos = sorted(Path("out/videos").iterdir())
    assert len(videos) == 3
    points = json.loads(first.stdout)["points"]
    assert [one["motion"] for one in points] == [0.0, 1.0, 0.0, 1.0]
    assert points[2]["videos"] == points[3]["videos"] != points[0]["videos"]
    assert points[0]["motion_degree"] is not None and points[0]["more_motion"] is None
    assert points[1]["more_motion"] == pytest.approx(
        points[1]["motion_degree"] - points[0]["motion_degree"]
    )
    table = Path("out/sweep.csv").read_text().splitlines()
    assert len(table) == 5 and table[0].startswith("motion,strategy,num_videos")
    for name in ("front.png", "curves-motion.png", "sheet-1.png"):
        assert (Path("out") / name).read_bytes().startswith(b"\x89PNG")
    assert "motion 1, dynamics-first" in Path("out/report.html").read_text(encoding="utf-8")
    videos[0].unlink()
    assert json.loads(sweep(*words, "--dry-run").stdout)["missing"] == 1


def test_the_rest_of_a_sweep_that_was_stopped_is_known_to_take_as_long(sweep, monkeypatch):
    make = VariantMaker.make
    begun = []

    def once(*arguments, **settings):
        if begun:
            raise KeyboardInterrupt
        begun.append(make(*arguments, **settings))

    monkeypatch.setattr(VariantMaker, "make", once)
    assert sweep("--over", "motion=0,1").exit_code == 130
    planned = json.loads(sweep("--over", "motion=0,1", "--dry-run", "--json").stdout)
    assert planned["missing"] == 1 and 0 < planned["seconds"] < 100


def test_inputs_and_parameters_of_the_recipe_can_be_others(sweep):
    swap = ["--input", "tuned=pocket:naive", "--set", "motion=0.5"]
    words = ["--over", "boundary=0.5,0.7", "--dry-run"]
    result = sweep(*words, *swap)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "  1  boundary 0.5, dynamics-first: steps 1-2 of 2: dynamics",
        "  2  boundary 0.7, dynamics-first: steps 1 of 2: dynamics, 2: consistency",
        "2 points of 1 videos each, 2 to make: unknown until the first video is made",
    ]
    assert "dynamics-first" not in result.stderr
    missing = sweep(*words, "--input", "tuned=nowhere.safetensors")
    assert missing.exit_code == 2 and "nowhere.safetensors" in missing.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "nothing to sweep"),
        (["--over", "motion=1:2"], "Cannot read"),
        (["--over", "gama=1,2"], "no number `gama`"),
        (["--over", "motion=0,1", "--boundary", "0.5"], "one value"),
        (["--over", "motion=0,1", "--weights", "base"], "--weights is not for this verb"),
        (["--over", "motion=0,1", "--manifest", "x.jsonl"], "need photos and prompts"),
        (["--over", "motion=0,1", "--workers", "2"], "--workers is for --ray"),
        (["--over", "boundary=0.5,1.5"], "no noise level"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_made(sweep, words, reason):
    result = sweep(*words)
    assert result.exit_code == 2
    assert reason in result.stderr and "Fix:" in result.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize("verb", ["sweep", "tune", "probe"])
@pytest.mark.parametrize(
    ("flags", "environment", "reason"),
    [
        (["--ray"], {}, "--ray shares videos of photos, and none are given"),
        (["--workers", "2"], {}, "--workers is for --ray"),
        ([], {"RANK": "1", "WORLD_SIZE": "2"}, "one of several processes"),
    ],
)
def test_sharing_that_cannot_be_is_refused_before_a_cluster_is_joined(
    tmp_path, verb, flags, environment, reason
):
    over = [] if verb == "probe" else ["--over", "motion=0,1"]
    command = [verb, "pocket", *over, "-o", str(tmp_path / "out"), *flags]
    result = CliRunner().invoke(app, command, env=environment)
    assert result.exit_code == 2 and reason in result.stderr and "Fix:" in result.stderr
    assert not (tmp_path / "out").exists()
