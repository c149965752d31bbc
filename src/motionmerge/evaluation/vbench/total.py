"""VBench-I2V's Quality, I2V and Total scores from its nine dimensions.

Each dimension is brought to 0..1 by its published range, then averaged with its weight. A missing
one is refused: VBench's own script counts it as raw 0, which becomes negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from motionmerge.errors import DataError

RANGES: Mapping[str, tuple[float, float]] = {
    "i2v_subject": (0.1462, 1.0),
    "i2v_background": (0.2615, 1.0),
    "camera_motion": (0.0, 1.0),
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "motion_smoothness": (0.7060, 0.9975),
    "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
}
WEIGHTS: Mapping[str, float] = {"dynamic_degree": 0.5, "camera_motion": 0.1}
"""Of dimensions whose weight is not 1."""

I2V = ("camera_motion", "i2v_subject", "i2v_background")
QUALITY = tuple(name for name in RANGES if name not in I2V)
IN_NO_TOTAL = "temporal_flickering"
UNBOUNDED = "aesthetic_quality"
"""The score of a linear layer, which is in 0..1 for photos and need not be for other pictures."""

DIMENSIONS = (*RANGES, IN_NO_TOTAL)


@dataclass(frozen=True)
class Totals:
    """The three scores, in [0, 1] where every dimension is within its range.

    Attributes:
        quality: Over six dimensions.
        i2v: Over three.
        total: Their mean.
    """

    quality: float
    i2v: float
    total: float


def normalised(dimension: str, score: float) -> float:
    """Scale a raw score to 0..1 by its published range.

    Raises:
        DataError: No total has the dimension.
    """
    if dimension not in RANGES:
        raise DataError(
            f"`{dimension}` is in no total of VBench-I2V.", fix=f"Use one of {', '.join(RANGES)}."
        )
    low, high = RANGES[dimension]
    return (score - low) / (high - low)


def mean_of(dimensions: tuple[str, ...], scores: Mapping[str, float]) -> float:
    """Return the weighted mean of normalised scores.

    Raises:
        DataError: One of the dimensions has no score.
    """
    lacking = [name for name in dimensions if name not in scores]
    if lacking:
        raise DataError(
            f"There is no score of {', '.join(lacking)}, and a total without it would be another.",
            fix="Measure all dimensions, or compare single dimensions.",
        )
    weights = {name: WEIGHTS.get(name, 1.0) for name in dimensions}
    weighted = sum(weights[name] * normalised(name, scores[name]) for name in dimensions)
    return weighted / sum(weights.values())


def totals(scores: Mapping[str, float]) -> Totals:
    """Return Quality, I2V and Total of raw scores in [0, 1]; temporal_flickering is in none.

    Raises:
        DataError: A dimension is missing or unknown.
    """
    unknown = [name for name in scores if name not in DIMENSIONS]
    if unknown:
        raise DataError(
            f"`{unknown[0]}` is no dimension of VBench-I2V.", fix=f"Use {', '.join(DIMENSIONS)}."
        )
    quality, i2v = mean_of(QUALITY, scores), mean_of(I2V, scores)
    return Totals(quality, i2v, (quality + i2v) / 2)
