"""What ComfyUI makes of a file of ours, where that is not the whole model.

Tried with ComfyUI 0.33.0 (783545f6, August 2026): `tests/comfyui/test_exports.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

TRIED = (
    "wan",
    "hunyuan-video",
    "hunyuan-video-1.5",
    "ltx",
    "ltx-2",
    "cosmos",
    "cogvideox",
    "kandinsky-5",
    "minimax-h3",
)
"""Families of whose files ComfyUI loads every tensor, but for `LIMITS`."""


@dataclass(frozen=True)
class Limit:
    """Something about a file that ComfyUI stumbles over.

    Attributes:
        family: The family that it is of.
        tensor: The tensor, by its name in the file.
        is_there: Whether it is the tensor that disturbs, or that it is absent.
        meaning: What ComfyUI does, and what to do instead.
    """

    family: str
    tensor: str
    is_there: bool
    meaning: str


HEADER = "config"
"""What a single file of LTX says about itself in its header, which ComfyUI and diffusers read."""

_SINGLE = "Take the model's single file as the recipe's base."
LIMITS = (
    Limit(
        "ltx-2",
        "video_embeddings_connector.learnable_registers",
        False,
        "Not for ComfyUI: the connectors are absent, which a folder of diffusers has in a part of "
        f"its own, and ComfyUI would leave them at random. {_SINGLE}",
    ),
    Limit(
        "minimax-h3",
        "rope.inv_freq",
        False,
        f"Not for ComfyUI, which does not open a file without `rope.inv_freq`. {_SINGLE}",
    ),
    Limit(
        "cosmos",
        "crossattn_proj.0.weight",
        True,
        "Not for ComfyUI, which leaves out `crossattn_proj` of Cosmos 2.5.",
    ),
    Limit(
        "cogvideox",
        "patch_embed.pos_embedding",
        True,
        "Not for ComfyUI, which computes a CogVideoX with `patch_embed.pos_embedding` (5B-I2V) "
        "without its rotary embeddings. CogVideoX 1.5 is computed with them.",
    ),
)


def limits_of(family: str | None, names: Collection[str], header: Collection[str]) -> list[str]:
    """Return a line for each limit of ComfyUI that a file runs into.

    Args:
        family: The file's family; None if it is unknown.
        names: Of its tensors.
        header: What its header says of the model.
    """
    if family == "ltx" and HEADER not in header:
        return [
            "ComfyUI loads it as LTX-Video 0.9.0 or 0.9.1. Later versions count time in another "
            f"way, which the header of their single file says and a folder does not. {_SINGLE}"
        ]
    return [
        limit.meaning
        for limit in LIMITS
        if limit.family == family and (limit.tensor in names) == limit.is_there
    ]
