"""SHA-256 of files; those of large files are remembered for as long as the file is not touched.

Hashing costs more than merging. A remembered digest counts only for the same path, size, inode and
modification time, and only if the file was at least two seconds old when it was hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path

from motionmerge.io.atomic import atomic_path
from motionmerge.io.paths import behind_links, open_plain_file

REMEMBERED_BYTES = 64 << 20
"""Smaller files are hashed each time."""

_SETTLED_SECONDS = 2.0
_MAX_ENTRIES = 1000
_lock = threading.Lock()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits.

    Large files' digests are kept in `$XDG_CACHE_HOME/motionmerge/hashes.json` (`~/.cache` by
    default); delete it to hash them anew.

    Raises:
        OSError: The file cannot be read.
    """
    before = path.stat()
    if before.st_size < REMEMBERED_BYTES:
        return _hash(path)
    identity = [before.st_size, before.st_ino, before.st_mtime_ns]
    key = str(behind_links(path))
    known = _remembered().get(key)
    if isinstance(known, list) and known[:-1] == identity and isinstance(known[-1], str):
        return known[-1]
    settled = time.time() - before.st_mtime > _SETTLED_SECONDS
    digest = _hash(path)
    after = path.stat()
    if settled and identity == [after.st_size, after.st_ino, after.st_mtime_ns]:
        _remember(key, [*identity, digest])
    return digest


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open_plain_file(path) as stream:
        buffer = bytearray(1 << 20)
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _cache_file() -> Path:
    """Return where hashes are remembered from one run to the next; the file need not exist."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "motionmerge" / "hashes.json"


def _remembered() -> dict[str, object]:
    try:
        entries = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _remember(key: str, entry: list[object]) -> None:
    """Keep a digest if there is a place for it; a read-only home is no reason to stop."""
    with _lock:
        entries = _remembered()
        entries.pop(key, None)
        entries = {**entries, key: entry}
        kept = dict(list(entries.items())[-_MAX_ENTRIES:])
        try:
            with atomic_path(_cache_file()) as path:
                path.write_text(json.dumps(kept), encoding="utf-8")
        except OSError:
            return
