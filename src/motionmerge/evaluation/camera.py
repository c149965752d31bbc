"""How the camera moves: one similarity transform fitted to optical flow or to matched features.

A `Move` says where the picture goes; the camera goes the other way: if all that is seen moves to
the right, the camera pans left. Any frame size; the centre of a frame is ((width - 1) / 2,
(height - 1) / 2), as pixels are counted from their centres.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from motionmerge.evaluation.flow import (
    FloatArray,
    FlowPair,
    Mask,
    Picture,
    lands_inside,
    lengths,
)
from motionmerge.evaluation.vbench.rules import GRID, camera_moves

STATIC, UNCLEAR = "static", "unclear"
LABELS = (
    *("pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out"),
    *("roll_clockwise", "roll_counterclockwise"),
    *(STATIC, UNCLEAR),
)

STILL_SHARE = 0.01
"""Of the shorter side: a camera that moves the border less in a whole clip is static."""

MIN_FOLLOWING = 0.3
"""Of the textured pixels: if fewer follow one move, no camera move is named."""

MIN_SUPPORT = 4
"""Of the 8 parts of the border: if the texture that follows a move is in fewer of them, the move
may be that of an object over flat ground."""

MIN_OVERLAP = 0.3
"""Of the frame: two frames that share less of the picture are not compared."""

_TEXTURE = 1e-5
_MOST_DRIFT = 0.05  # of the shorter side: what is left after a move was undone, if it is drift
_MIN_POINTS = 60
_MIN_MATCHES = 20

Matrix = npt.NDArray[np.float64]
Matches = tuple[FloatArray, FloatArray]
"""Places `[matches, 2]` as (x, y) in one gray frame, and where the same is seen in another."""

Matcher = Callable[[Picture, Picture], Matches]
"""Finds matches between two gray frames `[height, width]`, of which some may be wrong."""

_NO_MATCHES: Matches = (np.empty((0, 2), np.float32), np.empty((0, 2), np.float32))
_Number = TypeVar("_Number", np.uint8, np.float32)


@dataclass(frozen=True, kw_only=True)
class Move:
    """Where the picture has gone: screen = centre + zoom * rotation(picture - centre) + shift.

    Args:
        height, width: Of the frame, in pixels.
        shift: (x, y) in pixels.
        zoom: Above 1 the picture grows.
        angle: Radians; positive angles turn the picture clockwise.
    """

    height: int
    width: int
    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0
    angle: float = 0.0

    @property
    def matrix(self) -> Matrix:
        """The transform of pixel coordinates (x, y, 1), `[3, 3]`."""
        matrix = np.eye(3)
        a, b = self.zoom * math.cos(self.angle), self.zoom * math.sin(self.angle)
        matrix[:2, :2] = [[a, -b], [b, a]]
        centre = self._centre
        matrix[:2, 2] = centre + self.shift - matrix[:2, :2] @ centre
        return matrix

    @classmethod
    def from_matrix(cls, matrix: Matrix, *, height: int, width: int) -> Move:
        """Undo `matrix`."""
        centre = cls(height=height, width=width)._centre
        x, y = matrix[:2, :2] @ centre + matrix[:2, 2] - centre
        zoom = max(math.hypot(matrix[0, 0], matrix[1, 0]), 1e-6)
        angle = math.atan2(matrix[1, 0], matrix[0, 0])
        return cls(height=height, width=width, shift=(float(x), float(y)), zoom=zoom, angle=angle)

    def inverse(self) -> Move:
        """Return the move back."""
        matrix: Matrix = np.linalg.inv(self.matrix).astype(np.float64)
        return Move.from_matrix(matrix, height=self.height, width=self.width)

    @property
    def _centre(self) -> npt.NDArray[np.float64]:
        return np.array([(self.width - 1) / 2, (self.height - 1) / 2])

    def flow(self) -> FloatArray:
        """Return where every pixel goes, `[height, width, 2]` as (x, y) in pixels."""
        matrix = self.matrix - np.eye(3)
        x = np.arange(self.width, dtype=np.float64)
        y = np.arange(self.height, dtype=np.float64)[:, None]
        return np.stack(
            [
                matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2],
                matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2],
            ],
            axis=-1,
        ).astype(np.float32)

    def amounts(self) -> dict[str, float]:
        """Return how far each kind of move carries the picture, in pixels, by the camera's label.

        |x|, |y|, |zoom - 1| * m / 2 (zooming out counts like its inverse), |angle| * m / 2,
        m = the shorter side
        """
        x, y = self.shift
        half = min(self.height, self.width) / 2
        grown = (max(self.zoom, 1 / self.zoom) - 1) * half
        return {
            "pan_left" if x > 0 else "pan_right": abs(x),
            "tilt_up" if y > 0 else "tilt_down": abs(y),
            "zoom_in" if self.zoom > 1 else "zoom_out": grown,
            # A picture that turns clockwise is seen by a camera that turns the other way.
            "roll_counterclockwise" if self.angle > 0 else "roll_clockwise": abs(self.angle) * half,
        }

    @property
    def label(self) -> str:
        """The one of `LABELS` that dominates; `static` if none reaches `STILL_SHARE`."""
        amounts = self.amounts()
        label = max(amounts, key=lambda name: amounts[name])
        still = STILL_SHARE * min(self.height, self.width)
        return STATIC if amounts[label] < still else label

    @property
    def amplitude(self) -> float:
        """How far the dominant kind of move carries the picture, as a share of the width."""
        return max(self.amounts().values()) / self.width


@dataclass(frozen=True)
class MoveFit:
    """A move and how much of the picture follows it.

    Args:
        move: Where the picture goes.
        following: Share of the pixels looked at that go where the move says, within the larger of
            one pixel and a twentieth of their way.
        support: In how many of the 8 parts of the frame's border texture follows the move.
    """

    move: Move
    following: float
    support: int = 0

    @property
    def is_supported(self) -> bool:
        """Whether what follows the move is spread over the frame, as the ground is."""
        return self.following >= MIN_FOLLOWING and self.support >= MIN_SUPPORT


def fit_move(flow: FloatArray, *, where: Mask) -> MoveFit:
    """Fit one move to a flow field, giving low weight to vectors that do not follow it.

    minimise  sum_i w_i |T(p_i) - p_i - flow_i|^2,   w = 1 / (1 + r^2 / s^2)^2,   s^2 = 2 median r^2

    The start is found by RANSAC, so that a large object does not pull the fit.

    Args:
        flow: `[height, width, 2]` as (x, y) in pixels.
        where: Pixels to look at, `[height, width]`. With fewer than 60 of a grid's points the
            camera is called at rest, followed by nothing.
    """
    height, width = flow.shape[:2]
    stride = max(1, round(min(height, width) / 64))
    rows, columns = np.nonzero(where[::stride, ::stride])
    if len(rows) < _MIN_POINTS:
        return MoveFit(Move(height=height, width=width), 0.0)
    rows, columns = rows * stride, columns * stride
    points = np.stack([columns, rows], -1).astype(np.float64)
    moved = flow[rows, columns].astype(np.float64)
    matrix = _start(points, points + moved)
    for _ in range(8):
        squared = np.square(_apply(matrix, points) - points - moved).sum(-1)
        weights = 1 / (1 + squared / (2 * max(float(np.median(squared)), 0.01))) ** 2
        matrix = _weighted_fit(points, points + moved, weights)
    apart = np.linalg.norm(_apply(matrix, points) - points - moved, axis=-1)
    near = np.maximum(1.0, 0.05 * np.linalg.norm(moved, axis=-1))
    return MoveFit(
        Move.from_matrix(matrix, height=height, width=width), float((apart < near).mean())
    )


def _start(points: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> Matrix:
    found, _ = cv2.estimateAffinePartial2D(
        points.astype(np.float32),
        targets.astype(np.float32),
        method=cv2.RANSAC,
        ransacReprojThreshold=1.0,
        refineIters=0,
    )
    matrix = np.eye(3)
    if found is not None:
        matrix[:2] = found
    return matrix


def _apply(matrix: Matrix, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def _weighted_fit(
    points: npt.NDArray[np.float64],
    targets: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
) -> Matrix:
    """Return the similarity of least weighted squares in closed form (Umeyama 1991)."""
    total = weights.sum()
    mean = (weights @ points) / total
    mean_target = (weights @ targets) / total
    p, q = points - mean, targets - mean_target
    size = float(weights @ np.square(p).sum(-1))
    a = float(weights @ (p * q).sum(-1)) / size
    b = float(weights @ (p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0])) / size
    matrix = np.array([[a, -b, 0.0], [b, a, 0.0], [0.0, 0.0, 1.0]])
    matrix[:2, 2] = mean_target - matrix[:2, :2] @ mean
    return matrix


def textured(gray: Picture) -> Mask:
    """Return where a picture has structure in two directions, as flow needs; all if hardly any."""
    mask = has_texture(gray)
    return mask if mask.mean() > 0.02 else np.ones_like(mask)


def has_texture(gray: Picture) -> Mask:
    """Return where a picture has structure in two directions, `[height, width]`."""
    return np.asarray(cv2.cornerMinEigenVal(gray, 7, ksize=3) > _TEXTURE, dtype=np.bool_)


def sift_matches(first: Picture, second: Picture) -> Matches:
    """Match SIFT features of two gray frames by Lowe's ratio test.

    Source: Lowe 2004, "Distinctive image features from scale-invariant keypoints".
    """
    finder = cv2.SIFT.create(nfeatures=1000)
    key_points, features = zip(
        *(finder.detectAndCompute(picture, None) for picture in (first, second)), strict=True
    )
    if any(one is None or len(one) < _MIN_MATCHES for one in features):
        return _NO_MATCHES
    candidates = cv2.BFMatcher(cv2.NORM_L2).knnMatch(features[0], features[1], k=2)
    good = [pair[0] for pair in candidates if pair[0].distance < 0.75 * pair[1].distance]
    if not good:
        return _NO_MATCHES
    return (
        np.array([key_points[0][match.queryIdx].pt for match in good], dtype=np.float32),
        np.array([key_points[1][match.trainIdx].pt for match in good], dtype=np.float32),
    )


def match_move(
    first: Picture, second: Picture, *, matchers: Sequence[Matcher] = (sift_matches,)
) -> Move | None:
    """Find a move too large for optical flow from matched features (RANSAC).

    Args:
        first, second: Gray frames `[height, width]`.
        matchers: Asked in turn, until one finds a move.

    Returns:
        None where of no matcher 20 matches agree on one move.
    """
    for matches in matchers:
        here, there = matches(first, second)
        if len(here) < _MIN_MATCHES:
            continue
        found, inliers = cv2.estimateAffinePartial2D(
            here, there, method=cv2.RANSAC, ransacReprojThreshold=2.0
        )
        if found is not None and int(inliers.sum()) >= _MIN_MATCHES:
            height, width = first.shape
            return Move.from_matrix(np.vstack([found, [0, 0, 1]]), height=height, width=width)
    return None


def bring_back(picture: npt.NDArray[_Number], matrix: Matrix) -> tuple[npt.NDArray[_Number], Mask]:
    """Undo a move on a picture; also return a mask of the pixels that the picture covers."""
    height, width = picture.shape[:2]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (width, height)
    back = cv2.warpAffine(picture, matrix[:2], size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.full((height, width), 255, np.uint8), matrix[:2], size, flags=flags)
    return np.asarray(back, dtype=picture.dtype), np.asarray(inside) == 255


class Tracks:
    """The 10 x 10 points whose way VBench's camera rule looks at, carried along by flow.

    Where CoTracker follows points through the whole clip, these are moved by the flow from sample
    to sample; points that have left the frame move as the camera does.

    Args:
        height, width: Of the frame, in pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        margin = width / 64
        x = np.linspace(margin, width - margin, GRID)
        y = np.linspace(margin, height - margin, GRID)
        self.start: npt.NDArray[np.float64] = np.stack(np.meshgrid(x, y), axis=-1)
        self.now = self.start.copy()

    def advance(self, flow: FloatArray, move: Move, *, own: Mask) -> None:
        """Move the points on by one flow field.

        Args:
            flow: `[height, width, 2]`.
            move: The camera's.
            own: Where things move apart from the camera, `[height, width]`. Elsewhere points move
                as the camera does, because flow over flat ground is noise, which adds up.
        """
        height, width = flow.shape[:2]
        x, y = (self.now[..., axis].astype(np.float32) for axis in (0, 1))
        seen = cv2.remap(flow, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        is_inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        column = x.round().clip(0, width - 1).astype(int)
        is_inside &= own[y.round().clip(0, height - 1).astype(int), column]
        moved = _apply(move.matrix, self.now.reshape(-1, 2)).reshape(self.now.shape)
        self.now = np.where(is_inside[..., None], self.now + seen, moved)


def vbench_labels(
    start: npt.NDArray[np.float64], end: npt.NDArray[np.float64], *, height: int, width: int
) -> frozenset[str]:
    """Name camera moves by VBench's rule, with its quirks: a zoom may also be called a pan.

    Args:
        start, end, height, width: See `camera_moves`.

    Returns:
        Some of the first six of `LABELS`, or `static`; empty where no rule fits.
    """
    # VBench cuts both places to whole pixels. Here the way between them is cut, because a point
    # at rest on the border of two pixels would move by one, which is a move in a small frame.
    found = camera_moves(np.zeros_like(start), end - start, height=height, width=width) - {"None"}
    return frozenset(found - {STATIC} or found)


_WORDS = (
    (r"pan(s|ning|ned)?( slowly| gently)?( to)?( the)? left(wards?)?", "pan_left"),
    (r"pan(s|ning|ned)?( slowly| gently)?( to)?( the)? right(wards?)?", "pan_right"),
    (r"tilt(s|ing|ed)?( slowly| gently)? up(wards?)?", "tilt_up"),
    (r"tilt(s|ing|ed)?( slowly| gently)? down(wards?)?", "tilt_down"),
    (r"zoom(s|ing|ed)?( slowly| gently)? in", "zoom_in"),
    (r"zoom(s|ing|ed)?( slowly| gently)? out", "zoom_out"),
    (r"camera( is| stays| remains|,)? (static|still|fixed|rests)|static camera", STATIC),
)


def named_move(prompt: str) -> str | None:
    """Return the camera move that a prompt names in VBench's or the pocket model's words.

    None where it names none, or more than one.
    """
    text = prompt.lower()
    found = {label for pattern, label in _WORDS if re.search(rf"\b({pattern})\b", text)}
    return found.pop() if len(found) == 1 else None


def fit_pair(flow: FloatArray, *, gray: Picture, valid: Mask) -> MoveFit:
    """Fit a move to the flow of textured, valid pixels, or if few, of all that stay inside."""
    where = textured(gray) & valid
    if where.mean() < 0.05:
        where = lands_inside(flow)
    fit = fit_move(flow, where=where)
    return replace(fit, support=_support(fit.move, flow, has_texture(gray) & valid))


def without_drift(
    matrix: Matrix, first: Picture, last: Picture, *, objects: tuple[Mask, Mask] | None = None
) -> Matrix:
    """Correct a chained move by the flow that is left between its ends once it is undone.

    It stays as it is where the ends overlap too little, or where what is left is no small move.

    Args:
        matrix: The move from one frame to the other, chained from steps, `[3, 3]`.
        first, last: The gray frames `[height, width]`.
        objects: What does not count of each of them, `[height, width]`.
    """
    back, seen = bring_back(last, matrix)
    if objects is not None:
        covered, _ = bring_back(objects[1].astype(np.uint8), matrix)
        seen &= ~objects[0] & (covered == 0)
    if seen.mean() < MIN_OVERLAP:
        return matrix
    rest = FlowPair.between(first, back)
    where = rest.valid & seen
    if where.mean() < MIN_OVERLAP / 2:
        return matrix
    fit = fit_pair(rest.forward, gray=first, valid=where)
    left = max(fit.move.amounts().values())
    is_drift = fit.following >= MIN_FOLLOWING and left < _MOST_DRIFT * min(first.shape)
    return matrix @ fit.move.matrix if is_drift else matrix


def _support(move: Move, flow: FloatArray, where: Mask) -> int:
    """Count the parts of the border, of 8, in which texture follows a move.

    The border is that of what stays in the frame, a sixth of it wide; its parts are the outer 8 of
    3 x 3 fields, and one counts if at least 2 % of it follows.
    """
    expected = move.flow()
    stays = lands_inside(expected)
    if not stays.any():
        return 0
    near = np.maximum(1.0, 0.05 * lengths(expected))
    follows = (where & stays & (lengths(flow - expected) < near)).astype(np.uint8)
    x, y, width, height = cv2.boundingRect(stays.astype(np.uint8))
    part = follows[y : y + height, x : x + width]
    sixth = (height // 6 + 1, width // 6 + 1)
    part[sixth[0] : height - sixth[0], sixth[1] : width - sixth[1]] = 0
    fields = [field for rows in np.array_split(part, 3) for field in np.array_split(rows, 3, 1)]
    return sum(bool(field.size and field.mean() >= 0.02) for field in fields)
