"""Find hard cuts between the frames of a video, from thumbnails of all of them.

A step from one frame to the next is a cut if the thumbnails differ by more than `MIN_CHANGE` levels
of 255 on average, and by more than `MIN_RATIO` times the second largest of the `REACH` steps before
it and of those after it. So a fast move is none, whose steps are all large, and neither is a flash,
which changes back. Fades and dissolves are not found.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

THUMBNAIL = (18, 32)
"""Height and width in pixels."""

MIN_CHANGE = 12.0
MIN_RATIO = 2.5
REACH = 6

_FLASH = 0.5  # of a step: a frame later the pictures are alike again


def find_cuts(thumbnails: npt.NDArray[np.uint8]) -> list[int]:
    """List the frames that begin a new shot; the first frame is not among them.

    Args:
        thumbnails: Every frame, `[frames, height, width, 3]`.
    """
    if len(thumbnails) < 2:
        return []
    steps = _distances(thumbnails, 1)
    return [
        place + 1
        for place, step in enumerate(steps)
        if step > MIN_CHANGE and _stands_out(steps, place) and not _flashes(thumbnails, place)
    ]


def _distances(thumbnails: npt.NDArray[np.uint8], apart: int) -> npt.NDArray[np.float64]:
    """Return the mean difference of frames that are so far apart, in levels of 255."""
    # In pieces: all frames of a long video as whole numbers of 16 bits would fill memory.
    piece = 512
    found = []
    for start in range(0, len(thumbnails) - apart, piece):
        block = thumbnails[start : start + piece + apart].astype(np.int16)
        found.append(np.abs(block[apart:] - block[:-apart]).mean(axis=(1, 2, 3)))
    return np.concatenate(found) if found else np.zeros(0)


def _stands_out(steps: npt.NDArray[np.float64], place: int) -> bool:
    """Check whether a step is much larger than those around it.

    The largest on each side is left out, which may be another cut. The next counts, not the mean:
    where every picture is there two or three times, most steps are 0.
    """
    sides = (steps[max(0, place - REACH) : place], steps[place + 1 : place + 1 + REACH])
    around = max((float(np.sort(side)[-2:][0]) for side in sides if len(side)), default=0.0)
    return bool(steps[place] > MIN_RATIO * around)


def _flashes(thumbnails: npt.NDArray[np.uint8], place: int) -> bool:
    """Check whether the frame before a step looks like one soon after it, or the other way."""
    before = thumbnails[max(0, place - 1) : place + 1].astype(np.int16)
    after = thumbnails[place + 1 : place + 3].astype(np.int16)
    step = float(np.abs(after[0] - before[-1]).mean())
    around = [*(np.abs(before[-1] - one).mean() for one in after[1:])]
    around += [np.abs(after[0] - one).mean() for one in before[:-1]]
    return any(float(one) < _FLASH * step for one in around)
