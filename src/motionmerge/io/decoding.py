"""Decode a video's frames, upright, from a file or a part of one: bounded, every fault named.

Files may come from strangers: sizes and formats are bounded, and playlists, which name other files,
are not opened. An error speaks of the file as "it"; whoever reads many names it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from motionmerge.errors import DataError
from motionmerge.io.paths import is_plain_file, open_plain_file
from motionmerge.io.video import SAFE_OPTIONS

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
_MAX_PIXEL_RATIO = 4  # of a pixel's sides; what states more is taken for square
_ANEW = "Make or convert the video again."

Picture = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class ClipPlace:
    """Where the bytes of a video are: a file, or a part of one such as a member of a tar.

    Args:
        path: The file.
        offset: Where the video begins in it.
        num_bytes: Its length; None where it goes on to the end.
    """

    path: Path
    offset: int = 0
    num_bytes: int | None = None

    @property
    def is_whole_file(self) -> bool:
        """Whether the file holds nothing else."""
        return self.offset == 0 and self.num_bytes is None

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the bytes for reading.

        Raises:
            DataError: There is no such file, or it has no bytes.
            OSError: It cannot be read.
        """
        if not is_plain_file(self.path):
            raise DataError("There is no such file.", fix="Check the path.")
        size = self.path.stat().st_size - self.offset
        if self.num_bytes is not None:
            size = min(size, self.num_bytes)
        if size <= 0:
            raise DataError("The file has no bytes.", fix=_ANEW)
        with open_plain_file(self.path) as file:
            if self.is_whole_file:
                yield file
            else:
                yield io.BufferedReader(_Window(file, self.offset, size))


class _Window(io.RawIOBase):
    """A part of a file, read as if it were one; seeks stay inside."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._place = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        wanted = min(len(buffer), max(0, self._size - self._place))
        self._file.seek(self._start + self._place)
        content = self._file.read(wanted)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, origin + offset)
        return self._place

    def tell(self) -> int:
        return self._place


@dataclass(frozen=True, kw_only=True)
class DecodedFrame:
    """A frame whose pixels are computed when they are asked for.

    Args:
        size: Height and width as stored, upright.
        shown: The same with square pixels.
        ticks: When it is shown, in units of the file's time base; None where it does not say.
        is_key: Whether it can be decoded without others.
    """

    size: Size
    shown: Size
    ticks: int | None
    is_key: bool
    _draw: Callable[[Size | None], Picture]

    def pixels(self, size: Size | None = None) -> Picture:
        """Convert to RGB, `[height, width, 3]`, scaled to `size`; by default as stored."""
        return self._draw(size)


@dataclass(frozen=True, kw_only=True)
class OpenedClip:
    """A video that is open for decoding.

    Args:
        stated_rate: Frames per second as its header has them, 0 where it has none.
        stated_frames: Their number as its header has it, which is often wrong; 0 for none.
        time_base: Seconds of a tick.
        frames: Every frame in the order of decoding. It raises `DataError` at a damaged one, and at
            one that is too large; errors of the decoder pass through to `named_faults`.
        frames_from: Seeks to a time in ticks and goes on from a frame before it, if all is well;
            None where the format cannot.
    """

    stated_rate: float
    stated_frames: int
    time_base: Fraction
    frames: Iterator[DecodedFrame]
    frames_from: Callable[[int], Iterator[DecodedFrame]] | None


@contextmanager
def named_faults() -> Iterator[None]:
    """Turn the errors of decoders and of the machine into `DataError`."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise DataError(f"It cannot be decoded: {error.strerror or error}.", fix=_ANEW) from error
    except UnidentifiedImageError as error:
        raise DataError("It is not a video.", fix="Give a video such as mp4 or GIF.") from error
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise DataError(f"It cannot be read: {error}.", fix=_ANEW) from error


@contextmanager
def open_clip(place: ClipPlace) -> Iterator[OpenedClip]:
    """Open a video: animated WebP, GIF, or any format that FFmpeg reads, such as mp4.

    Raises:
        DataError: It is missing, empty, no video, or its frames are too small, large or narrow.
    """
    with named_faults(), place.opened() as file:
        start = file.read(12)
        file.seek(0)
        if start[:4] == b"RIFF" and start[8:] == b"WEBP":  # FFmpeg reads no animated WebP
            with Image.open(file, formats=["WEBP"]) as image:
                check_size(image.height, image.width)
                yield OpenedClip(
                    stated_rate=_webp_rate(file),
                    stated_frames=getattr(image, "n_frames", 1),
                    time_base=Fraction(1, 1000),
                    frames=_webp_frames(image),
                    frames_from=None,
                )
            return
        source = f"file:{place.path}" if place.is_whole_file else file
        with av.open(source, "r", options=SAFE_OPTIONS) as container:
            yield _opened_by_ffmpeg(container)


