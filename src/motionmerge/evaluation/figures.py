"""Empty charts in the house's style, as PNG for documents and SVG in the colors of a page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Color of text and axes; becomes the page's text color in SVG."""

_ANGLES = (35, -35, 145, -145, 0, 180, 65, -65, 115, -115)
"""Where a label may be around its point, in degrees, best first."""

_LINE = {"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3}


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Make an empty chart, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Draw axes in ink, without a frame."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def plain(text: str, *, most: int = 80) -> str:
    """Return a stranger's text for a chart: one line, cut, and no formula between dollar signs."""
    line = "".join(sign if sign.isprintable() else " " for sign in text)
    return (line if len(line) <= most else f"{line[: most - 2]}..").replace("$", r"\$")


def label_points(axes: Axes, labels: Sequence[tuple[float, float, str]], *, figure: Figure) -> None:
    """Write labels beside points, none upon another; a thin line joins a far label to its point.

    Call it when all else is drawn: places are chosen for the axes as they are then.

    Args:
        axes: Where the points are.
        labels: The point and the text of each.
        figure: The chart.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # lays it out
    page = figure.bbox
    points = axes.transData.transform([place[:2] for place in labels] or [(0, 0)])
    taken = [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in points]
    for *point, text in labels:
        for distance, angle in product(range(7, 200, 11), _ANGLES):
            dx, dy = (distance * turn(math.radians(angle)) for turn in (math.cos, math.sin))
            where: dict[str, Any] = {"xy": point, "xytext": (dx, dy), "textcoords": "offset points"}
            side = "center" if abs(dx) < 1 else "left" if dx > 0 else "right"
            label = axes.annotate(text, **where, fontsize=7, color=INK, ha=side, va="center")
            box = label.get_window_extent()
            is_whole = page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1)
            if is_whole and not any(map(box.overlaps, taken)):
                taken.append(box)
                if distance > 7:
                    axes.annotate("", **where, arrowprops={**_LINE, "color": INK})
                break
            label.remove()


def to_png(figure: Figure) -> bytes:
    """Return the chart on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, *, variables: Mapping[str, str] | None = None) -> str:
    """Return the chart as an SVG element without background; text has the page's color.

    Args:
        figure: The chart.
        variables: Colors that the page may set, by the names of its variables (`--NAME`).
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "motionmerge"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for name, color in (variables or {}).items():
        text = text.replace(color, f"var(--{name}, {color})")
    return text
