"""Small JSON files of strangers: bounded in size and depth, and named when they are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError

MAX_BYTES = 64 << 20
"""An index of shards has a line for each tensor; no configuration comes near it."""


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: It cannot be read, is too long or too deep, or holds something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
        if len(text) > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {str(error)[:300]}", fix="Download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds no mapping but a {type(value).__name__}.", fix="Download it again."
        )
    return value
