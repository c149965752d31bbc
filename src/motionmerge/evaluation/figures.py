"""Empty charts in the house's style, as PNG for documents and SVG in the colors of a page."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Color of text and axes; becomes the page's text color in SVG."""


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
