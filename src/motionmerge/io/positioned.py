"""Read and write at a place of a file, from any thread, and where the system has no call for it.

Linux reads into memory at a place (`preadv`); macOS lacks that, and Windows all such calls.
"""

from __future__ import annotations

import os
import threading
from typing import BinaryIO

_ONE_AT_A_TIME = threading.Lock()
"""Held while a file's own position is moved."""


def _seek_and_read(file: BinaryIO, target: memoryview, position: int) -> int:
    """Read without a call of the system's that takes a place."""
    with _ONE_AT_A_TIME:
        file.seek(position)
        return file.readinto(target) or 0  # type: ignore[attr-defined]


def _seek_and_write(file: BinaryIO, data: memoryview, position: int) -> int:
    """Write without a call of the system's that takes a place."""
    with _ONE_AT_A_TIME:
        file.seek(position)
        return file.write(data)


if hasattr(os, "preadv"):

    def read_at(file: BinaryIO, target: memoryview, position: int) -> int:
        """Fill `target` from a place of an unbuffered file; return how many bytes were there."""
        return os.preadv(file.fileno(), [target], position)
else:
    read_at = _seek_and_read

if hasattr(os, "pwrite"):

    def write_at(file: BinaryIO, data: memoryview, position: int) -> int:
        """Write to a place of an unbuffered file; return how many bytes were taken."""
        return os.pwrite(file.fileno(), data, position)
else:
    write_at = _seek_and_write
