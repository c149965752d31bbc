"""In which order shots are shown: all alike often, or fast ones more often than there are of them.

Most footage is slow, and a model takes over the motion that it is shown. Weights that flatten the
histogram of motion show each kind of motion about equally often, within a bound: a shot is never
shown more than `most` times as often as another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from motionmerge.errors import ConfigError
from motionmerge.rng import whole_number_for

NUM_BINS = 10


def flattening_weights(
    motions: Sequence[float | None], *, most: float = 8.0
) -> npt.NDArray[np.float64]:
    """Return how often each shot is to be shown; the weights add up to 1.

    weight = 1 / (shots in its bin of log(1 + motion)), bounded to `most` times the smallest

    Args:
        motions: In pixels a second; shots of unknown motion get the median weight.
        most: How much more often than another a shot may be shown, at least 1.

    Raises:
        ConfigError: `most` is below 1, or there is no shot.
    """
    if not most >= 1 or not motions:
        raise ConfigError(
            f"{len(motions)} shots cannot be weighted up to {most} times.",
            fix="Give at least one shot, and `most` from 1 on.",
        )
    known = np.array([one is not None for one in motions])
    values = np.log1p([one or 0.0 for one in motions])
    weights = np.ones(len(motions))
    if known.any():
        edges = np.histogram_bin_edges(values[known], NUM_BINS)
        bins = np.clip(np.digitize(values, edges) - 1, 0, NUM_BINS - 1)
        counts = np.bincount(bins[known], minlength=NUM_BINS)
        weights[known] = 1 / counts[bins[known]]
        weights[~known] = np.median(weights[known])
    weights = np.minimum(weights, most * weights.min())
    return weights / weights.sum()


def epoch_order(
    num: int, *, seed: int, epoch: int, weights: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.int64]:
    """Return which of `num` shots are shown in an epoch, in order, `[num]`.

    Without weights each comes once. With weights each comes `num * weight` times, rounded up or
    down, so that an epoch has the wanted histogram and not only on average.
    """
    rng = np.random.default_rng(whole_number_for(seed, "epoch", str(epoch)))
    order = rng.permutation(num)
    if weights is None:
        return order
    # Places at equal distances along the shots, which lie in an order of this epoch's own.
    ends = np.cumsum(weights[order])
    places = (np.arange(num) + rng.random()) / num * ends[-1]
    chosen = np.minimum(np.searchsorted(ends, places, side="right"), num - 1)
    return rng.permutation(order[chosen])
