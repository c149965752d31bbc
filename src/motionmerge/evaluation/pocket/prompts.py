"""Prompts and first frames to evaluate the pocket model on, none of which it was trained on.

`validation` shows fresh crops of the photographs of the training set and is for choosing settings;
`test` shows photographs that were held out. Textures are fresh in both. Scenes on which the
measures of `motion` are not reliable are not drawn: a picture without texture hides the camera, one
of an object's color hides the object.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from motionmerge.errors import ConfigError
from motionmerge.io.atomic import write_whole
from motionmerge.models.pocket.language import (
    CAMERA_MOVES,
    COLORS,
    SHAPES,
    Actor,
    Program,
    sample_moves,
)
from motionmerge.models.pocket.world import (
    COLOR_VALUES,
    HELD_OUT_PHOTOS,
    MAX_AMPLITUDE,
    RADIUS,
    SIZE,
    TRAINING_PHOTOS,
    Canvases,
    Scene,
    camera_path,
    object_displacement,
    render,
)
from motionmerge.text import fix_unknown_name

SPLITS = {"validation": TRAINING_PHOTOS, "test": HELD_OUT_PHOTOS}
DIFFICULTIES = ("plain", "sequence", "several")
NUM_CANVASES = 192

_MIN_TEXTURE = 1.5  # gray values per pixel, along the direction in which the picture changes least
_MAX_COLOR_SHARE = 1e-3  # of the picture's pixels near an object's color
_COLOR_MARGIN = 0.5  # RGB distance
_TIMES = np.linspace(0, 1, 9)


def scenes(split: str, *, num: int, seed: int = 0) -> tuple[list[Scene], Canvases]:
    """Draw the scenes of a split and their pictures.

    Scene i is the same whatever `num`. Difficulties take turns; the camera is captioned in every
    other scene. Amplitudes are 0: nobody tells a model how far to go.

    Raises:
        ConfigError: There is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"There is no split `{split}`.", fix=fix_unknown_name(split, SPLITS))
    key = [seed, list(SPLITS).index(split)]
    canvases = Canvases(
        NUM_CANVASES, photos=SPLITS[split], rng=np.random.default_rng([*key, 2**31])
    )
    usable = {color: _usable_canvases(canvases, color) for color in COLORS}
    return [_scene(np.random.default_rng([*key, i]), i, usable) for i in range(num)], canvases


def first_frames(chosen: Sequence[Scene], canvases: Canvases) -> torch.Tensor:
    """Render the input images of scenes, `[num, 3, 64, 64]` in [0, 1]."""
    return render(chosen, canvases, np.zeros(1)).video[:, 0]


def write_scenes(split: str, folder: Path, *, num: int, seed: int = 0) -> Path:
    """Write the input images of scenes, and a manifest that names them with their captions.

    Files that are there already are left alone: scene i is the same whatever `num`.

    Returns:
        The manifest.
    """
    chosen, canvases = scenes(split, num=num, seed=seed)
    lines = []
    for number, (scene, frame) in enumerate(
        zip(chosen, first_frames(chosen, canvases), strict=True)
    ):
        image = folder / f"{split}-{seed}-{number:04}.png"
        if not image.exists():
            pixels = (frame * 255).round().to(torch.uint8).movedim(0, -1).numpy()
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG")
            write_whole(image, buffer.getvalue())
        lines.append(json.dumps({"image": image.name, "prompt": scene.program.caption()}))
    manifest = folder / f"{split}-{seed}-{num}.jsonl"
    write_whole(manifest, "\n".join(lines) + "\n")
    return manifest


def _scene(rng: np.random.Generator, index: int, usable: dict[str, set[int]]) -> Scene:
    program = _program(rng, index)
    fits = sorted(set.intersection(*(usable[actor.color] for actor in program.actors)))
    while True:
        starts = rng.uniform(22, 42, (len(program.actors), 2))
        if _starts_are_clear(program, starts):
            break
    places = tuple((float(x), float(y)) for x, y in starts)
    return Scene(program, 0.0, places, int(rng.choice(fits)))


def _program(rng: np.random.Generator, index: int) -> Program:
    """Draw a program: difficulties and captioned cameras take turns; some have two objects."""
    difficulty = DIFFICULTIES[index % len(DIFFICULTIES)]
    camera_is_captioned = index // len(DIFFICULTIES) % 2 == 0
    has_turning_pair = difficulty == "sequence" and index % 9 == 1
    num_actors = 2 if difficulty == "several" or has_turning_pair else 1
    sequence_share = 1.0 if difficulty == "sequence" else 0.0
    actors = tuple(
        Actor(str(color), str(rng.choice(SHAPES)), sample_moves(rng, sequence_share=sequence_share))
        for color in rng.permutation(COLORS)[:num_actors]
    )
    return Program(actors, str(rng.choice(CAMERA_MOVES)), camera_is_captioned)


def _starts_are_clear(program: Program, starts: npt.NDArray[np.float64]) -> bool:
    """Return whether objects stay apart, and on the screen under the fastest camera."""
    paths = [
        start + object_displacement(actor.moves, _TIMES)
        for actor, start in zip(program.actors, starts, strict=True)
    ]
    shift, zoom = camera_path(program.camera, MAX_AMPLITUDE, _TIMES)
    for path in paths:
        on_screen = SIZE / 2 + zoom[:, None] * (path - SIZE / 2) + shift
        if np.abs(on_screen - SIZE / 2).max() > SIZE / 2 - RADIUS / 2:
            return False
    if len(paths) == 1:
        return True
    # A wrong move must not hide another object either: keep some distance over the whole clip.
    return float(np.abs(paths[0] - paths[1]).max(-1).min()) > 2 * RADIUS + 2


def _usable_canvases(canvases: Canvases, color: str) -> set[int]:
    pictures = canvases.pictures.permute(0, 2, 3, 1).numpy()
    value = np.array(COLOR_VALUES[color], dtype=np.float32)
    usable = set()
    for index, picture in enumerate(pictures):
        middle = picture[16:-16, 16:-16].astype(np.float32) / 255
        near = np.linalg.norm(middle - value, axis=-1) < _COLOR_MARGIN
        if near.mean() < _MAX_COLOR_SHARE and _texture_strength(middle) > _MIN_TEXTURE:
            usable.add(index)
    return usable


def _texture_strength(picture: npt.NDArray[np.float32]) -> float:
    """Compute how much structure a texture has: the median over its quarters of the least gradient.

    sqrt(smallest eigenvalue of mean(gradient gradient^T)), in gray values (0..255) per pixel
    """
    gray = picture.mean(-1) * 255
    smooth = (gray[:-1, :-1] + gray[1:, :-1] + gray[:-1, 1:] + gray[1:, 1:]) / 4
    gradient = np.stack(np.gradient(smooth), -1)
    half = len(smooth) // 2
    strengths = []
    for rows in (slice(half), slice(half, None)):
        for columns in (slice(half), slice(half, None)):
            g = gradient[rows, columns].reshape(-1, 2)
            strengths.append(np.sqrt(max(np.linalg.eigvalsh(g.T @ g / len(g))[0], 0)))
    return float(np.median(strengths))
