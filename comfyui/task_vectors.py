"""Task vectors as patches of ComfyUI: of a LoRA file, and of two MODELs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch

from .errors import NodeError
from .experts import KEY, Patch, bare_parameters, name_of, without_experts

log = logging.getLogger(KEY)

NETWORK = "diffusion_model."
"""What ComfyUI puts in front of the names of a denoiser's weights."""

CODES = (
    *(".scale_weight", ".scale_input", ".scaled_fp8"),  # until 2025
    *(".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale", ".comfy_quant"),
    *(".weight_s_rel", ".weight_s_channel", ".weight_codebook"),
)
"""Endings of what belongs to codes (fp8, fp4, int8): no weights, and they stay as they are."""


def lora_patch(model: Any, file: str, strength: float) -> Patch:
    """Return a LoRA as a patch of a MODEL.

    Raises:
        NodeError: No key of the file fits the MODEL.
    """
    values, unused = matched(model, read_lora(file))
    if not values:
        raise NodeError(
            f"No key of the LoRA `{file}` fits this model; it has e.g. `{unused[0]}`."
            if unused
            else f"The LoRA `{file}` is empty.",
            fix="Use a LoRA that was trained for this model, or write it for ComfyUI: "
            "`motionmerge export loras RECIPE --for comfyui`.",
        )
    if unused:
        log.warning(
            f"The LoRA `{file}` changes {len(values)} weights of this model; nothing in it fits "
            f"{len(unused)} of the LoRA's keys, e.g. `{unused[0]}`."
        )
    return Patch(values, strength)


def read_lora(file: str) -> dict[str, torch.Tensor]:
    """Read a LoRA from ComfyUI's folders."""
    path = Path(folder_paths.get_full_path_or_raise("loras", file))
    return _read(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=2)  # a pair of high and low noise
def _read(path: str, modified: int) -> dict[str, torch.Tensor]:
    return comfy.utils.load_torch_file(path, safe_load=True)


def matched(model: Any, lora: Mapping[str, torch.Tensor]) -> tuple[dict[Any, Any], list[str]]:
    """Return what a LoRA changes of a MODEL, by weight, and its keys that fit nothing there."""
    lora = comfy.lora_convert.convert_lora(dict(lora))
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    held = model.model.state_dict().keys()
    found = comfy.lora.load_lora(lora, names, log_missing=False)
    values = {key: value for key, value in found.items() if name_of(key) in held}
    used: set[str] = set()
    tensors = {id(tensor): key for key, tensor in lora.items()}
    for value in values.values():
        if isinstance(value, tuple):  # ("diff", (tensor,)) and its like
            used.update(tensors[id(one)] for one in value[1] if id(one) in tensors)
        else:
            used.update(value.loaded_keys)
    return values, [key for key in lora if key not in used]


def model_patch(model: Any, other: Any, *, keeps: float, strength: float) -> Patch:
    """Return keeps * model + strength * other as a patch of the MODEL.

    Raises:
        NodeError: The two have other weights, or other shapes.
    """
    check_same_weights(model, other, fix="Use a model and the model that it was fine-tuned from.")
    bare = bare_parameters(other.model)
    values = {name: _as_patch(other, name, is_bare=name in bare) for name in shapes_of(other)}
    return Patch(values, strength, keeps)


def _as_patch(model: Any, name: str, *, is_bare: bool) -> list[Any]:
    """Return a weight of a MODEL, with the MODEL's own patches, as the values of a patch.

    ComfyUI's `get_key_patches` fails at models with scales: it looks for a weight of each name in
    the state dict.
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(model.model, name)
    if is_bare:  # another node's, where one was put in its place
        weight = model.get_model_object(name)
    kept = model.hook_backup.get(name) or model.backup.get(name)  # what was there before patches
    if kept is not None:
        weight = kept[0]
    return [(weight, convert or _unchanged), *model.patches.get(name, [])]


def _unchanged(weight: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Return a weight that is stored as it is."""
    return weight


def check_same_weights(model: Any, other: Any, *, fix: str) -> None:
    """Check that two MODELs have the same weights, of the same shapes.

    Raises:
        NodeError: They do not.
    """
    one, two = shapes_of(model), shapes_of(other)
    for name in sorted(one.keys() | two.keys()):
        if one.get(name) != two.get(name):
            raise NodeError(
                f"The two models differ: `{name}` is {one.get(name, 'absent')} in the first and "
                f"{two.get(name, 'absent')} in the second.",
                fix=fix,
            )


def check_same_settings(high: Any, low: Any) -> None:
    """Check that two MODELs differ in their weights alone.

    A sampler takes wrappers and options from the model that reaches it, so that those of the other
    would do nothing.

    Raises:
        NodeError: One has what the other lacks.
    """
    one, two = (
        {*_words(model.model_options), *_words(model.wrappers), *_words(model.callbacks)}
        for model in (without_experts(high), without_experts(low))
    )
    if one != two:
        raise NodeError(
            "One of the models has settings that the other lacks: "
            f"{', '.join(sorted(' '.join(words) for words in one ^ two))}.",
            fix="Put the node that makes them behind Switch at Noise Level; it is then for both.",
        )


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a MODEL's weights, by name."""
    return {
        name: tuple(comfy.utils.get_attr(model.model, name).shape)  # codes may have another shape
        for name in model.model.state_dict()
        if name.startswith(NETWORK) and not name.endswith(CODES)
    }


def _words(options: Mapping[Any, Any], front: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the keys of nested options that hold anything."""
    for key, value in options.items():
        path = (*front, str(key))
        if isinstance(value, Mapping):
            yield from _words(value, path)
        elif value is not None and value != []:
            yield path
