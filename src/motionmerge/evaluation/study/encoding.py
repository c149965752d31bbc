"""The files that raters see: every video encoded alike, named by its content, without metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from motionmerge.errors import DataError
from motionmerge.io.video import load_image, read_frames, write_video

SIDE = 512
"""Pixels of the longer side of every video, so that sizes say nothing."""

_CRF = 14
_PHOTO_SIDE = 320
_ALIKE = 0.03  # by which the shapes of two videos may differ
_NAME_DIGITS = 20

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shelf:
    """A folder of files named by their content.

    Args:
        folder: Where they go.
        by_source: The names of what was put there, by what they are of.
    """

    folder: Path
    by_source: dict[tuple[Path | str, tuple[int, int]], str] = field(default_factory=dict)

    def put(self, content: bytes, suffix: str) -> str:
        """Write a file, and return its name."""
        name = hashlib.sha256(content).hexdigest()[:_NAME_DIGITS] + suffix
        (self.folder / name).write_bytes(content)
        return name

    def put_video(self, path: Path, size: tuple[int, int]) -> str:
        """Encode a video once in a size (height, width), and return its name."""
        if (path, size) not in self.by_source:
            frames, rate = read_frames(path)
            self.by_source[path, size] = self.put_frames(_fitted(frames, size), rate)
        return self.by_source[path, size]

    def put_frames(self, frames: Frames, rate: float) -> str:
        """Encode frames `[frames, height, width, 3]`, and return the file's name."""
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "video.mp4"
            write_video(path, frames, fps=rate, crf=_CRF)
            return self.put(path.read_bytes(), ".mp4")

    def put_photo(self, path: Path) -> str:
        """Write a small JPEG of a photo without its metadata, and return its name."""
        with TemporaryDirectory() as scratch:
            photo = load_image(path)
            photo.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE), Image.Resampling.LANCZOS)
            small = Path(scratch) / "photo.jpg"
            photo.save(small, quality=88)
            return self.put(small.read_bytes(), ".jpg")


@dataclass(frozen=True)
class Shape:
    """What a video looks like from outside."""

    height: int
    width: int
    seconds: float

    @classmethod
    def of(cls, path: Path) -> Shape:
        """Decode a video for its real shape and length."""
        frames, rate = read_frames(path)
        return cls(frames.shape[1], frames.shape[2], len(frames) / rate)


def common_size(paths: Sequence[Path], shapes: Sequence[Shape]) -> tuple[int, int]:
    """Return the height and width in which the videos of a scene are shown.

    Raises:
        DataError: They differ in shape or length, which would give their makers away.
    """
    first = shapes[0]
    for path, other in zip(paths, shapes, strict=True):
        ratio = other.width * first.height / (other.height * first.width)
        if abs(ratio - 1) > _ALIKE:
            raise DataError(
                f"{paths[0]} has {first.width} x {first.height} pixels and {path} "
                f"{other.width} x {other.height}: raters would tell them apart by their shape.",
                fix="Make both in one shape.",
            )
        if abs(other.seconds - first.seconds) > max(0.1, 0.05 * first.seconds):
            raise DataError(
                f"{paths[0]} takes {first.seconds:.2f} s and {path} {other.seconds:.2f} s: raters "
                "would tell them apart by their length.",
                fix="Make both with the same number of frames and frame rate.",
            )
    scale = SIDE / max(first.height, first.width)
    return tuple(2 * max(1, round(side * scale / 2)) for side in (first.height, first.width))  # type: ignore[return-value]


def _fitted(frames: Frames, size: tuple[int, int]) -> Frames:
    height, width = size
    if frames.shape[1:3] == size:
        return frames
    resized = [
        Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames
    ]
    return np.stack([np.asarray(one) for one in resized])


def check_card(path: Path, size: tuple[int, int], *, expected: str) -> tuple[Frames, float]:
    """Return a video, dimmed, that says what to answer: an attention check.

    It says so from its middle on, so that whoever answers before is caught.
    """
    frames, rate = read_frames(path)
    fitted = _fitted(frames, size)
    height, width = size
    text = f"This is a check.\nAnswer {expected.upper()}\nto every question."
    font = ImageFont.load_default(max(12, min(height, width) // 11))
    shown = []
    for at, frame in enumerate(fitted):
        card = Image.fromarray((frame * 0.35).astype(np.uint8))
        if at >= len(fitted) // 2:
            place = (width / 2, height / 2)
            ImageDraw.Draw(card).multiline_text(
                place, text, fill="white", font=font, anchor="mm", align="center"
            )
        shown.append(np.asarray(card))
    return np.stack(shown), rate
