"""Small JSON files of strangers: bounded in size and depth, and named when they are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError
from motionmerge.io.paths import open_plain_file

_MAX_BYTES = 64 << 20
"""An index of shards has a line for each tensor; no configuration comes near it."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: It cannot be read, is too long or too deep, or holds something else.
    """
    try:
        value = load_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {str(error)[:300]}", fix="Download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds no mapping but a {type(value).__name__}.", fix="Download it again."
        )
    return value


def load_json(path: Path, *, most_bytes: int = _MAX_BYTES) -> Any:
    """Load a JSON file of any kind, for callers that name its faults in their own words.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too long, or no JSON.
        RecursionError: It is too deep.
    """
    with open_plain_file(path) as file:
        text = file.read(most_bytes + 1)
    if len(text) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    return json.loads(text)
