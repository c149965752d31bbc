"""Measure a clip's motion, the camera's share of it and its steadiness, from its samples.

Lengths are counted in pixels of a frame that is `REFERENCE_WIDTH` wide, and per second, so that
sizes and frame rates can be compared. docs/reference/metrics.md defines every number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

from motionmerge.evaluation.camera import (
    MIN_FOLLOWING,
    MIN_OVERLAP,
    MIN_SUPPORT,
    STATIC,
    UNCLEAR,
    Matcher,
    Move,
    MoveFit,
    Tracks,
    bring_back,
    fit_pair,
    has_texture,
    match_move,
    sift_matches,
    textured,
    vbench_labels,
    without_drift,
)
from motionmerge.evaluation.clips import Clip
from motionmerge.evaluation.fast_objects import filled, follow_fast_objects
from motionmerge.evaluation.flow import (
    FloatArray,
    FlowPair,
    Mask,
    Picture,
    dense_flow,
    lands_inside,
    lengths,
    to_gray,
    warped,
)
from motionmerge.evaluation.metrics import DRIFT_DISTANCES
from motionmerge.evaluation.similarity import color_histogram, color_overlap, ssim_map
from motionmerge.evaluation.vbench.rules import (
    DYNAMIC_LENGTH,
    DYNAMIC_SIDE,
    DYNAMIC_TOP,
    needed_pairs,
)

REFERENCE_WIDTH = 512
"""Pixels: the width of the frame in which lengths are stated."""

FROZEN_SHARE = 1e-4
"""Of the width, from sample to sample: less than this is no motion (0.05 px of 512)."""

FROZEN_PIXELS = 0.02
"""Of the file's frames, if they are small: what codecs make of still pictures."""

LOOP_GAP = 3
"""Samples: a frame that looks like one before is no loop unless it is that much later."""

_LOST = 0.6  # share of valid flow below which features are tried
_FOLLOWED = 0.35  # share valid of what stays inside, below which nothing is followed (noise: 0.2)
_TRUSTED = 0.3  # share of valid flow that motion apart from the camera needs
_BLOCK, _SLOW = 4, 1.25  # pairs that are measured at once if they are slower, in the file's pixels
_STRAIGHT = 0.9  # of the way pair by pair, which noise makes longer
_DRIFT_PAIRS = 8  # compared at each distance
_DRIFT_SIDE = 256
_THUMBNAIL = 32
_LOOP_LEVELS = 2.0  # of 255: what changes less is no motion that could come back
_JERK_LENGTH = 0.05  # pixels


@dataclass(frozen=True)
class _Path:
    """What happens between two samples; lengths are means over the frame, in its pixels.

    Args:
        length: How far things go.
        camera: How far the camera's move carries them; None where it is not known.
        object: How far they go apart from it; None where the camera's move is not known.
    """

    length: float
    camera: float | None
    object: float | None


@dataclass(kw_only=True)
class _Sums:
    """What is gathered from pair to pair of samples; lengths in pixels of the measured frame."""

    paths: list[_Path | None] = field(default_factory=list)  # None: nothing can be followed
    unfollowed: list[float] = field(default_factory=list)
    support: list[int] = field(default_factory=list)
    top: list[float] = field(default_factory=list)
    warp: list[float] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)
    following: list[float] = field(default_factory=list)
    jerk: list[float] = field(default_factory=list)
    steps: list[npt.NDArray[np.float64]] = field(default_factory=list)


