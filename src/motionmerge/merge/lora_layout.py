"""How an exported LoRA calls its layers: in the style of diffusers, or of a family's original code.

transformer.blocks.0.attn1.to_q       diffusers
diffusion_model.blocks.0.self_attn.q  original, which the original code and ComfyUI load
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from motionmerge.errors import ConfigError
from motionmerge.merge.lora_fused import parts_of
from motionmerge.merge.original_names import ORIGINAL_NAMES, split_number
from motionmerge.merge.sources import MODULES

Shapes = Mapping[str, tuple[int, ...]]

_UNET_STARTS = ("down_", "mid_", "up_", "conv_in", "input_blocks", "temporal_in")
_SWAPPED = frozenset({"norm_out_linear"})
"""Its halves stand in another order in HunyuanVideo's original code; it has no name there."""


@dataclass(frozen=True)
class StoredLayer:
    """One layer of a LoRA file.

    Attributes:
        path: What the file calls it.
        weights: The model's tensors whose rows it stacks; several for a fused projection.
        unit_dims: Trailing dimensions of size one that its weight has and the model's have not.
    """

    path: str
    weights: tuple[str, ...]
    unit_dims: int = 0


Layout = Callable[[Shapes], Sequence[StoredLayer]]
"""Lists the layers for a model with tensors of these names and shapes."""


def diffusers_layout(shapes: Shapes) -> list[StoredLayer]:
    """Call every layer as diffusers does, with the denoiser's name in front."""
    prefix = ""
    if not _denoisers(shapes):
        is_unet = any(name.startswith(_UNET_STARTS) for name in shapes)
        prefix = "unet." if is_unet else "transformer."
    return [
        StoredLayer(prefix + name.removesuffix(".weight"), (name,)) for name in matrices(shapes)
    ]


def original_layout(shapes: Shapes) -> list[StoredLayer]:
    """Call every layer as the family's original code does, `diffusion_model.` in front.

    Raises:
        ConfigError: No such names are known for the model, or it has two denoisers.
    """
    denoisers = _denoisers(shapes)
    if len(denoisers) > 1:
        raise ConfigError(
            f"A LoRA in original keys is for one denoiser; the model has {', '.join(denoisers)}.",
            fix="Give the recipe the folder of one, or use the keys of diffusers.",
        )
    prefix = "".join(f"{denoiser}." for denoiser in denoisers)
    flat = {
        name.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): name
        for name in matrices(shapes)
    }
    for names in ORIGINAL_NAMES.values():
        if layers := _stack(flat, names):
            return layers
    raise ConfigError(
        f"No original names are known for a model with `{next(iter(shapes), '(no tensors)')}`.",
        fix=f"Use the keys of diffusers; original ones are known of {', '.join(ORIGINAL_NAMES)}.",
    )


def matrices(shapes: Shapes) -> list[str]:
    """List the tensors that a LoRA can change: weights of linear and convolution layers."""
    return [
        name
        for name, shape in shapes.items()
        if name.rpartition(".")[2] == "weight" and len(shape) >= 2
    ]


def _denoisers(shapes: Shapes) -> list[str]:
    found = dict.fromkeys(name.partition(".")[0] for name in shapes)
    return [name for name in found if name in MODULES]


def _stack(flat: Mapping[str, str], names: Mapping[str, str]) -> list[StoredLayer]:
    """Gather the tensors of each original layer; empty if a tensor has no place among `names`."""
    places = _places(names)
    gathered: dict[str, dict[int, str]] = {}
    for path, name in flat.items():
        template, number = split_number(path)
        if template in places:
            original, part = places[template]
            gathered.setdefault(original.replace("{}", number), {})[part] = name
        elif path not in _SWAPPED:
            return []
    return [
        StoredLayer(f"diffusion_model.{path}", tuple(found[part] for part in sorted(found)))
        for path, found in gathered.items()
    ]


def _places(names: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Give, by diffusers' name of a layer, the original layer and which part of it that is."""
    places = {}
    for original, ours in names.items():
        for _, parts in parts_of(ours.replace(".", "_")):
            places.update({name: (original, part) for part, name in enumerate(parts)})
    places |= {ours.replace(".", "_"): (original, 0) for original, ours in names.items()}
    return places
