"""Paths as people write them, and what no file system can hold."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from motionmerge.errors import CheckpointError


def path_of(name: str | Path) -> Path:
    """Read `~` as the home folder; `~name` is a plain name where there is no such user."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def exists(path: Path) -> bool:
    """Check whether something is there; under a name that is too long nothing is."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_plain_file(path: Path) -> bool:
    """Check whether a file is there that can be read to its end; of names from strangers."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def is_folder(path: Path) -> bool:
    """Check whether a folder is there; of names that nothing can have there is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_link(path: Path) -> bool:
    """Check whether a link is there, also one that leads nowhere."""
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def open_plain_file(path: Path) -> BufferedReader:
    """Open a file for reading, unless it is a pipe or a device, at which reading may never end.

    Raises:
        OSError: It cannot be opened, or is no plain file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "It is no plain file", str(path))
    return os.fdopen(descriptor, "rb")


def path_of_weights(name: str | Path, *, folder: Path | None = None) -> Path:
    """Find the absolute path of weights, relative to a folder or the current one.

    A link stays one, because its own name says what kind of file it is.

    Raises:
        CheckpointError: Nothing can have such a name.
    """
    path = (folder or Path.cwd()) / path_of(name)
    try:
        path.exists()
    except OSError as error:
        raise CheckpointError(
            f"There are no weights at {str(name)[:60]}..: {error.strerror}.",
            fix="Check the path.",
        ) from error
    return folder_of(path) / path.name


def folder_of(path: str | Path) -> Path:
    """Return the absolute folder that a file was named in, also where the file is only a link.

    The hub's cache consists of links: `model.safetensors` lies beside its `adapter_config.json`,
    and what it points to beside nothing, under a name without an ending.
    """
    return behind_links(Path(path).absolute().parent)


def behind_links(path: Path) -> Path:
    """Return the absolute path behind all links; of a ring of links, a name in it.

    `Path.resolve` fails at rings, with an error that is not even one of the file system's.
    """
    return Path(os.path.realpath(path))
