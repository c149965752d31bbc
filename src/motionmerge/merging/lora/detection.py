"""Recognise LoRA matrices by their names, and refuse them where whole weights are expected.

Factors do not add up as weights do: (up_a + up_b) @ (down_a + down_b) is no sum of the two LoRAs,
and their alphas would be left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from motionmerge.errors import CheckpointError

_MATRIX = re.compile(
    r"[._](?:lora_(?:A|B|down|up|mid|embedding_[AB]|magnitude_vector)"
    r"|lora\.(?:down|up)|lora_linear_layer\.(?:down|up)"
    r"|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|dora_scale)(?:\.|$)"
)
_WRAPPED = ".base_layer."
_DIFFERENCES = (".diff", ".diff_b", ".diff_m", ".set_weight")
"""Ends of tensors that LoRA files have beside matrices, or instead of them."""


def lora_matrices(names: Iterable[str]) -> list[str]:
    """Return those of some tensor names that belong to matrices of a LoRA, LoHa or LoKr."""
    return [name for name in names if _MATRIX.search(name)]


def is_lora(names: Iterable[str]) -> bool:
    """Check whether tensors with such names are those of a LoRA file.

    A whole checkpoint that was saved with LoRAs in it is none.
    """
    names = list(names)
    if any(_WRAPPED in name for name in names):
        return False
    return bool(lora_matrices(names)) or any(name.endswith(_DIFFERENCES) for name in names)


def check_whole_weights(source: str, names: Iterable[str]) -> None:
    """Check that an input that stands for a checkpoint is not a LoRA, and has none inside.

    Args:
        source: The input's name in formulas.
        names: Names of its tensors.

    Raises:
        CheckpointError: Some of its tensors are LoRA matrices, or layers wrapped for LoRAs.
    """
    names = list(names)
    matrices = lora_matrices(names)
    wrapped = [name for name in names if _WRAPPED in name]
    if wrapped:
        raise CheckpointError(
            f"`{source}` was saved with its LoRA adapters still in it: {len(wrapped)} of its "
            f"{len(names)} tensors are wrapped layers, e.g. `{wrapped[0]}`.",
            fix="Fuse the adapters into the weights and save again (peft: `merge_and_unload()`; "
            "diffusers: `fuse_lora()`, then `unload_lora_weights()`), or save the adapter alone "
            f"and use it as a LoRA: `base + lora({source}, 1.0)`.",
        )
    if matrices:
        raise CheckpointError(
            f"`{source}` is a LoRA, not the weights of a model: {len(matrices)} of its "
            f"{len(names)} tensors are LoRA matrices, e.g. `{matrices[0]}`. LoRA matrices cannot "
            "be added or subtracted like weights.",
            fix="Add the LoRA to a checkpoint in a recipe: "
            f"`base + lora({source}, 1.0)`, or `base - 0.25 * lora({source}, 1.0)` for more motion "
            "(`motionmerge merge`).",
        )
