"""Videos: pipelines, families of models, requests, single videos and batches."""

from __future__ import annotations

from typing import Any

from motionmerge.packages import public_name

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
    return public_name(__name__, _HOMES, name)
