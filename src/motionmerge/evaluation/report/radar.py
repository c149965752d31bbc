"""A radar of VBench-I2V's dimensions, each scaled by its published range, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from motionmerge.evaluation.report.sets import Figure, ReportSet
from motionmerge.evaluation.vbench.total import RANGES, normalised

_WIDTH, _HEIGHT, _RADIUS = 560, 400, 140
_LEAST = 3  # dimensions that make an area


def vbench_radar(sets: Sequence[ReportSet], colors: Mapping[str, str]) -> Figure | None:
    """Draw the dimensions that all sets with scores share; None where they are too few.

    Args:
        sets: Those without scores are left out.
        colors: A CSS color for each set's name.
    """
    scored = [one for one in sets if one.vbench]
    names = [name for name in RANGES if scored and all(name in one.vbench for one in scored)]
    if len(names) < _LEAST:
        return None
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="13" '
        f'aria-label="Radar of {len(names)} dimensions of VBench-I2V">'
    ]
    for share in (0.25, 0.5, 0.75, 1.0):
        ring = _points([share] * len(names))
        parts.append(f'<polygon points="{ring}" fill="none" stroke="currentColor" opacity=".2"/>')
    for index, name in enumerate(names):
        x, y = _place(index, len(names), 1.1)
        side = "middle" if abs(x - _WIDTH / 2) < 9 else "start" if x > _WIDTH / 2 else "end"
        label = f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{side}" fill="currentColor">'
        parts.append(f"{label}{name.replace('_', ' ')}</text>")
    for one in scored:
        color = colors[one.name]
        shares = [min(max(normalised(name, one.vbench[name]), 0.0), 1.0) for name in names]
        parts.append(
            f'<polygon points="{_points(shares)}" style="fill:{color};stroke:{color}" '
            f'fill-opacity=".1" stroke-width="2"><title>{escape(one.name)}</title></polygon>'
        )
    return Figure(
        "VBench-I2V",
        "".join([*parts, "</svg>"]),
        "Each dimension from the lower end (middle) to the upper end (rim) of VBench's range.",
    )


def _place(index: int, num: int, share: float) -> tuple[float, float]:
    angle = 2 * math.pi * index / num
    return (
        _WIDTH / 2 + share * _RADIUS * math.sin(angle),
        _HEIGHT / 2 - share * _RADIUS * math.cos(angle),
    )


def _points(shares: Sequence[float]) -> str:
    places = (_place(index, len(shares), share) for index, share in enumerate(shares))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
