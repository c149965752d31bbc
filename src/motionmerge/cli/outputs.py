"""Check before any work that outputs can be written, and that they replace nothing unasked."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from motionmerge.errors import ConfigError
from motionmerge.io.atomic import check_file, check_folder

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written, or is there and is not to be replaced.

    Raises:
        ConfigError: Says why.
    """
    check_file(path)
    check_output_folder(path.parent)
    if path.exists() and not overwrite:
        raise ConfigError(
            f"{path} exists already.", fix="Pass `--overwrite`, or choose another name."
        )


def check_output_folder(path: Path) -> None:
    """Refuse a folder that can be neither written to nor made; nothing is made.

    Raises:
        ConfigError: Says why.
    """
    check_folder(path)
    # Rights alone do not tell: root has them all, and some file systems take no files.
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"Cannot write to the folder {path}: {error}",
            fix="Choose another one, or check its rights and free space.",
        ) from error
