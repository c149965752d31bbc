"""A sweep combines values, uses two experts in five ways, and finds the points that none beats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motionmerge.errors import ConfigError, RecipeError
from motionmerge.evaluation.sweeps.grid import STRATEGIES, Axis, points_of
from motionmerge.evaluation.sweeps.results import front_of
from motionmerge.merging.in_memory import realise
from motionmerge.merging.recipes.recipe import Recipe

TEXT = """\
parameters: {motion: 0.25, boundary_level: 0.64}
inputs: {base: memory:base, tuned: memory:tuned}
experts:
  dynamics: base - motion * (tuned - base)
  consistency: tuned
schedule:
  - {expert: dynamics, above: boundary_level}
  - {expert: consistency}
"""


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("motion=-0.5:1:4", (-0.5, 0.0, 0.5, 1.0)),
        ("motion=0:0.3:4", (0.0, 0.1, 0.2, 0.3)),
        ("motion = 0.2,0.64, 0.9", (0.2, 0.64, 0.9)),
        ("motion=1,1", (1.0,)),
    ],
)
def test_an_axis_is_a_range_or_a_list(text, values):
    assert Axis.parse(text) == Axis("motion", values)


@pytest.mark.parametrize(
    "text",
    [
        *("motion", "=1,2", "motion=", "motion=a,b", "motion=nan,1", "motion=0:1", "motion=0:1:1"),
        *("motion=0:1:1e3", "motion=0:1:1000000000", "motion=0:inf:3", "motion=0:1:3:4"),
    ],
)
def test_an_axis_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="Cannot read"):
        Axis.parse(text)


def test_a_sweep_is_bounded_before_it_is_built_and_names_what_it_cannot_sweep():
    recipe = Recipe.parse(TEXT)
    many = tuple(number / 1000 for number in range(1000))
    with pytest.raises(ConfigError, match="2,000 points"):
        points_of(recipe, [Axis("motion", many), Axis("boundary", (0.5, 0.6))])
    with pytest.raises(ConfigError, match="no number `motoin`") as caught:
        points_of(recipe, [Axis("motoin", (1.0,))])
    assert "`motion`" in str(caught.value.fix)
    with pytest.raises(ConfigError, match="twice"):
        points_of(recipe, [Axis("motion", (1.0,)), Axis("motion", (2.0,))])
    with pytest.raises(ConfigError, match="no strategy"):
        points_of(recipe, [], strategies=["averagd"])
    with pytest.raises(RecipeError, match="above"):
        points_of(recipe, [Axis("boundary_level", (2.0,))])
    single = Recipe.parse("inputs: {base: memory:base}\nexperts: {merged: base}\n")
    with pytest.raises(ConfigError, match="two experts"):
        points_of(single, [], strategies=["averaged"])


def test_five_strategies_use_the_same_two_experts():
    base, tuned = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}
    points = points_of(
        Recipe.parse(TEXT),
        [Axis("motion", (0.5,)), Axis("boundary", (0.7,))],
        strategies=list(STRATEGIES),
    )
    inputs = {"base": base, "tuned": tuned}
    dynamics, consistency = torch.tensor([0.0, 4.0]), tuned["w"]
    expected = {
        "dynamics-first": ({"dynamics": dynamics, "consistency": consistency}, 0.7),
        "consistency-first": ({"consistency": consistency, "dynamics": dynamics}, 0.7),
        "dynamics-alone": ({"dynamics": dynamics}, None),
        "consistency-alone": ({"consistency": consistency}, None),
        "averaged": ({"averaged": (dynamics + consistency) / 2}, None),
    }
    for point in points:
        weights, boundary = expected[point.strategy]
        assert point.boundary == boundary
        assert point.recipe.schedule is not None
        assert list(point.recipe.schedule.experts) == list(weights)
        for name, one in weights.items():
            made = realise(point.recipe, inputs=inputs)[name]["w"]
            torch.testing.assert_close(made, one)
        assert Recipe.parse(point.recipe.print()) == point.recipe
    assert points[1].name == "motion 0.5, boundary 0.7, consistency-first"


qualities = st.lists(
    st.tuples(*[st.none() | st.integers(0, 4).map(float)] * 3), min_size=1, max_size=8
)


@given(qualities)
def test_a_point_is_on_the_front_unless_another_is_better(points):
    known = [point for point in points if point != (None, None, None)]
    common = [n for n in range(3) if known and all(point[n] is not None for point in known)]

    def beats(one, other):
        pairs = [(one[n], other[n]) for n in common]
        return min(a - b for a, b in pairs) >= 0 < max(a - b for a, b in pairs)

    front = front_of(points)
    assert any(front) == bool(common), "where points can be compared, there is a best one"
    for point, is_on_front in zip(points, front, strict=True):
        if point not in known or not common:
            assert not is_on_front
        else:
            assert is_on_front == (not any(beats(other, point) for other in known))
