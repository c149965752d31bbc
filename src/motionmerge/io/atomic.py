"""Writing a file or a folder under a temporary name and renaming it when whole."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from motionmerge.errors import ConfigError

_LONGEST_NAME = 200
"""Bytes of a name that leave room for what a temporary name adds to it, of 255."""

_STALE_SECONDS = 24 * 3600
"""Nobody writes any more to what another machine left untouched for so long."""

_PROBE_BYTES = 4096


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success rename it, on an exception delete it.

    Missing parent folders are created. A killed process leaves
    `.<name>.<machine>.<pid>.<random>.tmp`, never half a file under the real name. The next write to
    `path` removes what is left of this machine's dead processes, and of others after a day.
    """
    target = Path(path)
    temporary = _temporary_name(target)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new empty folder beside `path`; on success it replaces what `path` was.

    As `atomic_path`. Between the two renames that replace a folder, there is none for an instant.
    """
    target = Path(path)
    temporary = _temporary_name(target)
    replaced = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.replace(replaced)
        temporary.replace(target)
    finally:
        _remove(temporary)
        _remove(replaced)


def prepare_folder(path: str | Path) -> None:
    """Make a folder that is to be written to later, and see that it can be.

    Raises:
        ConfigError: It is a file, cannot be made, or its disk is full or read-only.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, prefix=".", suffix=".tmp") as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise ConfigError(
            f"Cannot write to the folder {path}: {error}",
            fix="choose another one, or check its rights and free space.",
        ) from error


def check_file(path: str | Path) -> None:
    """Refuse a name that no file can have; `prepare_folder` sees whether one can be written.

    Raises:
        ConfigError: It is too long or below a file, or there is something else than a file.
    """
    target = Path(path)
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except NotADirectoryError as error:
        raise ConfigError(
            f"Cannot write to the folder {target.parent}: it is none.", fix="choose another one."
        ) from error
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error}", fix="choose another name.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no file"
        raise ConfigError(f"Cannot write {path}: it is {kind}.", fix="give the name of a file.")


def _temporary_name(target: Path) -> Path:
    """Make the parent folder, clear it of what dead processes left of `target`, name a new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    pattern = re.compile(rf"\.{re.escape(name)}\.([0-9a-f]+)\.(\d+)\.[0-9a-f]+\.(tmp|old)")
    for path in target.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and _is_left(path, machine=found[1], pid=int(found[2])):
            with suppress(OSError):  # another process may be removing it too
                _remove(path)
    return target.parent / f".{name}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


@cache
def _machine() -> str:
    """Name what process ids are unique in: this start of this machine, and the container."""
    seen = [platform.node()]
    with suppress(OSError):
        seen.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        seen.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(seen).encode(errors="replace")).hexdigest()[:12]


def _is_left(path: Path, *, machine: str, pid: int) -> bool:
    """Tell whether nobody writes to a temporary file or folder any more."""
    if machine == _machine():
        return not _is_running(pid)
    try:
        parts = [path, *path.iterdir()] if path.is_dir() else [path]
        touched = max(part.lstat().st_ctime for part in parts)
    except OSError:
        return False
    return time.time() - touched > _STALE_SECONDS


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
