"""Networks of video models, which know nothing of merging."""

from __future__ import annotations

from typing import Any

from motionmerge.packages import public_name

_HOMES = {
    "ConsistI2VUNet": "consisti2v.unet",
    "DynamiCrafterUNet": "dynamicrafter.unet",
}
"""Public names, loaded on first use."""


def __getattr__(name: str) -> Any:
    return public_name(__name__, _HOMES, name)
