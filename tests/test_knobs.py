"""Knobs in the text of a recipe: read, printed, computed with, refused with a caret."""

from __future__ import annotations

import re
from typing import Any

import pytest

from motionmerge.errors import RecipeError
from motionmerge.knobs import FirstFrame, LowPass, MotionAmplitude, parse_attention, parse_image
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.schedule import ExpertSchedule, ScheduleEntry

TEXT = """parameters: {keep: 0.4, more: 1.15, scale: 5, bias: 0.6, high: 0.9, late: 0.97}
inputs: {base: 'memory:base'}
experts: {model: base}
schedule:
  - {expert: model, above: high, guidance: scale, start: late}
  - {expert: model, above: 0.5, image: low_pass(keep) + motion_amplitude(more)}
  - {expert: model, above: 0.4, image: "blur(1.5, 5, strength=linear(1, 0, 0.5))"}
  - {expert: model, above: 0.3, image: "time_noise(2 * keep, seed=3)"}
  - {expert: model, attention: first_frame(-bias)}
"""


def test_entries_print_as_they_are_read() -> None:
    recipe = Recipe.parse(TEXT)
    assert Recipe.parse(recipe.print()) == recipe
    assert recipe.schedule is not None
    assert ExpertSchedule.from_list(recipe.written_out().schedule.to_list()) == recipe.schedule  # type: ignore[union-attr]
    assert "low_pass(keep) + motion_amplitude(more)" in recipe.print()
    assert "start: late" in recipe.print()
    assert "first_frame(-bias)" in recipe.print()


def test_parameters_count_as_numbers_in_knobs() -> None:
    changed = Recipe.parse(TEXT).with_parameters(keep=0.25, bias=0.1, scale=1).schedule
    assert changed is not None
    first, second, _, fourth, last = changed.entries
    assert first.guidance == 1
    assert second.image == (LowPass(0.25), MotionAmplitude(1.15))
    assert fourth.image == parse_image("time_noise(0.5, seed=3)")
    assert last.attention == FirstFrame(-0.1)
    plain = Recipe.parse(TEXT).with_parameters(keep=0.25).written_out().print()
    assert "low_pass(0.25) + motion_amplitude(1.15)" in plain
    assert not re.search(r"\b(keep|more|scale|bias|high|late)\b", plain)


def test_the_names_of_knobs_are_in_what_is_drawn() -> None:
    schedule = ExpertSchedule(
        (
            ScheduleEntry("a", above=0.5, guidance=5),
            ScheduleEntry("a", attention=parse_attention("first_frame(-0.6)")),
        )
    )
    drawn = schedule.draw()
    assert drawn.startswith("1.0 |a (guidance 5)")
    assert "a (attention first_frame(-0.6))" in drawn
    assert schedule.labels == ("a (guidance 5)", "a (attention first_frame(-0.6))")


@pytest.mark.parametrize(
    ("entry", "message", "fix"),
    [
        ("imge: low_pass(1)", "has no setting `imge`", "Write `image`"),
        ("image: low_pas(0.4)", "no `low_pas()`", "Write `low_pass`"),
        ("image: low_pass(1.4)", "`keep` of low_pass() is 1.4", "from 0 to 1"),
        ("image: low_pass(true)", "no parameter `true`", "add `parameters"),
        ("image: low_pass(0.4) - low_pass(1)", "Expected a call", "low_pass(keep"),
        ("image: low_pass()", "takes 1 number(s), got 0", "low_pass(keep"),
        ("image: motion_amplitude(0.5)", "is 0.5", "from 1"),
        ("image: time_noise(1e9)", "`strength` of time_noise()", "from 0 to 10000"),
        ("image: time_noise(1) + low_pass(1) + time_noise(1)", "time_noise() twice", "Keep one"),
        ("attention: first_frame(70000)", "is 70000", "from -10000 to 10000"),
        ("image: first_frame(-1)", "no `first_frame()`", "Remove"),
        ("image: blur(1, 5)", "cut off at a comma", "in quotes"),
        ('image: "low_pass(0.4, passes=2)"', "no setting `passes`", "strength="),
        ('image: "low_pass(0.4, strength=1)"', "`strength` of low_pass()", "linear("),
        ('image: "time_noise(1, seed=0.5)"', "`seed` of time_noise()", "whole number"),
        ("image: __import__('os').system('ls')", "Expected a call", "low_pass(keep"),
        ("image: low_pass(1e999)", "too large", "smaller"),
        ("image: 3", "`image` of the schedule entry", "Write a call"),
        ("attention: first_frame(-0.6) + first_frame(1)", "2 calls", "Keep one"),
        ("attention: first_frame(bias)", "no parameter `bias`", "add `parameters"),
        ("guidance: 0.5", "0.5, below 1", "guidance: 3.5"),
        ("guidance: 1e18", "above 1000", "guidance: 3.5"),
        ("guidance: 010", "is '010'", "Write a number"),
        ("guidance: .nan", "is nan", "Write a number"),
        ("start: 0", "begins at a noise level", "start: 0.95"),
    ],
)
def test_what_makes_no_sense_is_refused_with_line_and_caret(
    entry: str, message: str, fix: str
) -> None:
    text = (
        "inputs: {base: 'memory:base'}\nexperts: {model: base}\nschedule:\n"
        f"  - {{expert: model, {entry}}}\n"
    )
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        Recipe.parse(text, source="mine.yaml")
    assert caught.value.message.startswith("mine.yaml:4:")
    assert "^" in caught.value.message
    assert fix in str(caught.value.fix)


def test_a_start_is_for_the_first_entry_alone() -> None:
    with pytest.raises(RecipeError, match="is not the first"):
        ExpertSchedule((ScheduleEntry("a", above=0.5), ScheduleEntry("a", start=0.9)))


def test_a_boundary_moves_and_knobs_stay() -> None:
    noisy = ScheduleEntry("a", step_fraction=0.2, guidance=5)
    moved = ExpertSchedule((noisy, ScheduleEntry("b", guidance=1))).with_boundary(0.7)
    assert moved.entries[0] == ScheduleEntry("a", above=0.7, guidance=5)
    with pytest.raises(RecipeError, match="this one has 1"):
        ExpertSchedule((ScheduleEntry("a"),)).with_boundary(0.7)


def test_what_holds_experts_alone_refuses_knobs() -> None:
    from motionmerge.evaluation.sweeps.grid import with_strategy
    from motionmerge.evaluation.sweeps.probe import windows_of, with_window
    from motionmerge.exports.targets import plan_whole_files
    from motionmerge.exports.two_experts import _two_experts

    recipe = Recipe.parse(
        "inputs: {base: 'memory:base', tuned: 'memory:tuned'}\n"
        "experts: {a: base, b: tuned}\n"
        "schedule: [{expert: a, above: 0.5, guidance: 3}, {expert: b}]"
    )
    window = windows_of(2, 0.5)[0]
    takers: list[Any] = [
        lambda: with_strategy(recipe, "averaged"),
        lambda: with_window(recipe, window, expert="a"),
        lambda: plan_whole_files(recipe, [], None),  # type: ignore[arg-type]
        lambda: _two_experts(recipe, None),  # type: ignore[arg-type]
    ]
    for take in takers:
        with pytest.raises(RecipeError, match=r"sets guidance, which .* cannot hold"):
            take()
