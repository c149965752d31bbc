"""What one set of weights does on some clips, and how it differs from another on the same clips."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from motionmerge.evaluation.runs import Measured
from motionmerge.evaluation.statistics import Estimate, bootstrap_mean, sign_flip_p_value
from motionmerge.sampling.batch.variants import Variant


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Values of clips.

    Attributes:
        values: By metric, then by clip; a clip without a value is left out.
        clusters: The prompt of each clip, so that several seeds of one are not several prompts.
        num_failed: Clips that could not be made or measured.
    """

    values: Mapping[str, Mapping[Hashable, float]]
    clusters: Mapping[Hashable, Hashable]
    num_failed: int = 0

    @classmethod
    def of_videos(cls, measured: Sequence[Measured], metrics: Sequence[str]) -> Observed:
        """Return the metrics of videos; a clip is named by its place in the list."""
        return cls(
            values={
                metric: {
                    clip: number
                    for clip, one in enumerate(measured)
                    if one.failure is None and (number := one.number(metric)) is not None
                }
                for metric in metrics
            },
            clusters={
                clip: one.source.cluster or str(one.source.path)
                for clip, one in enumerate(measured)
            },
            num_failed=sum(one.failure is not None for one in measured),
        )

    def mean(self, metric: str) -> Estimate | None:
        """Return the mean with its interval; None where no clip has the metric."""
        own = self.values.get(metric, {})
        if not own:
            return None
        return bootstrap_mean(list(own.values()), clusters=[self.clusters[clip] for clip in own])

    def difference(self, other: Observed, metric: str) -> Estimate | None:
        """Return how much more this is than another, over the clips that both have."""
        differences = self._differences(other, metric)
        if not differences:
            return None
        clusters = [self.clusters[clip] for clip in differences]
        return bootstrap_mean(list(differences.values()), clusters=clusters)

    def p_value(self, other: Observed, metric: str, *, num_tests: int = 1) -> float:
        """Return how often chance alone makes as large a difference, see `sign_flip_p_value`.

        1 where no clip is shared. Five prompts or fewer are never below 0.05.
        """
        differences = self._differences(other, metric)
        if not differences:
            return 1.0
        clusters = [self.clusters[clip] for clip in differences]
        return sign_flip_p_value(list(differences.values()), clusters=clusters, num_tests=num_tests)

    def _differences(self, other: Observed, metric: str) -> dict[Hashable, float]:
        theirs = other.values.get(metric, {})
        ours = self.values.get(metric, {})
        return {clip: ours[clip] - theirs[clip] for clip in ours if clip in theirs}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Something to have much of.

    Attributes:
        metric: What is measured; more is better.
        unit: Of it; empty for a share or a similarity.
        digits: How many are shown.
    """

    metric: str
    unit: str = ""
    digits: int = 2


class Bench(Protocol):
    """Prompts on which sets of weights are tried, and what is measured there.

    What was measured before is not measured again.

    Attributes:
        objectives: What is measured, by the name that people call it.
        num_clips, num_steps: Of a full measurement.
        about: The clips in words.
    """

    objectives: Mapping[str, Goal]
    num_clips: int
    num_steps: int
    about: str

    def observe(self, variant: Variant, *, num_clips: int, num_steps: int) -> Observed:
        """Measure a set of weights on the first clips; those of fewer are among those of more."""
        ...

    def seconds(self, *, num_clips: int, num_steps: int) -> float | None:
        """Estimate how long that takes; None where nothing was timed yet."""
        ...

    def key(self, variant: Variant, *, num_clips: int, num_steps: int) -> str:
        """Hash all that decides what is observed of a set of weights."""
        ...
