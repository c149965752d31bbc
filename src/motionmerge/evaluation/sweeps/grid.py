"""The points of a sweep: every combination of the values of some numbers, and of strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from motionmerge.errors import ConfigError
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.text import fix_unknown_name

BOUNDARY = "boundary"
MOST_POINTS = 1_000

DYNAMICS_FIRST = "dynamics-first"
STRATEGIES: Mapping[str, str] = {
    DYNAMICS_FIRST: "the recipe as it is",
    "consistency-first": "its two experts the other way round",
    "dynamics-alone": "the expert of the noisy steps throughout",
    "consistency-alone": "the expert of the last steps throughout",
    "averaged": "the mean of both experts' weights throughout",
}
"""Ways of using a recipe's two experts, as in Figure 5 of the paper."""

_EXAMPLE = (
    "Write `NAME=FROM:TO:COUNT` with a count from 2 to 1000, such as motion=-0.5:1:7, or "
    "`NAME=A,B,C`."
)


@dataclass(frozen=True)
class Axis:
    """A number that is swept.

    Attributes:
        name: A parameter of the recipe, or `boundary`.
        values: What it becomes, each once.
    """

    name: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Read `NAME=FROM:TO:COUNT` or `NAME=A,B,C`.

        Raises:
            ConfigError: It is neither, or has too many values.
        """
        name, sign, listed = text.partition("=")
        try:
            if not (sign and name.strip()):
                raise ValueError
            values = _range(listed) if ":" in listed else _numbers(listed.split(","))
        except ValueError as error:
            raise ConfigError(f"Cannot read `{text[:80]}` as values.", fix=_EXAMPLE) from error
        return cls(name.strip(), tuple(dict.fromkeys(values)))


def _range(text: str) -> list[float]:
    first, last, count = text.split(":")
    low, high = _numbers([first, last])
    num = int(count)
    if not 2 <= num <= MOST_POINTS:
        raise ValueError
    # Rounded, so that 0.1 * 3 is 0.3 in names and recipes.
    return [round(low + (high - low) * step / (num - 1), 12) for step in range(num)]


def _numbers(texts: Sequence[str]) -> list[float]:
    values = [float(text) for text in texts]
    if not values or len(values) > MOST_POINTS or not all(map(math.isfinite, values)):
        raise ValueError
    return values


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination.

    Attributes:
        values: Of the axes, by name.
        strategy: One of `STRATEGIES`.
        recipe: What makes its videos, with numbers in place of its parameters.
        boundary: Noise level at which the second expert takes over; None for the recipe's own.
    """

    values: Mapping[str, float]
    strategy: str
    recipe: Recipe
    boundary: float | None

    @property
    def name(self) -> str:
        """The values in words, such as `motion 0.5, boundary 0.64, dynamics-first`."""
        values = (f"{name} {value:g}" for name, value in self.values.items())
        return ", ".join([*values, self.strategy])


def points_of(
    recipe: Recipe, axes: Sequence[Axis], *, strategies: Sequence[str] = (DYNAMICS_FIRST,)
) -> list[Point]:
    """Combine all values with all strategies, the last axis fastest.

    Raises:
        ConfigError: An axis is named twice or is no number of the recipe, a strategy is unknown or
            needs two experts, or there are more than `MOST_POINTS` points.
        RecipeError: A value is out of range.
    """
    _check_axes(recipe, axes)
    for strategy in strategies:
        if strategy not in STRATEGIES:
            raise ConfigError(
                f"There is no strategy `{strategy}`.", fix=fix_unknown_name(strategy, STRATEGIES)
            )
    number = math.prod(len(axis.values) for axis in axes) * len(strategies)
    if number > MOST_POINTS:
        raise ConfigError(
            f"The sweep has {number:,} points; {MOST_POINTS:,} are the most.",
            fix="Give fewer values, or sweep one number after another.",
        )
    points: list[Point] = []
    for strategy in strategies:
        for values in product(*(axis.values for axis in axes)):
            chosen = dict(zip([axis.name for axis in axes], values, strict=True))
            points.append(_point(recipe, chosen, strategy))
    return points


def _check_axes(recipe: Recipe, axes: Sequence[Axis]) -> None:
    names = [axis.name for axis in axes]
    known = [*recipe.parameters, BOUNDARY]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"`{name}` is swept twice.", fix="Give all its values at once.")
        if name not in known:
            raise ConfigError(
                f"The recipe has no number `{name}` to sweep.", fix=fix_unknown_name(name, known)
            )


def _point(recipe: Recipe, values: Mapping[str, float], strategy: str) -> Point:
    own = {name: value for name, value in values.items() if name in recipe.parameters}
    chosen = with_strategy(recipe.with_parameters(**own).written_out(), strategy)
    boundary = None if BOUNDARY in own else values.get(BOUNDARY)
    is_alone = chosen.schedule is not None and len(chosen.schedule.entries) == 1
    return Point(
        values=values,
        strategy=strategy,
        recipe=chosen,
        boundary=None if is_alone else boundary,
    )


def with_strategy(recipe: Recipe, strategy: str) -> Recipe:
    """Return a recipe whose two experts are used in another way.

    Raises:
        ConfigError: The recipe has no two experts, of which one comes first.
    """
    if strategy == DYNAMICS_FIRST:
        return recipe
    entries = recipe.schedule.entries if recipe.schedule else ()
    if len(entries) != 2 or len(recipe.experts) != 2 or entries[0].condition is None:
        raise ConfigError(
            f"The strategy `{strategy}` is for recipes of two experts with a schedule.",
            fix=f"Leave it out, or give such a recipe, e.g. pocket: {', '.join(recipe.experts)} "
            "is what this one has.",
        )
    if recipe.schedule is not None:
        recipe.schedule.check_no_knobs(f"the strategy `{strategy}`")
    noisy, clean = (entry.expert for entry in entries)
    first, second = recipe.experts[noisy], recipe.experts[clean]
    if strategy == "consistency-first":
        turned = (replace(entries[0], expert=clean), ScheduleEntry(noisy))
        return replace(recipe, schedule=ExpertSchedule(turned))
    alone = {
        "dynamics-alone": (noisy, first),
        "consistency-alone": (clean, second),
        "averaged": ("averaged", first + 0.5 * (second - first)),
    }
    name, expert = alone[strategy]
    return replace(recipe, experts={name: expert}, schedule=ExpertSchedule((ScheduleEntry(name),)))
