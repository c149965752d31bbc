"""Nodes for ComfyUI: more motion from image-to-video models, by weights that change with the noise.

https://docs.comfy.org/custom-nodes: ComfyUI imports this file and calls `comfy_entrypoint`.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES


class MotionMergeExtension(ComfyExtension):
    """All nodes of this folder."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes: ComfyUI calls this."""
        return NODES


async def comfy_entrypoint() -> MotionMergeExtension:
    """Return the nodes of this folder: ComfyUI calls this."""
    return MotionMergeExtension()
