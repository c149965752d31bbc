"""`compare-knobs`: what is compared on which model, and that it is one sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.evaluation.sweeps.knob_points import knob_points, with_knobs
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.switching.knob_families import AMPLITUDE, KNOB_FAMILIES, KnobFamily

from ..tiny.folders import save_tiny

PAIR = {"tuned": "tuned.safetensors", "base": "base.safetensors"}


def family(name: str) -> KnobFamily:
    return next(one for one in KNOB_FAMILIES if one.name == name)


def test_every_pair_is_there_but_two_sets_of_weights() -> None:
    found = knob_points(family("Wan 2.1, 2.2-A14B, SkyReels-V2"), **PAIR, motion=0.5)
    names = [point.name for point in found.points]
    singles = ["tuned", "base", "EDG", "knob", "ALG", "amplitude", "bias"]
    assert names[:7] == singles
    of_weights = [f"{one} + {knob}" for one in ("EDG", "knob") for knob in singles[4:]]
    assert names[7:] == [*of_weights, "ALG + amplitude", "ALG + bias", "amplitude + bias"]
    assert found.left_out == {}
    for point in found.points:
        assert Recipe.parse(point.recipe.print()) == point.recipe
    knob = next(point for point in found.points if point.name == "knob")
    assert "0.5 *" in str(knob.recipe.experts["dynamics"])


@pytest.mark.parametrize("one", KNOB_FAMILIES, ids=lambda one: one.name)
def test_what_a_model_lacks_is_left_out_with_the_reason(one: KnobFamily) -> None:
    found = knob_points(one, motion=None)
    names = [point.name for point in found.points]
    assert names[0] == "tuned"
    assert {"base", "EDG", "knob"} <= found.left_out.keys()
    assert ("amplitude" in names) == one.has(AMPLITUDE)
    for name, reason in found.left_out.items():
        assert reason
        assert not any(name in other.split(" + ") for other in names)


def test_a_pair_has_the_knobs_of_both_and_the_boundary_of_the_weights() -> None:
    weights = Recipe.parse(
        "inputs: {a: a.safetensors}\nexperts: {noisy: a, clean: a}\n"
        "schedule: [{expert: noisy, above: 0.7}, {expert: clean}]"
    )
    knobs = [Recipe.load(name) for name in ("alg", "motion-amplitude", "first-frame-bias")]
    both = with_knobs(weights, [knobs[0], knobs[1].with_parameters(amplitude=1.2)])
    assert [entry.label for entry in both.written_out().schedule.entries] == [  # type: ignore[union-attr]
        "noisy (image low_pass(0.4) + motion_amplitude(1.2))",
        "noisy (image motion_amplitude(1.2))",
        "clean (image motion_amplitude(1.2))",
    ]
    early = with_knobs(weights, [knobs[0], knobs[2].with_parameters(share=0.1)])
    assert [entry.label for entry in early.written_out().schedule.entries] == [  # type: ignore[union-attr]
        "noisy (image low_pass(0.4), attention first_frame(-0.6))",
        "noisy (image low_pass(0.4))",
        "noisy",
        "clean",
    ]


def test_the_pocket_model_is_compared_on_prompts_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["compare-knobs", "--clips", "2", "--steps", "2", "-o", str(out), "--json"]
    planned = CliRunner().invoke(app, [*words, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert plan["points"][:2] == ["tuned", "base"]
    assert plan["points"][-1] == "knob + ALG"
    assert plan["missing"] == 2 * 7
    assert plan["left_out"].keys() == {"amplitude", "bias"}
    assert not out.exists()
    swapped = CliRunner().invoke(app, [*words, "--dry-run", "--input", "base=pocket:naive"])
    assert json.loads(swapped.stdout)["missing"] == 2 * 7


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--recipe", "alg"], "recipes of its own"),
        (["--boundary", "0.5"], "recipes of its own"),
        (["--set", "keep=0.2"], "--set is not"),
        (["--input", "style=x.safetensors"], "no input `style`"),
        (["--base", "pocket:naive"], "--base is not for the pocket model"),
        (["--base", "x", "--input", "base=y"], "--input names other weights"),
    ],
)
def test_what_this_verb_decides_itself_is_refused(
    words: list[str], reason: str, tmp_path: Path
) -> None:
    made = CliRunner().invoke(app, ["compare-knobs", *words, "-o", str(tmp_path / "out")])
    assert made.exit_code == 2
    assert reason in made.stderr


def test_a_model_without_prompts_is_compared_on_photos_alone(tmp_path: Path) -> None:
    save_tiny("SVD", tmp_path / "svd")
    for name in ("one", "two"):
        Image.radial_gradient("L").save(tmp_path / f"{name}.png")
    (tmp_path / "prompts.txt").write_text("a cat jumps\n")
    words = ["compare-knobs", "--model", str(tmp_path / "svd"), "-o", str(tmp_path / "out")]
    words += ["--height", "64", "--width", "64", "--num-frames", "4", "--dry-run", "--json"]
    photos = ["--photos", str(tmp_path)]
    planned = CliRunner().invoke(app, [*words, *photos])
    plan = json.loads(planned.stdout)
    assert (plan["points"], plan["missing"]) == (["tuned", "ALG"], 4)
    assert "what the model was tuned from" in plan["left_out"]["base"]
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    refused = CliRunner().invoke(app, [*words, *photos, *prompts])
    assert refused.exit_code == 2 and "Leave --prompts out" in refused.stderr
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "Give --photos or --manifest" in refused.stderr


def test_one_set_alone_is_no_comparison(tmp_path: Path) -> None:
    save_tiny("VideoCrafter", tmp_path / "vc")
    words = ["compare-knobs", "--model", str(tmp_path / "vc"), "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "nothing to compare tuned with" in refused.stderr
    assert "--base MODEL" in refused.stderr
    refused = CliRunner().invoke(app, [*words, "--motion", "0.5"])
    assert refused.exit_code == 2 and "--motion is of the knob" in refused.stderr
