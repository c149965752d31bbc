"""Paths as people write them, and what no file system can hold."""

from __future__ import annotations

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
    """Tell whether something is there; under a name that is too long nothing is."""
    try:
        return path.exists()
    except OSError:
        return False


def path_of_weights(name: str | Path, *, folder: Path | None = None) -> Path:
    """Find the absolute path of weights, relative to a folder or the current one.

    Raises:
        CheckpointError: Nothing can have such a name.
    """
    path = (folder or Path.cwd()) / path_of(name)
    try:
        path.exists()
    except OSError as error:
        raise CheckpointError(
            f"There are no weights at {str(name)[:60]}..: {error.strerror}.",
            fix="check the path.",
        ) from error
    return path.resolve()
