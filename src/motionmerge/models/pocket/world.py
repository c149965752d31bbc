"""The procedural world that the pocket model is trained on.

A photograph or texture lies under a camera that pans, tilts, zooms or rests. How far the camera
goes is never captioned: that is motion *degree*, a global quantity that is decided early in
denoising. On the picture one or two small objects move as the caption says: that is motion
*control*, local and decided late. Some moves change half-way ("moves up then left"). docs/pocket.md
says why the world is built like this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .language import Program, sample_program

SIZE = 64  # pixels, height and width of a clip
CANVAS = 128  # pixels, the picture under the camera
NUM_FRAMES = 16
FRAME_RATE = 8
MAX_AMPLITUDE = 14.0  # pixels at the border of the picture, over the whole clip
STRAIGHT_PATH = 11.0  # pixels that an object moves relative to the picture
PHASE_PATH = 9.0  # pixels in each half of a move that turns
RADIUS = 6.5  # pixels, of an object
MAX_ACTORS = 2
COLOR_VALUES = {
    "red": (0.92, 0.10, 0.12),
    "green": (0.08, 0.78, 0.18),
    "blue": (0.12, 0.25, 0.95),
    "yellow": (0.97, 0.88, 0.10),
    "purple": (0.72, 0.12, 0.85),
}
TRAINING_PHOTOS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "grass",
    "gravel",
    "hubble_deep_field",
)
HELD_OUT_PHOTOS = ("coffee", "rocket")
_UNIT = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
# A camera that pans left shows what is further left: the picture shifts right on the screen.
_SCREEN_SHIFT = {
    "pans left": (1.0, 0.0),
    "pans right": (-1.0, 0.0),
    "tilts up": (0.0, 1.0),
    "tilts down": (0.0, -1.0),
}


@dataclass(frozen=True)
class Scene:
    """A program with everything else that a clip needs.

    Args:
        program: What happens.
        amplitude: How far the border of the picture moves over the clip, in pixels; 0 at rest.
        starts: Start of each actor, (x, y) in pixels of the first frame.
        canvas: Index of the picture in a `Canvases` pool.
    """

    program: Program
    amplitude: float
    starts: tuple[tuple[float, float], ...]
    canvas: int


def load_photo(name: str) -> Image.Image:
    """Load a bundled photograph (see photos/LICENSES.md), RGB, 256 pixels on the short side."""
    resource = files("motionmerge.models.pocket") / "photos" / f"{name}.jpg"
    with resource.open("rb") as stream:
        return Image.open(stream, formats=["JPEG", "PNG"]).convert("RGB")


class Canvases:
    """A pool of pictures `[num, 3, CANVAS, CANVAS]` in [0, 1]: crops of photographs and textures.

    Args:
        num: How many pictures.
        photos: Names of the photographs to crop from.
        rng: Draws crops, colors and textures.
        texture_share: Share of procedural textures.
    """

    def __init__(
        self,
        num: int,
        *,
        photos: Sequence[str],
        rng: np.random.Generator,
        texture_share: float = 0.4,
    ) -> None:
        sources = [load_photo(name) for name in photos]
        pictures = []
        for _ in range(num):
            if rng.random() < texture_share:
                pictures.append(_texture(rng))
            else:
                pictures.append(_photo_crop(sources[rng.integers(len(sources))], rng))
        self.pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.pictures[index].float() / 255

    def to(self, device: torch.device | str) -> Canvases:
        """Move the pictures, in place."""
        self.pictures = self.pictures.to(device)
        return self


def _photo_crop(photo: Image.Image, rng: np.random.Generator) -> np.ndarray:
    side = int(rng.integers(128, min(photo.size) + 1))
    left = int(rng.integers(photo.width - side + 1))
    top = int(rng.integers(photo.height - side + 1))
    crop = photo.resize(
        (CANVAS, CANVAS), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    gains = rng.uniform(0.75, 1.15, 3) if rng.random() < 0.7 else np.ones(3)
    return np.clip(pixels * gains, 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Smooth colored noise: two colors mixed by a random field with a random finest scale."""
    knots = int(rng.integers(5, 17))
    field = torch.from_numpy(rng.normal(size=(1, 2, knots, knots)).astype(np.float32))
    field = F.interpolate(field, size=(CANVAS, CANVAS), mode="bicubic", align_corners=True)[0]
    mix = torch.sigmoid(2 * field).numpy()
    colors = rng.uniform(0.15, 0.9, (3, 3)).astype(np.float32)
    colors = 0.6 * colors + 0.4 * colors.mean(axis=1, keepdims=True)  # duller than the objects
    picture = colors[0] + mix[0][..., None] * (colors[1] - colors[0])
    picture = picture + 0.6 * mix[1][..., None] * (colors[2] - picture)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def sample_scene(
    rng: np.random.Generator,
    *,
    num_canvases: int,
    slow_power: float = 1.0,
    program: Program | None = None,
) -> Scene:
    """Draw a scene.

    amplitude = MAX_AMPLITUDE * u ** slow_power,  u uniform in [0, 1]

    Args:
        rng: Draws everything. num_canvases: Size of the picture pool. slow_power: 1 for amplitudes
        spread evenly, 4 for mostly slow clips with a tail of fast ones. program: What happens;
        drawn when left out.
    """
    program = program or sample_program(rng)
    amplitude = float(MAX_AMPLITUDE * rng.random() ** slow_power)
    if program.camera == "rests":
        amplitude = 0.0
    starts: list[tuple[float, float]] = []
    while len(starts) < len(program.actors):
        x, y = rng.uniform(20, 44, 2)
        if all(max(abs(x - a), abs(y - b)) > 2 * RADIUS for a, b in starts):
            starts.append((float(x), float(y)))
        elif len(starts) == 1 and rng.random() < 0.1:  # an unlucky first start: begin again
            starts.clear()
    return Scene(program, amplitude, tuple(starts), int(rng.integers(num_canvases)))


