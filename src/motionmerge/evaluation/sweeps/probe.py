"""Where in noise an expert acts: it denoises inside a window of noise levels, the other outside.

The window slides from noise to clean. What changes with it, against the other expert throughout, is
decided there: paired, on the same clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from motionmerge.errors import ConfigError
from motionmerge.evaluation.figures import INK, style_axes
from motionmerge.evaluation.statistics import LEVEL, Estimate, holm
from motionmerge.evaluation.sweeps.observed import Bench, Goal, Observed
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.batch.variants import Variant
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.text import fix_unknown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_WINDOWS = 100

_DIGITS = 4
_COLORS = ("#d6336c", "#2563eb", "#2f9e44", "#e08a00", "#8457c9", "#0f766e", "#a16207", "#7a7f87")


@dataclass(frozen=True)
class Window:
    """Noise levels: above `low`, up to `high`."""

    low: float
    high: float

    @property
    def name(self) -> str:
        """Both ends, from noise to clean."""
        return f"{self.high:g} to {self.low:g}"


WHOLE_RANGE = Window(0.0, 1.0)


def windows_of(windows: int, window: float) -> list[Window]:
    """Slide a window over all noise levels, from noise to clean.

    Args:
        windows: How many places it takes, the first and the last included.
        window: Width of each, in noise levels.

    Raises:
        ConfigError: There are fewer than two or too many, they are as wide as everything, or some
            levels would be in none.
    """
    if not 2 <= windows <= MOST_WINDOWS:
        raise ConfigError(
            f"{windows} windows were asked for.", fix=f"Give `windows=` from 2 to {MOST_WINDOWS}."
        )
    if not (math.isfinite(window) and 0 < window < 1):
        raise ConfigError(f"A window cannot be {window} wide.", fix="Give `window=`, e.g. 0.25.")
    if windows * window < 1 - 1e-9:
        raise ConfigError(
            f"{windows} windows of {window:g} leave noise levels out.",
            fix=f"Give a larger `window=`, or `windows=` of at least {math.ceil(1 / window)}.",
        )
    lows = np.linspace(1 - window, 0, windows)
    return [Window(round(float(low), _DIGITS), round(float(low + window), _DIGITS)) for low in lows]


def with_window(recipe: Recipe, window: Window, *, expert: str) -> Recipe:
    """Return a recipe in which an expert denoises inside a window and the other one outside.

    Raises:
        ConfigError: The recipe has no two experts, or not this one.
    """
    other = other_expert(recipe, expert)
    if recipe.schedule is not None:
        recipe.schedule.check_no_knobs("a window of noise levels")
    entries: list[ScheduleEntry] = []
    if window.high < 1:
        entries.append(ScheduleEntry(other, above=window.high))
    if window.low > 0:
        entries += [ScheduleEntry(expert, above=window.low), ScheduleEntry(other)]
    else:
        entries.append(ScheduleEntry(expert))
    return replace(recipe.written_out(), schedule=ExpertSchedule(tuple(entries)))


def throughout(recipe: Recipe, expert: str) -> Recipe:
    """Return a recipe with one expert alone."""
    plain = recipe.written_out()
    schedule = ExpertSchedule((ScheduleEntry(expert),))
    return replace(plain, experts={expert: plain.experts[expert]}, schedule=schedule)


def other_expert(recipe: Recipe, expert: str) -> str:
    """Return the expert that denoises outside the window.

    Raises:
        ConfigError: The recipe has no two experts, or not this one.
    """
    if len(recipe.experts) != 2:
        raise ConfigError(
            f"The recipe has {len(recipe.experts)} experts: {', '.join(recipe.experts)}.",
            fix="Give one that has two, e.g. pocket.",
        )
    if expert not in recipe.experts:
        raise ConfigError(
            f"The recipe has no expert `{expert}`.", fix=fix_unknown_name(expert, recipe.experts)
        )
    return next(name for name in recipe.experts if name != expert)


def noisy_expert(recipe: Recipe) -> str:
    """Return the expert that the recipe begins with."""
    names = recipe.schedule.experts if recipe.schedule else tuple(recipe.experts)
    return names[0]


@dataclass(frozen=True, kw_only=True)
class Injected:
    """What an expert does inside a window.

    Attributes:
        window: Where it denoises.
        observed: What was measured.
        more: Per objective: how much more than without this expert, paired.
        sure: Objectives that chance alone hardly changes as much (Holm over the windows).
    """

    window: Window
    observed: Observed
    more: Mapping[str, Estimate]
    sure: frozenset[str] = frozenset()

    def to_dict(self, objectives: Mapping[str, Goal]) -> dict[str, Any]:
        """Return it as JSON has it."""
        means = {name: self.observed.mean(one.metric) for name, one in objectives.items()}
        return {
            "from": self.window.high,
            "to": self.window.low,
            "measured": {name: mean.to_dict() for name, mean in means.items() if mean is not None},
            "more_than_without": {name: one.to_dict() for name, one in self.more.items()},
            "sure": sorted(self.sure),
        }


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found.

    Attributes:
        objectives: What was measured, by name, without objectives of which no clip has a value.
        without: The other expert throughout.
        everywhere: The expert throughout.
        windows: From noise to clean.
    """

    objectives: Mapping[str, Goal]
    without: Observed
    everywhere: Injected
    windows: Sequence[Injected]

    @property
    def num_prompts(self) -> int:
        """How many prompts with their photos the clips are of."""
        return len(set(self.without.clusters.values()))

    def strongest(self, name: str) -> Injected | None:
        """Return the window that changes an objective most, if any surely changes it."""
        sure = [one for one in self.windows if name in one.sure]
        return max(sure, key=lambda one: abs(one.more[name].value), default=None)


