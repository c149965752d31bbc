"""Videos: pipelines, families of models, requests, single videos and batches."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "AnalyticInit": "pipelines.start_latents",
    "ConsistI2VPipeline": "pipelines.consisti2v",
    "DynamiCrafterPipeline": "pipelines.dynamicrafter",
    "FrameInit": "pipelines.start_latents",
    "StartLatents": "pipelines.start_latents",
    "VideoCrafterPipeline": "pipelines.videocrafter",
}
"""Public names, loaded on first use."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
