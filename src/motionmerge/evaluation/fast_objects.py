"""Find objects that move farther between two frames than optical flow can follow.

DIS goes from coarse to fine, and at its coarsest a small object is not there: over ground that
stands still, such an object is taken for a change of brightness. What neither the flow nor the
camera's move explains in both frames is therefore matched patch by patch, the motion that most
patches agree on is undone, and flow is computed for what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import cv2
import numpy as np
import numpy.typing as npt

from motionmerge.evaluation.camera import Move
from motionmerge.evaluation.flow import (
    FloatArray,
    FlowPair,
    Mask,
    Picture,
    dense_flow,
    lands_inside,
    lengths,
    warped,
)

_LEVELS = 6.0  # of 255: what differs less is explained
_SMALLEST = 0.0005  # share of the frame: smaller spots are noise of the codec
_LARGEST = 0.5  # share of the frame: if more is unexplained, the frames have little in common
_PATCH = 16  # pixels of the halved frame
_MOST_PATCHES = 16
_MOST_MOVES = 4
_LEAST_SPREAD = 6.0  # of 255: standard deviation of a patch that can be found again
_LEAST_MATCH = 0.8
_SAME_MOVE = 4  # pixels of the halved frame
_SAME_AREA = 1.5  # times another, at most
_MARGIN = 16


@dataclass(frozen=True)
class Followed:
    """Flow between two frames after fast objects were looked for.

    Args:
        pair: The flow; where nothing explains the picture it is the camera's.
        unfollowed: Share of the first frame that goes where nothing could follow it; ground that
            something moves over does not count.
    """

    pair: FlowPair
    unfollowed: float


def follow_fast_objects(pair: FlowPair, move: Move, first: Picture, second: Picture) -> Followed:
    """Correct the flow where objects move too fast for it.

    Args:
        pair: The flow between the frames.
        move: The camera's.
        first, second: Gray frames, `[height, width]`.
    """
    lost = _unexplained(pair, move.flow(), first, second)
    if not lost.any() or lost.mean() > _LARGEST:
        return Followed(pair, float(lost.mean()))
    camera, back = (move.flow(), move.inverse().flow()), FlowPair(pair.backward, pair.forward)
    arrived = _unexplained(back, camera[1], second, first)
    forward, backward = pair.forward.copy(), pair.backward.copy()
    # Ground beside an object that was found is covered by it; the camera's move is right there.
    forward[lost], backward[arrived] = camera[0][lost], camera[1][arrived]
    search = _Search(
        first=first,
        second=second,
        lost=lost,
        arrived=arrived,
        forward=forward,
        backward=backward,
    )
    for shift in (*_patch_moves(search), *_spot_moves(search)):
        search.take(shift)
    moved_in = (lengths(backward - camera[1]) > 1.0) & (~arrived | search.landed())
    covered = cv2.dilate(moved_in.astype(np.uint8), _DISC) > 0
    rest = _without_specks(lost & ~search.found & ~covered)
    return Followed(FlowPair(forward, backward), float(rest.mean()))


_DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))


def _unexplained(pair: FlowPair, camera: FloatArray, first: Picture, second: Picture) -> Mask:
    """Return where the camera's move does not explain the second frame, and flow does not either.

    Both differences are compared to what is usual in the frame, so that grain and fades are no
    objects.
    """
    with_camera = _difference(camera, first, second)
    if not (with_camera > _LEVELS).any():
        return np.zeros(first.shape, dtype=np.bool_)
    with_flow = _difference(pair.forward, first, second)
    limit = _LEVELS + 3 * float(np.median(with_flow))
    doubtful = (with_flow > limit) | ~pair.valid
    return _without_specks((with_camera > limit) & doubtful & lands_inside(camera))


def _difference(flow: FloatArray, first: Picture, second: Picture) -> npt.NDArray[np.float32]:
    """Return how far frames differ along a flow, around every pixel, in levels of 255."""
    now, later = first.astype(np.float32), second.astype(np.float32)
    return np.asarray(cv2.blur(np.abs(warped(later, flow) - now), (5, 5)), dtype=np.float32)


def _without_specks(mask: Mask) -> Mask:
    """Drop thin lines and small spots."""
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, _DISC)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened)
    kept = stats[:, cv2.CC_STAT_AREA] >= _SMALLEST * mask.size
    kept[0] = False
    return np.asarray(kept[labels] if count > 1 else np.zeros_like(mask), dtype=np.bool_)


@dataclass(kw_only=True)
class _Search:
    """What is looked for, and what was found.

    Args:
        first, second: The frames, `[height, width]`.
        lost, arrived: What nothing explains in the first frame, and in the second.
        forward, backward: The flow, into which what is found is written.
        found: What was found in the first frame.
    """

    first: Picture
    second: Picture
    lost: Mask
    arrived: Mask
    forward: FloatArray
    backward: FloatArray
    found: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.found = np.zeros_like(self.lost)

    def take(self, move: tuple[int, int]) -> None:
        """Write the flow of what goes about as `move` says into both flow fields."""
        flow = self._flow_about(move)
        apart = _difference(flow, self.first, self.second)
        before = _difference(self.forward, self.first, self.second)
        lands = warped(cv2.dilate(self.arrived.astype(np.uint8), _DISC).astype(np.float32), flow)
        near = lengths(flow - np.array(move, dtype=np.float32)) < _MARGIN
        fits = near & ~self.found & (apart < _LEVELS + 3 * float(np.median(before)))
        better = fits & self.lost & (apart < 0.5 * before) & (lands > 0.5)
        taken = _without_specks(filled(better) & fits)
        if not taken.any():
            return
        self.forward[taken] = flow[taken]
        self.found |= taken
        shift, size = _translation(move), taken.shape[::-1]
        moved = cv2.warpAffine(taken.astype(np.uint8), shift, size) > 0
        returned = -cv2.warpAffine(flow, shift, size, borderMode=cv2.BORDER_REPLICATE)
        self.backward[moved] = returned[moved]

    def _flow_about(self, move: tuple[int, int]) -> FloatArray:
        """Return the flow around what is lost after a shift was undone; elsewhere the shift."""
        height, width = self.first.shape
        x, y, wide, high = cv2.boundingRect(self.lost.astype(np.uint8))
        box = (
            slice(max(0, y - _MARGIN), min(height, y + high + _MARGIN)),
            slice(max(0, x - _MARGIN), min(width, x + wide + _MARGIN)),
        )
        back = _translation((-move[0], -move[1]))
        brought = cv2.warpAffine(
            self.second, back, (width, height), borderMode=cv2.BORDER_REPLICATE
        )
        flow = np.full((height, width, 2), move, dtype=np.float32)
        one, two = (
            np.ascontiguousarray(np.asarray(each, dtype=np.uint8)[box])
            for each in (self.first, brought)
        )
        flow[box] += dense_flow(one, two)
        return flow

    def landed(self) -> Mask:
        """Return where what was found is in the second frame."""
        height, width = self.found.shape
        rows, columns = np.nonzero(self.found)
        to = self.forward[rows, columns].round().astype(int)
        rows, columns = rows + to[:, 1], columns + to[:, 0]
        target = np.zeros(self.found.shape, np.uint8)
        target[rows.clip(0, height - 1), columns.clip(0, width - 1)] = 1
        return np.asarray(cv2.dilate(target, _DISC) > 0, dtype=np.bool_)


def _translation(move: tuple[int, int]) -> npt.NDArray[np.float64]:
    return np.array([[1, 0, move[0]], [0, 1, move[1]]], dtype=np.float64)


def _patch_moves(search: _Search) -> Iterator[tuple[int, int]]:
    """Yield shifts (x, y) in pixels that patches of what is lost agree on, the commonest first."""
    one, two = (_halved(each, cv2.INTER_AREA) for each in (search.first, search.second))
    from_here, to_here = (
        _halved(mask.astype(np.uint8), cv2.INTER_NEAREST) for mask in (search.lost, search.arrived)
    )
    if not to_here.any():
        return
    x, y, width, height = cv2.boundingRect(to_here)
    left, top = max(0, x - _PATCH), max(0, y - _PATCH)
    area = two[top : y + height + _PATCH, left : x + width + _PATCH]
    if min(area.shape) < _PATCH:
        return
    shifts = []
    for row, column in _patches(one, from_here):
        patch = one[row : row + _PATCH, column : column + _PATCH]
        alike = cv2.matchTemplate(area, patch, cv2.TM_CCOEFF_NORMED)
        _, best, _, place = cv2.minMaxLoc(alike)
        if best >= _LEAST_MATCH:
            shifts.append((place[0] + left - column, place[1] + top - row))
    rest = np.array(shifts).reshape(-1, 2)
    for _ in range(_MOST_MOVES):
        if not len(rest):
            return
        near = np.abs(rest[:, None] - rest[None]).max(-1) <= _SAME_MOVE
        chosen = near[int(near.sum(1).argmax())]
        shift = 2 * np.median(rest[chosen], axis=0)
        yield int(shift[0]), int(shift[1])
        rest = rest[~chosen]


def _halved(picture: Picture, how: int) -> Picture:
    height, width = picture.shape
    half = cv2.resize(picture, (width // 2, height // 2), interpolation=how)
    return np.asarray(half, dtype=np.uint8)


def _patches(picture: Picture, mask: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Return corners (row, column) of patches with structure, mostly inside the mask."""
    exact = picture.astype(np.float32)
    size, anchor = (_PATCH, _PATCH), (0, 0)
    mean = cv2.boxFilter(exact, -1, size, anchor=anchor)
    square = cv2.boxFilter(exact * exact, -1, size, anchor=anchor)
    spread = np.sqrt(np.maximum(square - mean * mean, 0))
    inside = cv2.boxFilter(mask.astype(np.float32), -1, size, anchor=anchor)
    step = _PATCH // 2
    spread[inside < 0.5] = 0
    spread = spread[: -_PATCH + 1 or None : step, : -_PATCH + 1 or None : step]
    rows, columns = np.nonzero(spread > _LEAST_SPREAD)
    order = np.argsort(-spread[rows, columns], kind="stable")
    # Every n-th of all with structure, so that one object does not take them all.
    chosen = order[:: max(1, -(-len(order) // _MOST_PATCHES))]
    return [(int(rows[i]) * step, int(columns[i]) * step) for i in chosen]


def _spot_moves(search: _Search) -> Iterator[tuple[int, int]]:
    """Yield shifts between parts of the masks of one size and brightness: flat objects."""
    here, there = _spots(search.lost, search.first), _spots(search.arrived, search.second)
    for one, two in product(here, there):
        alike = max(one.area, two.area) < _SAME_AREA * min(one.area, two.area)
        shift = (round(two.x - one.x), round(two.y - one.y))
        if alike and abs(one.level - two.level) < 2 * _LEVELS and max(map(abs, shift)) > 2:
            yield shift


@dataclass(frozen=True)
class _Spot:
    x: float
    y: float
    area: int
    level: float


def _spots(mask: Mask, picture: Picture) -> list[_Spot]:
    """Return the largest connected parts of a mask, with the mean brightness inside."""
    _, labels, stats, centres = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    largest = sorted(range(1, len(areas)), key=lambda part: -areas[part])[:_MOST_MOVES]
    return [
        _Spot(
            x=float(centres[part][0]),
            y=float(centres[part][1]),
            area=int(areas[part]),
            level=float(picture[labels == part].mean()),
        )
        for part in largest
    ]


def filled(mask: Mask) -> Mask:
    """Close gaps and holes: flat parts of an object look as if they stood still."""
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, _DISC)
    outlines, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(closed, outlines, -1, 1, cv2.FILLED)
    return np.asarray(closed > 0, dtype=np.bool_)