def _opened_by_ffmpeg(container: av.container.InputContainer) -> OpenedClip:
    if not container.streams.video:
        raise DataError("It holds no video.", fix="Give a video such as mp4.")
    stream = container.streams.video[0]
    check_size(stream.height or MIN_SIDE, stream.width or MIN_SIDE)
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate or stream.guessed_rate or 0)

    def frames_from(ticks: int) -> Iterator[DecodedFrame]:
        container.seek(ticks, stream=stream, backward=True)
        return _ffmpeg_frames(container, stream)

    return OpenedClip(
        stated_rate=rate if 0 < rate <= _MAX_RATE else 0.0,
        stated_frames=stream.frames,
        time_base=Fraction(stream.time_base or 0),
        frames=_ffmpeg_frames(container, stream),
        frames_from=frames_from,
    )


def _ffmpeg_frames(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[DecodedFrame]:
    ratio = _pixel_ratio(stream)
    for frame in container.decode(stream):
        check_size(frame.height, frame.width)
        if frame.is_corrupt:
            raise DataError("A frame in it is damaged.", fix=_ANEW)
        turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
        size, shown = (frame.height, frame.width), (frame.height, round(frame.width * ratio))
        yield DecodedFrame(
            size=size[::-1] if turns % 2 else size,
            shown=shown[::-1] if turns % 2 else shown,
            ticks=frame.pts,
            is_key=bool(frame.key_frame),
            _draw=_drawing(frame, turns),
        )


def _drawing(frame: av.VideoFrame, turns: int) -> Callable[[Size | None], Picture]:
    """Return what converts a frame to RGB, scales it, and turns it as often by 90 degrees."""

    def draw(size: Size | None) -> Picture:
        if size is None:
            picture = frame.to_ndarray(format="rgb24")
        else:
            height, width = size[::-1] if turns % 2 else size
            smaller = height < frame.height
            picture = frame.to_ndarray(
                format="rgb24",
                height=height,
                width=width,
                interpolation="AREA" if smaller else "BICUBIC",
            )
        return np.ascontiguousarray(np.rot90(picture, turns), dtype=np.uint8)

    return draw


def _pixel_ratio(stream: av.VideoStream) -> float:
    """Return the width of a pixel over its height; 1 where the file says nothing usable."""
    ratio = float(stream.sample_aspect_ratio or 0)
    return ratio if 1 / _MAX_PIXEL_RATIO <= ratio <= _MAX_PIXEL_RATIO else 1.0


def _webp_rate(file: BinaryIO) -> float:
    """Return the mean frame rate by the durations of an animated WebP, 0 where it has none.

    They are in the chunks of the file, so that no frame is decoded twice.
    """
    milliseconds, num, place = 0, 0, file.tell()
    file.seek(12)
    while num < MAX_FRAMES and len(header := file.read(8)) == 8:
        size = int.from_bytes(header[4:], "little")
        if header[:4] == b"ANMF":  # place and size of a frame, 12 bytes, then its duration
            milliseconds += int.from_bytes(file.read(15)[12:], "little")
            num += 1
            file.seek(-15, 1)
        file.seek(size + size % 2, 1)
    file.seek(place)
    rate = 1000 * num / milliseconds if milliseconds else 0.0
    return rate if rate <= _MAX_RATE else 0.0


def _webp_frames(image: Image.Image) -> Iterator[DecodedFrame]:
    time = 0
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        image.load()
        picture = image.convert("RGB")
        size = (picture.height, picture.width)

        def draw(size: Size | None, picture: Image.Image = picture) -> Picture:
            if size is not None:
                picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
            return np.asarray(picture)

        yield DecodedFrame(size=size, shown=size, ticks=time, is_key=number == 0, _draw=draw)
        time += int(image.info.get("duration", 0))


def check_size(height: int, width: int) -> None:
    """Refuse frames that are too small, too large or too narrow, before memory is taken for them.

    Raises:
        DataError: Names the size.
    """
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
