"""What a set of measured videos says as a whole: means with intervals, counts, and conditions.

Videos that cannot be measured are counted, and in no mean. The unit of an interval is the prompt
with its photo, where these are known, so that several seeds of one prompt are not several prompts.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motionmerge.errors import ConfigError
from motionmerge.evaluation.metrics import METRICS
from motionmerge.evaluation.runs import Measured, labels_of
from motionmerge.evaluation.statistics import Estimate, bootstrap_mean
from motionmerge.text import fix_unknown_name

DYNAMIC_THRESHOLDS = (0.75, 1.5, 3.0, 6.0, 12.0, 24.0)
"""Pixels, of a frame whose shorter side has 256; VBench's is 6."""

_FACTS = ("width", "height", "num_frames", "frame_rate", "seconds")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A set of videos.

    Args:
        num_measured, num_failed, num_warned: Videos.
        num_clusters: Prompts, or videos of which no prompt is known.
        means: By metric, over the videos that have it.
        nums: How many videos that are, by metric.
        labels: How often each camera label was seen.
        dynamic_curve: Share of videos that are dynamic at each of `DYNAMIC_THRESHOLDS`.
    """

    num_measured: int
    num_failed: int
    num_warned: int
    num_clusters: int
    means: Mapping[str, Estimate]
    nums: Mapping[str, int]
    labels: Mapping[str, int]
    dynamic_curve: Mapping[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it: ends of intervals that there are not are null."""
        return {
            "num_measured": self.num_measured,
            "num_failed": self.num_failed,
            "num_warned": self.num_warned,
            "num_clusters": self.num_clusters,
            "metrics": {
                name: {
                    "mean": mean.value,
                    "low": mean.to_dict()["low"],
                    "high": mean.to_dict()["high"],
                    "num_clusters": mean.num,
                    "num_videos": self.nums[name],
                    "unit": METRICS[name].unit,
                }
                for name, mean in self.means.items()
            },
            "camera_labels": dict(self.labels),
            "dynamic_degree_dis_by_threshold": [
                {"pixels": threshold, "share": share}
                for threshold, share in self.dynamic_curve.items()
            ],
        }


def summarise(measured: Sequence[Measured]) -> Summary:
    """Summarise videos; a video that cannot be measured is only counted."""
    whole = [one for one in measured if one.failure is None]
    means, nums = {}, {}
    for name, metric in METRICS.items():
        having = [one for one in whole if one.number(name) is not None]
        if metric.is_label or name in _FACTS or not having:
            continue
        clusters = [_cluster(one) for one in having]
        values = [number for one in having if (number := one.number(name)) is not None]
        means[name] = bootstrap_mean(values, clusters=clusters)
        nums[name] = len(having)
    known = [one.number("dynamic_threshold_dis") for one in whole]  # of noise it is not
    lengths = [length for length in known if length is not None]
    return Summary(
        num_measured=len(whole),
        num_failed=len(measured) - len(whole),
        num_warned=sum(bool(one.warnings) for one in whole),
        num_clusters=len({_cluster(one) for one in whole}),
        means=means,
        nums=nums,
        labels=Counter(sorted(str(one.values["camera_label"]) for one in whole)),
        dynamic_curve={
            threshold: sum(length > threshold for length in lengths) / len(lengths)
            for threshold in DYNAMIC_THRESHOLDS
            if lengths
        },
    )


def _cluster(one: Measured) -> tuple[str, ...]:
    return one.source.cluster or (str(one.source.path),)


def worst_first(measured: Sequence[Measured]) -> list[Measured]:
    """Sort: what cannot be measured, then what has warnings, then by motion, the stillest first.

    A video whose motion is unknown, such as pure noise, comes before all whose motion is known.
    """

    def place(one: Measured) -> tuple[bool, bool, float]:
        degree = one.number("motion_degree")
        return one.failure is None, not one.warnings, -1.0 if degree is None else degree

    return sorted(measured, key=place)


# Conditions, such as `motion_degree < 2 or camera_label == static`

