"""The arithmetic of VBench-I2V's dimensions, apart from any network.

Each rule is the published one, with what is odd in it: `needed_pairs` rounds halves to even, two
sampled frames always count as dynamic, and the camera rule looks beside the middle of an edge.
`measure` applies the same rules to optical flow, without torch: only those on features import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from motionmerge.lazy_torch import torch

Features: TypeAlias = "torch.Tensor"
FloatArray = npt.NDArray[np.float64]

SAMPLES_PER_SECOND = 8
"""How many frames a second dynamic_degree looks at, about."""

DYNAMIC_SIDE, DYNAMIC_LENGTH = 256, 6.0
"""A pair is dynamic above 6 px if the shorter side has 256."""

DYNAMIC_TOP = 0.05
"""The length of a pair is the mean of the longest twentieth of its vectors."""

STILL_SHARE = 0.005
"""Of the shorter side: a point of the camera rule that goes no farther counts as static."""

GRID = 10
"""Points of a side of the grid that the camera rule follows."""

_MIDDLE = 5  # of 0..9: beside the middle, and so in VBench


def cosine(first: Features, second: Features) -> FloatArray:
    """Return the cosines of vectors along the last axis, negative ones as 0."""
    cosines = torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)
    return cosines.clamp(min=0).numpy()


def similarity_to_image(image: Features, frames: Features) -> float:
    """Score i2v_subject and i2v_background: 0.4 max(c) + 0.3 mean(k) + 0.3 min(k).

    Args:
        image: Features of the first image, `[channels]`.
        frames: Those of all frames, `[frames, channels]`, at least two. c compares the image with
            each, k each with the one before.
    """
    to_image = cosine(image, frames)
    to_previous = cosine(frames[:-1], frames[1:])
    return float(0.4 * to_image.max() + 0.3 * to_previous.mean() + 0.3 * to_previous.min())


def consistencies(frames: Features) -> FloatArray:
    """Compare each frame from the second on with the one before and with the first, `[frames - 1]`.

    Their mean is subject_consistency or background_consistency of the clip.
    """
    return (cosine(frames[:-1], frames[1:]) + cosine(frames[:1], frames[1:])) / 2


def flickering(frames: npt.NDArray[np.uint8]) -> float:
    """Score temporal_flickering: (255 - mean |difference of neighbours|) / 255."""
    exact = frames.astype(np.float32)  # VBench averages in float32
    differences = [np.abs(after - before).mean() for before, after in pairwise(exact)]
    return float((255.0 - np.mean(differences).item()) / 255.0)


def smoothness(frames: npt.NDArray[np.uint8], between: Sequence[npt.NDArray[np.uint8]]) -> float:
    """Score motion_smoothness from interpolated frames, one for each odd frame that has a next.

    With an even number of frames the last one is not used.
    """
    odd = [frames[1 + 2 * number] for number in range(len(between))]
    wrong = [np.abs(a.astype(np.int16) - b).mean() for a, b in zip(odd, between, strict=True)]
    return float((255 - np.mean(wrong)) / 255)


def sampling_interval(fps: float) -> int:
    """Return how many frames dynamic_degree goes on at once: about eight frames a second."""
    return max(1, round(fps / SAMPLES_PER_SECOND))


def flow_score(flow: torch.Tensor) -> float:
    """Return the mean length of the largest 5 % of a flow `[height, width, 2]`, in pixels."""
    lengths = flow.float().norm(dim=-1).flatten()
    return float(lengths.sort(descending=True).values[: int(lengths.numel() * DYNAMIC_TOP)].mean())


def dynamic_threshold(height: int, width: int) -> float:
    """Return the score above which a pair moves, in pixels."""
    return DYNAMIC_LENGTH * min(height, width) / DYNAMIC_SIDE


def needed_pairs(num_frames: int) -> int:
    """Return how many pairs of a clip of so many sampled frames must move."""
    return round(4 * (num_frames / 16.0))


def is_dynamic(scores: Sequence[float], *, threshold: float, needed: int) -> bool:
    """Check whether enough pairs move; no pair is not dynamic, even where none is needed."""
    return bool(scores) and sum(score > threshold for score in scores) >= needed


_PAIRS = {
    ("left", "left"): "pan_right",
    ("right", "right"): "pan_left",
    ("down", "down"): "tilt_up",
    ("up", "up"): "tilt_down",
    ("static", "static"): "static",
}
_TOP_DOWN = {**_PAIRS, ("up", "down"): "zoom_in", ("down", "up"): "zoom_out"}
_LEFT_RIGHT = {**_PAIRS, ("left", "right"): "zoom_in", ("right", "left"): "zoom_out"}


def camera_labels(tracks: npt.ArrayLike, *, height: int, width: int) -> tuple[str, ...]:
    """Name a camera's moves from where a grid of points goes.

    Args:
        tracks: `[frames, 100, 2]` as (x, y) in pixels, the 10 x 10 points row by row; only the
            first and the last frame count, cut to whole pixels.
        height: Of the frames.
        width: Of the frames.

    Returns:
        Sorted labels such as `pan_left`; `None` stands for points that move in no known way.
    """
    points = np.asarray(tracks, dtype=np.float64)[[0, -1]].reshape(2, GRID, GRID, 2)
    found = camera_moves(*points, height=height, width=width)
    for lesser in ("static", "None"):
        if len(found) > 1:
            found.discard(lesser)
    return tuple(sorted(found))


def camera_moves(start: FloatArray, end: FloatArray, *, height: int, width: int) -> set[str]:
    """Name all that pairs of opposite edges say of the camera, `static` and `None` among it.

    Args:
        start: Where the points are at first, `[10, 10, 2]` as (x, y) in pixels, rows from the top.
        end: Where they are at last; both are cut to whole pixels.
        height: Of the frames.
        width: Of the frames.

    Source: VBench, vbench2_beta_i2v/camera_motion.py.
    """
    moved = np.trunc(end) - np.trunc(start)
    limit = STILL_SHARE * min(height, width)
    middle, last = _MIDDLE, GRID - 1
    top, down = (_directions(moved[row, middle], limit) for row in (0, last))
    left, right = (_directions(moved[middle, column], limit) for column in (0, last))
    found = {_TOP_DOWN.get(pair, "None") for pair in product(top, down)}
    return found | {_LEFT_RIGHT.get(pair, "None") for pair in product(left, right)}


def _directions(moved: FloatArray, limit: float) -> list[str]:
    x, y = moved
    names = ((x > limit, "right"), (x < -limit, "left"), (y > limit, "down"), (y < -limit, "up"))
    return [name for holds, name in names if holds] or ["static"]
