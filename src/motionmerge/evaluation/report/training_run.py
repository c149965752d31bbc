"""What a training run logged, checked: its folder may come from someone else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VIDEO = re.compile(r"(videos)/step-\d{6,12}/([A-Za-z0-9_-]{1,80})\.mp4")
_MOST_VIDEOS = 64  # of one validation


@dataclass(frozen=True, kw_only=True)
class ValidationVideo:
    """A video of a clip that is held out.

    Args:
        step: After which it was made.
        name: Of its clip, the same at every step.
        path, photo: Its file, and that of its first frame.
        prompt: What was asked for.
        motion_degree: Pixels a second in a frame 512 wide.
        relative_motion: Its motion degree over that of step 0.
        first_frame_psnr: Of the first frame against the photo, in decibels.
        failure: Why it could not be made or measured.
    """

    step: int
    name: str
    path: Path
    photo: Path
    prompt: str
    motion_degree: float | None
    relative_motion: float | None
    first_frame_psnr: float | None
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class ValidationLine:
    """What was measured after a step.

    Args:
        step: Of the run.
        losses: By band of noise levels, such as `0.25-0.5`.
        relative_motion: Median over the videos; None where none has it.
        warn_below: Share of the base's motion below which is warned.
        videos: The videos.
    """

    step: int
    losses: Mapping[str, float]
    relative_motion: float | None
    warn_below: float | None
    videos: Sequence[ValidationVideo]

    @property
    def has_lost_motion(self) -> bool:
        """Whether videos move less than they should."""
        motion, least = self.relative_motion, self.warn_below
        return motion is not None and least is not None and motion < least

    @property
    def first_frame_psnr(self) -> float | None:
        """Mean over the videos."""
        known = [one.first_frame_psnr for one in self.videos if one.first_frame_psnr is not None]
        return math.fsum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run: its losses, step by step, and its validations.

    Args:
        num_steps: Of the whole run; None where the log does not say.
        losses: Steps and losses that were logged.
        validations: In the order of their steps.
    """

    num_steps: int | None
    losses: Sequence[tuple[int, float]]
    validations: Sequence[ValidationLine]

    @classmethod
    def read(
        cls, folder: Path, log: Iterable[Mapping[str, Any]], validation: Iterable[Mapping[str, Any]]
    ) -> TrainingRun:
        """Check the lines of both logs; what is no number, or no file of the run, is left out.

        Args:
            folder: Of the run; files are looked for inside it alone.
            log, validation: Lines with a `step`.
        """
        lines = list(log)
        losses = [(int(one["step"]), _number(one.get("loss"))) for one in lines]
        steps = lines[-1].get("steps") if lines else None
        return cls(
            num_steps=steps if type(steps) is int else None,
            losses=[(step, loss) for step, loss in losses if loss is not None],
            validations=[_validation(folder, one) for one in validation],
        )


def _validation(folder: Path, line: Mapping[str, Any]) -> ValidationLine:
    held_out, videos = line.get("held_out"), line.get("videos")
    losses = held_out.items() if isinstance(held_out, dict) else ()
    found = videos[:_MOST_VIDEOS] if isinstance(videos, list) else ()
    checked = [_video(folder, int(line["step"]), one) for one in found]
    return ValidationLine(
        step=int(line["step"]),
        losses={str(band)[:20]: loss for band, one in losses if (loss := _number(one)) is not None},
        relative_motion=_number(line.get("relative_motion")),
        warn_below=_number(line.get("warn_below")),
        videos=[one for one in checked if one is not None],
    )


def _video(folder: Path, step: int, content: object) -> ValidationVideo | None:
    """Return a video; None if its file would lie elsewhere than videos of a run do."""
    if not isinstance(content, dict):
        return None
    place = _VIDEO.fullmatch(str(content.get("file")))
    if place is None:
        return None
    failure = content.get("failure")
    return ValidationVideo(
        step=step,
        name=place[2],
        path=folder / place[0],
        photo=folder / place[1] / f"{place[2]}.png",
        prompt=str(content.get("prompt") or "")[:2000],
        motion_degree=_number(content.get("motion_degree")),
        relative_motion=_number(content.get("relative_motion")),
        first_frame_psnr=_number(content.get("first_frame_psnr")),
        failure=None if failure is None else str(failure)[:500],
    )


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e12 else None  # nor is NaN below it
