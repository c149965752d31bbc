"""Check before any work that outputs can be written, and that they replace nothing unasked."""

from __future__ import annotations

from typing import Annotated

import typer

from motionmerge.io.atomic import check_folder, check_new_file

__all__ = ["OverwriteOption", "check_folder", "check_new_file"]

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
