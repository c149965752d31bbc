"""Measure clips in all dimensions whose files are there; every result is kept as one JSON line.

A killed run goes on where it stopped: a line is used again for the same clip (by content),
dimension and configuration (networks, first image, resize rule, target of the camera).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from motionmerge.errors import DataError, ShapeError
from motionmerge.evaluation.row_files import (
    WHOLE,
    Shard,
    append_rows,
    config_hash,
    joined,
    read_row_files,
)
from motionmerge.evaluation.vbench.dimensions import clips_of, decode, measure_of
from motionmerge.evaluation.vbench.frames import Era, antialias_of
from motionmerge.evaluation.vbench.sources import PLUGINS, SOURCES, Networks
from motionmerge.evaluation.vbench.suite import SuiteClip
from motionmerge.evaluation.vbench.total import DIMENSIONS, UNBOUNDED
from motionmerge.io.hashing import hash_file

ROWS = "vbench"
"""Stem of the files of rows."""

RULES = 1
"""Raised when a rule changes, so that older lines no longer count."""

_ROUNDING = 1e-6

_SECONDS = {
    "i2v_subject": 0.45,
    "i2v_background": 1.3,
    "subject_consistency": 0.7,
    "background_consistency": 0.1,
    "aesthetic_quality": 1.9,
    "dynamic_degree": 3.5,
    "imaging_quality": 1.0,
    "motion_smoothness": 2.0,
    "camera_motion": 0.5,
    "temporal_flickering": 0.01,
}
"""Time of a 320 x 512 frame on one CPU core (benchmarks/vbench.py), a guess for plugins."""


@dataclass(frozen=True, kw_only=True)
class DimensionRow:
    """A clip's value in a dimension.

    Attributes:
        clip: SHA-256 of the clip's file.
        metric: `vbench.` and the dimension.
        value: See `DimensionValues`; None if it could not be measured.
        config: Hash of everything else that decides the value.
        video: The clip's file name.
        details: Further results; `fault` is the reason if there is no value.
    """

    clip: str
    metric: str
    value: float | None
    config: str
    video: str
    details: Mapping[str, Any]

    @property
    def dimension(self) -> str:
        """Return the dimension's name."""
        return self.metric.removeprefix("vbench.")

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return what decides the value, with the name: equal files may be several samples."""
        return self.clip, self.metric, self.config, self.video

    @property
    def is_fault(self) -> bool:
        """Whether it says why there is no value."""
        return self.value is None


@dataclass(frozen=True)
class Job:
    """A value to measure."""

    clip: SuiteClip
    dimension: str
    digest: str
    config: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return the key of its row, with the name: equal files may be several samples."""
        return self.digest, f"vbench.{self.dimension}", self.config, self.clip.path.name


def plan(
    clips: Sequence[SuiteClip],
    networks: Networks,
    *,
    era: Era,
    dimensions: Sequence[str] = DIMENSIONS,
    shard: Shard = WHOLE,
) -> list[Job]:
    """List what can be measured, dimension by dimension, in one part of the clips.

    Raises:
        CheckpointError: A weights file cannot be read.
        DataError: A clip or an image cannot be read.
    """
    jobs: list[Job] = []
    hashes: dict[Path, str] = {}
    for dimension in dimensions:
        if networks.missing_for(dimension):
            continue
        common = {
            "rules": RULES,
            "dimension": dimension,
            "networks": networks.hashes(dimension),
            "antialias": antialias_of(dimension, era),
        }
        if networks.device != "cpu":  # its numbers differ in the last digits
            common["device"] = networks.device
        for clip in clips_of(dimension, list(clips)):
            digest = _hash(clip.path, hashes)
            if not shard.holds(digest):
                continue
            own = dict(common)
            if dimension.startswith("i2v_"):
                own["image"] = _hash(clip.image, hashes) if clip.image is not None else None
            if dimension == "camera_motion":
                own["camera"] = clip.camera
            jobs.append(Job(clip, dimension, digest, config_hash(**own)))
    return jobs


def missing_files(
    networks: Networks, dimensions: Sequence[str] = DIMENSIONS
) -> dict[str, dict[str, str]]:
    """Return, for each dimension that is off, the files it lacks: names and descriptions."""
    words = {**SOURCES, **{name: what for name, (_, what) in PLUGINS.items()}}
    return {
        dimension: {name: words[name] for name in lacking}
        for dimension in dimensions
        if (lacking := networks.missing_for(dimension))
    }


