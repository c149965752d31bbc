"""How long videos take: seconds of work done, kept beside the results for the time of a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from motionmerge.errors import DataError
from motionmerge.evaluation.row_files import append_rows
from motionmerge.io.paths import open_plain_file
from motionmerge.sampling.batch.manifest import VideoJob

FILE = "timings.jsonl"

_MOST_BYTES = 1 << 20


def work_of(jobs: Sequence[VideoJob]) -> float:
    """Return how much videos ask for: steps times pixels, of settings that are filled in."""
    work = 0.0
    for job in jobs:
        own = job.settings
        pixels = (own.height or 1) * (own.width or 1) * (own.num_frames or 1)
        work += (own.num_inference_steps or 1) * pixels
    return work


class Pace:
    """Seconds of an amount of work, from what was timed in a folder.

    Args:
        folder: Where the timings are kept.
        kind: What they are of; others are not used.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._path, self._kind = folder / FILE, kind
        self._work, self._seconds = 0.0, 0.0
        for work, seconds in self._read():
            self._work += work
            self._seconds += seconds

    def add(self, work: float, seconds: float) -> None:
        """Keep how long some work took.

        Raises:
            DataError: The file cannot be written.
        """
        self._work += work
        self._seconds += seconds
        append_rows(self._path, [{"kind": self._kind, "work": work, "seconds": seconds}])

    def seconds(self, work: float) -> float | None:
        """Estimate; None where nothing was timed yet."""
        if work <= 0:
            return 0.0
        return self._seconds / self._work * work if self._work > 0 else None

    def _read(self) -> list[tuple[float, float]]:
        if not self._path.exists():
            return []
        try:
            with open_plain_file(self._path) as file:
                lines = file.read(_MOST_BYTES).decode(errors="replace").splitlines()
        except OSError as error:
            raise DataError(f"Cannot read {self._path}: {error}", fix="Remove it.") from error
        found = []
        for line in lines:
            try:
                row = json.loads(line)
                work, seconds = float(row["work"]), float(row["seconds"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a line that a kill cut off
            if row.get("kind") == self._kind and 0 < work < 1e18 and 0 < seconds < 1e9:
                found.append((work, seconds))
        return found


def duration(seconds: float | None) -> str:
    """Write an estimate in words."""
    if seconds is None:
        return "time unknown until the first video is made"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
