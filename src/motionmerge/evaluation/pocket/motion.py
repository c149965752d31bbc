"""How far the camera moves in a clip of the pocket world, and whether the objects do as told.

The camera is a similarity transform fitted to optical flow (DIS) outside the objects; objects are
found by color and their moves counted relative to the picture, with the camera's motion taken out.
DIS: Kroeger et al. 2016 (arXiv 1603.03590). Fit: iteratively reweighted least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from motionmerge.errors import ShapeError
from motionmerge.evaluation.flow import dense_flow, to_gray
from motionmerge.evaluation.similarity import MAX_PSNR
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
# Lost are 0.16 at most in 99 of 100 real clips and 0.43 in whole generated ones; 0.5 and more when
# half of the picture slips by 8 pixels (median 0.7), or it fades half-way into another (1.3).
MAX_LOST = 0.5  # of the picture's contrast, in its worst quarter, for a picture that is still whole

_COLOR_REACH = 0.42  # RGB distance up to which a pixel belongs to an object of a color
_KEYFRAMES = (0, 5, 10, 15)  # where the camera is fitted; in between it is interpolated
_MIN_PIXELS = 60  # of a picture or a quarter of it, for a mean that says something
_MID = (7, 8)  # the frames on both sides of the half
_AXES = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}

Mask = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CameraMove:
    """Where the picture has gone: screen = center + zoom * rotation(picture - center) + shift.

    Args:
        shift: (x, y) in pixels of a 64-pixel frame.
        zoom: Above 1 the picture grows.
        angle: Radians.
    """

    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0
    angle: float = 0.0

    @property
    def zoom_degree(self) -> float:
        """How far zooming moves the border, in pixels; zooming out counts like its inverse."""
        return (max(self.zoom, 1 / self.zoom) - 1) * SIZE / 2

    @property
    def degree(self) -> float:
        """Motion degree: how far the border moves, sqrt(|shift|^2 + zoom_degree^2) in pixels."""
        return math.hypot(*self.shift, self.zoom_degree)

    @property
    def kind(self) -> str:
        """The one of `CAMERA_MOVES` that dominates; `rests` below `REST_DEGREE`."""
        x, y = self.shift
        if self.degree < REST_DEGREE:
            return "rests"
        if self.zoom_degree > max(abs(x), abs(y)):
            return "zooms in" if self.zoom > 1 else "zooms out"
        if abs(x) >= abs(y):
            return "pans left" if x > 0 else "pans right"
        return "tilts up" if y > 0 else "tilts down"

    def matrix(self) -> npt.NDArray[np.float64]:
        """Return the transform of pixel coordinates (x, y, 1), `[3, 3]`."""
        turn = self.zoom * np.array(
            [
                [math.cos(self.angle), -math.sin(self.angle)],
                [math.sin(self.angle), math.cos(self.angle)],
            ]
        )
        center = np.full(2, SIZE / 2)
        matrix = np.eye(3)
        matrix[:2, :2] = turn
        matrix[:2, 2] = center + self.shift - turn @ center
        return matrix

    @classmethod
    def from_matrix(cls, matrix: npt.NDArray[np.float64]) -> CameraMove:
        """Undo `matrix`."""
        center = np.full(2, SIZE / 2)
        x, y = matrix[:2, :2] @ center + matrix[:2, 2] - center
        zoom = math.hypot(matrix[0, 0], matrix[1, 0])
        return cls((float(x), float(y)), max(zoom, 1e-3), math.atan2(matrix[1, 0], matrix[0, 0]))


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
            difference / variance of the first frame, both smoothed, in the worst quarter of the
            picture and the worst key frame. About 0 in a whole clip, 1 and more without the photo.
    """

    camera: CameraMove
    actors: tuple[ActorMeasures, ...]
    first_frame_db: float
    background_db: float
    lost: float

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
    grays = to_gray(frames)
    objects = np.stack([_object_mask(frame, scene.program) for frame in frames])
    cameras = _camera_moves(grays, objects)
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


def psnr(picture: FloatArray, reference: FloatArray, *, where: Mask | None = None) -> float:
    """Compute the PSNR of values in [0, 1] in decibels, at most `MAX_PSNR`."""
    error = np.square(picture - reference)
    mean = float((error if where is None else error[where]).mean())
    return MAX_PSNR if mean <= 10 ** (-MAX_PSNR / 10) else -10 * math.log10(mean)


