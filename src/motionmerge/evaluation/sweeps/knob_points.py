"""The ways to more motion that a model has, as points of a sweep: weights, knobs, and pairs.

Weights: base, tuned, EDG, the motion knob. Knobs on the tuned weights: ALG, motion amplitude, a
bias against the first frame. Then every pair of them but EDG with the motion knob.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from motionmerge.evaluation.sweeps.grid import Point
from motionmerge.merging.recipes.recipe import OWN_MODEL, Recipe
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.switching.knob_families import KnobFamily, wanted_knobs

TUNED = "tuned"
KNOBS = {"ALG": "alg", "amplitude": "motion-amplitude", "bias": "first-frame-bias"}
"""Shipped recipes of knobs by their names in a comparison."""

_NO_BASE = "what the model was tuned from is not given"


@dataclass(frozen=True)
class KnobPoints:
    """What is compared, and what is not.

    Attributes:
        points: The first is what all others are compared with.
        left_out: Why the others are missing, by name.
    """

    points: tuple[Point, ...]
    left_out: dict[str, str]


def knob_points(
    family: KnobFamily, *, tuned: str = OWN_MODEL, base: str | None = None, motion: float | None
) -> KnobPoints:
    """List what a model can be compared under.

    Args:
        family: Of its pipeline.
        tuned: The weights that the knobs act on: a path or a name.
        base: What these were tuned from; without it, weights are not extrapolated.
        motion: Of the motion knob; the recipe's own if None.
    """
    weights = {TUNED: _alone(TUNED, tuned)}
    left_out: dict[str, str] = {}
    if base is None:
        left_out |= dict.fromkeys(("base", "EDG", "knob"), _NO_BASE)
    else:
        weights["base"] = _alone("base", base)
        weights["EDG"] = Recipe.edg(base=base, tuned=tuned).written_out()
        weights["knob"] = Recipe.knob(base=base, tuned=tuned, motion=motion).written_out()
    knobs: dict[str, Recipe] = {}
    for name, recipe in KNOBS.items():
        own = Recipe.load(recipe)
        assert own.schedule is not None
        missing = [knob for knob in wanted_knobs(own.schedule) if not family.has(knob)]
        if missing:
            left_out[name] = family.reason(missing[0])
        else:
            knobs[name] = own
    found = dict(weights)
    for knob, own in knobs.items():
        found[knob] = with_knobs(weights[TUNED], [own])
    extrapolated = [name for name in ("EDG", "knob") if name in weights]
    for name, knob in product(extrapolated, knobs):
        found[f"{name} + {knob}"] = with_knobs(weights[name], [knobs[knob]])
    for one, other in combinations(knobs, 2):
        found[f"{one} + {other}"] = with_knobs(weights[TUNED], [knobs[one], knobs[other]])
    points = (
        Point(values={}, strategy=name, recipe=recipe, boundary=None)
        for name, recipe in found.items()
    )
    return KnobPoints(tuple(points), left_out)


def with_knobs(weights: Recipe, knobs: Sequence[Recipe]) -> Recipe:
    """Return a recipe's weights with what the first entries of others set besides experts.

    A knob of the first steps is for the recipe's first expert, whatever its boundary.

    Args:
        weights: A recipe without knobs.
        knobs: Recipes of one expert, which set something in all steps or in the first.
    """
    assert weights.schedule is not None
    schedules = [recipe.written_out().schedule for recipe in knobs]
    firsts = [schedule.entries[0] for schedule in schedules if schedule is not None]
    shares = sorted({one.step_fraction for one in firsts if one.step_fraction is not None})
    entries = weights.schedule.entries
    early = [
        ScheduleEntry(entries[0].expert, step_fraction=share, **_in_force(firsts, share))
        for share in shares
    ]
    late = [replace(entry, **_in_force(firsts, None)) for entry in entries]
    return replace(weights, schedule=ExpertSchedule((*early, *late)))


def _in_force(firsts: Sequence[ScheduleEntry], share: float | None) -> dict[str, Any]:
    """Return what is set until a share of the steps is done; None for the rest of them."""
    found: dict[str, Any] = {"image": ()}
    for entry in firsts:
        until = entry.step_fraction
        if until is not None and (share is None or until < share):
            continue
        found["image"] += entry.image
        found |= {"attention": entry.attention} if entry.attention is not None else {}
        found |= {"guidance": entry.guidance} if entry.guidance is not None else {}
    return found


def _alone(name: str, path: str) -> Recipe:
    sections = {"inputs": {name: path}, "experts": {name: name}}
    return Recipe.from_sections(sections)
