"""What a search found, as recipe files that say what was measured, as JSON, and as a chart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionmerge.evaluation.figures import label_points, new_figure
from motionmerge.evaluation.statistics import Estimate
from motionmerge.evaluation.sweeps.observed import Goal
from motionmerge.evaluation.sweeps.tune import Tried, Tuning
from motionmerge.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FRONT, _OTHER, _REFERENCE = "#d6336c", "#7a7f87", "#2563eb"


def texts_of(one: Tried, objectives: Mapping[str, Goal]) -> Iterator[str]:
    """Yield each objective's mean with its interval, and the paired difference, in words."""
    for name, objective in objectives.items():
        mean = one.observed.mean(objective.metric)
        if mean is None:
            continue
        unit = f" {objective.unit}" if objective.unit else ""
        text = f"{name} {mean.text(objective.digits)}{unit}"
        if name in one.gains:
            text += f", {one.gains[name].text(objective.digits, sign=True)} against the original"
        yield text


def front_files(
    tuning: Tuning, folder: Path, *, name: str, about: str, seed: int
) -> dict[str, str]:
    """Return the recipes of the front by file; each says what was measured.

    Args:
        tuning: What was found.
        folder: Where the files go, for relative paths of inputs.
        name: Of the recipe whose numbers were searched.
        about: The clips in words.
        seed: Of clips and proposals.
    """
    files = {}
    for number, one in enumerate(tuning.front, start=1):
        recipe = one.candidate.variant.experts.recipe
        assert recipe is not None  # every candidate has one
        measured = "; ".join(texts_of(one, tuning.objectives))
        num = max(len(values) for values in one.observed.values.values())
        description = (
            f"Found by motionmerge tune {__version__} from {name}: {measured} (mean with 95 % "
            f"interval; n {num} of {about}, {one.rung.num_steps} steps, seed {seed}). Chosen on "
            "these clips: report numbers of others."
        )
        described = replace(recipe.relocated(folder), description=description)
        files[f"front-{number}.yaml"] = described.print()
    return files


def tuning_to_dict(tuning: Tuning, files: Sequence[str]) -> dict[str, Any]:
    """Return a search as JSON has it, best candidates first.

    Args:
        tuning: What was found.
        files: Of the front, in its order.
    """
    by_number = {one.candidate.number: file for one, file in zip(tuning.front, files, strict=True)}
    own = None if tuning.chosen is tuning.reference else tuning.chosen.candidate.number
    return {
        "objectives": {name: one.metric for name, one in tuning.objectives.items()},
        "rungs": [vars(rung) for rung in tuning.rungs],
        "stopped_early": tuning.stopped_early,
        "num_failed": tuning.num_failed,
        "take": None if own is None else by_number[own],
        "why": tuning.why,
        "original": _entry(tuning.reference, tuning.objectives),
        "candidates": [
            {**_entry(one, tuning.objectives), "file": by_number.get(one.candidate.number)}
            for one in tuning.tried
        ],
    }


def _entry(one: Tried, objectives: Mapping[str, Goal]) -> dict[str, Any]:
    means = {name: one.observed.mean(each.metric) for name, each in objectives.items()}
    return {
        "trial": one.candidate.number,
        "values": dict(one.candidate.values),
        **vars(one.rung),
        "num_failed": one.observed.num_failed,
        "is_on_front": one.is_on_front,
        "measured": {name: mean.to_dict() for name, mean in means.items() if mean is not None},
        "more_than_original": {name: gain.to_dict() for name, gain in one.gains.items()},
    }


def tuning_chart(tuning: Tuning) -> Figure:
    """Draw the first objective against the second, of candidates measured on all clips."""
    first, second = itertools.islice(tuning.objectives, 2)
    figure, axes = new_figure(6.4, 4.4)
    top = [one for one in tuning.tried if one.rung == tuning.rungs[-1]]
    for one in [*top, tuning.reference]:
        x, y = (one.observed.mean(tuning.objectives[name].metric) for name in (second, first))
        if x is None or y is None:
            continue
        color = _FRONT if one.is_on_front else _OTHER
        color = _REFERENCE if one is tuning.reference else color
        axes.errorbar(
            x.value,
            y.value,
            xerr=_arms(x),
            yerr=_arms(y),
            fmt="o",
            color=color,
            elinewidth=0.6,
            markersize=4,
        )
    for label, color in (("front", _FRONT), ("beaten", _OTHER), ("original", _REFERENCE)):
        axes.plot([], [], "o", color=color, label=label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, ncols=3)
    axes.set_xlabel(_label(second, tuning.objectives[second]))
    axes.set_ylabel(_label(first, tuning.objectives[first]))
    labels = []
    for number, one in enumerate(tuning.front, start=1):
        x, y = (one.observed.mean(tuning.objectives[name].metric) for name in (second, first))
        if x is not None and y is not None:
            labels.append((x.value, y.value, str(number)))
    label_points(axes, labels, figure=figure)
    return figure


def _arms(mean: Estimate) -> list[list[float]]:
    """Return how far an interval reaches to both sides; nothing where there is none."""
    arms = [mean.value - mean.low, mean.high - mean.value]
    return [[max(0.0, arm) if arm == arm else 0.0] for arm in arms]


def _label(name: str, objective: Goal) -> str:
    return f"{name} ({objective.unit})" if objective.unit else name
