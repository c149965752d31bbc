"""Read a video once: the frames that are measured, their times, and what is wrong with the file.

Frames are taken about eight times a second, as VBench's dynamic degree does, and scaled until the
longer side is `LONGER_SIDE`. Faults are named: a file that cannot be measured is a `DataError`,
what can be measured but is odd is a note.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt

from motionmerge.errors import DataError
from motionmerge.evaluation.vbench.rules import sampling_interval
from motionmerge.io.clips import are_even
from motionmerge.io.decoding import MAX_FRAMES, ClipPlace, OpenedClip, Picture, open_clip
from motionmerge.io.video import SAFE_OPTIONS

LONGER_SIDE = 512
"""Pixels: larger frames are scaled down to it."""

SHORTER_SIDE = 192
"""Pixels: smaller frames are scaled up to it, because optical flow is biased in small ones."""

MAX_SAMPLES = 241
"""Thirty seconds; of a longer video only its beginning is measured, and a note says so."""


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


def read_clip(path: str | Path) -> Clip:
    """Read a video: GIF, animated WebP, or any format that FFmpeg reads, such as mp4.

    Raises:
        DataError: The file is missing, empty, damaged, ends early, has a single frame, or frames
            that are too small, too large or too narrow.
    """
    with open_clip(ClipPlace(Path(path))) as opened:
        return _collect(opened)


def read_comment(path: str | Path) -> str:
    """Return the comment in a video's metadata, where our own prompt and seed are; "" if none."""
    try:
        with av.open(f"file:{path}", options=SAFE_OPTIONS) as container:
            return container.metadata.get("comment", "")
    except (OSError, av.error.FFmpegError, ValueError):
        return ""


def _collect(opened: OpenedClip) -> Clip:
    """Read all frames once; keep every `interval`-th one scaled, and the first as it is."""
    interval = sampling_interval(opened.stated_rate)
    first: Picture | None = None
    before: Picture | None = None
    samples: list[Picture] = []
    times: list[float | None] = []
    changes, is_whole = 0.0, True
    for frame in opened.frames:
        picture = frame.pixels()
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
            samples.append(at_measured_size(picture))
        if len(times) == MAX_FRAMES:
            is_whole = False
            break
        before = picture
        times.append(None if frame.ticks is None else float(frame.ticks * opened.time_base))
    if first is None or len(times) < 2:
        count = "no frame" if first is None else "one frame"
        raise DataError(f"It has {count}; motion needs two.", fix="Make a longer video.")
    if is_whole and len(times) < opened.stated_frames:
        raise DataError(
            f"It ends early: {len(times)} of its {opened.stated_frames} frames can be read.",
            fix="Make the video again.",
        )
    if len(samples) < 2:  # two or three frames at a high rate
        raise DataError(
            f"It has {len(times)} frames in less than an eighth of a second.",
            fix="Make a longer video.",
        )
    seconds, rate, notes = _timing(times, opened.stated_rate)
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
    if not are_even(seconds):
        return seconds, rate, (f"its frame rate varies: {rate:.3g} a second on average",)
    is_stated = stated_rate and abs(rate - stated_rate) < 0.01 * stated_rate
    return seconds, stated_rate if is_stated else rate, ()


def at_measured_size(picture: Picture) -> Picture:
    """Scale a frame, in color or gray, to the size at which motion is measured."""
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
