"""A sweep's curves with bands, and its front of motion against fidelity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from motionmerge.evaluation.figures import INK, label_points, new_figure, style_axes
from motionmerge.evaluation.metrics import METRICS
from motionmerge.evaluation.sweeps.results import FIDELITY, MOTION, OBEDIENCE, SHOWN, PointResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#2563eb", "#d6336c", "#2f9e44", "#b45309", "#7048e8", "#0c8599", "#5f656d", "#a61e4d")
"""Those of the sets on a report's page, in the same order."""

_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK, "ncols": 2}


def lines_of(results: Sequence[PointResult], axis: str) -> Mapping[str, list[PointResult]]:
    """Sort points into lines along one number; the other values and the strategy name a line."""
    lines: dict[str, list[PointResult]] = {}
    for result in results:
        others = [f"{name} {v:g}" for name, v in result.point.values.items() if name != axis]
        lines.setdefault(", ".join([*others, result.point.strategy]), []).append(result)
    return {
        name: sorted(line, key=lambda one: one.point.values[axis]) for name, line in lines.items()
    }


def curves_chart(results: Sequence[PointResult], *, axis: str) -> Figure:
    """Draw every metric along a number: a line for each combination of the others, 95 % bands."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    metrics = metrics_to_draw(results)
    num_rows = math.ceil(len(metrics) / 2)
    figure = Figure(figsize=(9.6, 0.6 + 2.6 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 2, squeeze=False).flat
    lines = lines_of(results, axis)
    for metric, axes in zip(metrics, panels, strict=False):
        style_axes(axes)
        for line, color in zip(lines.values(), _COLORS, strict=False):
            _draw_line(axes, line, axis=axis, metric=metric, color=color)
        axes.set_xlabel(axis)
        unit = METRICS[metric].unit
        axes.set_ylabel(f"{metric} ({unit})" if unit else metric)
    for axes in panels:  # one too many, if their number is odd
        axes.set_axis_off()
    if len(lines) > 1:
        handles = [Line2D([], [], color=color) for color in _COLORS[: len(lines)]]
        figure.legend(handles, list(lines)[: len(handles)], loc="outside upper left", **_LEGEND)
    return figure


def _draw_line(
    axes: Axes, line: Sequence[PointResult], *, axis: str, metric: str, color: str
) -> None:
    known = [(one.point.values[axis], mean) for one in line if (mean := one.mean(metric))]
    if not known:
        return
    x = [value for value, _ in known]
    axes.plot(x, [mean.value for _, mean in known], "o-", color=color, markersize=4)
    low = [mean.value if math.isnan(mean.low) else mean.low for _, mean in known]
    high = [mean.value if math.isnan(mean.high) else mean.high for _, mean in known]
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def metrics_to_draw(results: Sequence[PointResult]) -> list[str]:
    """Return the metrics that any video of the sweep has."""
    return [metric for metric in SHOWN if any(one.mean(metric) for one in results)]


def front_chart(results: Sequence[PointResult], *, first: Sequence[PointResult] = ()) -> Figure:
    """Draw motion against fidelity; points of the front are filled.

    Beside each stands its number in the results, and how often the camera went as told.

    Args:
        results: All points.
        first: Those whose strategies take the first colors, as the sets of a page do.
    """
    figure, axes = new_figure(6.4, 4.4)
    strategies = list(dict.fromkeys(one.point.strategy for one in (*first, *results)))
    labels: list[tuple[float, float, str]] = []
    for strategy, color in zip(strategies, cycle(_COLORS), strict=False):
        own = [pair for pair in enumerate(results, start=1) if pair[1].point.strategy == strategy]
        for number, one in own:
            motion, fidelity = one.mean(MOTION), one.mean(FIDELITY)
            if motion is None or fidelity is None:
                continue
            face = color if one.is_on_front else "none"
            axes.plot(fidelity.value, motion.value, "o", color=color, markerfacecolor=face)
            text = str(number)
            if (obeys := one.mean(OBEDIENCE)) is not None:
                text += f" ({100 * obeys.value:.0f} %)"
            labels.append((fidelity.value, motion.value, text))
        label = strategy if len(own) > 1 else f"{own[0][0]} {strategy}"
        axes.plot([], [], "o", color=color, label=label)
    axes.set_xlabel(f"{FIDELITY}: the first frame against the photo")
    axes.set_ylabel(f"{MOTION} ({METRICS[MOTION].unit})")
    if len(strategies) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), **_LEGEND)
    label_points(axes, labels, figure=figure)
    return figure
