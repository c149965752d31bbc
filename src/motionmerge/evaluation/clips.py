"""Read a video once: the frames that are measured, their times, and what is wrong with the file.

Frames are taken about eight times a second, as VBench's dynamic degree does, and scaled until the
longer side is `LONGER_SIDE`. Faults are named: a file that cannot be measured is a `DataError`,
what can be measured but is odd is a note. Files may come from strangers: sizes, lengths and formats
are bounded, and playlists, which name other files, are not opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from motionmerge.errors import DataError
from motionmerge.evaluation.vbench.rules import sampling_interval
from motionmerge.io.video import SAFE_OPTIONS

LONGER_SIDE = 512
"""Pixels: larger frames are scaled down to it."""

SHORTER_SIDE = 192
"""Pixels: smaller frames are scaled up to it, because optical flow is biased in small ones."""

MAX_SAMPLES = 241
"""Thirty seconds; of a longer video only its beginning is measured, and a note says so."""

MAX_FRAMES = 20_000
MAX_PIXELS = 8192 * 4320
MAX_ASPECT = 16
MIN_SIDE = 16

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".webp"),
    *(".mpg", ".mpeg", ".mxf", ".ogv", ".ts", ".wmv", ".y4m"),
)
"""What is taken for a video in a folder; a file that is named by itself may have any suffix."""

_MAX_RATE = 1000.0
_UNEVEN = 1.5  # times the median distance of two frames, for a rate that counts as variable

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video as it is measured.

    Args:
        samples: `[samples, height, width, 3]`, RGB, scaled.
        times: Seconds of each sample since the first, `[samples]`; None where the file has no
            frame rate.
        first: The first frame as it is in the file, `[height, width, 3]`.
        num_frames: Frames in the file, or read of it.
        frame_rate: Frames per second; None where the file has none.
        flicker: VBench's temporal flickering of all frames at their own size, in [0, 1]; None where
            not all frames were read.
        notes: What is odd about the file, as sentences without a full stop.
    """

    samples: Picture
    times: npt.NDArray[np.float64] | None
    first: Picture
    num_frames: int
    frame_rate: float | None
    flicker: float | None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the file's frames."""
        return self.first.shape[0], self.first.shape[1]

    @property
    def seconds(self) -> float | None:
        """How long the measured part is."""
        return None if self.times is None else float(self.times[-1])


@dataclass(frozen=True)
class _Stated:
    """What a file says of itself: its frame rate and number of frames, 0 if it does not."""

    rate: float
    num_frames: int


def read_clip(path: str | Path) -> Clip:
    """Read a video: GIF, animated WebP, or any format that FFmpeg reads, such as mp4.

    Raises:
        DataError: The file is missing, empty, damaged, ends early, has a single frame, or frames
            that are too small, too large or too narrow.
    """
    with _named_faults(), _opened(Path(path)) as (stated, frames):
        return _collect(frames, stated)


def read_comment(path: str | Path) -> str:
    """Return the comment in a video's metadata, where our own prompt and seed are; "" if none."""
    try:
        with av.open(f"file:{path}", options=SAFE_OPTIONS) as container:
            return container.metadata.get("comment", "")
    except (OSError, av.error.FFmpegError, ValueError):
        return ""


