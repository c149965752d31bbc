"""Distances between sets of video features: Frechet (FVD), kernel (KVD), and Inception Score.

The trace of the matrix root is a nuclear norm, tr (C1 C2)^1/2 = ||A B'||_*, where A and B are the
centred features over the root of n: no matrix root, never negative, 0 for equal sets, and right
for fewer samples than channels. Everything is float64. FVD of few videos is mostly bias: n stands
beside every number, and `fvd_infinity` extrapolates.

Papers: Unterthiner et al. 2018 (FVD), Binkowski et al. 2018 (KID), Chong and Forsyth 2020 (FID at
infinity), Salimans et al. 2016 (IS).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from motionmerge.errors import ConfigError, DataError, ShapeError

FloatArray = npt.NDArray[np.float64]
Covariance = Literal["n", "n-1"]

ENOUGH_VIDEOS = 2048
"""Published FVDs rest on this many; with fewer the bias is larger than most differences."""

_MOST_BYTES = 8 << 30


@dataclass(frozen=True)
class Preset:
    """How a published code computes FVD; numbers of different presets cannot be compared.

    Attributes:
        geometry: What becomes of frames before I3D.
        covariance: Divisor of the covariances.
    """

    geometry: str
    covariance: Covariance


_CROP = "shorter side 224, bilinear without antialias, centre crop, [-1, 1]"
_SQUASH = "squash to 224 x 224, bilinear without antialias, [-1, 1]"
PRESETS: Mapping[str, Preset] = {
    "styleganv": Preset(_SQUASH, "n"),
    "cd-fvd": Preset(_SQUASH, "n"),
    "common-metrics": Preset(_CROP, "n-1"),
    "videogpt": Preset(f"{_CROP}, through 8 bits", "n-1"),
}


@dataclass(frozen=True)
class Moments:
    """Sums over features from which a mean and a covariance follow; shards add up.

    Attributes:
        num: How many features.
        shift: Subtracted from all, the same in every shard, `[channels]`.
        total: Sum of what is left, `[channels]`.
        outer: Sum of its outer products, `[channels, channels]`.
    """

    num: int
    shift: FloatArray
    total: FloatArray
    outer: FloatArray

    def __add__(self, other: Moments) -> Moments:
        """Add another shard's.

        Raises:
            ShapeError: It was made with another shift.
        """
        if not np.array_equal(self.shift, other.shift):
            raise ShapeError(
                "These moments were made with different shifts.", fix="Use one shift for all."
            )
        return Moments(
            self.num + other.num, self.shift, self.total + other.total, self.outer + other.outer
        )

    def mean(self) -> FloatArray:
        """Return the mean, `[channels]`."""
        return self.shift + self.total / self.num

    def covariance(self, divisor: Covariance) -> FloatArray:
        """Return the covariance, `[channels, channels]`."""
        centred = self.outer - np.outer(self.total, self.total) / self.num
        return centred / _divided_by(self.num, divisor)


def moments(features: npt.ArrayLike, *, shift: npt.ArrayLike | None = None) -> Moments:
    """Sum features up.

    Args:
        features: `[videos, channels]`.
        shift: About the mean of all shards, for precision; by default 0.

    Raises:
        ShapeError: They are no matrix, or too few.
    """
    x = _checked(features, least=1)
    about = np.zeros(x.shape[1]) if shift is None else np.asarray(shift, dtype=np.float64)
    left = x - about
    return Moments(len(x), about, left.sum(0), left.T @ left)


def frechet(first: npt.ArrayLike, second: npt.ArrayLike, *, covariance: Covariance) -> float:
    """Return the Frechet distance of two sets of features.

    Args:
        first: `[videos, channels]`.
        second: The same of the other set.
        covariance: Divisor; part of the preset.

    Raises:
        ShapeError: The sets do not fit, or have fewer than two features.
    """
    x, y = _pair(first, second)
    a, b = (_rooted(z, covariance) for z in (x, y))
    shift = x.mean(0) - y.mean(0)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(float(shift @ shift + (a * a).sum() + (b * b).sum() - 2 * root), 0.0)


def frechet_of_moments(first: Moments, second: Moments, *, covariance: Covariance) -> float:
    """Return the Frechet distance from sums of shards; see `frechet`."""
    shift = first.mean() - second.mean()
    one, two = first.covariance(covariance), second.covariance(covariance)
    values, vectors = np.linalg.eigh(one)
    half = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ two @ half), 0)).sum()
    return max(float(shift @ shift + np.trace(one) + np.trace(two) - 2 * root), 0.0)


def fvd_infinity(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    covariance: Covariance,
    seed: int = 0,
    num_sizes: int = 15,
) -> float:
    """Extrapolate the Frechet distance to infinitely many videos: least squares of FVD on 1 / n.

    Args:
        first: `[videos, channels]`.
        second: The same of the other set.
        covariance: See `frechet`.
        seed: Draws the subsets.
        num_sizes: Sizes from a quarter of the smaller set up to all of it.

    Raises:
        ShapeError: See `frechet`; or there are fewer than 16 videos.
    """
    x, y = _pair(first, second, least=16)
    smaller = min(len(x), len(y))
    random = np.random.default_rng(seed)
    sizes = np.unique(np.linspace(max(smaller // 4, 4), smaller, num_sizes).astype(int))
    values = [
        frechet(random.permutation(x)[:size], random.permutation(y)[:size], covariance=covariance)
        for size in sizes
    ]
    design = np.stack([np.ones(len(sizes)), 1 / sizes], 1)
    return float(np.linalg.lstsq(design, np.array(values), rcond=None)[0][0])


@dataclass(frozen=True)
class KernelDistance:
    """An unbiased KVD with its interval.

    Attributes:
        value: Of all videos; may be negative where the sets are alike.
        low: Lower end of the 95 % interval, from subsets.
        high: Upper end.
        num: Videos of the smaller set.
        gamma: Of the kernel (gamma <a, b> + 1)^3.
    """

    value: float
    low: float
    high: float
    num: int
    gamma: float


def kernel_distance(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    gamma: float | None = None,
    seed: int = 0,
    num_subsets: int = 200,
) -> KernelDistance:
    """Return the unbiased squared MMD with a cubic kernel.

    The interval is that of subsampling: halves drawn without replacement spread as the whole does,
    since half the set is left out.

    Args:
        first: `[videos, channels]`.
        second: The same of the other set.
        gamma: By default 1 / channels (KID); the FVD paper's KVD uses 1.
        seed: Draws the subsets.
        num_subsets: How many.

    Raises:
        ShapeError: See `frechet`; or there are fewer than four videos.
    """
    x, y = _pair(first, second, least=4)
    factor = 1 / x.shape[1] if gamma is None else gamma
    xx, yy, xy = (_kernel(a, b, factor) for a, b in ((x, x), (y, y), (x, y)))
    random = np.random.default_rng(seed)
    value = _mmd(xx, yy, xy)
    spread = []
    for _ in range(num_subsets):
        i = random.permutation(len(x))[: len(x) // 2]
        j = random.permutation(len(y))[: len(y) // 2]
        spread.append(_mmd(xx[np.ix_(i, i)], yy[np.ix_(j, j)], xy[np.ix_(i, j)]))
    low, high = np.quantile(spread, [0.025, 0.975])
    return KernelDistance(value, float(low), float(high), min(len(x), len(y)), factor)


def inception_score(
    probabilities: npt.ArrayLike, *, num_splits: int = 10, shuffle_seed: int | None = None
) -> tuple[float, float]:
    """Return the mean and standard deviation of the Inception Score over splits.

    Args:
        probabilities: `[videos, classes]`, rows that sum to 1.
        num_splits: Parts of equal size; what is left over is not used.
        shuffle_seed: None keeps the order (TGAN2); 42 is StyleGAN-V's.

    Raises:
        ShapeError: They are no matrix, or fewer than the splits.
    """
    p = _checked(probabilities, least=num_splits)
    if shuffle_seed is not None:
        p = p[np.random.RandomState(shuffle_seed).permutation(len(p))]
    size = len(p) // num_splits
    scores = []
    for number in range(num_splits):
        part = p[number * size : (number + 1) * size]
        logs = np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(part.mean(0), 1e-300))
        scores.append(np.exp((part * logs).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def warning_of(num: int) -> str | None:
    """Return what must be said beside an FVD of so few videos; None if they are enough."""
    if num >= ENOUGH_VIDEOS:
        return None
    return (
        f"{num} videos are fewer than {ENOUGH_VIDEOS:,}: FVD is biased upwards by about 1 / n. "
        "Compare only sets of one size, or FVD at infinity and KVD."
    )


def preset_of(name: str) -> Preset:
    """Return a preset.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset `{name}`.", fix=f"Use {', '.join(PRESETS)}.")
    return PRESETS[name]


