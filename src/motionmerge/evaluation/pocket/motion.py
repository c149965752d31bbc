"""How far the camera moves in a clip of the pocket world, and whether the objects do as told.

Flow, the camera's move and PSNR are those of `measure`. What is the pocket world's own: objects are
found by color, and their moves are counted relative to the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch

from motionmerge.errors import ShapeError
from motionmerge.evaluation.camera import Move, bring_back, fit_pair, without_drift
from motionmerge.evaluation.clips import at_measured_size
from motionmerge.evaluation.flow import FloatArray, FlowPair, Mask, to_gray
from motionmerge.evaluation.similarity import psnr
from motionmerge.models.pocket.language import Actor, Program
from motionmerge.models.pocket.world import (
    COLOR_VALUES,
    NUM_FRAMES,
    PHASE_PATH,
    RADIUS,
    SIZE,
    STRAIGHT_PATH,
    Scene,
)

REST_DEGREE = 1.0  # pixels: less than this is a camera at rest
MIN_PATH_SHARE = 0.35  # of the true path, for a move that counts as made
AREA_BAND = (0.5, 1.7)  # of the first area, for an object that counts as still there
COPY_SHARE = 0.15  # of the first area, for a second blob that counts as a leftover
# Real clips overlap by 0.76 and more; an object in two equal pieces overlaps by 0.5 at most.
MIN_OVERLAP = 0.6  # with the object as it was drawn, for one that keeps its shape
# Lost are 0.12 at most in 120 real clips. With a right half that slips by 8 pixels it is more than
# 0.5 in 90 of 100 of them (median 1.7), by 12 pixels in 95 of 100 (2.4).
MAX_LOST = 0.5  # of the contrast of the worst quarter, for a picture that is still whole
MIN_CONTRAST = 0.25  # of the whole picture's: what a quarter's is taken to be, if it is less

_COLOR_REACH = 0.42  # RGB distance up to which a pixel belongs to an object of a color
_KEYFRAMES = (0, 5, 10, 15)  # where the camera is fitted; in between it is interpolated
_MIN_PIXELS = 60  # of a picture or a quarter of it, for a mean that says something
_MID = (7, 8)  # the frames on both sides of the half
_KINDS = {
    "pan_left": "pans left",
    "pan_right": "pans right",
    "tilt_up": "tilts up",
    "tilt_down": "tilts down",
    "zoom_in": "zooms in",
    "zoom_out": "zooms out",
}
_AXES = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}


def motion_degree(move: Move) -> float:
    """Return how far a move carries the border of a frame of 64 pixels, in pixels.

    sqrt(|shift|^2 + zoomed^2),   zoomed = how far zooming carries it
    """
    return math.hypot(*move.shift, _zoomed(move))


def camera_kind(move: Move) -> str:
    """Return the one of `CAMERA_MOVES` that dominates; `rests` below `REST_DEGREE`."""
    if motion_degree(move) < REST_DEGREE:
        return "rests"
    seen = {name: far for name, far in move.amounts().items() if name in _KINDS}
    return _KINDS[max(seen, key=lambda name: seen[name])]


def _zoomed(move: Move) -> float:
    return next(far for name, far in move.amounts().items() if name.startswith("zoom"))


@dataclass(frozen=True, kw_only=True)
class ActorMeasures:
    """What one object does.

    Args:
        displacements: (x, y) in pixels relative to the picture in each half of the clip; NaN where
            the object cannot be found.
        directions_right: Per half, whether the dominant axis and its sign are those of the prompt,
            over at least `MIN_PATH_SHARE` of the true path.
        area_ratio: Last area / first area, with the zoom taken out; 0 if the object is gone.
        intact: Still there, of about the same size, and without leftover copies.
        overlap: With the shape as drawn, grown by the zoom and laid where it fits best:
            intersection / union, the least over the key frames, in [0, 1].
    """

    displacements: tuple[tuple[float, float], tuple[float, float]]
    directions_right: tuple[bool, bool]
    area_ratio: float
    intact: bool
    overlap: float

    @property
    def whole(self) -> bool:
        """Whether it is intact and keeps its shape: in one piece, neither smeared nor drawn out."""
        return self.intact and self.overlap >= MIN_OVERLAP


@dataclass(frozen=True, kw_only=True)
class ClipMeasures:
    """What happens in one clip.

    Args:
        camera: The picture's move from the first frame to the last.
        actors: In the order of the program.
        first_frame_db: PSNR of the first frame with respect to the input image, at most 100.
        background_db: PSNR of the last frame with respect to the first one carried along by the
            camera, outside the objects: low where the picture breaks up.
        lost: How much of the first frame is not found again, outside the objects: squared
            difference / variance of the first frame, both smoothed and of one quarter of the
            picture, in the worst quarter and the worst key frame; the variance counts as
            `MIN_CONTRAST` of the whole picture's at least. About 0 in a whole clip, 1 and more
            without the photo.
    """

    camera: Move
    actors: tuple[ActorMeasures, ...]
    first_frame_db: float
    background_db: float
    lost: float

    @property
    def degree(self) -> float:
        """Motion degree, see `motion_degree`."""
        return motion_degree(self.camera)

    @property
    def camera_kind(self) -> str:
        """Kind of camera move, see `camera_kind`."""
        return camera_kind(self.camera)

    @property
    def direction_right(self) -> float:
        """Share of halves of moves that go where the prompt says."""
        halves = [right for actor in self.actors for right in actor.directions_right]
        return sum(halves) / len(halves) if halves else math.nan

    @property
    def obeyed(self) -> bool:
        """Whether every object goes where the prompt says, in both halves."""
        return all(all(actor.directions_right) for actor in self.actors)

    @property
    def intact(self) -> bool:
        return all(actor.intact for actor in self.actors)

    @property
    def picture_holds(self) -> bool:
        """Whether the picture under the objects is still that of the photo, in one piece."""
        return self.lost <= MAX_LOST

    @property
    def whole(self) -> bool:
        """Whether the clip is still whole: every object, and the picture under them."""
        return self.picture_holds and all(actor.whole for actor in self.actors)


def measure_clip(
    video: torch.Tensor, scene: Scene, *, image: torch.Tensor | None = None
) -> ClipMeasures:
    """Measure a clip against what its scene says.

    Args:
        video: `[16, 3, 64, 64]` in [0, 1].
        scene: Gives the program and where the objects start.
        image: The input image `[3, 64, 64]`; the first frame if left out.

    Raises:
        ShapeError: `video` has another shape.
    """
    if tuple(video.shape) != (NUM_FRAMES, 3, SIZE, SIZE):
        raise ShapeError(
            f"A clip of shape {list(video.shape)} cannot be measured.",
            fix=f"Pass [{NUM_FRAMES}, 3, {SIZE}, {SIZE}], the size of the pocket world.",
        )
    frames = np.ascontiguousarray(video.float().permute(0, 2, 3, 1).numpy())
    objects = np.stack([_object_mask(frame, scene.program) for frame in frames])
    cameras = _camera_moves(frames, objects)
    actors = tuple(
        _measure_actor(frames, actor, start, cameras)
        for actor, start in zip(scene.program.actors, scene.starts, strict=True)
    )
    reference = frames[0] if image is None else image.float().permute(1, 2, 0).numpy()
    return ClipMeasures(
        camera=cameras[-1],
        actors=actors,
        first_frame_db=psnr(frames[0], reference),
        background_db=_background_db(frames, objects, cameras[-1]),
        lost=max(_lost(frames, objects, cameras[index], index) for index in _KEYFRAMES[1:]),
    )


def _camera_moves(frames: FloatArray, objects: Mask) -> list[Move]:
    """Return the camera's move since the first frame, for every frame, in pixels of the frame.

    Chained over key frames, whose drift is taken out; in between it is interpolated. Looked at is
    what `measure` looks at: frames scaled up, as flow in small ones is biased.
    """
    grays = [at_measured_size(gray) for gray in to_gray(frames[list(_KEYFRAMES)])]
    height, width = grays[0].shape
    hidden = [
        cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
        for mask in objects[list(_KEYFRAMES)]
    ]
    matrix, moves = np.eye(3), [Move(height=height, width=width)]
    for index in range(1, len(grays)):
        pair = FlowPair.between(grays[index - 1], grays[index])
        step = fit_pair(
            pair.forward, gray=grays[index - 1], valid=pair.valid & ~hidden[index - 1]
        ).move
        matrix = without_drift(
            step.matrix @ matrix, grays[0], grays[index], objects=(hidden[0], hidden[index])
        )
        moves.append(Move.from_matrix(matrix, height=height, width=width))
    scale = SIZE / width
    values = np.array([(*move.shift, math.log(move.zoom), move.angle) for move in moves])
    x, y, log_zoom, angle = (np.interp(np.arange(NUM_FRAMES), _KEYFRAMES, one) for one in values.T)
    return [
        Move(
            height=SIZE,
            width=SIZE,
            shift=(float(x[t]) * scale, float(y[t]) * scale),
            zoom=math.exp(log_zoom[t]),
            angle=float(angle[t]),
        )
        for t in range(NUM_FRAMES)
    ]


def _ground(objects: Mask, move: Move, index: int) -> Mask:
    """Return where neither the first frame nor one that is brought back shows an object."""
    covered, seen = bring_back(objects[index].astype(np.uint8), move.matrix)
    return seen & ~objects[0] & (covered == 0)


def _background_db(frames: FloatArray, objects: Mask, move: Move) -> float:
    back, _ = bring_back(frames[-1], move.matrix)
    where = _ground(objects, move, -1)
    return psnr(back, frames[0], where=where) if where.any() else 0.0


def _lost(frames: FloatArray, objects: Mask, move: Move, index: int) -> float:
    """Compare one frame, brought back by the camera, with the first; see `ClipMeasures.lost`."""
    # Smoothed, as sampling anew alone changes the finest texture.
    first, now = (cv2.GaussianBlur(frames[one], (0, 0), 1.0) for one in (0, index))
    back, _ = bring_back(now, move.matrix)
    where = _ground(objects, move, index)
    if where.sum() < _MIN_PIXELS:
        return 1.0
    contrast = max(_contrast(first, where), 1e-4)
    error = np.square(back - first).sum(-1)
    halves = (slice(None, SIZE // 2), slice(SIZE // 2, None))
    quarters = [where, *(_only(where, rows, columns) for rows in halves for columns in halves)]
    return max(
        float(error[one].mean()) / max(_contrast(first, one), MIN_CONTRAST * contrast)
        for one in quarters
        if one.sum() >= _MIN_PIXELS
    )


def _contrast(picture: FloatArray, where: Mask) -> float:
    return float(np.square(picture[where] - picture[where].mean(0)).sum(-1).mean())


def _only(where: Mask, rows: slice, columns: slice) -> Mask:
    part = np.zeros_like(where)
    part[rows, columns] = where[rows, columns]
    return part


def color_distance(frame: FloatArray, color: str) -> FloatArray:
    """Compute the Euclidean RGB distance of every pixel to a named color, `[height, width]`."""
    return np.linalg.norm(frame - np.array(COLOR_VALUES[color], dtype=np.float32), axis=-1)


def _object_mask(frame: FloatArray, program: Program) -> Mask:
    """Return the pixels that may show an object or its soft border."""
    mask = np.zeros(frame.shape[:2], dtype=np.uint8)
    for actor in program.actors:
        mask |= (color_distance(frame, actor.color) < _COLOR_REACH).astype(np.uint8)
    return cv2.dilate(mask, np.ones((5, 5), np.uint8)) > 0


@dataclass(frozen=True)
class _Blob:
    center: tuple[float, float]
    area: float
    second_area: float
    touches_border: bool


def _find_blob(frame: FloatArray, color: str) -> _Blob | None:
    """Return the largest patch of a color, and how large the second largest is."""
    mask = (color_distance(frame, color) < _COLOR_REACH).astype(np.uint8)
    opened = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    num, _, stats, centers = cv2.connectedComponentsWithStats(opened, connectivity=8)
    if num < 2:
        return None
    areas = stats[1:, cv2.CC_STAT_AREA]
    order = np.argsort(areas)[::-1]
    largest = 1 + int(order[0])
    left, top, width, height = stats[largest, :4]
    touches = min(left, top) == 0 or left + width == SIZE or top + height == SIZE
    x, y = centers[largest]
    second = float(areas[order[1]]) if len(order) > 1 else 0.0
    return _Blob((float(x), float(y)), float(areas[order[0]]), second, bool(touches))


def _measure_actor(
    frames: FloatArray,
    actor: Actor,
    start: tuple[float, float],
    cameras: Sequence[Move],
) -> ActorMeasures:
    first = _find_blob(frames[0], actor.color)
    first_area = first.area if first else math.inf
    places = {0: np.array(start) - 0.5}  # counted from the centre of the first pixel
    for index in (*_MID, NUM_FRAMES - 1):
        blob = _find_blob(frames[index], actor.color)
        places[index] = np.full(2, np.nan)
        if blob is not None:
            on_picture = np.linalg.inv(cameras[index].matrix) @ (*blob.center, 1.0)
            places[index] = on_picture[:2]
    half = (places[_MID[0]] + places[_MID[1]]) / 2
    displacements = (half - places[0], places[NUM_FRAMES - 1] - half)
    path = PHASE_PATH if len(actor.moves) == 2 else STRAIGHT_PATH / 2
    rights = [
        _goes(displacement, direction, at_least=MIN_PATH_SHARE * path)
        for displacement, direction in zip(displacements, actor.phases, strict=True)
    ]
    intact, ratio, overlap = True, 0.0, 1.0
    for index in _KEYFRAMES[1:]:
        blob = _find_blob(frames[index], actor.color)
        overlap = min(overlap, _overlap(frames[index], actor, cameras[index].zoom))
        if blob is None:
            intact, ratio = False, 0.0
            continue
        ratio = blob.area / (first_area * cameras[index].zoom ** 2)
        large_enough = ratio >= AREA_BAND[0] or blob.touches_border
        alone = blob.second_area <= COPY_SHARE * first_area
        intact = intact and large_enough and ratio <= AREA_BAND[1] and alone
    (x1, y1), (x2, y2) = displacements
    return ActorMeasures(
        displacements=((float(x1), float(y1)), (float(x2), float(y2))),
        directions_right=(rights[0], rights[1]),
        area_ratio=ratio,
        intact=intact,
        overlap=overlap,
    )


def _overlap(frame: FloatArray, actor: Actor, zoom: float) -> float:
    """Compare all pixels of an object's color with its shape, laid where it fits best."""
    radius = RADIUS * zoom
    reach = math.ceil(radius) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    distance = np.hypot(x, y) if actor.shape == "ball" else np.maximum(abs(x), abs(y)) * 1.1
    shape = (radius - distance + 0.5).clip(0, 1).astype(np.float32)
    colored = (color_distance(frame, actor.color) < _COLOR_REACH).astype(np.float32)
    # Beyond the screen there is neither color nor shape: an object may lie half outside.
    inside = np.pad(np.ones_like(colored), reach)
    shared = cv2.filter2D(np.pad(colored, reach), -1, shape, borderType=cv2.BORDER_CONSTANT)
    drawn = cv2.filter2D(inside, -1, shape, borderType=cv2.BORDER_CONSTANT)
    return float((shared / np.maximum(colored.sum() + drawn - shared, 1.0)).max())


def _goes(displacement: npt.NDArray[np.float64], direction: str, *, at_least: float) -> bool:
    axis, sign = _AXES[direction]
    along, across = sign * displacement[axis], abs(displacement[1 - axis])
    return bool(along >= at_least and along > across)
