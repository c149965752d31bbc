"""The strength of a fine-tune's recipe: the least that gives the base's motion back."""

from __future__ import annotations

import pytest

from motionmerge.evaluation.sweeps.observed import Observed
from motionmerge.evaluation.sweeps.strength import choose_strength
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.batch.variants import Variant
from motionmerge.sampling.request.experts import ExpertChoice

RECIPE = Recipe.load("knob")
BASE = Variant("the base", ExpertChoice())


class Clips:
    """Two clips; what is measured on them follows from the variant's name."""

    objectives, num_clips, num_steps, about = {}, 2, 7, "2 videos of 2 photos"

    def __init__(self, motions: dict[str, tuple[float | None, ...]]) -> None:
        self.motions, self.seen = motions, []

    def observe(self, variant: Variant, *, num_clips: int, num_steps: int) -> Observed:
        assert (num_clips, num_steps) == (2, 7)
        self.seen.append(variant.name)
        known = {k: v for k, v in enumerate(self.motions[variant.name]) if v is not None}
        values = {"motion_degree": known, "first_frame_ssim": {0: 0.9, 1: 0.7}}
        return Observed(values=values, clusters={0: "a", 1: "b"})

    def seconds(self, *, num_clips: int, num_steps: int) -> None: ...
    def key(self, variant: Variant, *, num_clips: int, num_steps: int) -> str:
        return variant.name


def chosen_on(clips: Clips, values: tuple[float, ...] = (0.5, -1, 0, 0.25)):
    def build(name: str, recipe: Recipe) -> Variant:
        return Variant(name, ExpertChoice(recipe))

    return choose_strength(clips, BASE, RECIPE, values, build=build)


def test_the_least_value_that_moves_as_much_as_the_base_is_taken_and_no_larger_one_is_tried():
    clips = Clips(
        {"the base": (4, 6), "motion -1": (1, 1), "motion 0": (2, 7), "motion 0.25": (6, 6)}
    )
    chosen = chosen_on(clips)
    assert chosen.motion == chosen.recipe.parameters["motion"] == 0.25
    assert clips.seen == ["the base", "motion -1", "motion 0", "motion 0.25"]
    text = chosen.recipe.description
    assert "-1 20% and 0.800, 0 90% and 0.800, 0.25 120% and 0.800" in text
    assert "2 videos of 2 photos, 7 steps" in text and "the least that moves as much" in text
    # The first clip moves less at 0 than at 0.25, the second more; both less at -1.
    assert "do not tell it from 0. " in text
    assert Recipe.parse(chosen.recipe.print()) == chosen.recipe


@pytest.mark.parametrize(("most", "motion"), [(3.0, 0.5), (2.1, 0.25)])
def test_where_none_moves_as_much_the_least_is_taken_that_nearly_moves_most(most, motion):
    motions = {"motion -1": (1, None), "motion 0": (1, 3), "motion 0.25": (2, None)}
    chosen = chosen_on(Clips({"the base": (4, 6), **motions, "motion 0.5": (most, None)}))
    assert chosen.motion == motion and "none moves as much as the base" in chosen.why
    assert "-1 25%" in chosen.why


def test_one_video_tells_no_value_from_another():
    chosen = chosen_on(Clips({"the base": (4,), "motion -1": (1,), "motion 0": (5,)}))
    assert chosen.motion == 0 and "so few videos do not tell it from -1" in chosen.why


@pytest.mark.parametrize(
    ("base", "tuned", "why"),
    [
        ((None, None), (1, 1), "not known"),
        ((4, 6), (None, None), "is known"),
        ((0.1, 0.2), (9, 9), "0.15 px/s, too little to compare with"),
    ],
)
def test_without_motion_to_compare_the_recipe_stays_as_it_was(base, tuned, why):
    chosen = chosen_on(Clips({"the base": base, "motion -1": tuned}), (-1,))
    assert chosen.motion is None and chosen.recipe == RECIPE and why in chosen.why