def probe(
    bench: Bench,
    recipe: Recipe,
    windows: Sequence[Window],
    *,
    expert: str,
    build: Callable[[str, Recipe], Variant],
    objectives: Mapping[str, Goal],
    tell: Callable[[str], None] | None = None,
) -> Probe:
    """Measure an expert inside every window; what was measured before is not measured again.

    Args:
        bench: Clips and steps.
        recipe: Has two experts.
        windows: See `windows_of`.
        expert: The one inside the windows.
        build: Finds the weights of a recipe.
        objectives: What to look at.
        tell: Told of every window.

    Raises:
        ConfigError: As `other_expert`.
        DataError: Nothing could be measured.
    """

    def observe(name: str, changed: Recipe) -> Observed:
        observed = bench.observe(
            build(name, changed), num_clips=bench.num_clips, num_steps=bench.num_steps
        )
        if tell is not None:
            tell(name)
        return observed

    other = other_expert(recipe, expert)
    without = observe(f"{other} throughout", throughout(recipe, other))
    known = {name: one for name, one in objectives.items() if without.mean(one.metric) is not None}

    def injected(window: Window, observed: Observed) -> Injected:
        found = {name: observed.difference(without, one.metric) for name, one in known.items()}
        more = {name: one for name, one in found.items() if one is not None}
        return Injected(window=window, observed=observed, more=more)

    everywhere = observe(f"{expert} throughout", throughout(recipe, expert))
    found = [
        injected(
            window,
            observe(f"{expert} from {window.name}", with_window(recipe, window, expert=expert)),
        )
        for window in windows
    ]
    return Probe(
        objectives=known,
        without=without,
        everywhere=injected(WHOLE_RANGE, everywhere),
        windows=_with_sure(found, without, known),
    )


def _with_sure(
    windows: Sequence[Injected], without: Observed, objectives: Mapping[str, Goal]
) -> list[Injected]:
    """Mark what chance hardly does: among so many windows some are far from 0 by chance alone."""
    chances = {
        name: holm(
            {
                one.window.name: one.observed.p_value(
                    without, objective.metric, num_tests=len(windows)
                )
                for one in windows
            }
        )
        for name, objective in objectives.items()
    }
    return [
        replace(
            one, sure=frozenset(name for name, p in chances.items() if p[one.window.name] < LEVEL)
        )
        for one in windows
    ]


def probe_chart(found: Probe, *, expert: str) -> Figure:
    """Draw a panel for each objective: the change by window, noise at the left, 95 % intervals."""
    from matplotlib.figure import Figure

    num = len(found.objectives)
    figure = Figure(figsize=(7.2, 0.5 + 1.9 * num), layout="constrained")
    panels = figure.subplots(num, 1, squeeze=False, sharex=True).flat
    for (name, objective), color, axes in zip(
        found.objectives.items(), _COLORS, panels, strict=False
    ):
        style_axes(axes)
        _draw(axes, found, name, color)
        unit = f" ({objective.unit})" if objective.unit else ""
        axes.set_ylabel(f"Δ {name}{unit}")
        axes.set_xlim(1, 0)
    axes.set_xlabel(f"noise level at which {expert} denoises, the other expert elsewhere")
    return figure


def _draw(axes: Axes, found: Probe, name: str, color: str) -> None:
    axes.axhline(0, color=INK, linewidth=0.6)
    if (all_of_it := found.everywhere.more.get(name)) is not None:
        axes.axhline(all_of_it.value, color=color, linewidth=0.9, linestyle="--")
        axes.annotate(
            "throughout",
            (0.99, all_of_it.value),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=7,
            color=INK,
        )
    for one in found.windows:
        more = one.more.get(name)
        if more is None:
            continue
        axes.hlines(more.value, one.window.low, one.window.high, color=color, linewidth=2)
        if not math.isnan(more.low):
            middle = (one.window.low + one.window.high) / 2
            axes.vlines(middle, more.low, more.high, color=color, linewidth=0.9)