def object_displacement(moves: tuple[str, ...], times: np.ndarray) -> np.ndarray:
    """Return the displacement on the picture `[times, 2]` (x, y) in pixels; times in [0, 1]."""
    if len(moves) == 1:
        return STRAIGHT_PATH * times[:, None] * np.array(_UNIT[moves[0]])
    first = np.minimum(times, 0.5)[:, None] * np.array(_UNIT[moves[0]])
    second = np.maximum(times - 0.5, 0)[:, None] * np.array(_UNIT[moves[1]])
    return 2 * PHASE_PATH * (first + second)


def camera_path(camera: str, amplitude: float, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Screen shift `[times, 2]` in pixels and zoom factor `[times]` of the picture.

    screen = center + zoom * (picture - center) + shift
    """
    direction = np.array(_SCREEN_SHIFT.get(camera, (0.0, 0.0)))
    shift = amplitude * times[:, None] * direction
    growth = 1 + amplitude / (SIZE / 2) * times
    zoom = {"zooms in": growth, "zooms out": 1 / growth}.get(camera, np.ones_like(times))
    return shift, zoom


@dataclass(frozen=True)
class Clips:
    """Rendered scenes.

    Args:
        video: `[batch, times, 3, SIZE, SIZE]` in [0, 1].
        flow: Where each pixel comes from in the first frame, minus where it is, in pixels:
            `[batch, times, 2, SIZE, SIZE]`.
        source_is_visible: Whether that place shows the same thing in the first frame:
            `[batch, times, 1, SIZE, SIZE]`, boolean.
        is_object: Whether an object covers the pixel: `[batch, times, 1, SIZE, SIZE]`, boolean.
    """

    video: torch.Tensor
    flow: torch.Tensor
    source_is_visible: torch.Tensor
    is_object: torch.Tensor


class Staging(NamedTuple):
    """Scenes as tensors, whose shapes do not depend on what happens: ready for a GPU.

    Args:
        canvas: Index of the picture, `[batch]`.
        shift, zoom: Of the picture, see `camera_path`: `[batch, times, 2]` and `[batch, times]`.
        start: Where each object starts, `[batch, MAX_ACTORS, 2]`.
        moved: How far it has moved relative to the picture, `[batch, MAX_ACTORS, times, 2]`.
        color: `[batch, MAX_ACTORS, 3]`.
        is_ball, is_there: `[batch, MAX_ACTORS]`, boolean.
    """

    canvas: torch.Tensor
    shift: torch.Tensor
    zoom: torch.Tensor
    start: torch.Tensor
    moved: torch.Tensor
    color: torch.Tensor
    is_ball: torch.Tensor
    is_there: torch.Tensor


def stage(scenes: Sequence[Scene], times: np.ndarray) -> Staging:
    """Compute where everything is at `times` in [0, 1], `[times]` or `[batch, times]`."""
    rows = np.broadcast_to(times, (len(scenes), np.shape(times)[-1]))
    paths = [
        camera_path(scene.program.camera, scene.amplitude, row)
        for scene, row in zip(scenes, rows, strict=True)
    ]
    per_actor = (len(scenes), MAX_ACTORS)
    start, color = np.zeros((*per_actor, 2)), np.zeros((*per_actor, 3))
    moved = np.zeros((*per_actor, rows.shape[1], 2))
    is_ball, is_there = np.zeros(per_actor, dtype=bool), np.zeros(per_actor, dtype=bool)
    for index, scene in enumerate(scenes):
        for slot, actor in enumerate(scene.program.actors):
            start[index, slot] = scene.starts[slot]
            moved[index, slot] = object_displacement(actor.moves, rows[index])
            color[index, slot] = COLOR_VALUES[actor.color]
            is_ball[index, slot] = actor.shape == "ball"
            is_there[index, slot] = True
    return Staging(
        torch.tensor([scene.canvas for scene in scenes]),
        torch.from_numpy(np.stack([p[0] for p in paths])).float(),
        torch.from_numpy(np.stack([p[1] for p in paths])).float(),
        torch.from_numpy(start).float(),
        torch.from_numpy(moved).float(),
        torch.from_numpy(color).float(),
        torch.from_numpy(is_ball),
        torch.from_numpy(is_there),
    )


def render(scenes: Sequence[Scene], canvases: Canvases, times: np.ndarray) -> Clips:
    """Render scenes at `times` in [0, 1]; time 0 is the first frame.

    Args:
        scenes: What to render. canvases: The pool that they index. times: `[times]` for all scenes
        or a row for each, `[batch, times]`.

    Objects are anti-aliased, drawn in the order of the program, and ride on the picture: the camera
    moves them too.
    """
    return render_staged(stage(scenes, times), canvases)


def render_staged(staging: Staging, canvases: Canvases) -> Clips:
    """Render what `stage` made, on the device where it and the canvases are."""
    shift, zoom = staging.shift, staging.zoom
    center = SIZE / 2
    axis = torch.arange(SIZE, device=shift.device) + 0.5
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # [y, x, 2] as (x, y)
    picture = (pixels - center - shift[:, :, None, None]) / zoom[:, :, None, None, None]
    video = F.grid_sample(
        canvases[staging.canvas],
        (picture * (2 / CANVAS)).flatten(1, 2),
        align_corners=False,
        padding_mode="reflection",
    )
    video = video.unflatten(2, (shift.shape[1], SIZE)).transpose(1, 2).contiguous()
    place = picture + center  # where each pixel lies in the first frame, if it does not move
    flow = place - pixels
    visible = ((place > 0) & (place < SIZE)).all(-1)
    is_object = torch.zeros_like(visible)
    for slot in range(MAX_ACTORS):
        start = staging.start[:, slot, None, None, None]
        moved = staging.moved[:, slot, :, None, None]
        is_ball = staging.is_ball[:, slot, None, None, None]
        is_there = staging.is_there[:, slot, None, None, None]
        now = _coverage(place - start - moved, is_ball, zoom) * is_there
        uncovered = (_coverage(place - start, is_ball, zoom) > 0.05) & is_there
        color = staging.color[:, slot, None, :, None, None]
        video = torch.lerp(video, color, now[:, :, None])
        inside = now > 0.5
        visible = (visible & ~(uncovered & ~inside & ~is_object)) | inside
        flow = torch.where(inside[..., None], place - pixels - moved, flow)
        is_object = is_object | inside
    return Clips(video, flow.permute(0, 1, 4, 2, 3), visible[:, :, None], is_object[:, :, None])


def _coverage(offset: torch.Tensor, is_ball: torch.Tensor, zoom: torch.Tensor) -> torch.Tensor:
    """Share of each pixel that an object covers, `[batch, times, y, x]`, by distance from it."""
    distance = torch.where(is_ball, offset.norm(dim=-1), offset.abs().amax(-1) * 1.1)
    return ((RADIUS - distance) * zoom[..., None, None] + 0.5).clamp(0, 1)
