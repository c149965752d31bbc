"""Names of DynamiCrafter's U-Net and image projector, official beside ours.

Which official block is which of ours depends on the size of the model, so that the table is made
for the names of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from motionmerge.dynamicrafter_names import (
    Rename,
    count_indices,
    find_rename,
    image_projector_renames,
    unet_layout_of_official,
    unet_layout_of_ours,
    unet_renames,
)
from motionmerge.errors import CheckpointError
from motionmerge.merging.names.rules import Names

_OFFICIAL_PROJECTOR, _OUR_PROJECTOR = "image_proj_model.", "image_projector."
_LEAVES = (".weight", ".bias")
_LEARNED_SCALE = ".attn2.alpha"
"""Of the 256 model: our `to_v_ip` is multiplied by it, so that new names alone would be wrong."""


def dynamicrafter_style(names: Iterable[str]) -> Names | None:
    """Return the names of a DynamiCrafter of this size; None if it is none.

    Args:
        names: Of its tensors, official or ours, without wrappers; those of the image projector
            begin with `image_proj_model.` or `image_projector.`.
    """
    held = list(names)
    if any(name.endswith(_LEARNED_SCALE) for name in held):
        return None
    is_official = any(name.startswith("input_blocks.") for name in held)
    if not is_official and not any(name.startswith("down_stages.") for name in held):
        return None
    try:
        layout = (unet_layout_of_official if is_official else unet_layout_of_ours)(held)
    except CheckpointError:
        return None
    renames = _by_path(_all_renames(layout, held), is_official=is_official)
    table: dict[str, str] = {}
    ones: dict[str, tuple[int, int]] = {}
    for name in held:
        found = find_rename(name, renames)
        if found is None:
            continue
        rename, rest = found
        leaf = next((leaf for leaf in _LEAVES if rest.endswith(leaf)), "")
        rest = rest.removesuffix(leaf)
        official = rename.official + rest
        ours = [path + rest for path in rename.ours]
        table[official] = ours[0] if len(ours) == 1 else f"{ours[0].removesuffix('to_k')}to_kv"
        if rename.unit_dims and not rest:
            ones[f"{official}.weight"] = (0, rename.unit_dims)
    return Names(
        family="dynamicrafter",
        style="official DynamiCrafter",
        table=table,
        ones=ones,
        computed=(r"^(betas|alphas_|sqrt_|log_one_|posterior_|lvlb_weights|scale_arr|logvar)",),
    )


def _all_renames(layout: Mapping[str, Any], names: Sequence[str]) -> list[Rename]:
    depth = max(
        count_indices(names, rf"{re.escape(prefix)}layers\.(\d+)\.")
        for prefix in (_OFFICIAL_PROJECTOR, _OUR_PROJECTOR)
    )
    projector = [
        Rename(
            _OFFICIAL_PROJECTOR + rename.official,
            tuple(_OUR_PROJECTOR + name for name in rename.ours),
            rename.unit_dims,
        )
        for rename in image_projector_renames(depth=depth)
    ]
    return [*unet_renames(**layout), *projector]


def _by_path(renames: Iterable[Rename], *, is_official: bool) -> dict[str, Rename]:
    return {
        path: rename
        for rename in renames
        for path in ((rename.official,) if is_official else rename.ours)
    }
