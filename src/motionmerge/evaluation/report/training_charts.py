"""The curves of a training run: losses, and motion beside the base's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from motionmerge.evaluation.figures import INK, new_figure, to_svg
from motionmerge.evaluation.report.sets import Figure
from motionmerge.evaluation.report.training_run import TrainingRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 600
"""Of the curve of losses; more are averaged."""

_COLORS = ("#2563eb", "#d6336c", "#2f9e44", "#b45309", "#7048e8", "#0c8599")
_VARIABLES = {f"set-{place}": color for place, color in enumerate(_COLORS)}
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK, "ncols": 4}
_SIZE = (6.4, 3.2)


def training_charts(run: TrainingRun) -> list[Figure]:
    """Draw what a run has numbers for."""
    charts = (_motion(run), _losses(run), _held_out(run), _fidelity(run))
    return [one for one in charts if one is not None]


def _losses(run: TrainingRun) -> Figure | None:
    if not run.losses:
        return None
    steps, losses = np.array(run.losses, dtype=np.float64).T
    if len(steps) > MOST_POINTS:
        parts = np.array_split(np.arange(len(steps)), MOST_POINTS)
        steps = np.array([steps[part].mean() for part in parts])
        losses = np.array([losses[part].mean() for part in parts])
    figure, axes = _new("loss")
    width = max(1, len(losses) // 15)
    dots = "o" if width == 1 else None  # a line of one point is not seen
    alpha = 0.4 if width > 1 else 1
    axes.plot(steps, losses, color=_COLORS[0], linewidth=1, marker=dots, markersize=4, alpha=alpha)
    note = "As it was logged; it is as noisy as the noise levels that were drawn."
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width // 2 :][: len(smooth)], smooth, color=_COLORS[0], linewidth=2)
        note += f" Bold: means of {width} points."
    return Figure("Loss of training", to_svg(figure, variables=_VARIABLES), note)


def _held_out(run: TrainingRun) -> Figure | None:
    bands = list(dict.fromkeys(band for one in run.validations for band in one.losses))
    if not bands:
        return None
    figure, axes = _new("loss on held-out clips")
    for band, color in zip(bands, _COLORS, strict=False):
        points = [(one.step, one.losses[band]) for one in run.validations if band in one.losses]
        _line(axes, points, color=color, label=f"noise {band}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", colors=INK)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), **_LEGEND)
    return Figure(
        "Held-out loss by noise",
        to_svg(figure, variables=_VARIABLES),
        "At the same noise each time. Motion is decided where there is much noise, detail where "
        "there is little.",
    )


def _motion(run: TrainingRun) -> Figure | None:
    lines = [one for one in run.validations if one.relative_motion is not None]
    if not lines:
        return None
    figure, axes = _new("motion, share of the base's")
    for one in lines:
        known = [v.relative_motion for v in one.videos if v.relative_motion is not None]
        axes.plot([one.step] * len(known), known, "o", color=_COLORS[0], markersize=3, alpha=0.4)
    points = [(one.step, one.relative_motion or 0.0) for one in lines]
    _line(axes, points, color=_COLORS[0], label="median")
    if (least := lines[-1].warn_below) is not None:
        axes.axhline(least, color=_COLORS[1], linestyle="--", linewidth=1.2, label="warning")
    axes.axhline(1, color=INK, linestyle=":", linewidth=0.7)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), **_LEGEND)
    return Figure(
        "Motion beside the base's",
        to_svg(figure, variables=_VARIABLES),
        "Motion degree of each video over that of step 0, from the same noise; the line is the "
        "median. Below the dashed line the run warns.",
    )


def _fidelity(run: TrainingRun) -> Figure | None:
    found = [(one.step, one.first_frame_psnr) for one in run.validations]
    points = [(step, value) for step, value in found if value is not None]
    if not points:
        return None
    figure, axes = _new("PSNR of the first frame (dB)")
    _line(axes, points, color=_COLORS[2], label="mean")
    return Figure(
        "Faithfulness to the photo",
        to_svg(figure, variables=_VARIABLES),
        "The first frame of the videos against the photo that they begin with; mean.",
    )


def _new(label: str) -> tuple[Any, Axes]:
    figure, axes = new_figure(*_SIZE)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return figure, axes


def _line(axes: Axes, points: Sequence[tuple[int, float]], *, color: str, label: str) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, "o-", color=color, markersize=4, label=label)
