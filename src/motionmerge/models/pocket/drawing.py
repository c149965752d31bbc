"""Objects of the pocket world painted into a photo, in the size and colors that the model knows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from motionmerge.errors import DataError
from motionmerge.io.video import fit_image

from .language import COLORS, SHAPES
from .text import known_words
from .world import COLOR_VALUES, MAX_ACTORS, RADIUS, SIZE

Thing = tuple[str, str]
"""Color and shape of an object."""

Place = tuple[float, float]
"""Where its middle is: (x, y) in pixels of a 64-pixel frame."""

_TIMES = 4  # drawn larger and scaled down, for smooth edges
_NEAR = 0.42  # RGB distance up to which a pixel may belong to an object of a color


def named_things(prompt: str) -> list[Thing]:
    """List the objects that a prompt names, each once: a color and the shape behind it."""
    words = known_words(prompt)
    pairs = pairwise(words)
    return list(dict.fromkeys(pair for pair in pairs if pair[0] in COLORS and pair[1] in SHAPES))


def absent_things(photo: Image.Image, things: Sequence[Thing]) -> list[Thing]:
    """List the objects that a photo cannot show, as no pixel of it is near their color.

    The others may be there or not: a red coat is as red as a red ball.
    """
    small = photo.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32) / 255
    return [
        (color, shape)
        for color, shape in things
        if np.linalg.norm(pixels - np.array(COLOR_VALUES[color]), axis=-1).min() >= _NEAR
    ]


def places_for(prompt: str, *, seed: int) -> dict[Thing, Place]:
    """Draw where the objects of a prompt start, as the scenes that the model learned from do.

    Raises:
        DataError: It names none, more than `MAX_ACTORS`, or two of one color.
    """
    things = named_things(prompt)
    fix = 'Name one or two, e.g. "the red ball moves up and the blue box moves left".'
    if not things:
        raise DataError(f"There is nothing to draw: {prompt!r} names no ball and no box.", fix=fix)
    if len(things) > MAX_ACTORS or len({color for color, _ in things}) < len(things):
        names = ", ".join(" ".join(thing) for thing in things)
        raise DataError(
            f"The pocket model knows at most {MAX_ACTORS} objects, of different colors; the prompt "
            f"names {names}.",
            fix=fix,
        )
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.uniform(20, 44, (len(things), 2))
        if len(starts) == 1 or np.abs(starts[0] - starts[1]).max() > 2 * RADIUS:
            return {
                thing: (float(x), float(y)) for thing, (x, y) in zip(things, starts, strict=True)
            }


def paint_named(
    photo: Image.Image, prompt: str, *, seed: int, side: int | None
) -> tuple[Image.Image, dict[Thing, Place]]:
    """Paint the objects of a prompt into a photo, and return their places too.

    Args:
        photo: RGB, of any shape; its middle is taken.
        prompt: Names them.
        seed: Of their places.
        side: Of the result in pixels; None for the model's own size.

    Raises:
        DataError: As `places_for`.
    """
    places, side = places_for(prompt, seed=seed), side or SIZE
    return draw_things(fit_image(photo, side, side), places), places


def draw_things(photo: Image.Image, places: dict[Thing, Place]) -> Image.Image:
    """Paint objects into a square photo.

    Args:
        photo: RGB, as high as it is wide.
        places: The objects and their middles.
    """
    side = photo.width
    layer = photo.resize((side * _TIMES, side * _TIMES), Image.Resampling.BICUBIC)
    mask = Image.new("L", layer.size)
    colors, covered = ImageDraw.Draw(layer), ImageDraw.Draw(mask)
    unit = side * _TIMES / SIZE
    for (color, shape), (x, y) in places.items():
        radius = RADIUS if shape == "ball" else RADIUS / 1.1
        box = tuple(unit * value for value in (x - radius, y - radius, x + radius, y + radius))
        fill = tuple(round(255 * value) for value in COLOR_VALUES[color])
        for canvas, paint in ((colors, fill), (covered, 255)):
            (canvas.ellipse if shape == "ball" else canvas.rectangle)(box, fill=paint)
    small = (side, side)
    return Image.composite(
        layer.resize(small, Image.Resampling.BOX), photo, mask.resize(small, Image.Resampling.BOX)
    )
