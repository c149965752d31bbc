"""The page of `motionmerge data check`: how much training clips move, in charts and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from motionmerge.errors import DataError
from motionmerge.evaluation.figures import new_figure, to_svg
from motionmerge.evaluation.html import page_text
from motionmerge.evaluation.motion import REFERENCE_WIDTH
from motionmerge.evaluation.report.embedding import jpeg_uri
from motionmerge.evaluation.report.sets import Figure
from motionmerge.io.atomic import write_whole
from motionmerge.io.clips import FrameTimes, frames_at
from motionmerge.io.decoding import ClipPlace

MOST_SHOWN = 36
"""Shots of the contact sheet, evenly spread from the slowest to the fastest."""

_COLUMNS = 6  # frames of a shot
_FRAME = (90, 160)
_MOST_LISTED = 500
_COLOR = "#2563eb"


@dataclass(frozen=True, kw_only=True)
class ShownShot:
    """A shot that is kept, as the page shows it.

    Args:
        name: Of its clip.
        place, times: Of its clip.
        first, end: Its first frame, and the one after its last.
        motion: Pixels a second in a frame 512 wide; None where it is not known.
        caption: Of its clip.
    """

    name: str
    place: ClipPlace
    times: FrameTimes
    first: int
    end: int
    motion: float | None
    caption: str


def write_checks_page(
    path: Path,
    shots: Sequence[ShownShot],
    *,
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[tuple[str, str]],
    left_out: Sequence[tuple[str, str]],
) -> None:
    """Write the page: numbers, the distribution of motion, a contact sheet, what is left out.

    Args:
        path: The HTML file; it needs no other.
        shots: What is kept.
        title: Of the page.
        facts: Numbers by name.
        notes: Names of clips, and what is odd about each.
        left_out: Names of what is left out, and why.

    Raises:
        DataError: It cannot be written.
    """
    motions = [shot.motion for shot in shots if shot.motion is not None]
    text = page_text(
        "clips.html.j2",
        title=title,
        facts=facts,
        figures=[Figure("", motion_chart(motions))] if motions else [],
        shown=[(shot, _strip(shot)) for shot in _spread(shots)],
        num_shots=len(shots),
        notes=notes[:_MOST_LISTED],
        num_notes=len(notes),
        left_out=left_out[:_MOST_LISTED],
        num_left_out=len(left_out),
        reference_width=REFERENCE_WIDTH,
    )
    write_whole(path, text)


def motion_chart(motions: Sequence[float]) -> str:
    """Draw how many shots move how much, as SVG."""
    from matplotlib.ticker import MaxNLocator

    edges: npt.NDArray[np.float64] = np.geomspace(0.5, 512, 21)
    counts, _ = np.histogram(np.clip(motions, edges[0], edges[-1]), edges)
    figure, axes = new_figure(7.2, 2.8)
    axes.bar(edges[:-1], counts, np.diff(edges) * 0.94, align="edge", color=_COLOR)
    axes.set_xscale("log")
    ticks = [0.5, 2, 8, 32, 128, 512]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"motion, px/s in a frame {REFERENCE_WIDTH} px wide (ends: less, more)")
    axes.set_ylabel("shots")
    return to_svg(figure, variables={"set-0": _COLOR})


def _spread(shots: Sequence[ShownShot]) -> list[ShownShot]:
    """Choose shots from the slowest to the fastest; those of unknown motion come last."""
    known = sorted(shots, key=lambda shot: (shot.motion is None, shot.motion or 0.0))
    places = np.linspace(0, len(known) - 1, min(MOST_SHOWN, len(known))).round().astype(int)
    return [known[place] for place in places]


def _strip(shot: ShownShot) -> str | None:
    """Draw frames of a shot side by side; None where they cannot be read by now."""
    indices = np.linspace(shot.first, shot.end - 1, _COLUMNS).round().astype(int).tolist()
    try:
        frames = frames_at(shot.place, indices, times=shot.times, size=_FRAME)
    except DataError:
        return None
    return jpeg_uri(np.concatenate(list(frames), axis=1))
