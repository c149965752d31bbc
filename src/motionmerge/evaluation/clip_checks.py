"""Look at clips that are to be trained on: what is in each file, and how much each shot moves.

Motion is `motion_degree` of `measure`, by the same flow, over the middle `MEASURED_SAMPLES` samples
of a shot: one second. What was found is kept by the SHA-256 of the clip's bytes, so that a run
that was killed goes on; of a clip that cannot be read nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from motionmerge.errors import DataError, MotionMergeError
from motionmerge.evaluation.clips import Clip, measured_size
from motionmerge.evaluation.motion import measure_motion
from motionmerge.evaluation.row_files import WHOLE, Shard, append_rows, config_hash, read_row_files
from motionmerge.evaluation.runs import UNFORESEEN, reason_of
from motionmerge.evaluation.vbench.rules import sampling_interval
from motionmerge.io import cuts
from motionmerge.io.clips import ClipSurvey, FrameTimes, frames_at, hash_clip, survey_clip
from motionmerge.io.decoding import ClipPlace

FORMAT = 1
"""Raise it when what is kept changes its meaning: kept rows are then not used."""

ROWS = "checks"
"""Stem of the files of rows."""

MEASURED_SAMPLES = 9

_CONTENT = ("num_bytes", "size", "times", "cuts", "notes", "motions")


@dataclass(frozen=True, kw_only=True)
class CheckedClip:
    """A clip and what was found.

    Args:
        name: Of the clip.
        place: Where its bytes are.
        clip: Their SHA-256; None if they cannot be read.
        num_bytes: How many they are.
        survey: What is in it; None where `failure` says why nothing is known.
        motions: Of each shot of the survey, in pixels a second of a frame 512 wide; None where it
            is not known, or the shot is too short.
        failure: Why it cannot be used.
    """

    name: str
    place: ClipPlace
    clip: str | None = None
    num_bytes: int = 0
    survey: ClipSurvey | None = None
    motions: tuple[float | None, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class CheckRow:
    """A line of a file of rows: the findings on a clip as JSON, and what decided them."""

    clip: str
    config: str
    found: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> CheckRow:
        """Build a row from what a file holds.

        Raises:
            ValueError, TypeError, KeyError: No run can have written it.
        """
        row = cls(**content)
        if not isinstance(row.clip, str) or not isinstance(row.config, str):
            raise ValueError("its parts are of other types")
        _findings(row.found)
        return row


@dataclass
class KeptChecks:
    """Findings that are kept, and the file that new ones go to.

    Args:
        path: Rows are appended here; None keeps nothing.
        found: By clip and configuration.
    """

    path: Path | None = None
    found: dict[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def in_folder(cls, folder: Path, shard: Shard = WHOLE) -> KeptChecks:
        """Read the rows of all parts in a folder; new ones go to this part's file.

        Raises:
            DataError: A file cannot be read, or a line is no row.
        """
        rows = read_row_files(folder, ROWS, CheckRow.of)
        found = {(row.clip, row.config): row.found for row in rows}
        return cls(folder / shard.file_name(ROWS), found)

    def add(self, row: CheckRow) -> None:
        """Keep a row.

        Raises:
            DataError: The file cannot be written.
        """
        self.found[row.clip, row.config] = row.found
        if self.path is not None:
            append_rows(self.path, [asdict(row)])


def check_clips(
    clips: Iterable[tuple[str, ClipPlace]],
    *,
    num_frames: int,
    kept: KeptChecks | None = None,
    shard: Shard = WHOLE,
    progress: Callable[[str], None] | None = None,
) -> list[CheckedClip]:
    """Look at the clips of one shard, except those whose findings are kept.

    Args:
        clips: Names and places.
        num_frames: Of shots with fewer the motion is not measured.
        kept: Where rows are found and kept; by default nothing is.
        shard: Which part of the clips.
        progress: Called with the name after each, also after those of other shards.

    Raises:
        DataError: Rows cannot be written. A clip that cannot be used is no error: its `failure`
            says why.
    """
    kept = kept or KeptChecks()
    checked = []
    for name, place in clips:
        one = _checked(name, place, num_frames=num_frames, kept=kept, shard=shard)
        if one is not None:
            checked.append(one)
        if progress is not None:
            progress(name)
    return checked


def _checked(
    name: str, place: ClipPlace, *, num_frames: int, kept: KeptChecks, shard: Shard
) -> CheckedClip | None:
    try:
        clip = hash_clip(place)
    except (OSError, DataError) as error:
        if shard.number != 1:  # without bytes it belongs to the first
            return None
        return CheckedClip(name=name, place=place, failure=reason_of(error))
    if not shard.holds(clip):
        return None
    config = checks_config(num_frames)
    found = kept.found.get((clip, config))
    if found is None:
        try:
            found = _look_at(place, num_frames)
        except (MotionMergeError, *UNFORESEEN) as error:
            return CheckedClip(name=name, place=place, clip=clip, failure=reason_of(error))
        kept.add(CheckRow(clip, config, found))
    num_bytes, survey, motions = _findings(found)
    return CheckedClip(
        name=name, place=place, clip=clip, num_bytes=num_bytes, survey=survey, motions=motions
    )


def checks_config(num_frames: int) -> str:
    """Hash what decides the findings on a clip."""
    return config_hash(
        format=FORMAT,
        opencv=cv2.__version__.split(".")[:2],
        cuts=[cuts.THUMBNAIL, cuts.MIN_CHANGE, cuts.MIN_RATIO, cuts.REACH],
        samples=MEASURED_SAMPLES,
        num_frames=num_frames,
    )


def _look_at(place: ClipPlace, num_frames: int) -> dict[str, Any]:
    """Decode a clip, and measure each of its shots that is long enough."""
    survey = survey_clip(place)
    motions = [
        _motion_of(place, survey, first, end) if end - first >= max(2, num_frames) else None
        for first, end in survey.shots
    ]
    num_bytes = place.num_bytes or place.path.stat().st_size
    values = (
        num_bytes,
        survey.size,
        survey.times.to_json(),
        survey.cuts,
        survey.notes,
        motions,
    )
    return dict(zip(_CONTENT, values, strict=True))


def _motion_of(place: ClipPlace, survey: ClipSurvey, first: int, end: int) -> float | None:
    """Measure the middle of a shot."""
    indices = _sampled(first, end, sampling_interval(survey.times.rate))
    samples = frames_at(place, indices, times=survey.times, size=measured_size(*survey.size))
    seconds = survey.times.seconds[indices]
    clip = Clip(
        samples=samples,
        times=seconds - seconds[0],
        first=np.broadcast_to(np.uint8(0), (*survey.size, 3)),  # of which the size alone counts
        num_frames=end - first,
        frame_rate=survey.times.rate,
        flicker=None,
    )
    motion = measure_motion(clip)["motion_degree"]
    return float(motion) if isinstance(motion, float) and math.isfinite(motion) else None


def _sampled(first: int, end: int, interval: int) -> list[int]:
    """Return which frames are measured: every so many, in the middle, and two at least."""
    indices = list(range(first, end, interval))
    if len(indices) < 2:
        return [first, end - 1]
    skipped = max(0, len(indices) - MEASURED_SAMPLES) // 2
    return indices[skipped : skipped + MEASURED_SAMPLES]


def _findings(
    found: Mapping[str, Any],
) -> tuple[int, ClipSurvey, tuple[float | None, ...]]:
    """Read what `_look_at` found, checking types.

    Raises:
        ValueError, TypeError, KeyError: It is something else.
    """
    num_bytes, (height, width), times, where, notes, motions = (found[one] for one in _CONTENT)
    survey = ClipSurvey(
        size=(int(height), int(width)),
        times=FrameTimes.from_json(times),
        cuts=tuple(map(int, where)),
        notes=tuple(map(str, notes)),
    )
    ends = [0, *survey.cuts, survey.times.num_frames]
    if sorted(set(ends)) != ends or len(motions) != len(survey.shots) or int(num_bytes) < 1:
        raise ValueError("its cuts do not rise, or its shots have no motion each")
    return int(num_bytes), survey, tuple(_number(one) for one in motions)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"a motion cannot be {str(value)[:40]}")
    return float(value)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the 5, 25, 50, 75 and 95 % quantiles by name; nothing of nothing."""
    if not values:
        return {}
    shares = (5, 25, 50, 75, 95)
    found = np.percentile(np.asarray(values), shares)
    return {f"{share} %": float(value) for share, value in zip(shares, found, strict=True)}