def estimate_seconds(jobs: Sequence[Job], *, num_frames: int, height: int, width: int) -> float:
    """Estimate the time that jobs take on one CPU core, from clips of one size."""
    scale = height * width / (320 * 512)
    sized = ("dynamic_degree", "motion_smoothness", "camera_motion", "temporal_flickering")
    return sum(
        _SECONDS[job.dimension] * num_frames * (scale if job.dimension in sized else 1)
        for job in jobs
    )


def run(
    jobs: Sequence[Job],
    networks: Networks,
    *,
    era: Era,
    folder: Path,
    shard: Shard = WHOLE,
    progress: Callable[[str], None] = lambda _: None,
) -> list[DimensionRow]:
    """Run the jobs that have no row yet; one dimension's networks are in memory at a time.

    Args:
        jobs: From `plan`.
        networks: The same as for `plan`.
        era: The same as for `plan`.
        folder: Where `vbench.jsonl` grows, or the file of a part.
        shard: The same as for `plan`.
        progress: Called with a dimension's name after each of its clips.

    Returns:
        The rows of all jobs, in their order. A clip that cannot be measured has a row that says
        why; the next run tries it again.

    Raises:
        CheckpointError: A weights file is another network's.
        DataError: The rows cannot be read or written.
    """
    path = folder / shard.file_name(ROWS)
    known = joined(read_row_files(folder, ROWS, _row))
    waiting: dict[str, list[Job]] = {}
    for job in jobs:
        if job.key not in known or known[job.key].value is None:
            waiting.setdefault(job.dimension, []).append(job)
        else:
            progress(job.dimension)
    for dimension, some in waiting.items():
        measure = measure_of(dimension, networks, era=era)
        for job in some:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as exact as on a CPU
                row = _measured(job, measure)
            if row != known.get(job.key):  # the same fault again
                append_rows(path, [vars(row)])
            known[job.key] = row
            progress(dimension)
    return [known[job.key] for job in jobs]


def _measured(job: Job, measure: Callable[..., Any]) -> DimensionRow:
    digest, metric, config, video = job.key
    row = DimensionRow(
        clip=digest, metric=metric, value=None, config=config, video=video, details={}
    )
    try:
        found = measure(decode(job.clip))
        row = replace(row, value=found.value, details=dict(found.details))
        _check_row(row)
    except (DataError, ShapeError) as error:  # a plugin that fails ends the run
        fault = error.message
    except (MemoryError, torch.OutOfMemoryError):
        fault = "the memory does not suffice"
    except ValueError as error:
        fault = f"what the network gave is no score: {error}"
    else:
        return row
    return replace(row, value=None, details={"fault": fault})


_ROW_OF = {
    "subject_consistency": ("cnt_per_video", "video_sim"),
    "background_consistency": ("cnt_per_video", "video_sim"),
}
"""The numbers among the details from which a score is computed."""


def _row(content: Mapping[str, Any]) -> DimensionRow:
    """Build a row from what a file holds, checking types and ranges.

    Raises:
        ValueError: It cannot be a row of ours; TypeError and KeyError likewise.
    """
    row = DimensionRow(**content)
    _check_row(row)
    return row


def _check_row(row: DimensionRow) -> None:
    """Check the types and ranges of a row.

    Raises:
        ValueError: No score can be like this; KeyError if one of the details is missing.
    """
    if not all(isinstance(part, str) for part in row.key) or not isinstance(row.details, dict):
        raise ValueError("its parts are of other types")
    try:
        json.dumps(row.details, allow_nan=False)
    except ValueError as error:
        raise ValueError("it holds a number that is not finite") from error
    if row.value is None:
        return
    if row.dimension not in DIMENSIONS:
        raise ValueError(f"{row.metric[:60]!r} is no dimension")
    most = 100.0 if row.dimension == "imaging_quality" else 1.0
    numbers = [(row.value, most)]
    numbers += [(row.details[name], math.inf) for name in _ROW_OF.get(row.dimension, ())]
    for number, largest in numbers:
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number):
            raise ValueError(f"{str(number)[:40]!r} is no number")
        if row.dimension != UNBOUNDED and not -_ROUNDING <= number <= largest + _ROUNDING:
            raise ValueError(f"{number} is not between 0 and {largest:g}")
    if row.dimension == "camera_motion" and not isinstance(row.details["prompt_type"], str):
        raise ValueError("its camera move is no text")


def _hash(path: Path, known: dict[Path, str]) -> str:
    if path not in known:
        try:
            known[path] = hash_file(path)
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error}", fix="Check the file.") from error
    return known[path]
