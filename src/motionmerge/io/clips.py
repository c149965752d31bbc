"""What is in a video file, found by decoding it once, and any frames of it afterwards.

Headers are not believed: their counts of frames were wrong in 3 of 15 real files. Frames are found
again by their times, and only where those rise: in 3 of the same files seeking gave wrong frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from motionmerge.errors import DataError
from motionmerge.io.cuts import THUMBNAIL, find_cuts
from motionmerge.io.decoding import (
    MAX_FRAMES,
    ClipPlace,
    DecodedFrame,
    OpenedClip,
    Picture,
    Size,
    open_clip,
)
from motionmerge.io.hashing import hash_file
from motionmerge.io.video import MAX_VIDEO_BYTES

MAX_ALL_PIXELS = 2 * 10**11
"""Of all frames of a file together: 20,000 of 4K."""

_NEAR = 24  # frames: from here on seeking is quicker than decoding from the start
_UNEVEN = 1.5  # times the median distance of two frames, for a rate that counts as variable


def are_even(seconds: npt.NDArray[np.float64]) -> bool:
    """Check whether frames at these times are all shown about equally long."""
    steps = np.diff(seconds)
    middle = float(np.median(steps)) if len(steps) else 0.0
    return not len(steps) or bool(
        steps.max() <= _UNEVEN * middle and steps.min() >= middle / _UNEVEN
    )


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a file are shown, in the order of decoding.

    Args:
        num_frames: How many can be decoded.
        base: Seconds of a tick.
        ticks: Time of each frame; None where the file's do not rise, and frame n is at n * `base`.
    """

    num_frames: int
    base: Fraction
    ticks: tuple[int, ...] | None

    @cached_property
    def seconds(self) -> npt.NDArray[np.float64]:
        """Time of each frame since the first."""
        ticks = np.arange(self.num_frames) if self.ticks is None else np.array(self.ticks)
        return np.asarray((ticks - ticks[0]) * float(self.base), dtype=np.float64)

    @property
    def rate(self) -> float:
        """Frames per second, on average; of a single frame 0."""
        if self.num_frames < 2:
            return 0.0
        ticks = self.num_frames - 1 if self.ticks is None else self.ticks[-1] - self.ticks[0]
        return float((self.num_frames - 1) / (ticks * self.base))

    @property
    def duration(self) -> float:
        """Seconds, with a last frame that is shown as long as the others mostly are."""
        steps = np.diff(self.seconds)
        return float(self.seconds[-1] + np.median(steps)) if len(steps) else 0.0

    @property
    def is_even(self) -> bool:
        """Whether all frames are shown about equally long."""
        return are_even(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Write them as runs of equal steps, `[first, step, number]`."""
        base = [self.base.numerator, self.base.denominator]
        if self.ticks is None:
            return {"base": base, "num_frames": self.num_frames}
        runs, place = [], 0
        for step, equal in groupby(np.diff(self.ticks).tolist()):
            number = len(list(equal))
            runs.append([self.ticks[place], step, number])
            place += number
        return {"base": base, "num_frames": self.num_frames, "runs": runs}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FrameTimes:
        """Read what `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: It is something else, or longer than `MAX_FRAMES`.
        """
        num_frames, base = content["num_frames"], Fraction(*content["base"])
        if type(num_frames) is not int or not 0 < num_frames <= MAX_FRAMES or base <= 0:
            raise ValueError("its number of frames or its time base is impossible")
        runs = content.get("runs")
        if runs is None:
            return cls(num_frames, base, None)
        if sum(number for _, _, number in runs) != num_frames - 1:
            raise ValueError("its times are not as many as its frames")
        ticks = [runs[0][0]] if runs else [0]
        for first, step, number in runs:
            if first != ticks[-1] or not 0 < step < 2**40 or number < 1:
                raise ValueError("its times do not rise")
            ticks.extend(first + step * (place + 1) for place in range(number))
        return cls(num_frames, base, tuple(map(int, ticks)))


@dataclass(frozen=True, kw_only=True)
class ClipSurvey:
    """What decoding a file once has shown.

    Args:
        size: Height and width of its frames as shown: upright, with square pixels.
        times: Of its frames.
        cuts: The frames that begin a new shot, see `io.cuts`.
        notes: What is odd about the file, as sentences without a full stop.
    """

    size: Size
    times: FrameTimes
    cuts: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def shots(self) -> list[tuple[int, int]]:
        """First frame of each shot, and the one after its last."""
        ends = [*self.cuts, self.times.num_frames]
        return list(zip([0, *self.cuts], ends, strict=True))


def survey_clip(place: ClipPlace) -> ClipSurvey:
    """Decode a file once: its real frames, their times, and its cuts.

    Raises:
        DataError: It is missing, empty, no video, damaged, too long, has a single frame, frames
            of several sizes, or neither times nor a frame rate.
    """
    ticks: list[int | None] = []
    thumbnails: list[Picture] = []
    size: tuple[Size, Size] | None = None
    with _counted(ticks), open_clip(place) as opened:
        for frame in opened.frames:
            size = size or (frame.size, frame.shown)
            if frame.size != size[0]:
                raise DataError("The size of its frames changes.", fix="Make videos of one size.")
            ticks.append(frame.ticks)
            height, width = frame.size
            if len(ticks) > min(MAX_FRAMES, MAX_ALL_PIXELS // (height * width)):
                raise DataError("It is too long to be read whole.", fix="Cut it into parts.")
            thumbnails.append(frame.pixels(THUMBNAIL))
    if size is None or len(ticks) < 2:
        count = "no frame" if size is None else "one frame"
        raise DataError(f"It has {count}; motion needs two.", fix="Make a longer video.")
    times, notes = _times_of(ticks, opened)
    if opened.stated_frames not in (0, len(ticks)):
        notes.append(f"its header says {opened.stated_frames} frames, and it has {len(ticks)}")
    if size[0] != size[1]:
        notes.append("its pixels are not square, and are scaled to be")
    cuts = tuple(find_cuts(np.stack(thumbnails)))
    return ClipSurvey(size=size[1], times=times, cuts=cuts, notes=tuple(notes))


@contextmanager
def _counted(ticks: Sequence[int | None]) -> Iterator[None]:
    """Add to an error how many frames came before it."""
    try:
        yield
    except DataError as error:
        if not ticks:
            raise
        raise DataError(
            f"{error.message.removesuffix('.')} (after {len(ticks)} frames).", fix=error.fix
        ) from error


def _times_of(ticks: Sequence[int | None], opened: OpenedClip) -> tuple[FrameTimes, list[str]]:
    """Return the times of frames, and what is odd about them."""
    known = [one for one in ticks if one is not None]
    num, base = len(ticks), opened.time_base
    if len(known) == num and base > 0 and all(a < b for a, b in pairwise(known)):
        times = FrameTimes(num, base, tuple(known))
        note = f"its frame rate varies: {times.rate:.3g} a second on average"
        return times, [] if times.is_even else [note]
    if not opened.stated_rate:
        raise DataError(
            "It has neither a frame rate nor times that rise.", fix="Convert the video again."
        )
    rate = Fraction(opened.stated_rate).limit_denominator(100_000)
    note = f"the times of its frames do not rise: the rate that it states is used, {float(rate):g}"
    return FrameTimes(num, 1 / rate, None), [note]


def frames_at(
    place: ClipPlace, indices: Sequence[int], *, times: FrameTimes, size: Size | None = None
) -> Picture:
    """Decode some frames of a file.

    Args:
        place: The file.
        indices: Which frames, from 0, in any order.
        times: What `survey_clip` found; frames are found again by them.
        size: Height and width: frames are scaled until they cover it, and cut around the middle.

    Returns:
        `[indices, height, width, 3]`, RGB, upright, with square pixels.

    Raises:
        DataError: The file is not the one that was surveyed, cannot be decoded there, or the frames
            would fill more than 4 GiB; or there are no such frames in it.
    """
    wanted = sorted(set(indices))
    if not wanted or wanted[0] < 0 or wanted[-1] >= times.num_frames:
        raise DataError(
            f"Frames {list(indices)[:8]} were asked for, of a video that has {times.num_frames}.",
            fix="Ask for frames that it has.",
        )
    try:
        found = _by_seeking(place, wanted, times, size)
        if found is None:
            found = _in_order(place, wanted, times, size)
    except DataError as error:
        raise DataError(f"{place.path}: {error.message}", fix=error.fix) from error
    return np.stack([found[index] for index in indices])


def _by_seeking(
    place: ClipPlace, wanted: Sequence[int], times: FrameTimes, size: Size | None
) -> dict[int, Picture] | None:
    """Read frames from the one before which everything can be decoded; None if that fails.

    A frame counts only if its time is the wanted one, and if the first that came after the jump
    can be decoded without others: what comes before it may be built on frames that are not there.
    """
    if times.ticks is None or wanted[0] < _NEAR:
        return None
    index_of = {times.ticks[index]: index for index in wanted}
    found: dict[int, Picture] = {}
    try:
        with open_clip(place) as opened:
            if opened.frames_from is None:
                return None
            for number, frame in enumerate(opened.frames_from(times.ticks[wanted[0]])):
                too_late = frame.ticks is None or frame.ticks > times.ticks[wanted[0]]
                if number == 0 and (too_late or not frame.is_key):
                    return None
                index = index_of.get(frame.ticks or 0)
                if index is not None and frame.ticks is not None:
                    found[index] = _fitted(frame, size, num=len(wanted))
                if len(found) == len(wanted) or (frame.ticks or 0) > times.ticks[wanted[-1]]:
                    break
    except DataError:
        return None
    return found if len(found) == len(wanted) else None


def _in_order(
    place: ClipPlace, wanted: Sequence[int], times: FrameTimes, size: Size | None
) -> dict[int, Picture]:
    """Decode from the first frame on."""
    found: dict[int, Picture] = {}
    chosen = set(wanted)
    with open_clip(place) as opened:
        for index, frame in enumerate(opened.frames):
            if times.ticks is not None and frame.ticks != times.ticks[index]:
                break
            if index in chosen:
                found[index] = _fitted(frame, size, num=len(wanted))
            if index == wanted[-1]:
                return found
    raise DataError(
        "It is not the video that was looked at: other frames, or other times.",
        fix="Look at it again (`motionmerge data check`).",
    )


def _fitted(frame: DecodedFrame, size: Size | None, *, num: int) -> Picture:
    """Convert a frame, scaled until it covers `size` and cut around the middle."""
    height, width = size or frame.shown
    if num * height * width * 3 > MAX_VIDEO_BYTES:
        raise DataError(
            f"{num} frames of {width} x {height} pixels fill more than 4 GiB.",
            fix="Ask for fewer or smaller frames.",
        )
    if size is None:
        return frame.pixels(None if frame.shown == frame.size else frame.shown)
    shown_height, shown_width = frame.shown
    scale = max(height / shown_height, width / shown_width)
    wide = (max(height, round(shown_height * scale)), max(width, round(shown_width * scale)))
    top, left = (wide[0] - height) // 2, (wide[1] - width) // 2
    return frame.pixels(wide)[top : top + height, left : left + width]


def hash_clip(place: ClipPlace) -> str:
    """Return the SHA-256 of a video's bytes in hexadecimal digits.

    Raises:
        DataError: There is no such file, or it has no bytes.
        OSError: It cannot be read.
    """
    if place.is_whole_file:
        with place.opened():
            return hash_file(place.path)
    digest = hashlib.sha256()
    with place.opened() as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
