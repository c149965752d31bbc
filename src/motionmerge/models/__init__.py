"""Networks of video models, which know nothing of merging."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "ConsistI2VUNet": "consisti2v.unet",
    "DynamiCrafterUNet": "dynamicrafter.unet",
}
"""Public names, loaded on first use."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
