"""Which frames of a shot a model is shown: views, fixed by (seed, shot, number of the view).

A view is a span of frames at a stride, or at a rate, scaled to one of several sizes. Nothing about
it depends on when it is asked for, so that what was computed from it can be kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from motionmerge.config import FrozenModel
from motionmerge.errors import ConfigError, DataError
from motionmerge.io.clips import frames_at
from motionmerge.io.decoding import MAX_FRAMES, Picture, Size
from motionmerge.rng import whole_number_for
from motionmerge.training.clips_folder import LeftOut
from motionmerge.training.clips_manifest import ClipShot, TrainingClip

_MOST_PIXELS = 8192  # a side of a clip
_RATE_TOLERANCE = 1.01  # a file of 23.976 frames a second has 24


class ViewSettings(FrozenModel):
    """How views are taken.

    Attributes:
        sizes: Heights and widths; a clip gets the one that is nearest to its shape.
        num_frames: Of a view.
        frame_stride: Least and most frames from one to the next, drawn uniformly from those for
            which the shot is long enough.
        frame_rate: Frames per second, by the times of the frames; instead of strides.
        seed: Of all draws.
    """

    sizes: tuple[Size, ...] = Field(min_length=1)
    num_frames: int = Field(16, ge=1, le=MAX_FRAMES)
    frame_stride: tuple[int, int] | None = None
    frame_rate: float | None = Field(None, gt=0, le=1000)
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> ViewSettings:
        if (self.frame_stride is None) == (self.frame_rate is None):
            raise ConfigError(
                "Views need either `frame_stride` or `frame_rate`.",
                fix="Set one of them, such as `frame_stride: [1, 6]`.",
            )
        if self.frame_stride is not None:
            least, most = self.frame_stride
            if not 1 <= least <= most <= MAX_FRAMES:
                raise ConfigError(
                    f"`frame_stride` is {[least, most]}.",
                    fix=f"Write [least, most], from 1 to {MAX_FRAMES:,}.",
                )
        if any(not 1 <= side <= _MOST_PIXELS for size in self.sizes for side in size):
            raise ConfigError(
                f"`sizes` are {list(self.sizes)}.",
                fix=f"Write [height, width] in pixels, each from 1 to {_MOST_PIXELS}.",
            )
        return self


@dataclass(frozen=True)
class TrainingShot:
    """A shot and the clip that it is of."""

    clip: TrainingClip
    shot: ClipShot

    @property
    def key(self) -> tuple[str, str]:
        """Names it by its bytes: the clip's SHA-256 and the first frame."""
        return self.clip.clip, str(self.shot.first)

    @cached_property
    def seconds(self) -> npt.NDArray[np.float64]:
        """Times of its frames."""
        return self.clip.times.seconds[self.shot.first : self.shot.end]


@dataclass(frozen=True, kw_only=True)
class ClipView:
    """A view.

    Args:
        shot: What it shows.
        number: Of the view among those of its shot.
        indices: Which frames of the file, rising.
        size: Height and width.
        frame_rate: Frames per second of the view, by the times of its frames.
        frame_stride: Frames of the file from one to the next; None where a rate was asked for.
    """

    shot: TrainingShot
    number: int
    indices: tuple[int, ...]
    size: Size
    frame_rate: float
    frame_stride: int | None

    def read(self) -> Picture:
        """Decode its frames, `[frames, height, width, 3]`.

        Raises:
            DataError: The file cannot be read, or is another by now.
        """
        clip = self.shot.clip
        return frames_at(clip.place, self.indices, times=clip.times, size=self.size)


