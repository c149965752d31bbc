"""What a sweep's points measure: means with intervals, differences from the first, the front.

All points have the same photos, prompts and seeds, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motionmerge.evaluation.runs import Measured
from motionmerge.evaluation.statistics import Estimate
from motionmerge.evaluation.summary import Summary, summarise
from motionmerge.evaluation.sweeps.grid import Point
from motionmerge.evaluation.sweeps.observed import Observed

MOTION = "motion_degree"
FIDELITY, OBEDIENCE = "first_frame_ssim", "camera_agreement"
WANTED_HIGH = (MOTION, FIDELITY, OBEDIENCE)
"""What the front trades against each other: how much moves, is the photo kept, does it obey."""

MORE = {"more_motion": MOTION, "more_fidelity": FIDELITY, "more_obedience": OBEDIENCE}
"""Columns of the paired differences."""

SHOWN = (MOTION, "object_motion", FIDELITY, "drift_ssim_8", "warp_error", OBEDIENCE, "frozen_share")
"""Metrics of tables and curves."""


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """A point and what its videos measure.

    Attributes:
        point: The values.
        measured: Its videos, in the order of the manifest.
        summary: Over them.
        more: How much more of each of `WANTED_HIGH` it has than the first point, paired; nothing
            for the first itself.
        is_on_front: No other point is at least as good in everything and better in something.
    """

    point: Point
    measured: Sequence[Measured]
    summary: Summary
    more: Mapping[str, Estimate]
    is_on_front: bool

    def mean(self, metric: str) -> Estimate | None:
        """Return the mean of a metric; None where no video has it."""
        return self.summary.means.get(metric)


def results_of(
    measured: Sequence[Sequence[Measured]], points: Sequence[Point]
) -> list[PointResult]:
    """Summarise the videos of every point.

    Args:
        measured: Of every point, in the same order of prompts.
        points: The points.
    """
    summaries = list(map(summarise, measured))
    front = front_of([_qualities(summary) for summary in summaries])
    observed = [Observed.of_videos(own, WANTED_HIGH) for own in measured]
    return [
        PointResult(
            point=point,
            measured=measured[number],
            summary=summaries[number],
            more={
                metric: more
                for metric in WANTED_HIGH
                if number and (more := observed[number].difference(observed[0], metric))
            },
            is_on_front=front[number],
        )
        for number, point in enumerate(points)
    ]


def _qualities(summary: Summary) -> tuple[float | None, ...]:
    return tuple(
        summary.means[metric].value if metric in summary.means else None for metric in WANTED_HIGH
    )


def front_of(qualities: Sequence[tuple[float | None, ...]]) -> list[bool]:
    """Return which points no other point beats; more is better.

    Args:
        qualities: Of each point. Points are compared where all of them have a value; a point of
            which nothing is known is not on the front.
    """
    known = [own for own in qualities if any(value is not None for value in own)]
    common = [number for number, each in enumerate(zip(*known, strict=True)) if None not in each]

    def beats(one: tuple[float | None, ...], other: tuple[float | None, ...]) -> bool:
        pairs = [(one[number] or 0.0, other[number] or 0.0) for number in common]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [
        own in known and bool(common) and not any(beats(other, own) for other in known)
        for own in qualities
    ]


def to_table(results: Sequence[PointResult]) -> list[dict[str, Any]]:
    """Return one flat mapping for each point: values, means and intervals."""
    rows = []
    for result in results:
        row: dict[str, Any] = {**result.point.values, "strategy": result.point.strategy}
        row |= {
            "num_videos": result.summary.num_measured,
            "num_failed": result.summary.num_failed,
            "num_warned": result.summary.num_warned,
            "is_on_front": result.is_on_front,
        }
        for metric in SHOWN:
            row |= _columns(metric, result.mean(metric))
        for name, metric in MORE.items():
            row |= _columns(name, result.more.get(metric))
        rows.append(row)
    return rows


def _columns(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    found = {} if estimate is None else estimate.to_dict()
    columns = {"value": name, "low": f"{name}_low", "high": f"{name}_high"}
    return {column: found.get(part) for part, column in columns.items()}
