"""`motionmerge recipes`, and what is answered to a mistyped name of one."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.cli.options import recipe_names
from motionmerge.merging.recipes.files import shipped_recipes
from motionmerge.merging.recipes.recipe import Recipe


def test_every_shipped_recipe_is_listed_with_a_sentence_its_inputs_and_parameters():
    shown = CliRunner().invoke(app, ["recipes"]).stdout
    entries = [entry.splitlines() for entry in shown.split("\n\n")]
    by_name = {name: lines for name, *lines in entries}
    for name in shipped_recipes():
        recipe = Recipe.load(name)
        summary, *rest = (line.strip() for line in by_name[name])
        assert " ".join((recipe.description or "").split()).startswith(summary)
        assert summary.endswith(".") and ". " not in summary.replace("et al. ", "")
        details = dict(line.split(": ", 1) for line in rest)
        for one in recipe.inputs:
            assert one in details["inputs"]
        for one, value in recipe.parameters.items():
            assert f"{one} = {value:g}" in details["parameters"]


def test_the_list_is_json_for_programs():
    found = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)
    assert list(found) == list(shipped_recipes())
    assert found["edg-official"]["parameters"]["drop_rate"] == 0.7
    assert found["edg-official"]["inputs"] == {"base": "pocket:base", "tuned": "pocket:tuned"}


def test_the_shell_completes_the_names_that_are_shipped():
    assert recipe_names() == sorted(shipped_recipes())


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "edg-oficial", "-o", "out"],
        ["merge", "edg-official.yaml", "-o", "out"],
        ["show", "edg-oficial"],
        ["export", "loras", "edg-oficial", "-o", "out"],
        ["generate", "p.png", "--prompt", "the camera pans left", "--recipe", "edg-oficial"],
    ],
    ids=" ".join,
)
def test_a_mistyped_name_is_answered_with_the_nearest_recipe(words, tmp_path, monkeypatch):
    from motionmerge.models.pocket.world import load_photo

    monkeypatch.chdir(tmp_path)
    load_photo("coffee").save("p.png")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "Fix: Write `edg-official` instead of `edg-of" in result.stderr


def test_a_name_that_resembles_none_is_answered_with_all():
    result = CliRunner().invoke(app, ["merge", "nonsense", "-o", "out"])
    assert "There is no recipe `nonsense`" in result.stderr
    assert ", ".join(shipped_recipes()) in result.stderr


def test_weights_in_place_of_a_recipe_are_answered_with_what_merges_two(tmp_path):
    weights = tmp_path / "base.safetensors"
    weights.write_bytes(b"\xb0" * 64)
    result = CliRunner().invoke(app, ["merge", str(weights), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert "is no recipe: a recipe is text" in result.stderr
    assert "`motionmerge extrapolate BASE TUNED -o FOLDER`" in result.stderr


@pytest.mark.parametrize("verb", ["batch", "merge"])
def test_a_file_that_cannot_be_read_is_told_in_words_and_once(verb, tmp_path):
    words = [verb, str(tmp_path), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "Errno" not in result.stderr and result.stderr.count(str(tmp_path)) == 1


def test_what_is_printed_ends_with_one_line_break():
    for words in (["edg-official"], ["edg-official", "--json"], ["--json"]):
        shown = CliRunner().invoke(app, ["recipes", *words]).stdout
        assert shown.endswith("\n") and not shown.endswith("\n\n")