def nearest_size(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the size whose shape is nearest.

    Of several of the same shape it is the largest that needs no enlarging, else the smallest.
    """
    height, width = size

    def badness(one: Size) -> tuple[float, bool, int]:
        apart = abs(math.log(one[1] / one[0] * height / width))
        enlarged = one[0] > height or one[1] > width
        area = one[0] * one[1]
        return round(apart, 9), enlarged, area if enlarged else -area

    return min(sizes, key=badness)


def sizes_around(size: Size, *, multiple: int, ratios: Iterable[float]) -> tuple[Size, ...]:
    """Return sizes of about the same area: buckets for clips of other shapes.

    Args:
        size: Height and width whose area counts; it comes first.
        multiple: What both sides are rounded to.
        ratios: Widths over heights.
    """
    area = size[0] * size[1]
    found = {size: None}
    for ratio in ratios:
        sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
        height, width = (max(multiple, multiple * round(side / multiple)) for side in sides)
        found[height, width] = None
    return tuple(found)


def usable_shots(
    clips: Iterable[TrainingClip], settings: ViewSettings
) -> tuple[list[TrainingShot], list[LeftOut]]:
    """List the shots of which a view can be taken, and why others cannot.

    Raises:
        DataError: There is none.
    """
    shots, left_out = [], []
    for clip in clips:
        for part in clip.shots:
            shot = TrainingShot(clip, part)
            reason = _why_not(shot, settings)
            if reason is None:
                shots.append(shot)
            else:
                where = f"{clip.name}, frames {part.first} to {part.end - 1}"
                left_out.append(LeftOut(where, reason))
    if not shots:
        raise DataError(
            f"Of {len(left_out)} shots none is long enough: {left_out[0].reason}"
            if left_out
            else "There is no clip.",
            fix="Ask for fewer frames, smaller strides or a lower rate, or add longer clips.",
        )
    return shots, left_out


def _why_not(shot: TrainingShot, settings: ViewSettings) -> str | None:
    if settings.frame_rate is None:
        if _strides(shot, settings):
            return None
        return f"It has {shot.shot.num_frames} frames, too few for {settings.num_frames}."
    if len(_starts(shot, settings)):
        return None
    if shot.clip.times.rate * _RATE_TOLERANCE < settings.frame_rate:
        return f"It has {shot.clip.times.rate:.3g} frames a second, fewer than were asked for."
    return (
        f"It is shorter than {settings.num_frames} frames at {settings.frame_rate:g} a second, or "
        "has gaps."
    )


def view_of(shot: TrainingShot, number: int, settings: ViewSettings) -> ClipView:
    """Take a view of a shot, the same at every call.

    Raises:
        DataError: The shot is too short, see `usable_shots`.
    """
    reason = _why_not(shot, settings)
    if reason is not None:
        raise DataError(f"{shot.clip.name}: {reason}", fix="Choose among `usable_shots`.")
    drawn = whole_number_for(settings.seed, "view", *shot.key, str(number))
    rng = np.random.default_rng(drawn)
    stride: int | None = None
    if settings.frame_rate is None:
        stride = int(rng.choice(_strides(shot, settings)))
        span = (settings.num_frames - 1) * stride
        start = int(rng.integers(shot.shot.num_frames - span))
        local = np.arange(settings.num_frames) * stride + start
    else:
        local = rng.choice(_starts(shot, settings))
    seconds = float(shot.seconds[local[-1]] - shot.seconds[local[0]])
    return ClipView(
        shot=shot,
        number=number,
        indices=tuple(int(index) + shot.shot.first for index in local),
        size=nearest_size(shot.clip.size, settings.sizes),
        frame_rate=(len(local) - 1) / seconds if seconds else shot.clip.times.rate,
        frame_stride=stride,
    )


def whole_frame_rate(view: ClipView) -> float:
    """Return a view's frames per second, rounded down, as DynamiCrafter is told them."""
    return float(math.floor(view.frame_rate + 1e-3))  # the times of a clip make 4.9999 of 5


def own_frame_stride(view: ClipView) -> float:
    """Return a view's stride in frames of its file, as DynamiCrafter-256 is told it."""
    assert view.frame_stride is not None  # refused by `check_model`
    return float(view.frame_stride)


def _strides(shot: TrainingShot, settings: ViewSettings) -> list[int]:
    """List the strides for which a shot is long enough."""
    least, most = settings.frame_stride or (1, 1)
    steps = settings.num_frames - 1
    return [one for one in range(least, most + 1) if steps * one < shot.shot.num_frames]


def _starts(shot: TrainingShot, settings: ViewSettings) -> npt.NDArray[np.int64]:
    """Return the frames of every view at the asked rate, `[views, num_frames]`.

    Each is the frame nearest to its time. Views that would show one frame twice are left out: the
    picture would stand still where the file has a gap.
    """
    seconds = shot.seconds
    offsets = np.arange(settings.num_frames) / (settings.frame_rate or 1.0)
    half = 0.5 / shot.clip.times.rate
    firsts = seconds[seconds + offsets[-1] <= seconds[-1] + half]
    middles = (seconds[1:] + seconds[:-1]) / 2
    found = np.searchsorted(middles, firsts[:, None] + offsets[None])
    rises = (np.diff(found, axis=1) > 0).all(axis=1)
    return found[rises]
