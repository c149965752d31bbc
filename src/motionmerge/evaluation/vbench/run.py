"""Measure clips in all dimensions whose files are there; every result is kept as one JSON line.

A killed run goes on where it stopped: a line is used again for the same clip (by content),
dimension and configuration (networks, first image, resize rule, target of the camera).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import DataError, ShapeError
from motionmerge.evaluation.runs import AGREEMENT, config_hash
from motionmerge.evaluation.vbench.dimensions import clips_of, decode, measure_of
from motionmerge.evaluation.vbench.frames import Era, antialias_of
from motionmerge.evaluation.vbench.sources import PLUGINS, SOURCES, Networks
from motionmerge.evaluation.vbench.suite import SuiteClip
from motionmerge.evaluation.vbench.total import DIMENSIONS
from motionmerge.io.hashing import hash_file
from motionmerge.io.paths import open_plain_file

ROWS_FILE = "vbench.jsonl"
RULES = 1
"""Raised when a rule changes, so that older lines no longer count."""

_ROUNDING = 1e-6

_SECONDS = {
    "i2v_subject": 0.6,
    "i2v_background": 1.8,
    "subject_consistency": 1.0,
    "background_consistency": 0.2,
    "aesthetic_quality": 2.8,
    "dynamic_degree": 4.8,
    "imaging_quality": 1.0,
    "motion_smoothness": 2.0,
    "camera_motion": 0.5,
    "temporal_flickering": 0.01,
}
"""Rough time of a 320 x 512 frame on one CPU core, a guess for plugins."""


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

    def line(self) -> str:
        """Return the row as one line of JSON."""
        return json.dumps(vars(self), ensure_ascii=False, allow_nan=False) + "\n"


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
) -> list[Job]:
    """List what can be measured, dimension by dimension.

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
        for clip in clips_of(dimension, list(clips)):
            own = dict(common)
            if dimension.startswith("i2v_"):
                own["image"] = _hash(clip.image, hashes) if clip.image is not None else None
            if dimension == "camera_motion":
                own["camera"] = clip.camera
            jobs.append(Job(clip, dimension, _hash(clip.path, hashes), config_hash(**own)))
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
    progress: Callable[[str], None] = lambda _: None,
) -> list[DimensionRow]:
    """Run the jobs that have no row yet; one dimension's networks are in memory at a time.

    Args:
        jobs: From `plan`.
        networks: The same as for `plan`.
        era: The same as for `plan`.
        folder: Where `vbench.jsonl` grows.
        progress: Called with a dimension's name after each of its clips.

    Returns:
        The rows of all jobs, in their order. A clip that cannot be measured has a row that says
        why; the next run tries it again.

    Raises:
        CheckpointError: A weights file is another network's.
        DataError: The rows cannot be read or written.
    """
    path = folder / ROWS_FILE
    known = _joined(read_rows(path), path)
    waiting: dict[str, list[Job]] = {}
    for job in jobs:
        if job.key not in known or known[job.key].value is None:
            waiting.setdefault(job.dimension, []).append(job)
        else:
            progress(job.dimension)
    for dimension, some in waiting.items():
        measure = measure_of(dimension, networks, era=era)
        for job in some:
            row = _measured(job, measure)
            if row != known.get(job.key):  # the same fault again
                _append(path, row)
            known[job.key] = row
            progress(dimension)
    return [known[job.key] for job in jobs]


def _measured(job: Job, measure: Callable[..., Any]) -> DimensionRow:
    digest, metric, config, video = job.key
    value, details = None, {}
    try:
        found = measure(decode(job.clip))
    except (DataError, ShapeError) as error:  # a plugin that fails ends the run
        details = {"fault": error.message}
    else:
        if math.isfinite(found.value):
            value, details = found.value, dict(found.details)
        else:
            details = {"fault": f"the network gave {found.value}"}
    return DimensionRow(
        clip=digest, metric=metric, value=value, config=config, video=video, details=details
    )


def read_rows(path: Path) -> Iterator[DimensionRow]:
    """Yield the rows of a file, skipping a last line that was cut off.

    Raises:
        DataError: The file cannot be read, or another line is no row.
    """
    if not path.exists():
        return
    try:
        with open_plain_file(path) as file:
            lines = file.read().decode(errors="replace").split("\n")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error}", fix="Check the file.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _row(json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):
                return  # a kill cut it off
            raise DataError(
                f"{path}, line {number} is no result: {error}", fix="Remove the line."
            ) from error


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
    if not all(isinstance(part, str) for part in _key(row)) or not isinstance(row.details, dict):
        raise ValueError("its parts are of other types")
    if row.value is None:
        return row
    most = 100.0 if row.dimension == "imaging_quality" else 1.0
    numbers = [(row.value, most)]
    numbers += [(row.details[name], math.inf) for name in _ROW_OF.get(row.dimension, ())]
    for number, largest in numbers:
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number):
            raise ValueError(f"{str(number)[:40]!r} is no number")
        is_free = row.dimension == "aesthetic_quality"  # of a linear layer
        if not is_free and not -_ROUNDING <= number <= largest + _ROUNDING:
            raise ValueError(f"{number} is not between 0 and {largest:g}")
    if row.dimension == "camera_motion" and not isinstance(row.details["prompt_type"], str):
        raise ValueError("its camera move is no text")
    return row


def _joined(
    rows: Iterable[DimensionRow], path: Path
) -> dict[tuple[str, str, str, str], DimensionRow]:
    """Join rows by their keys: a value wins over a fault, and two values must agree.

    Raises:
        DataError: They do not.
    """
    known: dict[tuple[str, str, str, str], DimensionRow] = {}
    for row in rows:
        other = known.get(_key(row))
        if other is None or other.value is None:
            known[_key(row)] = row
        elif row.value is not None and abs(row.value - other.value) > AGREEMENT:
            raise DataError(
                f"{path} gives {row.dimension} of {row.video} as {other.value} and {row.value}.",
                fix="Remove the lines of one machine.",
            )
    return known


def _key(row: DimensionRow) -> tuple[str, str, str, str]:
    return row.clip, row.metric, row.config, row.video


def _append(path: Path, row: DimensionRow) -> None:
    """Append a row and sync it to disk; first remove a line that a kill cut off."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    whole = path.read_bytes()
                    file.truncate(whole.rfind(b"\n") + 1)
            file.write(row.line().encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(
            f"Cannot write {path}: {error}", fix="Check the folder and its free space."
        ) from error


def _hash(path: Path, known: dict[Path, str]) -> str:
    if path not in known:
        try:
            known[path] = hash_file(path)
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error}", fix="Check the file.") from error
    return known[path]
