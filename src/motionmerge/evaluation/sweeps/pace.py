"""How long videos and loading take, kept beside the results for the time of a plan."""

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
    """Seconds of an amount of work and of sets of weights, from what was timed in a folder.

    Args:
        folder: Where the timings are kept.
        kind: What they are of; others are not used.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._path, self._kind = folder / FILE, kind
        self._timed = self._read()

    def add(self, work: float, seconds: float, *, loads: int = 0, loading: float = 0.0) -> None:
        """Keep how long some work took, and beside it the loading of so many sets of weights.

        Raises:
            DataError: The file cannot be written.
        """
        self._timed.append((work, seconds, loads, loading))
        row = {"kind": self._kind, "work": work, "seconds": seconds}
        row |= {"loads": loads, "loading": loading} if loads else {}
        append_rows(self._path, [row])

    def seconds(self, work: float, *, loads: int = 0) -> float | None:
        """Estimate; None where nothing was timed yet."""
        if work <= 0:
            return 0.0
        if not self._timed:
            return None
        all_work, seconds, all_loads, loading = map(sum, zip(*self._timed, strict=True))
        return seconds / all_work * work + loading / max(1, all_loads) * loads

    def _read(self) -> list[tuple[float, float, float, float]]:
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
                loads, loading = float(row.get("loads", 0)), float(row.get("loading", 0))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a line that a kill cut off
            is_likely = 0 < work < 1e18 and 0 < seconds < 1e9
            if row.get("kind") == self._kind and is_likely and 0 <= min(loads, loading) < 1e9:
                found.append((work, seconds, loads, loading))
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