def read_features(path: Path) -> FloatArray:
    """Read features `[videos, channels]` from a .npy or .safetensors file of one tensor.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            tensors = load_file(path)
            if len(tensors) != 1:
                raise ValueError(f"it holds {len(tensors)} tensors")
            (array,) = tensors.values()
        else:
            raise ValueError(f"its name ends in {path.suffix!r}")
        return _checked(array, least=1)
    except (OSError, ValueError, ShapeError) as error:
        raise DataError(
            f"{path} holds no features: {error}",
            fix="Save [videos, channels] as .npy or .safetensors.",
        ) from error


def _divided_by(num: int, divisor: Covariance) -> int:
    return num if divisor == "n" else num - 1


def _rooted(x: FloatArray, divisor: Covariance) -> FloatArray:
    """Return A with A' A the covariance, no higher than it is wide."""
    a = (x - x.mean(0)) / np.sqrt(_divided_by(len(x), divisor))
    if len(a) <= a.shape[1]:
        return a
    factor: FloatArray = np.linalg.qr(a, mode="r")  # type: ignore[assignment]
    return factor


def _kernel(a: FloatArray, b: FloatArray, gamma: float) -> FloatArray:
    return (gamma * (a @ b.T) + 1) ** 3


def _mmd(xx: FloatArray, yy: FloatArray, xy: FloatArray) -> float:
    n, m = len(xx), len(yy)
    own = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(own - 2 * xy.mean())


def _pair(first: npt.ArrayLike, second: npt.ArrayLike, *, least: int = 2) -> Sequence[FloatArray]:
    x, y = (_checked(z, least=least) for z in (first, second))
    if x.shape[1] != y.shape[1]:
        raise ShapeError(
            f"Features of {x.shape[1]} and {y.shape[1]} channels cannot be compared.",
            fix="Compute both with the same network.",
        )
    return x, y


def _checked(features: npt.ArrayLike, *, least: int) -> FloatArray:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) < least or not x.shape[1]:
        raise ShapeError(
            f"Features of shape {list(x.shape)} came.",
            fix=f"Pass [videos, channels] of at least {least} videos.",
        )
    if not np.isfinite(x).all():
        raise ShapeError("Features hold NaN or infinity.", fix="Look at the videos behind them.")
    return x
