"""Recipes have parameters: numbers with names, in expressions and in the schedule."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from motionmerge.errors import RecipeError
from motionmerge.merging.in_memory import realise
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.named import named, number_text
from motionmerge.schedule import ScheduleEntry

from .conftest import make_pair, same_bits

TEXT = """\
parameters:
  motion: 0.25
  boundary: 0.64
  drop_rate: 0.7
  seed: 3
  details: 1
inputs:
  base: memory:base
  tuned: memory:tuned
experts:
  dynamics: base - motion * dare(tuned - base, drop_rate=drop_rate, seed=seed)
  consistency: base + details * (tuned - base) + -0.5 * motion * (tuned - base)
schedule:
  - {expert: dynamics, above: boundary}
  - {expert: consistency}
"""


def weights():
    base, tuned = make_pair()
    return {"base": base, "tuned": tuned}


def plain(motion):
    return Recipe.parse(
        TEXT.replace("-0.5 * motion *", f"{-0.5 * motion!r} *")
        .replace("motion *", f"{motion!r} *")
        .replace("details *", "1 *")
        .replace("above: boundary", "above: 0.64")
        .replace("drop_rate=drop_rate, seed=seed", "drop_rate=0.7, seed=3")
        .partition("inputs:")[2]
        .join(["inputs:", ""])
    )


def test_a_recipe_with_parameters_prints_them_and_is_read_back():
    recipe = Recipe.parse(TEXT)
    assert recipe.print() == TEXT
    assert Recipe.parse(recipe.print()) == recipe
    assert pickle.loads(pickle.dumps(recipe)).print() == TEXT


@pytest.mark.parametrize("motion", [0.25, -1.0, 0.0, 2.0, 1 / 3])
def test_parameters_give_the_bits_of_the_numbers_written_out(motion):
    named_one = Recipe.parse(TEXT).with_parameters(motion=motion)
    first = realise(named_one, inputs=weights())
    second = realise(plain(motion), inputs=weights())
    assert first.keys() == second.keys()
    for expert, tensors in first.items():
        assert all(same_bits(tensors[name], second[expert][name]) for name in tensors)


def test_other_values_are_printed_and_reach_the_schedule():
    recipe = Recipe.parse(TEXT).with_parameters(boundary=0.9, motion=-1)
    assert recipe.schedule.entries[0].above == 0.9
    assert "motion: -1\n" in recipe.print()
    assert "above: boundary" in recipe.print()
    assert recipe != Recipe.parse(TEXT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("motion: 0.25", "motion: fast"), "not a number"),
        (TEXT.replace("motion: 0.25", "motion: .nan"), "not a number"),
        (TEXT.replace("motion: 0.25", "motion: true"), "not a number"),
        (TEXT.replace("  motion: 0.25\n", "  motion: 0.25\n  extra: 1\n"), "used nowhere"),
        (TEXT.replace("  base: memory", "  motion: memory:x\n  base: memory"), "both"),
        (TEXT.replace("motion", "dare"), "not a name"),
        (TEXT.replace("drop_rate: 0.7", "drop_rate: 1.5"), r"`drop_rate=1.5` is not .*\n.*\n +\^"),
        (TEXT.replace("boundary: 0.64", "boundary: 64"), "outside"),
        (TEXT.replace("seed: 3", "seed: 3.5"), "64-bit integer"),
        (TEXT.replace("above: boundary", "above: boundry"), "Write a number|is 'boundry'"),
        (TEXT.replace("base - motion *", "motion + motion *"), "checkpoint|not defined"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.parse(text)
    assert caught.value.fix


def test_an_unknown_parameter_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match="no parameter `moton`") as caught:
        Recipe.parse(TEXT).with_parameters(moton=1.0)
    assert "motion" in str(caught.value.fix)
    with pytest.raises(RecipeError, match="none"):
        Recipe.load("wan22-lightning").with_parameters(motion=1.0)


def test_a_named_number_computes_as_its_value():
    number = named(0.5, "motion")
    assert (-number, 2 * number, number * 2) == (-0.5, 1.0, 1.0)
    assert number_text(-number) == "-motion"
    negative = -number
    assert number_text(-negative) == "motion"
    assert number_text(2 * number) == "2 * motion"
    assert torch.tensor(1.0) * number == 0.5


def test_a_recipe_written_out_has_the_same_experts_without_names():
    recipe = Recipe.parse(TEXT).with_parameters(motion=2.0)
    plain = recipe.written_out()
    assert plain.experts == recipe.experts and plain.schedule == recipe.schedule
    assert not plain.parameters
    assert "drop_rate=0.7, seed=3" in plain.print() and "above: 0.64" in plain.print()


def test_writing_out_leaves_what_stands_in_quotes():
    selected = 'only(details * (tuned - base), "re:motion- -")'
    text = TEXT.replace("details * (tuned - base)", selected)
    recipe = Recipe.parse(text).with_parameters(motion=-2.0)
    plain = recipe.written_out()
    assert plain.experts["consistency"] == recipe.experts["consistency"]
    assert '"re:motion- -"' in plain.print()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64], ids=str)
def test_a_number_of_numpy_is_that_number(kind):
    numbers = {"motion": kind(0.5), "boundary": kind(1)}
    plain = {name: number.item() for name, number in numbers.items()}
    recipe = Recipe.parse(TEXT)
    assert recipe.with_parameters(**numbers) == recipe.with_parameters(**plain)
    assert ScheduleEntry("a", above=kind(1)) == ScheduleEntry("a", above=1)
    with pytest.raises(RecipeError, match="motion"):
        Recipe.parse(TEXT).with_parameters(motion=np.float32("nan"))


def test_a_lora_is_not_called_as_the_model_that_it_is_for():
    with pytest.raises(RecipeError, match="`base` is the model"):
        Recipe.of_loras({"a": {"base": 1.0}})
