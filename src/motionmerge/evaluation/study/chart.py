"""A chart of wins, ties and losses per question, as the paper's Figure 3 shows its human study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from motionmerge.evaluation.figures import INK, new_figure, plain
from motionmerge.evaluation.study.analysis import PairResult, StudyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"wins": "#2563eb", "ties": "#c9ccd1", "losses": "#d6336c"}
_LONGEST = 24  # characters of a system's name
_LEAST_LABEL = 0.07  # of the bar's length, for a number inside


def study_chart(result: StudyResult, *, note: str = "") -> Figure:
    """Draw a bar for each question and pair: wins, ties, losses; `*` if Holm's p < 5 %."""
    pairs = sorted({(one.system, one.other) for one in result.pairs}, key=_order(result))
    figure, _ = new_figure(7.2, 1.0 + 0.34 * len(result.pairs) + 0.5 * len(pairs))
    figure.clear()
    heights = [sum((one.system, one.other) == pair for one in result.pairs) for pair in pairs]
    columns = figure.subplots(len(pairs), 1, squeeze=False, height_ratios=heights, sharex=True)
    for axes, pair in zip(columns[:, 0], pairs, strict=True):
        _draw_pair(axes, [one for one in result.pairs if (one.system, one.other) == pair])
    columns[-1, 0].set_xlabel(
        "share of judgements (%); lines: Wilson's 95 % intervals of wins (above) and\n"
        "losses (below), as if judgements were independent;\n"
        "*: p < 5 % over scenes and over raters (Holm)"
    )
    if note:
        figure.suptitle(plain(note), color=INK, fontsize="medium")
    return figure


def _order(result: StudyResult) -> Callable[[tuple[str, str]], list[int]]:
    systems = result.study.systems
    return lambda pair: [systems.index(name) for name in pair]


def _draw_pair(axes: Axes, rows: Sequence[PairResult]) -> None:
    for place, one in enumerate(rows):
        start = 0.0
        for kind, color in COLORS.items():
            share = getattr(one, kind)
            axes.barh(place, 100 * share.value, left=100 * start, color=color, height=0.66)
            if share.value >= _LEAST_LABEL:
                middle = 100 * (start + share.value / 2)
                ink = INK if kind == "ties" else "white"
                axes.text(
                    middle, place, f"{100 * share.value:.0f}", ha="center", va="center", color=ink
                )
            start += share.value
        for end, sign, estimate in ((0, 1, one.wins), (100, -1, one.losses)):
            low, high = (end + sign * 100 * value for value in (estimate.low, estimate.high))
            axes.plot([low, high], [place - sign * 0.25] * 2, color=INK, linewidth=1.2)
    marks = ["*" if one.p_value < 0.05 else "" for one in rows]
    axes.set_yticks(
        range(len(rows)),
        [
            f"{one.question}{mark}  n={one.num_judgements}"
            for one, mark in zip(rows, marks, strict=True)
        ],
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.axvline(50, color=INK, linewidth=0.6, linestyle=":")
    axes.tick_params(colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    system, other = (plain(name, most=_LONGEST) for name in (rows[0].system, rows[0].other))
    axes.set_title(f"{system} wins", loc="left", color=COLORS["wins"], fontsize="medium")
    axes.set_title("tie", loc="center", color=INK, fontsize="medium")
    axes.set_title(f"{other} wins", loc="right", color=COLORS["losses"], fontsize="medium")
