"""The order in which a report shows videos: failures, frozen ones, then the biggest disagreements.

A scene is one prompt, photo and seed under every set that has it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from motionmerge.evaluation.metrics import HEADLINES, METRICS
from motionmerge.evaluation.report.sets import Key, ReportSet
from motionmerge.evaluation.runs import FROZEN_WARNING, Measured


@dataclass(frozen=True, kw_only=True)
class SharedScene:
    """One prompt, photo and seed.

    Args:
        key: What its videos share.
        videos: By the set's name; of several in one set the first.
        more: How many further videos of the sets share the key.
        disagreement: Mean over metrics of the range over sets, in standard deviations of all
            videos; 0 for one set.
        apart: The metric with the largest range, lowest and highest value.
    """

    key: Key
    videos: Mapping[str, Measured]
    more: int
    disagreement: float
    apart: tuple[str, float, float] | None

    @property
    def num_failed(self) -> int:
        """How many of its videos cannot be measured."""
        return sum(one.failure is not None for one in self.videos.values())

    @property
    def num_frozen(self) -> int:
        """In how many of its videos nothing moves."""
        return sum(is_frozen(one) for one in self.videos.values())

    @property
    def num_warned(self) -> int:
        """How many of its videos have warnings."""
        return sum(bool(one.warnings) for one in self.videos.values())

    @property
    def difference(self) -> str:
        """What its videos differ in most, as a sentence; empty if they do not."""
        if self.apart is None:
            return ""
        name, low, high = self.apart
        digits, unit = HEADLINES[name], METRICS[name].unit
        return f"differ most in {name}: {low:.{digits}f} to {high:.{digits}f} {unit}".rstrip()


def is_frozen(one: Measured) -> bool:
    """Return whether nothing moves in most of a video."""
    share = one.number("frozen_share")
    return share is not None and share >= FROZEN_WARNING


def order_scenes(sets: Sequence[ReportSet]) -> list[SharedScene]:
    """Find the scenes that at least two sets share (with one set, all), the most telling first."""
    spread = _spreads([one for each in sets for one in each.measured])
    counts = Counter(key for one in sets for key in one.by_key)
    scenes = [_scene(key, sets, spread) for key, num in counts.items() if num >= min(2, len(sets))]
    return sorted(
        scenes,
        key=lambda one: (-one.num_failed, -one.num_frozen, -one.disagreement, -one.num_warned),
    )


def _scene(key: Key, sets: Sequence[ReportSet], spread: Mapping[str, float]) -> SharedScene:
    found = {one.name: one.by_key[key] for one in sets if key in one.by_key}
    videos = {name: those[0] for name, those in found.items()}
    ranges: dict[str, tuple[float, float]] = {}
    for metric in spread:
        numbers = [value for one in videos.values() if (value := one.number(metric)) is not None]
        if len(numbers) > 1:
            ranges[metric] = min(numbers), max(numbers)
    scaled = {name: (high - low) / spread[name] for name, (low, high) in ranges.items()}
    most = max(scaled, key=lambda name: scaled[name], default=None)
    return SharedScene(
        key=key,
        videos=videos,
        more=sum(len(those) - 1 for those in found.values()),
        disagreement=math.fsum(scaled.values()) / len(scaled) if scaled else 0.0,
        apart=None if most is None or not scaled[most] else (most, *ranges[most]),
    )


def _spreads(measured: Sequence[Measured]) -> dict[str, float]:
    """Return the standard deviation of each metric that varies over the videos."""
    spreads = {}
    for name in HEADLINES:
        numbers = [value for one in measured if (value := one.number(name)) is not None]
        spread = float(np.std(numbers)) if numbers else 0.0
        if spread > 0:
            spreads[name] = spread
    return spreads
