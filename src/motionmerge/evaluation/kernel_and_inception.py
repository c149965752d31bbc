"""The kernel distance (KVD) of two sets of videos, and the inception score (IS) of one.

The first takes features of a network, `[clips, dim]`, the second class probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.frechet import (
    Features,
    check_level,
    checked_features,
    checked_pair,
    finite_distance,
    overflow_named,
)
from motionmerge.evaluation.statistics import Estimate

FEWEST_FOR_KERNEL = 3
"""Clips in each set."""


def kernel_distance(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    gamma: float | None = None,
    level: float = 0.95,
) -> Estimate:
    """Compute the kernel distance (KVD, as KID): the unbiased squared MMD of (gamma <a, b> + 1)^3.

    The interval is a jackknife's: from the distances without each clip in turn.

    Args:
        first, second: Features, `[clips, dim]`.
        gamma: Above 0; 1 / dim if None, as KID has it; the FVD paper has 1, which gives other
            numbers.
        level: Of the interval.

    Raises:
        DataError: As `frechet_distance`, or there are fewer than 3 clips in a set.
        ConfigError: `gamma` is no finite number above 0, or the level is outside (0, 1).

    Source: Binkowski et al. 2018 (KID); Unterthiner et al. 2018; Efron and Stein 1981.
    """
    check_level(level)
    one, two = checked_pair(first, second, fewest=FEWEST_FOR_KERNEL)
    factor = checked_gamma(gamma, dim=one.shape[1])
    with overflow_named():
        value, variance = _kernel_distance_and_variance(one, two, factor)
        finite_distance(value + variance)
    spread = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    return Estimate(value, value - spread, value + spread, min(len(one), len(two)))


def _kernel_distance_and_variance(
    one: Features, two: Features, factor: float
) -> tuple[float, float]:
    within = [_without_diagonal((factor * (rows @ rows.T) + 1) ** 3) for rows in (one, two)]
    across = (factor * (one @ two.T) + 1) ** 3
    value = within[0].mean + within[1].mean - 2 * float(across.mean())
    variance = 0.0
    for own, rows in zip(within, (across, across.T), strict=True):
        # Without clip i: the pairs within lose its row and column, those across lose its row.
        n = len(rows)
        pairs_within = (own.mean * n * (n - 1) - 2 * own.row_sums) / ((n - 1) * (n - 2))
        pairs_across = (rows.sum() - rows.sum(1)) / ((n - 1) * rows.shape[1])
        left_out = pairs_within - 2 * pairs_across
        variance += (n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum())
    return value, variance


def checked_gamma(gamma: float | None, *, dim: int) -> float:
    """Return the factor of the kernel of `kernel_distance`.

    Raises:
        ConfigError: It is no finite number above 0.
    """
    if gamma is None:
        return 1 / dim
    if not (math.isfinite(gamma) and gamma > 0):
        raise ConfigError(
            f"A `gamma` of {gamma} makes no kernel.",
            fix="Give `gamma=` a finite number above 0, such as 1, or leave it out.",
        )
    return gamma


def inception_score(
    probabilities: npt.ArrayLike, *, num_splits: int = 10, shuffle_seed: int | None = None
) -> tuple[float, float]:
    """Compute the inception score of class probabilities: its mean and deviation over splits.

        exp(mean over clips of KL(p(y | clip) || p(y)))

    Args:
        probabilities: `[clips, classes]`; rows add up to 1.
        num_splits: Into how many parts the clips are cut.
        shuffle_seed: Of `numpy.random.RandomState`: 42 as StyleGAN-V, None for no shuffling as in
            TGAN2.

    Raises:
        DataError: Rows are no probabilities, or there are fewer clips than splits.
        ConfigError: There is no split.

    Source: Salimans et al. 2016; Saito et al. 2020 (TGAN2, for videos).
    """
    if num_splits < 1:
        raise ConfigError(
            f"There are no inception scores of {num_splits} splits.",
            fix="Set `num_splits` to 10, as published, or to 1.",
        )
    rows = checked_features(probabilities)
    if (rows < 0).any() or not np.allclose(rows.sum(1), 1, atol=1e-3) or len(rows) < num_splits:
        raise DataError(
            f"An array of shape {list(rows.shape)} has no inception score in {num_splits} splits.",
            fix="Pass class probabilities (after the softmax) of at least one clip per split.",
        )
    if shuffle_seed is not None:
        rows = rows[np.random.RandomState(shuffle_seed).permutation(len(rows))]
    tiny = np.finfo(np.float64).tiny
    scores = []
    for part in np.array_split(rows, num_splits):
        log_ratio = np.log(part.clip(tiny)) - np.log(part.mean(0).clip(tiny))
        scores.append(math.exp(float((part * log_ratio).sum(1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


@dataclass(frozen=True)
class _Pairs:
    """The mean over pairs of unlike clips, and each clip's sum over the others."""

    mean: float
    row_sums: Features


def _without_diagonal(kernel: Features) -> _Pairs:
    sums = kernel.sum(1) - np.diagonal(kernel)
    n = len(kernel)
    return _Pairs(float(sums.sum()) / (n * (n - 1)), sums)
