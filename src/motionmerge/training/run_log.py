"""The logs of a training run: a line of JSON for each step that is logged, or validated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from motionmerge.errors import DataError

LOG, VALIDATION_LOG = "log.jsonl", "validation.jsonl"

MOST_BYTES = 1 << 28
"""Of a log; a longer one is no log of ours."""

_MOST_STEPS = 10**12


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log, without a last one that was torn when the run was killed.

    Raises:
        DataError: It is too large, or another line is not JSON or has no step.
    """
    if not path.exists():
        return
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path} is larger than any log.", fix="Look at what it is.")
    lines = path.read_text("utf-8", errors="replace").splitlines()
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            step = line.get("step") if isinstance(line, dict) else None
            if type(step) is not int or not 0 <= step < _MOST_STEPS:
                raise ValueError("it has no step")
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise DataError(
                    f"Line {number} of {path} is no line of a log.", fix="Remove that line."
                ) from error
            return
        yield line