def measure_motion(
    clip: Clip, *, matchers: Sequence[Matcher] = (sift_matches,)
) -> dict[str, float | str | None]:
    """Measure a clip by optical flow between its samples.

    Args:
        clip: Its samples.
        matchers: Find moves that are too large for flow, see `match_move`.

    Returns:
        Every metric of `metrics.MOTION` by name; None where the clip does not have it, such as
        what is counted per second without a frame rate.
    """
    grays = to_gray(clip.samples)
    height, width = grays.shape[1:]
    scale = max(1.0, width / clip.size[1])
    sums, tracks = _Sums(), Tracks(height, width)
    before: FloatArray | None = None
    for index, (now, later) in enumerate(pairwise(grays)):
        step = _look_at(now, later, matchers)
        _add_step(sums, step, colors=clip.samples[index : index + 2])
        if step.is_lost:
            before = None
            continue
        if before is not None:
            sums.jerk.append(_mean_length(step.pair.forward - before, where=textured(now)))
        before = step.pair.forward
        tracks.advance(before, step.fit.move, own=step.own > 0)
    whole = _whole_move(sums.steps, grays)
    is_spread = None not in sums.paths and _is_spread(whole, sums.support)
    following = float(np.mean(sums.following))
    result: dict[str, float | str | None] = {}
    result |= _per_second(
        _slow_parts_again(sums.paths, grays, scale, matchers),
        _followed_seconds(clip, sums.paths),
        width,
    )
    result |= _camera(whole, following, is_known=is_spread and following >= MIN_FOLLOWING)
    labels = vbench_labels(tracks.start, tracks.now, height=height, width=width)
    # Points that are lost on their way, or over flat ground, have no move.
    result["camera_labels_dis"] = ("+".join(sorted(labels)) if is_spread else "") or "none"
    result |= _dynamic(sums.top, height, width, num_samples=len(grays))
    result |= _steadiness(sums, max(FROZEN_SHARE * width, FROZEN_PIXELS * scale))
    result["looping_share"] = looping_share(grays)
    result |= _drift(clip.samples, sums.steps)
    return result


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What is seen from one sample to the next.

    Args:
        pair, fit: The flow, and the camera's move in it.
        own: How far each pixel goes apart from the camera, `[height, width]`.
        way: How far it goes: by the flow where it moves apart from the camera, else as the camera
            says, because flow over flat ground is arbitrary.
        unfollowed: Share of the picture that could not be followed.
        is_lost: Nothing can be followed: a cut, noise, or a move that is too fast.
    """

    pair: FlowPair
    fit: MoveFit
    own: npt.NDArray[np.float32]
    way: npt.NDArray[np.float32]
    unfollowed: float = 0.0
    is_lost: bool = False

    def path(self) -> _Path:
        if not self.fit.is_supported:
            # Over flat ground nobody sees the ground's own motion: what moves are the objects.
            apart = None if self.own.any() else 0.0
            return _Path(float(self.way.mean()), apart, apart)
        valid = self.pair.valid
        own = float(self.own[valid].mean()) if valid.mean() >= _TRUSTED else None
        return _Path(float(self.way.mean()), float(lengths(self.fit.move.flow()).mean()), own)


def _look_at(first: Picture, second: Picture, matchers: Sequence[Matcher]) -> _Step:
    pair, fit = _flow_and_fit(first, second, matchers)
    stays = lands_inside(pair.forward)
    if pair.valid.sum() < _FOLLOWED * stays.sum() or stays.mean() < _FOLLOWED / 3:
        nothing = np.zeros(first.shape, np.float32)
        rest = Move(height=first.shape[0], width=first.shape[1])
        fit = MoveFit(rest, 0.0)
        return _Step(pair=pair, fit=fit, own=nothing, way=nothing, unfollowed=1.0, is_lost=True)
    if not fit.is_supported:
        own = _motion_over_flat_ground(pair, first, second)
        return _Step(pair=pair, fit=fit, own=own, way=own)
    move = fit.move
    followed = follow_fast_objects(pair, move, first, second)
    camera = move.flow()
    own = own_motion(followed.pair, camera, first, second)
    way = np.where(own > 0, lengths(followed.pair.forward), lengths(camera))
    return _Step(pair=followed.pair, fit=fit, own=own, way=way, unfollowed=followed.unfollowed)


def _motion_over_flat_ground(
    pair: FlowPair, first: Picture, second: Picture
) -> npt.NDArray[np.float32]:
    """Return how far objects go, in pixels; ground without texture is taken to stand still.

    Flow spreads from an object over flat ground; it counts inside the outline of what has texture.
    """
    still = np.zeros_like(pair.forward)
    seen = own_motion(pair, still, first, second) > 0
    outline = filled(has_texture(first) & seen).astype(np.uint8)
    # Texture is seen from four pixels away.
    return lengths(pair.forward) * cv2.erode(outline, np.ones((9, 9), np.uint8))


def _is_spread(whole: Move, support: Sequence[int]) -> bool:
    """Check whether what follows the camera's move is spread over the frame, or nothing moves."""
    return whole.label == STATIC or float(np.median(support)) >= MIN_SUPPORT


def _followed_seconds(clip: Clip, paths: Sequence[_Path | None]) -> float | None:
    """Return how long the parts of a clip are in which something could be followed."""
    if clip.times is None:
        return None
    steps = np.diff(clip.times)
    return float(sum(step for step, path in zip(steps, paths, strict=True) if path is not None))


