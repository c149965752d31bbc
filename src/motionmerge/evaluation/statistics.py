"""How sure a number is: bootstrap intervals over prompts, Wilson intervals, Holm's correction.

The unit is the prompt: its videos of several seeds are one cluster. Conditions see the same prompts
and the same noise, so that differences are paired. Everything is drawn in batches, so that memory
does not grow with the number of prompts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from motionmerge.errors import DataError

NUM_RESAMPLES = 10_000

_BATCH_ENTRIES = 1_000_000
"""Of an array of resampled values: 8 MB."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Args:
        value: The estimate from all prompts.
        low, high: Ends of the interval; NaN where there is none, as for one prompt alone.
        num: How many prompts it rests on.
    """

    value: float
    low: float
    high: float
    num: int

    def scaled(self, factor: float) -> Estimate:
        """Return the same in another unit, e.g. percent."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.num)

    def to_dict(self) -> dict[str, float | None]:
        """Return it as JSON has it: ends of an interval that there is not are None."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}

    def text(self, digits: int = 1, *, sign: bool = False) -> str:
        """Write as `3.2 [2.9, 3.6]`."""
        form = f"{'+' if sign else ''}.{digits}f"
        if math.isnan(self.low):
            return f"{self.value:{form}} [no interval]"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def bootstrap_mean(
    values: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    training_seeds: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Compute a mean with its bootstrap interval (BCa), drawn over clusters.

    For a paired comparison pass differences, see `paired_difference`.

    Args:
        values: `[videos]`.
        clusters: The prompt of each value: values of one prompt are drawn together. By default each
            is a prompt of its own.
        training_seeds: The training run that each value is from. With several, runs and prompts are
            both drawn, each with replacement (percentile interval): another run of the training
            would differ as these do.

    Raises:
        DataError: There is no value, one is not finite, or the lengths differ.

    Source: Efron 1987 (BCa); Owen 2007, "The pigeonhole bootstrap".
    """
    array = _checked(values)
    groups = _codes(clusters, num=len(array))
    runs = None if training_seeds is None else _codes(training_seeds, num=len(array))
    if runs is not None and runs.max() > 0:
        return _crossed(array, groups, runs, level=level, seed=seed, num_resamples=num_resamples)
    sums, sizes = np.bincount(groups, weights=array), np.bincount(groups).astype(np.float64)
    mean = float(array.mean())
    if len(sums) == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    if np.ptp(sums / sizes) == 0:
        return Estimate(mean, mean, mean, len(sums))
    has_even_sizes = bool((sizes == sizes[0]).all())
    data = (sums / sizes,) if has_even_sizes else (sums, sizes)
    with warnings.catch_warnings():  # an interval that degenerates is looked at below
        warnings.simplefilter("ignore")
        interval = stats.bootstrap(
            data,
            _mean if has_even_sizes else _ratio,
            n_resamples=num_resamples,
            batch=max(1, _BATCH_ENTRIES // len(sums)),
            paired=len(data) > 1,
            vectorized=True,
            confidence_level=level,
            method="BCa",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    if not np.isfinite([interval.low, interval.high]).all():
        # All but one value are the same, and BCa has no acceleration: take the percentiles.
        draws = _resampled(_mean_of(array, groups), num=len(sums), seed=seed, times=num_resamples)
        return percentile_interval(mean, draws, num=len(sums), level=level)
    return Estimate(mean, float(interval.low), float(interval.high), len(sums))


def _mean(values: FloatArray, axis: int = -1) -> FloatArray:
    return np.asarray(values.mean(axis=axis))


def _ratio(sums: FloatArray, sizes: FloatArray, axis: int = -1) -> FloatArray:
    return np.asarray(sums.sum(axis=axis) / sizes.sum(axis=axis))


def _mean_of(array: FloatArray, groups: npt.NDArray[np.intp]) -> Callable[..., float]:
    sums, sizes = np.bincount(groups, weights=array), np.bincount(groups)
    return lambda draw: float(sums[draw].sum() / sizes[draw].sum())


def _crossed(
    array: FloatArray,
    groups: npt.NDArray[np.intp],
    runs: npt.NDArray[np.intp],
    *,
    level: float,
    seed: int,
    num_resamples: int,
) -> Estimate:
    """Draw training runs and prompts independently; a value counts as often as both were drawn."""
    shape = (int(runs.max()) + 1, int(groups.max()) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (runs, groups), array)
    np.add.at(counts, (runs, groups), 1)
    rng = np.random.default_rng(seed)
    batch = max(1, _BATCH_ENTRIES // shape[1])
    resampled: list[FloatArray] = []
    for start in range(0, num_resamples, batch):
        size = min(batch, num_resamples - start)
        of_runs, of_groups = (
            rng.multinomial(num, np.full(num, 1 / num), size=size).astype(np.float64)
            for num in shape
        )
        top = ((of_runs @ sums) * of_groups).sum(axis=1)
        bottom = ((of_runs @ counts) * of_groups).sum(axis=1)
        resampled.append(top[bottom > 0] / bottom[bottom > 0])
    mean = float(array.mean())
    return percentile_interval(mean, np.concatenate(resampled), num=shape[1], level=level)


def paired_difference(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    training_seeds: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Estimate:
    """Compute the mean of first - second with its interval.

    Args:
        first, second: `[videos]`, of the same prompts and noise in the same order.
        clusters, training_seeds: As for `bootstrap_mean`.

    Raises:
        DataError: They cannot be paired, or as for `bootstrap_mean`.
    """
    a, b = _checked(first), _checked(second)
    if a.shape != b.shape:
        raise DataError(
            f"{len(a)} and {len(b)} values cannot be paired.",
            fix="Pass the values of the same prompts in the same order.",
        )
    return bootstrap_mean(a - b, clusters=clusters, training_seeds=training_seeds, level=level)


def sign_flip_p_value(
    differences: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    num_tests: int = 1,
) -> float:
    """Return the two-sided p-value of paired differences being zero on average.

    The means of clusters get random signs.

    Args:
        differences: `[videos]`.
        clusters: As for `bootstrap_mean`.
        seed: Of the signs.
        num_tests: How many p-values `holm` will correct together. Of n draws the least p-value is
            2 / (n + 1), which it multiplies: a small one is computed again from so many draws that
            it can stay below `LEVEL`.

    Raises:
        DataError: As for `bootstrap_mean`.
    """
    array = _checked(differences)
    groups = _codes(clusters, num=len(array))
    means = np.bincount(groups, weights=array) / np.bincount(groups)
    return float(sign_flip_p_values(means[None], seed=seed, num_tests=num_tests)[0])


_MOST_EXACT = 12  # clusters whose 4,096 choices of signs are all gone through
_FEWEST_DRAWS, _DRAWS_PER_TEST, _SMALL = 2_000, 100, 0.005


def sign_flip_p_values(means: FloatArray, *, seed: int = 0, num_tests: int = 1) -> FloatArray:
    """Return `sign_flip_p_value` for many sets of clusters at once.

    Args:
        means: `[sets, clusters]`, the mean of each cluster.
        seed, num_tests: As for `sign_flip_p_value`.

    Returns:
        `[sets]`; exact where all signs are few enough to be gone through.
    """
    found = _of_random_signs(means, seed=seed, times=_FEWEST_DRAWS)
    needed, is_small = _DRAWS_PER_TEST * num_tests, found <= _SMALL
    is_drawn = means.shape[1] > _MOST_EXACT
    if is_drawn and needed > _FEWEST_DRAWS and is_small.any():
        found[is_small] = _of_random_signs(means[is_small], seed=seed + 1, times=needed)
    return found


def _of_random_signs(means: FloatArray, *, seed: int, times: int) -> FloatArray:
    """Count how often a sum with other signs is as large or as small, and double the rarer one."""
    num_sets, num = means.shape
    is_exact = num <= _MOST_EXACT
    times = 2**num if is_exact else times
    rng = np.random.default_rng(seed)
    sums, nearly = means.sum(axis=1), 1e-12 * np.abs(means).sum(axis=1)  # rounding breaks no tie
    larger, smaller = np.zeros(num_sets), np.zeros(num_sets)
    batch = max(1, _BATCH_ENTRIES // max(num, num_sets))
    for start in range(0, times, batch):
        rows = np.arange(start, min(start + batch, times))
        bits = (
            rows[:, None] >> np.arange(num) & 1
            if is_exact
            else rng.integers(2, size=(len(rows), num))
        )
        drawn = (2.0 * bits - 1) @ means.T
        larger += (drawn >= sums - nearly).sum(axis=0)
        smaller += (drawn <= sums + nearly).sum(axis=0)
    itself = 0 if is_exact else 1  # the signs as they are, which chance would draw as well
    return np.minimum(1.0, 2 * (np.minimum(larger, smaller) + itself) / (times + itself))


LEVEL = 0.05
"""A corrected p-value below it is called a difference."""


def fewest_to_be_sure(num_tests: int, *, level: float = LEVEL) -> int:
    """Return how many clusters random signs need to call one of so many differences sure.

    Of n prompts, or raters, with one sign each the least two-sided p-value is 2^(1 - n), which
    `holm` then multiplies by the number of tests: 6 for one test, 9 for seven.
    """
    return math.floor(math.log2(num_tests / level)) + 2


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for how many there are (Holm 1979): the k-th smallest of m times m - k + 1.

    Raises:
        DataError: One is outside [0, 1].
    """
    for name, value in p_values.items():
        if not 0 <= value <= 1:
            raise DataError(f"The p-value of {name} is {value}.", fix="Pass values in [0, 1].")
    corrected, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = least
    return {name: corrected[name] for name in p_values}


def percentile_interval(
    value: float, resampled: FloatArray, *, num: int, level: float = 0.95
) -> Estimate:
    """Turn resampled values of a statistic into the percentile interval around its value."""
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), num)


def bootstrap_statistic(
    statistic: Callable[[npt.NDArray[np.intp]], float],
    num: int,
    *,
    level: float = 0.95,
    seed: int = 0,
    num_resamples: int = 2_000,
) -> Estimate:
    """Compute the percentile interval of any statistic of prompts.

    Args:
        statistic: Takes indices of prompts, with repetitions.
        num: How many prompts there are.
    """
    resampled = _resampled(statistic, num=num, seed=seed, times=num_resamples)
    return percentile_interval(statistic(np.arange(num)), resampled, num=num, level=level)


def _resampled(
    statistic: Callable[[npt.NDArray[np.intp]], float], *, num: int, seed: int, times: int
) -> FloatArray:
    rng = np.random.default_rng(seed)
    return np.array([statistic(rng.integers(num, size=num)) for _ in range(times)])


def wilson_interval(successes: int, num: int, *, level: float = 0.95) -> Estimate:
    """Compute a share with Wilson's score interval, which stays inside [0, 1].

    Raises:
        DataError: There is no trial, or more successes than trials.

    Source: Wilson 1927.
    """
    if not 0 <= successes <= num or num == 0:
        raise DataError(
            f"{successes} successes in {num} trials give no share.", fix="Pass at least one trial."
        )
    share = successes / num
    interval = stats.binomtest(successes, num).proportion_ci(level, method="wilson")
    # The interval contains the share; rounding must not undo that at 0 and 1.
    return Estimate(
        share, min(max(float(interval.low), 0.0), share), max(float(interval.high), share), num
    )


def _codes(names: Sequence[Hashable] | None, *, num: int) -> npt.NDArray[np.intp]:
    """Return the number names from 0 in the order of their first appearance."""
    if names is None:
        return np.arange(num)
    if len(names) != num:
        raise DataError(
            f"{num} values and {len(names)} names of clusters do not fit together.",
            fix="Pass one name for each value.",
        )
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.intp)


def _checked(values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise DataError(
            f"Values of shape {list(array.shape)} have no mean, or some are not finite.",
            fix="Pass at least one finite number per prompt.",
        )
    return array
