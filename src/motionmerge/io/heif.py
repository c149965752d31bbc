"""HEIC photos, which phones take: read by pillow-heif where that is installed.

Nothing is registered with Pillow, so other code in the process opens what it opened before.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from PIL import Image

from motionmerge.errors import DataError

_BRANDS = ("heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs", "mif1", "msf1")
"""Kinds of HEIF files, at the beginning of the file; AVIF has others, or is tried before."""


def is_heif(path: str | Path) -> bool:
    """Check whether a file begins as a HEIF container does, whatever it is called."""
    with Path(path).open("rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:] in {brand.encode() for brand in _BRANDS}


def open_heif(path: str | Path) -> Image.Image:
    """Open the main image of a HEIF file, upright; its pixels are not decoded yet.

    Raises:
        DataError: pillow-heif is not installed.
        SyntaxError: The file is damaged; Pillow's own formats raise the same.
    """
    try:
        plugin: Any = importlib.import_module("pillow_heif")
    except ImportError as error:
        raise DataError(
            f"{path} is a HEIC photo; reading it needs pillow-heif, which is not installed.",
            fix="Run `pip install pillow-heif`, or save the photo as JPEG.",
        ) from error
    image: Image.Image = plugin.HeifImageFile(path)
    return image