def fit_similarity(flow: FloatArray, *, where: Mask) -> CameraMove:
    """Fit one camera move to a flow field; what moves otherwise loses its weight.

    minimise  sum_i w_i |T(p_i) - p_i - flow_i|^2,   w = 1 / (1 + r^2 / s^2)^2,   s^2 = 2 median r^2

    Args:
        flow: `[64, 64, 2]` in pixels.
        where: Pixels to look at. With fewer than `_MIN_PIXELS` the camera is called at rest.
    """
    rows, columns = np.nonzero(where[::2, ::2])
    points = 2.0 * np.stack([columns, rows], -1) + 0.5 - SIZE / 2
    targets = points + flow[::2, ::2][rows, columns]
    if len(points) < _MIN_PIXELS:
        return CameraMove()
    x, y = points.T
    ones, zeros = np.ones_like(x), np.zeros_like(x)
    design = np.stack([np.stack([x, -y, ones, zeros], -1), np.stack([y, x, zeros, ones], -1)], 1)
    weights = ones
    for _ in range(8):
        weighted = weights[:, None, None] * design
        normal = np.einsum("nij,nik->jk", weighted, design)
        a, b, shift_x, shift_y = np.linalg.solve(normal, np.einsum("nij,ni->j", weighted, targets))
        residual = design @ np.array([a, b, shift_x, shift_y]) - targets
        squared = np.square(residual).sum(-1)
        weights = 1 / (1 + squared / (2 * max(float(np.median(squared)), 0.01))) ** 2
    return CameraMove((float(shift_x), float(shift_y)), math.hypot(a, b), math.atan2(b, a))


def _camera_moves(grays: npt.NDArray[np.uint8], objects: Mask) -> list[CameraMove]:
    """Return the camera's move since the first frame, for every frame.

    Chained over key frames, then corrected by the flow between the first frame and the key frame
    brought back by the chained estimate.
    """
    found = [CameraMove()]
    for before, now in pairwise(_KEYFRAMES):
        flow = dense_flow(grays[before], grays[now])
        step = fit_similarity(flow, where=~objects[before] & _lands_inside(flow))
        chained = step.matrix() @ found[-1].matrix()
        back, visible = _bring_back(grays[now], chained)
        covered, _ = _bring_back(objects[now].astype(np.uint8), chained)
        rest = dense_flow(grays[0], back)
        where = visible & ~objects[0] & (covered == 0) & _lands_inside(rest)
        correction = fit_similarity(rest, where=where)
        found.append(CameraMove.from_matrix(chained @ correction.matrix()))
    times = np.arange(NUM_FRAMES)
    values = np.array([(*move.shift, math.log(move.zoom), move.angle) for move in found])
    x, y, log_zoom, angle = (np.interp(times, _KEYFRAMES, column) for column in values.T)
    return [
        CameraMove((float(x[t]), float(y[t])), math.exp(log_zoom[t]), float(angle[t]))
        for t in times
    ]


def _lands_inside(flow: FloatArray) -> Mask:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    x, y = columns + flow[..., 0], rows + flow[..., 1]
    return (x > 0) & (x < SIZE - 1) & (y > 0) & (y < SIZE - 1)


def _bring_back(
    picture: npt.NDArray[Any], matrix: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[Any], Mask]:
    """Undo a camera move on a picture; also say which pixels of the result were on the screen."""
    to_centers = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts from centers
    affine = (np.linalg.inv(to_centers) @ matrix @ to_centers)[:2]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (SIZE, SIZE)
    back = cv2.warpAffine(picture, affine, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = np.full(size, 255, np.uint8)
    return back, cv2.warpAffine(inside, affine, size, flags=flags) == 255


def _background_db(frames: FloatArray, objects: Mask, camera: CameraMove) -> float:
    back, visible = _bring_back(frames[-1], camera.matrix())
    covered, _ = _bring_back(objects[-1].astype(np.uint8), camera.matrix())
    where = visible & ~objects[0] & (covered == 0)
    return psnr(back, frames[0], where=where) if where.any() else 0.0


def _lost(frames: FloatArray, objects: Mask, camera: CameraMove, index: int) -> float:
    """Compare one frame, brought back by the camera, with the first; see `ClipMeasures.lost`."""
    # Smoothed, as sampling anew alone changes the finest texture.
    first, now = (cv2.GaussianBlur(frames[one], (0, 0), 1.0) for one in (0, index))
    back, visible = _bring_back(now, camera.matrix())
    covered, _ = _bring_back(objects[index].astype(np.uint8), camera.matrix())
    where = visible & ~objects[0] & (covered == 0)
    if where.sum() < _MIN_PIXELS:
        return 1.0
    contrast = float(np.square(first[where] - first[where].mean(0)).sum(-1).mean())
    error = np.square(back - first).sum(-1)
    halves = (slice(None, SIZE // 2), slice(SIZE // 2, None))
    quarters = [where, *(_only(where, rows, columns) for rows in halves for columns in halves)]
    worst = max(float(error[one].mean()) for one in quarters if one.sum() >= _MIN_PIXELS)
    return worst / max(contrast, 1e-4)


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
    x, y = centers[largest] + 0.5
    second = float(areas[order[1]]) if len(order) > 1 else 0.0
    return _Blob((float(x), float(y)), float(areas[order[0]]), second, bool(touches))


def _measure_actor(
    frames: FloatArray,
    actor: Actor,
    start: tuple[float, float],
    cameras: Sequence[CameraMove],
) -> ActorMeasures:
    first = _find_blob(frames[0], actor.color)
    first_area = first.area if first else math.inf
    places = {0: np.array(start)}
    for index in (*_MID, NUM_FRAMES - 1):
        blob = _find_blob(frames[index], actor.color)
        places[index] = np.full(2, np.nan)
        if blob is not None:
            on_picture = np.linalg.inv(cameras[index].matrix()) @ (*blob.center, 1.0)
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
