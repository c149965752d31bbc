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
    Tracks,
    bring_back,
    sift_matches,
    textured,
    vbench_labels,
    without_drift,
)
from motionmerge.evaluation.clips import Clip
from motionmerge.evaluation.flow import (
    FloatArray,
    Mask,
    Picture,
    lengths,
    to_gray,
    warped,
)
from motionmerge.evaluation.metrics import DRIFT_DISTANCES
from motionmerge.evaluation.sample_steps import SampleStep, StepPath, measure_step
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

_BLOCK, _SLOW = 4, 1.25  # pairs that are measured at once if they are slower, in the file's pixels
_STRAIGHT = 0.9  # of the way pair by pair, which noise makes longer
_DRIFT_PAIRS = 8  # compared at each distance
_DRIFT_SIDE = 256
_THUMBNAIL = 32
_LOOP_LEVELS = 2.0  # of 255: what changes less is no motion that could come back
_JERK_LENGTH = 0.05  # pixels


@dataclass(kw_only=True)
class _Sums:
    """What is gathered from pair to pair of samples; lengths in pixels of the measured frame."""

    paths: list[StepPath | None] = field(default_factory=list)  # None: nothing can be followed
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
        step = measure_step(now, later, matchers)
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


def _is_spread(whole: Move, support: Sequence[int]) -> bool:
    """Check whether what follows the camera's move is spread over the frame, or nothing moves."""
    return whole.label == STATIC or float(np.median(support)) >= MIN_SUPPORT


def _followed_seconds(clip: Clip, paths: Sequence[StepPath | None]) -> float | None:
    """Return how long the parts of a clip are in which something could be followed."""
    if clip.times is None:
        return None
    steps = np.diff(clip.times)
    return float(sum(step for step, path in zip(steps, paths, strict=True) if path is not None))


def _mean_length(vectors: FloatArray, *, where: Mask) -> float:
    return float(lengths(vectors)[where].mean())


def _slow_parts_again(
    paths: Sequence[StepPath | None], grays: Picture, scale: float, matchers: Sequence[Matcher]
) -> list[StepPath]:
    """Measure slow parts over longer distances, because flow below half a pixel is biased.

    Blocks of `_BLOCK` pairs that hardly move are measured from end to end as well. That way counts
    unless the pairs' is much longer: then things went to and fro. Pairs that cannot be followed are
    left out.
    """
    result: list[StepPath] = []
    for start in range(0, len(paths), _BLOCK):
        block = paths[start : start + _BLOCK]
        known = [path for path in block if path is not None]
        total = sum(path.length for path in known)
        if len(block) == len(known) > 1 and total < _SLOW * scale * len(block):
            step = measure_step(grays[start], grays[start + len(block)], matchers)
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


def _add_step(sums: _Sums, step: SampleStep, *, colors: Picture) -> None:
    pair, valid = step.pair, step.pair.valid
    sums.valid.append(float(valid.mean()))
    sums.following.append(step.fit.following)
    sums.support.append(step.fit.support)
    sums.steps.append(step.fit.move.matrix)
    sums.paths.append(None if step.is_lost else step.path())
    if step.is_lost:
        return
    sums.unfollowed.append(step.unfollowed)
    sums.top.append(_mean_of_longest(step.distance))
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
    paths: Sequence[StepPath], seconds: float | None, width: int
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