@contextmanager
def _named_faults() -> Iterator[None]:
    """Turn the errors of decoders into `DataError`."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise DataError(
            f"It cannot be decoded: {error.strerror or error}.", fix="Make the video again."
        ) from error
    except UnidentifiedImageError as error:
        raise DataError("It is not a video.", fix="Give a video such as mp4 or GIF.") from error
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise DataError(f"It cannot be read: {error}.", fix="Make the video again.") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError("There is no such file.", fix="Check the path.")
    if path.stat().st_size == 0:
        raise DataError("The file has no bytes.", fix="Make the video again.")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_Stated, Iterator[tuple[Picture, float | None]]]]:
    """Open a video: what it states, and its frames (RGB, upright) with their times in seconds."""
    _check_file(path)
    with path.open("rb") as file:
        start = file.read(12)
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":  # FFmpeg reads no animated WebP
        with Image.open(path, formats=["WEBP"]) as image:
            _check_size(image.height, image.width)
            yield _Stated(_webp_rate(path), getattr(image, "n_frames", 1)), _webp_frames(image)
        return
    with av.open(f"file:{path}", options=SAFE_OPTIONS) as container:
        if not container.streams.video:
            raise DataError("It holds no video.", fix="Give a video such as mp4.")
        stream = container.streams.video[0]
        _check_size(stream.height or MIN_SIDE, stream.width or MIN_SIDE)
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        yield _Stated(rate if 0 < rate <= _MAX_RATE else 0.0, stream.frames), _av_frames(container)


def _webp_rate(path: Path) -> float:
    """Return the mean frame rate by the durations of an animated WebP, 0 where it has none.

    They are in the chunks of the file, so that no frame is decoded twice.
    """
    milliseconds, num = 0, 0
    with path.open("rb") as file:
        file.seek(12)
        while num < MAX_FRAMES and len(header := file.read(8)) == 8:
            size = int.from_bytes(header[4:], "little")
            if header[:4] == b"ANMF":  # place and size of a frame, 12 bytes, then its duration
                milliseconds += int.from_bytes(file.read(15)[12:], "little")
                num += 1
                file.seek(-15, 1)
            file.seek(size + size % 2, 1)
    rate = 1000 * num / milliseconds if milliseconds else 0.0
    return rate if rate <= _MAX_RATE else 0.0


def _webp_frames(image: Image.Image) -> Iterator[tuple[Picture, float | None]]:
    time = 0.0
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        image.load()
        yield np.asarray(image.convert("RGB")), time
        time += float(image.info.get("duration", 0)) / 1000


def _av_frames(
    container: av.container.InputContainer,
) -> Iterator[tuple[Picture, float | None]]:
    for frame in container.decode(video=0):
        _check_size(frame.height, frame.width)
        if frame.is_corrupt:
            raise DataError("A frame in it is damaged.", fix="Make the video again.")
        picture = frame.to_ndarray(format="rgb24")
        turns = round((getattr(frame, "rotation", 0) or 0) / 90)
        yield np.ascontiguousarray(np.rot90(picture, turns)), frame.time


def _check_size(height: int, width: int) -> None:
    """Refuse sizes that cannot be measured, before memory is taken for them."""
    small, large = sorted((height, width))
    if small < MIN_SIDE:
        raise DataError(
            f"Its frames have {width} x {height} pixels; {MIN_SIDE} a side are the least.",
            fix="Make a larger video.",
        )
    if height * width > MAX_PIXELS or large > MAX_ASPECT * small:
        raise DataError(
            f"Its frames have {width} x {height} pixels, more than {MAX_PIXELS:,} or in a strip.",
            fix="Scale the video down.",
        )


def _collect(frames: Iterator[tuple[Picture, float | None]], stated: _Stated) -> Clip:
    """Read all frames once; keep every `interval`-th one scaled, and the first as it is."""
    interval = sampling_interval(stated.rate)
    first: Picture | None = None
    before: Picture | None = None
    samples: list[Picture] = []
    times: list[float | None] = []
    changes, is_whole = 0.0, True
    for picture, time in frames:
        if first is None:
            first = picture
        if before is not None:
            if picture.shape != before.shape:
                raise DataError(
                    f"The size of its frames changes after {len(times)} of them.",
                    fix="Make a video of one size.",
                )
            changes += cv2.norm(picture, before, cv2.NORM_L1) / picture.size
        if len(times) % interval == 0:
            if len(samples) == MAX_SAMPLES:
                is_whole = False
                break
            samples.append(_scaled(picture))
        if len(times) == MAX_FRAMES:
            is_whole = False
            break
        before = picture
        times.append(time)
    if first is None or len(times) < 2:
        count = "no frame" if first is None else "one frame"
        raise DataError(f"It has {count}; motion needs two.", fix="Make a longer video.")
    if is_whole and len(times) < stated.num_frames:
        raise DataError(
            f"It ends early: {len(times)} of its {stated.num_frames} frames can be read.",
            fix="Make the video again.",
        )
    if len(samples) < 2:  # two or three frames at a high rate
        raise DataError(
            f"It has {len(times)} frames in less than an eighth of a second.",
            fix="Make a longer video.",
        )
    seconds, rate, notes = _timing(times, stated.rate)
    sampled = None if seconds is None else seconds[::interval][: len(samples)]
    if not is_whole:
        until = f"{len(times)} frames" if sampled is None else f"{sampled[-1]:.1f} s"
        notes = (*notes, f"only its first {until} were measured")
    return Clip(
        samples=np.stack(samples),
        times=sampled,
        first=first,
        num_frames=len(times),
        frame_rate=rate,
        flicker=(255 - changes / (len(times) - 1)) / 255 if is_whole else None,
        notes=notes,
    )


def _timing(
    times: list[float | None], stated_rate: float
) -> tuple[npt.NDArray[np.float64] | None, float | None, tuple[str, ...]]:
    """Return seconds since the first frame, the frame rate, and what is odd about them."""
    known = [time for time in times if time is not None]
    rises = len(known) == len(times) and all(b > a for a, b in pairwise(known))
    if not rises:
        if not stated_rate:
            return None, None, ("it has no frame rate: nothing is measured per second",)
        note = "its frames have no times: the frame rate that it states was used"
        return np.arange(len(times)) / stated_rate, stated_rate, (note,)
    seconds = np.array(known) - known[0]
    rate = (len(known) - 1) / float(seconds[-1])
    steps = np.diff(seconds)
    middle = float(np.median(steps))
    if steps.max() > _UNEVEN * middle or steps.min() < middle / _UNEVEN:
        return seconds, rate, (f"its frame rate varies: {rate:.3g} a second on average",)
    is_stated = stated_rate and abs(rate - stated_rate) < 0.01 * stated_rate
    return seconds, stated_rate if is_stated else rate, ()


def _scaled(picture: Picture) -> Picture:
    """Scale a frame to the size at which motion is measured."""
    height, width = measured_size(*picture.shape[:2])
    if (height, width) == picture.shape[:2]:
        return picture
    is_smaller = height < picture.shape[0]
    how = cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (width, height), interpolation=how), dtype=np.uint8)


def measured_size(height: int, width: int) -> tuple[int, int]:
    """Return height and width at which frames of a size are measured."""
    scale = min(1.0, LONGER_SIDE / max(height, width))
    scale = max(scale, SHORTER_SIDE / min(height, width))
    return round(height * scale), round(width * scale)
