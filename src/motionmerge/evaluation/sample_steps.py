"""Measure what happens from one sample of a clip to the next: the camera's move, and all others.

Lengths are counted in pixels of the frame that is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from motionmerge.evaluation.camera import (
    Matcher,
    Move,
    MoveFit,
    bring_back,
    fit_pair,
    has_texture,
    match_move,
)
from motionmerge.evaluation.fast_objects import filled, follow_fast_objects
from motionmerge.evaluation.flow import (
    FloatArray,
    FlowPair,
    Picture,
    dense_flow,
    lands_inside,
    lengths,
    warped,
)

_LOST = 0.6  # share of valid flow below which features are tried
_FOLLOWED = 0.35  # share valid of what stays inside, below which nothing is followed (noise: 0.2)
_TRUSTED = 0.3  # share of valid flow that motion apart from the camera needs


@dataclass(frozen=True)
class StepPath:
    """What happens between two samples; lengths are means over the frame, in its pixels.

    Args:
        length: How far things go.
        camera: How far the camera's move carries them; None where it is not known.
        object: How far they go apart from it; None where the camera's move is not known.
    """

    length: float
    camera: float | None
    object: float | None


@dataclass(frozen=True, kw_only=True)
class SampleStep:
    """What is seen from one sample to the next; see `measure_step`.

    Args:
        pair, fit: The flow, and the camera's move in it.
        own: How far each pixel goes apart from the camera, in pixels, `[height, width]`.
        distance: How far it goes in all: by the flow where it moves apart from the camera, else
            as the camera does, because flow over flat ground is arbitrary.
        unfollowed: Share of the picture that could not be followed.
        is_lost: Nothing can be followed: a cut, noise, or a move that is too fast.
    """

    pair: FlowPair
    fit: MoveFit
    own: npt.NDArray[np.float32]
    distance: npt.NDArray[np.float32]
    unfollowed: float = 0.0
    is_lost: bool = False

    def path(self) -> StepPath:
        """Return the mean lengths of the step, as far as they are known."""
        if not self.fit.is_supported:
            # Over flat ground nobody sees the ground's own motion: what moves are the objects.
            apart = None if self.own.any() else 0.0
            return StepPath(float(self.distance.mean()), apart, apart)
        valid = self.pair.valid
        own = float(self.own[valid].mean()) if valid.mean() >= _TRUSTED else None
        return StepPath(
            float(self.distance.mean()), float(lengths(self.fit.move.flow()).mean()), own
        )


def measure_step(first: Picture, second: Picture, matchers: Sequence[Matcher]) -> SampleStep:
    """Find the camera's move between two gray frames `[height, width]`, and what moves apart.

    Args:
        first, second: The frames.
        matchers: Find moves that are too large for flow, see `match_move`.
    """
    pair, fit = _flow_and_fit(first, second, matchers)
    stays = lands_inside(pair.forward)
    if pair.valid.sum() < _FOLLOWED * stays.sum() or stays.mean() < _FOLLOWED / 3:
        nothing = np.zeros(first.shape, np.float32)
        rest = MoveFit(Move(height=first.shape[0], width=first.shape[1]), 0.0)
        return SampleStep(
            pair=pair, fit=rest, own=nothing, distance=nothing, unfollowed=1.0, is_lost=True
        )
    if not fit.is_supported:
        own = _motion_over_flat_ground(pair, first, second)
        return SampleStep(pair=pair, fit=fit, own=own, distance=own)
    move = fit.move
    followed = follow_fast_objects(pair, move, first, second)
    camera = move.flow()
    own = _own_motion(followed.pair, camera, first, second)
    distance = np.where(own > 0, lengths(followed.pair.forward), lengths(camera))
    return SampleStep(
        pair=followed.pair, fit=fit, own=own, distance=distance, unfollowed=followed.unfollowed
    )


def _flow_and_fit(
    first: Picture, second: Picture, matchers: Sequence[Matcher]
) -> tuple[FlowPair, MoveFit]:
    """Return the flow between two frames and the camera's move.

    Where most of the flow cannot be trusted, the move may be too large for it. Then features are
    matched, and flow is computed again for what is left.
    """
    pair = FlowPair.between(first, second)
    fit = fit_pair(pair.forward, gray=first, valid=pair.valid)
    if pair.valid.mean() >= _LOST:
        return pair, fit
    move = match_move(first, second, matchers=matchers)
    if move is None:
        return pair, fit
    back, seen = bring_back(second, move.matrix)
    undone = move.flow()
    forward = undone + _scaled_by(dense_flow(first, back), move)
    returned = move.inverse()
    again, its_seen = bring_back(first, returned.matrix)
    backward = returned.flow() + _scaled_by(dense_flow(second, again), returned)
    better = FlowPair(forward.astype(np.float32), backward.astype(np.float32))
    if better.valid[seen].sum() <= pair.valid.sum() or not its_seen.any():
        return pair, fit
    return better, fit_pair(better.forward, gray=first, valid=better.valid)


def _scaled_by(rest: FloatArray, move: Move) -> FloatArray:
    """Turn flow that is left after a move was undone into flow on the screen."""
    turn = move.matrix[:2, :2].astype(np.float32)
    return np.asarray(rest @ turn.T, dtype=np.float32)


def _motion_over_flat_ground(
    pair: FlowPair, first: Picture, second: Picture
) -> npt.NDArray[np.float32]:
    """Return how far objects go, in pixels; ground without texture is taken to stand still.

    Flow spreads from an object over flat ground; it counts inside the outline of what has texture.
    """
    still = np.zeros_like(pair.forward)
    seen = _own_motion(pair, still, first, second) > 0
    outline = filled(has_texture(first) & seen).astype(np.uint8)
    # Texture is seen from four pixels away.
    return lengths(pair.forward) * cv2.erode(outline, np.ones((9, 9), np.uint8))


def _own_motion(
    pair: FlowPair, camera: FloatArray, first: Picture, second: Picture
) -> npt.NDArray[np.float32]:
    """Return how far each pixel goes apart from the camera, in pixels, `[height, width]`.

    |flow - camera| near places where the flow explains the second frame better than the camera's
    move does, by two levels of 255 and a fifth; 0 elsewhere. So a flat sky, in which flow is
    arbitrary, has no motion of its own.
    """
    now = first.astype(np.float32)
    after = second.astype(np.float32)
    with_flow, with_camera = (
        cv2.blur(np.abs(warped(after, flow) - now), (5, 5)) for flow in (pair.forward, camera)
    )
    seen = (with_camera > 1.2 * with_flow + 2).astype(np.uint8)
    reach = 2 * (first.shape[1] // 48) + 1
    near = cv2.dilate(seen, np.ones((reach, reach), np.uint8)) > 0
    return lengths(pair.forward - camera) * near
