"""Copies of folders whose large weights are hard links, and whose other files are their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from motionmerge.errors import CheckpointError
from motionmerge.io.paths import behind_links

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")


def copy_folder(
    source: Path, target: Path, *, leave_out: Callable[[Path], bool] = lambda _: False
) -> None:
    """Repeat a folder: weights as hard links where the disk can link, all else as copies.

    Who edits a configuration of the result must not edit that of the source. Links of the source,
    as the hub's cache has them, become what they point to.

    Args:
        source: The folder.
        target: A folder, which may exist.
        leave_out: Called with the path of each file, relative to `source`.

    Raises:
        CheckpointError: A file is a broken link, or cannot be copied.
    """
    for relative in _files(source):
        if leave_out(relative):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        if relative.suffix.lower() in _WEIGHTS and _linked(source / relative, target / relative):
            continue
        try:
            shutil.copyfile(source / relative, target / relative)
        except OSError as error:
            raise CheckpointError(
                f"Cannot copy {source / relative} to {target / relative}: {error}",
                fix="Check that the folder is whole, and the free space.",
            ) from error


def _linked(source: Path, target: Path) -> bool:
    """Make a hard link to a file, not to a link to it."""
    try:
        os.link(behind_links(source), target)
    except OSError:  # another disk, or one without links
        return False
    return True


def _files(folder: Path) -> Iterator[Path]:
    """List the files of a folder, relative to it, behind links to folders as well."""
    seen: set[Path] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = behind_links(Path(here))
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(here, name).relative_to(folder) for name in sorted(files))