_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_TOKEN = re.compile(r"\s*(<=|>=|==|!=|<|>|[A-Za-z_]\w*|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
_GRAMMAR = "Write `NAME < NUMBER`, joined by `and` and `or`, such as `motion_degree < 2`."


@dataclass(frozen=True)
class _Comparison:
    """`NAME OP VALUE`, or `mean NAME OP VALUE`; of several words, `== WORD` asks for one."""

    metric: str
    sign: str
    value: float | str
    of_mean: bool

    def holds(self, one: Measured, summary: Summary) -> bool | None:
        """Compare; None where there is no value."""
        found: Any = one.values.get(self.metric)
        if self.of_mean:
            found = summary.means[self.metric].value if self.metric in summary.means else None
        if isinstance(self.value, str) and found is not None:
            return (self.value in str(found).split("+")) == (self.sign == "==")
        return None if found is None else _COMPARE[self.sign](found, self.value)


@dataclass(frozen=True)
class FailWhen:
    """A condition under which a video is not good enough: comparisons, `and` before `or`.

    Args:
        text: As it was written.
        alternatives: Joined by `or`; each is joined by `and`.
    """

    text: str
    alternatives: tuple[tuple[_Comparison, ...], ...]

    @classmethod
    def parse(cls, text: str) -> FailWhen:
        """Read a condition; nothing in it is executed.

        Raises:
            ConfigError: It is none, or a metric is unknown (the nearest one is named).
        """
        tokens = _tokens(text)
        alternatives: list[list[_Comparison]] = [[]]
        while True:
            of_mean = tokens[:1] == ["mean"]
            comparison = tokens[of_mean : of_mean + 3]
            alternatives[-1].append(_comparison(comparison, text, of_mean=of_mean))
            tokens = tokens[of_mean + 3 :]
            if not tokens:
                return cls(text, tuple(map(tuple, alternatives)))
            joint, *tokens = tokens
            if joint == "or":
                alternatives.append([])
            elif joint != "and":
                raise ConfigError(f"Cannot read `{joint}` in the condition `{text}`.", fix=_GRAMMAR)

    def failing(self, measured: Sequence[Measured], summary: Summary) -> list[Measured]:
        """Return the videos that meet the condition, or for which it cannot be judged."""
        return [one for one in measured if one.failure is None and self._holds(one, summary)]

    def _holds(self, one: Measured, summary: Summary) -> bool:
        # What cannot be judged must not pass: `None` counts as met.
        return any(
            all(part.holds(one, summary) is not False for part in alternative)
            for alternative in self.alternatives
        )

    def missing(self, measured: Sequence[Measured]) -> list[str]:
        """Return the metrics of the condition that no video has."""
        names = {part.metric for alternative in self.alternatives for part in alternative}
        return sorted(
            name for name in names if not any(one.values.get(name) is not None for one in measured)
        )


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    while place < len(text.rstrip()):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ConfigError(f"Cannot read `{text[place:]}` in the condition.", fix=_GRAMMAR)
        tokens.append(found[1])
        place = found.end()
    return tokens


def _comparison(tokens: list[str], text: str, *, of_mean: bool) -> _Comparison:
    if len(tokens) < 3 or tokens[1] not in _COMPARE:
        raise ConfigError(f"The condition `{text}` is not complete.", fix=_GRAMMAR)
    name, sign, value = tokens
    if name not in METRICS:
        raise ConfigError(f"There is no metric `{name}`.", fix=fix_unknown_name(name, METRICS))
    if METRICS[name].is_label:
        if of_mean or sign not in ("==", "!="):
            raise ConfigError(
                f"The metric `{name}` is a word.", fix=f"Write `{name} == WORD` or `!=`."
            )
        if value not in (labels := labels_of(name)):
            raise ConfigError(
                f"`{value}` is no camera label of `{name}`.", fix=fix_unknown_name(value, labels)
            )
        return _Comparison(name, sign, value, of_mean)
    number = _number(value)
    if number is None:
        raise ConfigError(f"`{name}` is compared to `{value}`, which is no number.", fix=_GRAMMAR)
    return _Comparison(name, sign, number, of_mean)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
