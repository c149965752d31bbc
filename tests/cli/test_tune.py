"""`motionmerge tune` and `probe` make what is missing, measure it, and write what they found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.pocket.world import load_photo


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    load_photo("chelsea").save("photos/my cat.png")
    Path("prompts.txt").write_text("the camera pans left\n")
    given = ["--photos", "photos", "--prompts", "prompts.txt", "--size", "64", "-o", "out"]

    def call(verb, recipe, *words):
        own = [] if "--own-prompts" in words else given
        words = [word for word in words if word != "--own-prompts"]
        return CliRunner().invoke(app, [verb, recipe, *own, *map(str, words)])

    return call


def test_a_front_is_written_as_recipes_that_say_what_was_measured(run):
    words = ["--over", "motion=0,1", "--steps", "2", "-n", "2"]
    planned = run("tune", "pocket", *words, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "unknown until the first video is made" in planned.stdout and not Path("out").exists()
    first = run("tune", "pocket", *words)
    assert first.exit_code == 0, first.output
    told = [line for line in first.stderr.splitlines() if "px/s" in line]
    assert sum(line.startswith("as it was") for line in told) == 1
    assert not any(line.startswith("motion 1:") for line in told), "the recipe as it was, again"
    assert first.stdout.splitlines()[-1].startswith(("Take out/front-", "Keep the recipe"))
    found = json.loads(Path("out/tune.json").read_text())
    files = sorted(Path("out").glob("front-*.yaml"))
    assert [one["file"] for one in found["candidates"] if one["is_on_front"]].count(None) == 0
    for file in files:
        again = Recipe.load(file)
        assert again.parameters["motion"] in (0, 1)
        assert "2 steps, seed 0" in (again.description or "")
    videos = {path: path.stat().st_mtime_ns for path in Path("out/videos").iterdir()}
    assert len(videos) == len({one["values"]["motion"] for one in found["candidates"]} | {1.0})
    assert json.loads(run("tune", "pocket", *words, "--json").stdout) == found
    assert videos == {path: path.stat().st_mtime_ns for path in Path("out/videos").iterdir()}
    assert json.loads(run("tune", "pocket", *words, "--dry-run", "--json").stdout)["seconds"] > 0


def test_a_probe_of_the_pocket_model_needs_no_photos(run):
    words = ["--own-prompts", "-o", "out", "--clips", "2", "--steps", "2", "--windows", "3"]
    result = run("probe", "pocket", *words, "--window", "0.4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["expert"] == "dynamics" and found["num_steps"] == 2
    assert [one["from"] for one in found["windows"]] == [1.0, 0.7]
    assert found["windows_without_steps"] == [{"from": 0.4, "to": 0.0}]
    assert set(found["objectives"]) >= {"motion", "obedience", "first_frame"}
    assert "more_than_without" in found["windows"][0]
    assert Path("out/probe.svg").read_text(encoding="utf-8").startswith("<svg")
    assert not Path("out/videos").exists()
    again = run("probe", "pocket", *words, "--window", "0.4")
    assert "2 prompts are too few" in again.stdout and "fewer than 7" in again.stdout
    assert "no window surely changes motion" in again.stdout


@pytest.mark.parametrize(
    ("verb", "words", "reason"),
    [
        ("tune", ["pocket", "--over", "motion=1"], "leaves nothing to search"),
        ("tune", ["pocket", "--over", "gama=0:1"], "no number `gama`"),
        ("tune", ["pocket", "--boundary", "0.5"], "one value"),
        ("tune", ["pocket", "--objective", "moton"], "no objective `moton`"),
        ("tune", ["pocket", "--manifest", "x.jsonl"], "need photos and prompts"),
        ("tune", ["pocket", "--weights", "base"], "--weights is not for this verb"),
        ("tune", ["pocket", "--own-prompts", "--size", "64", "-o", "out"], "own prompts"),
        ("probe", ["pocket", "--expert", "dynamcs"], "no expert `dynamcs`"),
        ("probe", ["pocket", "--windows", "3"], "leave noise levels out"),
        ("probe", ["pocket", "--window", "1.5"], "cannot be 1.5 wide"),
        ("probe", ["pocket", "--steps", "1"], "have a denoising step of 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(run, verb, words, reason):
    result = run(verb, *words)
    assert result.exit_code == 2, result.output
    assert reason in result.stderr and "Fix:" in result.stderr
    assert not Path("out").exists()
