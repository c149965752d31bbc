"""What other code puts in front of a tensor's name, and which tensors are the denoiser's."""

from __future__ import annotations

import re
from collections.abc import Iterable

DENOISERS = ("unet", "transformer", "transformer_2")
PROJECTOR = "image_projector."
"""What the tensors of an image projector begin with, of any file of several modules."""
_MODULE = re.compile(r"^(unet|transformer_2|transformer|image_projector)\.")

FRONT = (
    "model.diffusion_model",
    "diffusion_model",
    "base_model.model",
    "module",
    "_forward_module",
    "pipe.dit",
    "dit",
    "model",
    "net",
)
"""Words in front of the names of a whole model; a longer one stands before its beginning."""

BETWEEN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Words that torch puts anywhere into the names of a compiled, sharded or checkpointed model."""

_FRONT = re.compile(rf"^(?:{'|'.join(map(re.escape, (*FRONT, *BETWEEN)))})\.")
_BETWEEN = re.compile(rf"\.(?:{'|'.join(BETWEEN)})(?=\.)")

DENOISER_PREFIX = "model.diffusion_model."
"""What a file of a whole model has in front of the denoiser's names."""

_OTHER_PARTS = re.compile(
    r"^(?:first_stage_model|cond_stage_model|embedder|conditioner|text_encoders?|vae|audio_vae|vocoder"
    r"|text_embedding_projection|model_ema)\."
)


def unwrapped(name: str) -> str:
    """Return a name without what is in front of it and between, e.g. `_orig_mod.`."""
    name = _BETWEEN.sub("", name)
    while (shorter := _FRONT.sub("", name)) != name:
        name = shorter
    return name


def split_module(name: str) -> tuple[str, str]:
    """Return the module of a pipeline that a name begins with, empty if none, and the bare name."""
    bare = unwrapped(name)
    found = _MODULE.match(bare)
    return (found[1], unwrapped(bare[found.end() :])) if found else ("", bare)


def bare_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return module and bare name of each tensor; no module unless all tensors have one."""
    split = {name: split_module(name) for name in names}
    if all(module for module, _ in split.values()):
        return split
    return {name: ("", unwrapped(name)) for name in split}


def with_projector(split: Iterable[tuple[str, str]]) -> list[str]:
    """Return the bare names of a pipeline's denoiser, and those of its projector with its name.

    Args:
        split: Module and bare name of each tensor, as `bare_names` has them.
    """
    return [f"{PROJECTOR}{name}" if f"{m}." == PROJECTOR else name for m, name in split]


def denoiser_alone(names: Iterable[str]) -> list[str]:
    """Return the names without those of other parts, in a file of a whole model."""
    held = list(names)
    if not any(name.startswith(DENOISER_PREFIX) for name in held):
        return held
    return [name for name in held if not _OTHER_PARTS.match(name)]
