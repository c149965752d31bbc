"""Charts of an evaluation on the pocket model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from motionmerge.evaluation.figures import INK, new_figure, to_svg
from motionmerge.evaluation.pocket.claims import family
from motionmerge.evaluation.pocket.conditions import (
    BEST,
    BEST_REVERSED,
    HANDOVER,
    KNOB,
    METHOD,
    REVERSED,
)
from motionmerge.evaluation.pocket.decided import Alternative
from motionmerge.evaluation.pocket.runs import ConditionResults
from motionmerge.evaluation.report.sets import Figure as PageFigure
from motionmerge.evaluation.statistics import bootstrap_mean, wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES = {  # name, legend, color
    KNOB: ("one set of weights: tuned … base … extrapolated", "#7a7f87"),
    HANDOVER: ("base early / tuned late", "#0a9bc4"),
    METHOD: ("full method, paper's strength", "#e08a00"),
    REVERSED: ("paper's strength, reversed", "#b98cd9"),
    BEST: ("full method, best found", "#d6336c"),
    BEST_REVERSED: ("best found, reversed", "#8457c9"),
}
VARIANT_COLORS = {"base": "#2f9e44", "tuned": "#2563eb", "naive": "#a16207", "equal": "#0f766e"}
_DEGREE, _SHARE, _INTACT = "#d6336c", "#2563eb", "#7a7f87"  # of the knob's three curves


def front_chart(results: Mapping[str, ConditionResults]) -> Figure:
    """Draw obedience against motion degree: every family a line, 95 % intervals as crosses."""
    figure, axes = new_figure(7.2, 4.6)
    for name, (label, color) in FAMILIES.items():
        members = family(results, name)
        if members:
            _draw_family(axes, members, label, color)
    close = {name: _x(results[name]) for name in ("tuned", "naive") if name in results}
    for name, color in VARIANT_COLORS.items():
        if name in results:
            x, y = _x(results[name]), results[name].degree
            axes.plot(x, y, "D", color=color, markersize=7, zorder=5)
            # naive and tuned lie beside each other, at the end of every line: say so below them
            is_left = name in close and name == min(close, key=lambda one: close[one])
            align = "right" if is_left else "left"
            axes.annotate(
                name,
                (x, y),
                xytext=(-6 if is_left else 6, -14 if name in close else 6),
                textcoords="offset points",
                color=color,
                weight="bold",
                ha=align,
            )
    axes.set_xlabel("obedience: clips in which every object does all it was told (%)")
    axes.set_ylabel("motion degree (px at the border)")
    # Above the points, of which there may be some anywhere.
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
    )
    return figure


def _draw_family(axes: Axes, members: Sequence[ConditionResults], label: str, color: str) -> None:
    degrees = [bootstrap_mean(m.column("degree")[m.moving], num_resamples=2_000) for m in members]
    shares = [
        wilson_interval(int(m.column("obeyed").sum()), len(m.clips)).scaled(100) for m in members
    ]
    x, y = [e.value for e in shares], [e.value for e in degrees]
    axes.errorbar(
        x,
        y,
        xerr=[[e.value - e.low for e in shares], [e.high - e.value for e in shares]],
        yerr=[[e.value - e.low for e in degrees], [e.high - e.value for e in degrees]],
        color=color,
        elinewidth=0.5,
        linewidth=1.6,
        marker="o",
        markersize=3.5,
        label=label,
    )


def knob_chart(results: Mapping[str, ConditionResults]) -> Figure:
    """Draw motion degree, obedience and intact objects along the motion knob."""
    figure, axes = new_figure(6.4, 3.4)
    members = family(results, KNOB)
    alphas = [one.condition.setting for one in members]
    degrees = [bootstrap_mean(m.column("degree")[m.moving], num_resamples=2_000) for m in members]
    axes.plot(alphas, [e.value for e in degrees], "o-", color=_DEGREE)
    axes.fill_between(
        alphas, [e.low for e in degrees], [e.high for e in degrees], color=_DEGREE, alpha=0.18
    )
    axes.set_xlabel("motion knob α: base − α (tuned − base);  −1 is tuned, 0 is base")
    axes.set_ylabel("motion degree (px)", color=_DEGREE)
    axes.set_ylim(bottom=0)
    shares = axes.twinx()
    shares.plot(alphas, [_x(one) for one in members], "s-", color=_SHARE, markersize=4)
    shares.plot(alphas, [100 * one.intact for one in members], "^:", color=_INTACT, markersize=4)
    shares.set_ylabel("obedience ■   intact ▲   (%)", color=_SHARE)
    shares.set_ylim(0, 102)
    shares.spines["top"].set_visible(False)
    for spine in shares.spines.values():
        spine.set_color(INK)
    shares.tick_params(colors=INK)
    return figure


def decided_chart(alternatives: Sequence[Alternative]) -> Figure:
    """Draw how well each alternative can be told apart at each noise level."""
    figure, axes = new_figure(6.4, 3.4)
    levels = np.linspace(0.3, 0.995, 200)
    for alternative, color in zip(alternatives, ("#d6336c", "#e08a00", "#2563eb"), strict=False):
        axes.plot(levels, alternative.separation(levels), color=color, label=alternative.name)
        axes.plot(alternative.level(1), 1, "o", color=color)
    axes.axhline(1, color=INK, linewidth=0.6, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(0.2, 60)
    axes.invert_xaxis()
    axes.set_xlabel("noise level (1 noise … 0 clean)")
    axes.set_ylabel("d′ of the two alternatives")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def knob_figure(results: Mapping[str, ConditionResults]) -> PageFigure:
    """Return the knob's chart for a page."""
    return PageFigure(
        "The motion knob",
        to_svg(knob_chart(results), variables=_PAGE_COLORS),
        "One set of weights on the line through base and tuned: to the right of 0 extrapolated "
        "away from tuned, to the left an average of the two. Obedience is that of the objects "
        "alone; intact means that each of them is there once, of about the same size.",
    )


def front_figure(results: Mapping[str, ConditionResults]) -> PageFigure:
    """Return the chart of obedience against motion degree for a page."""
    return PageFigure(
        "Obedience against motion degree",
        to_svg(front_chart(results), variables=_PAGE_COLORS),
        "Every family a line, with 95 % intervals as crosses.",
    )


_PAGE_COLORS = {
    "set-0": _SHARE,
    "set-1": _DEGREE,
    "set-2": VARIANT_COLORS["base"],
    "set-3": FAMILIES[METHOD][1],
    "set-5": FAMILIES[HANDOVER][1],
    "set-6": _INTACT,
}
"""Colors by the page's variables that may set them."""


def _x(results: ConditionResults) -> float:
    return 100 * results.obedience
