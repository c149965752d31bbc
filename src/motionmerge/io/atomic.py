"""Writing a file or a folder under a temporary name and renaming it when whole."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from motionmerge.errors import ConfigError, DataError, MotionMergeError
from motionmerge.io.paths import behind_links

_LONGEST_NAME = 200
"""Bytes of a name that leave room for what a temporary name adds to it, of 255."""

_STALE_SECONDS = 24 * 3600
"""Nobody writes any more to what another machine left untouched for so long."""

_PROBE_BYTES = 4096

_TEMPORARY = re.compile(r"\.(.+)\.([0-9a-f]{12})\.(\d+)\.[0-9a-f]{8}\.(?:tmp|old)", re.DOTALL)

_others: dict[tuple[int, int], tuple[float, list[Path]]] = {}
"""For a folder, by device and inode: when it was listed, and the temporary files that are left."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success rename it, on an exception delete it.

    Missing parent folders are created. A killed process leaves
    `.<name>.<machine>.<pid>.<random>.tmp`, never half a file under the real name. The next process
    that writes into the folder removes what dead processes of this machine left there, and what
    other machines left a day ago.
    """
    with scratch_path(path) as temporary:
        yield temporary
        temporary.replace(path)


@contextmanager
def scratch_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, as `atomic_path` does; it is deleted in any case."""
    temporary = _temporary_name(Path(path))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(kind: type[MotionMergeError], path: str | Path) -> Iterator[None]:
    """Raise an error of a kind, which names the file, where the disk refuses to be written to."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"Cannot write {path}: {error}", fix="Check the folder and its free space."
        ) from error


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a small file that appears only when it is whole; what UTF-8 lacks becomes an escape.

    Raises:
        DataError: It cannot be written.
    """
    data = content if isinstance(content, bytes) else content.encode(errors="backslashreplace")
    with disk_errors(DataError, path), atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new empty folder beside `path`; on success it replaces what `path` was.

    As `atomic_path`. Between the two renames that replace a folder, there is none for an instant.
    Where `path` is a link to a folder, the folder behind it is replaced.
    """
    target = Path(path)
    if target.is_symlink():
        target = behind_links(target)
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


@contextmanager
def folder_of_results(path: str | Path) -> Iterator[None]:
    """Remove the folder on an exception, if it was made inside the block and nothing is in it.

    Folders above it likewise.
    """
    target = Path(path).absolute()
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:  # the innermost first
            with suppress(OSError):  # it holds something, or was never made
                status = folder.stat()
                folder.rmdir()
                # The next folder may get its inode, and has to be listed anew.
                _others.pop((status.st_dev, status.st_ino), None)
        raise


def check_new_folder(
    path: str | Path, *, overwrite: bool, marker: str, keep: Iterable[Path] = ()
) -> None:
    """Refuse a folder that is not to be replaced, before `atomic_folder` replaces it.

    Args:
        path: The folder to write.
        overwrite: A folder that an earlier run wrote may be replaced.
        marker: A file by which such a folder is known; others are never removed.
        keep: What is read while the folder is written, and must not be replaced with it.

    Raises:
        ConfigError: It exists and may not be replaced, holds one of `keep`, or cannot be written.
    """
    target = Path(path)
    for one in keep:
        read, written = behind_links(one), behind_links(target)
        if read.is_relative_to(written) or written.is_relative_to(read):
            raise ConfigError(
                f"The result {path} and its source {one} must not lie in each other.",
                fix="Choose another folder.",
            )
    check_folder(target)
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{path} exists already.",
            fix="Choose another folder, or pass `overwrite=True`.",
        )
    if not (target / marker).is_file():
        raise ConfigError(
            f"{path} holds other things than an earlier result: it has no {marker}.",
            fix="Choose another folder, or remove this one yourself.",
        )


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written, or is there and is not to be replaced.

    Raises:
        ConfigError: Its name or its folder cannot be written to, or it exists already.
    """
    check_file(path)
    check_folder(path.parent)
    if path.exists() and not overwrite:
        raise ConfigError(
            f"{path} exists already.",
            fix="Choose another name, or pass `overwrite=True`.",
        )


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
        raise _no_folder(path, error) from error


def check_folder(path: str | Path) -> None:
    """Refuse a folder that cannot be made or written to; nothing is made.

    Raises:
        ConfigError: It or a folder above it is a file, has too long a name, or may not be written.
    """
    target = Path(path).absolute()
    try:
        above = (target, *target.parents)
        there = next(one for one in above if one.exists() or one.is_symlink())
        if not there.exists():  # no folder can be made in its place
            raise _no_folder(path, f"{there} is a link to {there.readlink()}, which is not there")
        if not there.is_dir():
            raise _no_folder(path, f"{there} is no folder")
        # Rights alone do not tell: root has them all, and some file systems take no files.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _no_folder(path, error) from error


def _no_folder(path: str | Path, reason: object) -> ConfigError:
    return ConfigError(
        f"Cannot write to the folder {path}: {reason}",
        fix="Choose another one, or check its rights and free space.",
    )


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
        raise _no_folder(target.parent, "it is none.") from error
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error}", fix="Choose another name.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no file"
        raise ConfigError(f"Cannot write {path}: it is {kind}.", fix="Give the name of a file.")


def _temporary_name(target: Path) -> Path:
    """Make the parent folder, clear it of what dead processes left, name a new file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return target.parent / f".{name}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead processes left in a folder.

    It is listed once a day: among 100,000 files that takes half a second. In between, only those
    are looked at that others were writing then.
    """
    status = folder.stat()
    place = (status.st_dev, status.st_ino)
    listed_at, others = _others.get(place, (-math.inf, []))
    if time.monotonic() - listed_at >= _STALE_SECONDS:
        listed_at = time.monotonic()
        with os.scandir(folder) as entries:
            others = [folder / entry.name for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for path in sorted(others, reverse=True):  # `.tmp` before the `.old` that it was to replace
        if _is_left(path):
            with suppress(OSError):  # another process may be removing it too
                _remove_or_put_back(path)
    _others[place] = listed_at, [path for path in others if os.path.lexists(path)]


@cache
def _machine() -> str:
    """Name what process ids are unique in: this start of this machine, and the container."""
    seen = [platform.node()]
    with suppress(OSError):
        seen.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        seen.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(seen).encode(errors="replace")).hexdigest()[:12]


def _is_left(path: Path) -> bool:
    """Return whether nobody writes to a temporary file or folder any more."""
    _, machine, pid = _TEMPORARY.fullmatch(path.name).groups()  # type: ignore[union-attr]
    if machine == _machine():
        return not _is_running(int(pid))
    try:
        parts = [path, *path.iterdir()] if path.is_dir() else [path]
        touched = max(part.lstat().st_ctime for part in parts)
    except OSError:
        return False
    return time.time() - touched > _STALE_SECONDS


def _remove_or_put_back(path: Path) -> None:
    """Remove a leftover, but put a folder back whose process died before the new one was there."""
    target = path.with_name(_TEMPORARY.fullmatch(path.name)[1])  # type: ignore[index]
    if path.suffix == ".old" and not os.path.lexists(target):
        if not re.fullmatch(r"[0-9a-f]{64}", target.name):  # else its name was too long to keep
            path.rename(target)
        return
    _remove(path)


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":  # where a signal of 0 is no question, but Ctrl-C
        return True
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