def _mean_length(vectors: FloatArray, *, where: Mask) -> float:
    return float(lengths(vectors)[where].mean())


def own_motion(
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


def _slow_parts_again(
    paths: Sequence[_Path | None], grays: Picture, scale: float, matchers: Sequence[Matcher]
) -> list[_Path]:
    """Measure slow parts over longer distances, because flow below half a pixel is biased.

    Blocks of `_BLOCK` pairs that hardly move are measured from end to end as well. That way counts
    unless the pairs' is much longer: then things went to and fro. Pairs that cannot be followed are
    left out.
    """
    result: list[_Path] = []
    for start in range(0, len(paths), _BLOCK):
        block = paths[start : start + _BLOCK]
        known = [path for path in block if path is not None]
        total = sum(path.length for path in known)
        if len(block) == len(known) > 1 and total < _SLOW * scale * len(block):
            step = _look_at(grays[start], grays[start + len(block)], matchers)
            whole = None if step.is_lost else step.path()
            has_parts = any(path.object is not None for path in known)
            if (
                whole
                and whole.length > _STRAIGHT * total
                and (whole.object is not None or not has_parts)
            ):
                result.append(whole)
                continue
        result.extend(known)
    return result


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


def _add_step(sums: _Sums, step: _Step, *, colors: Picture) -> None:
    pair, valid = step.pair, step.pair.valid
    sums.valid.append(float(valid.mean()))
    sums.following.append(step.fit.following)
    sums.support.append(step.fit.support)
    sums.steps.append(step.fit.move.matrix)
    sums.paths.append(None if step.is_lost else step.path())
    if step.is_lost:
        return
    sums.unfollowed.append(step.unfollowed)
    sums.top.append(_mean_of_longest(step.way))
    if valid.any():
        now, later = (one.astype(np.float32) for one in colors)
        apart = np.abs(warped(later, pair.forward) - now)
        sums.warp.append(float(apart[valid].mean()) / 255)


def _mean_of_longest(far: FloatArray) -> float:
    flat = far.ravel()
    count = max(1, int(DYNAMIC_TOP * flat.size))
    return float(np.partition(flat, flat.size - count)[-count:].mean())


def _whole_move(steps: Sequence[npt.NDArray[np.float64]], grays: Picture) -> Move:
    """Chain the moves from sample to sample; take their drift out where the ends overlap."""
    height, width = grays.shape[1:]
    matrix, turned = np.eye(3), 0.0
    for step in steps:
        matrix = step @ matrix
        turned += math.atan2(step[1, 0], step[0, 0])
    matrix = without_drift(matrix, grays[0], grays[-1])
    move = Move.from_matrix(matrix, height=height, width=width)
    # A matrix knows an angle up to whole turns; the steps know how many there were.
    turns = round((turned - move.angle) / (2 * math.pi))
    return replace(move, angle=move.angle + 2 * math.pi * turns)


def _per_second(
    paths: Sequence[_Path], seconds: float | None, width: int
) -> dict[str, float | str | None]:
    names = ("motion_degree", "motion_share", "camera_degree", "object_motion")
    if not seconds or not paths:
        return dict.fromkeys(names)
    unit = REFERENCE_WIDTH / width / seconds
    degree = sum(path.length for path in paths) * unit
    own = [path.object for path in paths if path.object is not None]
    camera = [path.camera for path in paths if path.camera is not None]
    return {
        "motion_degree": degree,
        "motion_share": degree / REFERENCE_WIDTH,
        # A number that some pairs do not have would be too small.
        "camera_degree": sum(camera) * unit if len(camera) == len(paths) else None,
        "object_motion": sum(own) * unit if len(own) == len(paths) else None,
    }


def _camera(whole: Move, following: float, *, is_known: bool) -> dict[str, float | str | None]:
    x, y = whole.shift
    found: dict[str, float | str | None] = {
        "camera_amplitude": whole.amplitude,
        "camera_pan": -x / whole.width,
        "camera_tilt": y / whole.height,
        "camera_zoom": whole.zoom,
        "camera_roll": -math.degrees(whole.angle),
    }
    if not is_known:
        found = dict.fromkeys(found)
    label = whole.label if is_known else UNCLEAR
    return {"camera_label": label, **found, "camera_following": following}


def _dynamic(
    top: Sequence[float], height: int, width: int, *, num_samples: int
) -> dict[str, float | str | None]:
    """Apply VBench's rule of dynamic degree: enough pairs above a length.

    The largest length for which the rule says yes is kept, so that any threshold can be asked for.
    """
    if not top:
        return {"dynamic_threshold_dis": None, "dynamic_degree_dis": None}
    need = max(1, needed_pairs(num_samples))
    scale = DYNAMIC_SIDE / min(height, width)
    ranked = sorted(top, reverse=True)
    threshold = ranked[need - 1] * scale if len(ranked) >= need else 0.0
    return {
        "dynamic_threshold_dis": threshold,
        "dynamic_degree_dis": float(threshold > DYNAMIC_LENGTH),
    }


def _steadiness(sums: _Sums, still: float) -> dict[str, float | str | None]:
    far = np.array([path.length for path in sums.paths if path is not None])
    middle = float(far.mean()) if len(far) else 0.0
    moves = middle > _JERK_LENGTH and sums.jerk
    return {
        "warp_error": float(np.mean(sums.warp)) if sums.warp else None,
        "warp_valid": float(np.mean(sums.valid)),
        "jerk": float(np.mean(sums.jerk)) / middle if moves else None,
        "frozen_share": float((far < still).sum()) / len(sums.paths),
        "unfollowed_share": float(np.mean(sums.unfollowed)) if sums.unfollowed else None,
        "cut_share": sums.paths.count(None) / len(sums.paths),
    }


def looping_share(grays: Picture) -> float:
    """Return the share of frames that look like one from before, after the picture had changed.

    Frame j returns to frame i if it is at least `LOOP_GAP` samples later, and closer to it than a
    quarter of how far the picture had gone from it in between. Distances are mean differences of
    32 x 32 thumbnails; what goes less than 2 of 255 levels is no motion.

    Args:
        grays: `[samples, height, width]`.
    """
    size = (_THUMBNAIL, _THUMBNAIL)
    small = np.stack([cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in grays])
    flat = small.reshape(len(small), -1).astype(np.float32)
    returned = 0
    for j in range(LOOP_GAP, len(flat)):
        apart = np.abs(flat[: j + 1] - flat[j]).mean(axis=1)  # to every frame up to this one
        # How far frames after i were from j, which i is close to.
        gone = np.maximum.accumulate(apart[::-1])[::-1]
        earlier = np.arange(j - LOOP_GAP + 1)
        far = gone[earlier + 1]
        returned += bool(((far > _LOOP_LEVELS) & (apart[earlier] < 0.25 * far)).any())
    return returned / len(flat)


def _drift(
    samples: Picture, steps: Sequence[npt.NDArray[np.float64]]
) -> dict[str, float | str | None]:
    """Compare frames at growing distances: their structure with the camera taken out, their colors.

    At each distance up to `_DRIFT_PAIRS` pairs are taken evenly from the clip.
    """
    height, width = samples.shape[1:3]
    scale = min(1.0, _DRIFT_SIDE / max(height, width))
    size = (round(width * scale), round(height * scale))
    small = np.stack([cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in samples])
    to_small = _scaling(size[0] / width, size[1] / height)
    chains = [np.eye(3)]
    for step in steps:
        chains.append(step @ chains[-1])
    colors = [color_histogram(one) for one in small]
    result: dict[str, float | str | None] = {}
    for distance in DRIFT_DISTANCES:
        structure, color = [], []
        last = len(small) - 1 - distance
        for i in sorted({round(place) for place in np.linspace(0, last, _DRIFT_PAIRS)}):
            if last < 0:
                break
            between = chains[i + distance] @ np.linalg.inv(chains[i])
            matrix = to_small @ between @ np.linalg.inv(to_small)
            back, seen = bring_back(small[i + distance], matrix)
            color.append(color_overlap(colors[i], colors[i + distance]))
            if seen.mean() >= MIN_OVERLAP:
                alike = ssim_map(to_gray(back), to_gray(small[i]))
                structure.append(float(alike[seen].mean()))
        result[f"drift_ssim_{distance}"] = float(np.mean(structure)) if structure else None
        result[f"drift_color_{distance}"] = float(np.mean(color)) if color else None
    return result


def _scaling(x: float, y: float) -> npt.NDArray[np.float64]:
    """Scale pixel coordinates, which are counted from pixels' centres."""
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
