"""Pieces of the studio's page, from templates that escape every text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean

from motionmerge.errors import MotionMergeError
from motionmerge.evaluation.figures import new_figure, style_axes, to_svg
from motionmerge.evaluation.flow import shared_scale
from motionmerge.evaluation.html import filled
from motionmerge.evaluation.metrics import METRICS
from motionmerge.evaluation.report.embedding import embed_video, strip_uri
from motionmerge.sampling.request.step_plan import StepPlan
from motionmerge.studio.turns import Stopped
from motionmerge.studio.works import (
    EXPORT_FILE,
    NUMBERS,
    PHOTO,
    RECIPE_FILE,
    Exported,
    History,
    MadeVideo,
    Work,
    Works,
)

TEMPLATES = Path(__file__).parent / "templates"

_WIDTH = 360  # of the axis, in units of its drawing
_MOTION, _LIKENESS = "#d6336c", "#2563eb"  # of the curves; the page has its own
_LONGEST = 1500  # characters of a message

_PLACES = re.compile(r"(?:/[\w.@+-]+)+/(?=[\w.@+-])")
"""Folders in an error's text; the names of files stay."""


def message(text: str, *, kind: str = "note") -> str:
    """Return a note or an error."""
    return filled(TEMPLATES / "message.html.j2", kind=kind, text=text[:_LONGEST], share=0.0)


def fault(error: BaseException) -> str:
    """Return what went wrong, without folders of this machine and without a traceback."""
    if isinstance(error, Stopped):
        return message("Stopped. Nothing was kept.")
    if isinstance(error, MotionMergeError):
        text = str(error)
    else:
        text = f"Something failed that should not: {type(error).__name__}: {error}"
    return message(_PLACES.sub("", text), kind="error")


def progress(text: str, share: float) -> str:
    """Return a bar with what is being done."""
    return filled(TEMPLATES / "message.html.j2", kind="progress", text=text[:200], share=share)


def history(found: History) -> str:
    """Return the list of what was made, the newest first."""
    page = TEMPLATES / "history.html.j2"
    return filled(page, works=found.works, num_damaged=found.num_damaged)


def shown_work(work: Work, works: Works) -> str:
    """Return the videos of a work side by side, with flow and numbers below them."""
    embedded = [embed_video(works.path(work.id) / one.file) for one in work.videos]
    flows = [flow for one in embedded for flow in one.flows]
    scale = shared_scale(flows) if flows else 1.0
    root = f"works/{work.id}"
    videos = [
        {
            "made": made,
            "source": f"{root}/{made.file}",
            "strip": strip_uri(one.flows, scale=scale) if one.flows else None,
            "numbers": _numbers(made),
        }
        for made, one in zip(work.videos, embedded, strict=True)
    ]
    has_recipe = (works.path(work.id) / RECIPE_FILE).is_file()
    return filled(
        TEMPLATES / "work.html.j2",
        work=work,
        model=shlex.quote(work.model),
        photo=PHOTO,
        videos=videos,
        root=root,
        curve=_curve(work.videos) if work.kind == "sweep" else None,
        has_recipe=has_recipe,
    )


def exported(files: Exported) -> str:
    """Return where to save files for another tool, and what to do with them there."""
    return filled(
        TEMPLATES / "exported.html.j2", source=f"works/{files.id}/{EXPORT_FILE}", usage=files.usage
    )


def _numbers(made: MadeVideo) -> list[tuple[str, str]]:
    found = []
    for name, value in made.numbers.items():
        text = f"{value:.1f} {METRICS[name].unit}"
        found.append((NUMBERS[name], f"{100 * value:.0f} %" if name == "frozen_share" else text))
    return found


def _curve(videos: Sequence[MadeVideo]) -> str:
    """Draw motion and likeness to the photo over the knob; of several seeds the mean."""
    figure, axes = new_figure(4.6, 2.6)
    other = axes.twinx()
    style_axes(other)
    for axis, name, color in (
        (axes, "motion_degree", _MOTION),
        (other, "first_frame_psnr", _LIKENESS),
    ):
        known: dict[float, list[float]] = {}
        for one in videos:
            if one.point is not None and name in one.numbers:
                known.setdefault(one.point, []).append(one.numbers[name])
        axis.plot(list(known), [fmean(values) for values in known.values()], "-", color=color)
        dots = [(point, value) for point, values in known.items() for value in values]
        axis.plot([x for x, _ in dots], [y for _, y in dots], "o", color=color)
        axis.set_ylabel(f"{NUMBERS[name]} ({METRICS[name].unit})", color=color)
        axis.tick_params(axis="y", colors=color)
    other.spines["left"].set_visible(False)
    axes.set_xlabel("motion knob")
    return to_svg(figure, variables={"mm-dynamics": _MOTION, "mm-consistency": _LIKENESS})


def axis(plan: StepPlan, *, boundary: float | None) -> str:
    """Draw the noise axis: which expert has which range, and each step on it."""
    bands, first = [], 0  # clean on the left, as on the boundary's slider: steps go leftwards
    edges = _edges(plan.levels)
    names = list(dict.fromkeys(plan.experts))
    for name, run in groupby(plan.experts):
        last = first + len(list(run))
        left, right = edges[first], edges[last]
        bands.append(
            {
                "x": right,
                "width": round(left - right, 1),
                "name": name.partition(" (")[0],  # its knobs stand below
                "color": min(names.index(name), 2),
            }
        )
        first = last
    return filled(
        TEMPLATES / "axis.html.j2",
        bands=bands,
        ticks=[round(_WIDTH * level, 1) for level in plan.levels],
        boundary=None if boundary is None else round(_WIDTH * boundary, 1),
        words=plan.line,
        warning=plan.warning,
    )


def _edges(levels: Sequence[float]) -> list[float]:
    """Return where each step's range begins, and where the last one ends."""
    middles = [(a + b) / 2 for a, b in pairwise(levels)]
    return [round(_WIDTH * level, 1) for level in (1.0, *middles, 0.0)]
