"""Which numbers of a recipe are searched, and between which values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from motionmerge.errors import ConfigError
from motionmerge.evaluation.sweeps.grid import BOUNDARY, Axis
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.named import NamedFloat
from motionmerge.text import fix_unknown_name

KNOWN_RANGES: Mapping[str, tuple[float, float]] = {
    "motion": (-0.5, 1.5),
    "alpha": (0.0, 1.5),
    "beta": (0.25, 1.0),
    "gamma": (0.0, 0.5),
    "drop_rate": (0.0, 0.9),
    BOUNDARY: (0.3, 0.95),
}
"""Of numbers known by name; all others need a range of the user's."""

_DIGITS = 3
_EXAMPLE = (
    "Write `NAME=FROM:TO` such as motion=-0.5:1.5, `NAME=FROM:TO:COUNT` for as many steps, or "
    "`NAME=A,B,C`."
)


@dataclass(frozen=True)
class Range:
    """A number that is searched.

    Attributes:
        name: A parameter of the recipe, or `boundary`.
        low, high: Its least and largest value.
        values: The only values, ascending; None for all between.
    """

    name: str
    low: float
    high: float
    values: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read `NAME=FROM:TO`, `NAME=FROM:TO:COUNT` or `NAME=A,B,C`.

        Raises:
            ConfigError: It is none of these, or has no two values.
        """
        name, _, listed = text.partition("=")
        if listed.count(":") == 1:
            ends = Axis.parse(f"{name}={listed.replace(':', ',')}")
            values = None
        else:
            ends = Axis.parse(text)
            values = tuple(sorted(ends.values))
        low, high = min(ends.values), max(ends.values)
        if not low < high:
            raise ConfigError(f"`{text[:80]}` leaves nothing to search.", fix=_EXAMPLE)
        return cls(ends.name, low, high, values)

    def holds(self, value: float) -> bool:
        """Return whether a value is among those searched."""
        if self.values is not None:
            return any(math.isclose(value, one) for one in self.values)
        return self.low <= value <= self.high

    def rounded(self, value: float) -> float:
        """Return a value as it is written into recipes, inside the range."""
        return min(max(round(value, _DIGITS), self.low), self.high)


def space_of(recipe: Recipe, given: Sequence[str] = ()) -> list[Range]:
    """Return the ranges to search: those given, or of all numbers known by name.

    `alpha` is left out where the recipe has `motion`, which then multiplies it.

    Raises:
        ConfigError: A range cannot be read, is given twice or of no number of the recipe, or no
            number is known by name.
        RecipeError: The recipe cannot have an end of a range.
    """
    ranges = [Range.parse(text) for text in given]
    own = [*recipe.parameters, *([BOUNDARY] if has_boundary(recipe) else [])]
    names = [one.name for one in ranges]
    for name in names:
        if name not in own:
            raise ConfigError(
                f"The recipe has no number `{name}` to search.", fix=fix_unknown_name(name, own)
            )
        if names.count(name) > 1:
            raise ConfigError(f"`{name}` is given twice.", fix="Give one range of each number.")
    if not ranges:
        left_out = {"alpha"} if "motion" in own else set()
        known = [name for name in own if name in KNOWN_RANGES and name not in left_out]
        ranges = [Range(name, *KNOWN_RANGES[name]) for name in known]
    if not ranges:
        raise ConfigError(
            f"No number of the recipe has a usual range: {', '.join(own) or 'it has none'}.",
            fix="Give ranges: `over=`, e.g. motion=-0.5:1.5.",
        )
    for one in ranges:
        for end in (one.low, one.high):
            candidate(recipe, {one.name: end})
    return ranges


def has_boundary(recipe: Recipe) -> bool:
    """Return whether a recipe's two experts hand over at a place that a number can move."""
    entries = recipe.schedule.entries if recipe.schedule else ()
    if len(entries) != 2 or len(recipe.experts) != 2 or entries[0].condition is None:
        return False
    return not isinstance(entries[0].condition[1], NamedFloat) and BOUNDARY not in recipe.parameters


def candidate(recipe: Recipe, values: Mapping[str, float]) -> Recipe:
    """Return a recipe with other numbers.

    Raises:
        RecipeError: It cannot have one of them.
    """
    own = {name: value for name, value in values.items() if name in recipe.parameters}
    changed = recipe.with_parameters(**own) if own else recipe
    if BOUNDARY in values and BOUNDARY not in own:
        assert changed.schedule is not None
        changed = replace(changed, schedule=changed.schedule.with_boundary(values[BOUNDARY]))
    return changed


def own_values(recipe: Recipe, space: Sequence[Range]) -> dict[str, float] | None:
    """Return what the recipe itself has of the numbers searched; None if one is outside."""
    found: dict[str, float] = {}
    for one in space:
        if one.name in recipe.parameters:
            value = float(recipe.parameters[one.name])
        else:
            assert recipe.schedule is not None
            above = recipe.schedule.entries[0].above
            if above is None:
                return None
            value = float(above)
        if not one.holds(value):
            return None
        found[one.name] = value
    return found
