"""A doctor's note on a LoRA file: its names, its strength and where that stands, what it fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionmerge.io.weights import WeightsReader, open_weights
from motionmerge.lazy_torch import torch
from motionmerge.merging.inputs.pieces import Shapes
from motionmerge.merging.lora.keys import LoraModule, group_keys
from motionmerge.merging.lora.names import bare_path, is_other_component
from motionmerge.merging.lora.placement import LoraPiece, check_modules, strength_of
from motionmerge.merging.lora.scaling import NO_ALPHA, LoraScaling
from motionmerge.merging.lora.task_vector import LoraTensors
from motionmerge.merging.names.original import STYLES, split_number
from motionmerge.parameter_groups import GROUPS, OTHER, group_of

HIGH_RANK = 32
"""LoRAs of more than this rank without any alpha are seldom meant to be used at full strength."""

ReadTensor = Callable[[str], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LoraGroup:
    """A LoRA's modules of one parameter group.

    Attributes:
        layers: Number of its modules.
        ranks: Smallest and largest rank; None if no matrices tell.
        alphas: Smallest and largest alpha; None if nothing knows any.
        scales: Smallest and largest alpha / rank, which are in force at strength 1.
        origins: Where alpha stands, in words.
        change: Norm of the change at strength 1, as a share of the norm of the weights that it
            reaches; None without a base.
    """

    layers: int
    ranks: tuple[int, int] | None
    alphas: tuple[float, float] | None
    scales: tuple[float, float]
    origins: tuple[str, ...]
    change: float | None = None


@dataclass(frozen=True, kw_only=True)
class LoraDescription:
    """A description of a LoRA file.

    Attributes:
        styles: The styles of its keys, in words.
        adapters: Names of adapters in its keys; most files have none.
        groups: Its modules by parameter group.
        modules: The modules of a pipeline that it is for; empty where its header does not say.
        reached: Tensors of the base that it changes; None without a base.
        strangers: Modules or keys that go nowhere, with the reason; without a base, only those
            that go nowhere in any.
        unused_strengths: Number of its keys of alpha whose layers it does not hold.
        warnings: What looks wrong.
    """

    styles: tuple[str, ...]
    adapters: tuple[str, ...]
    groups: Mapping[str, LoraGroup]
    modules: tuple[str, ...] = ()
    reached: tuple[str, ...] | None = None
    strangers: Mapping[str, str] = field(default_factory=dict)
    unused_strengths: int = 0
    warnings: tuple[str, ...] = ()


def describe_lora(
    source: str | Path | WeightsReader,
    model_shapes: Shapes | None = None,
    *,
    read_base: ReadTensor | None = None,
) -> LoraDescription:
    """Describe a LoRA file; its tensors are read only if a base is.

    Args:
        source: The file or folder, or a reader of it.
        model_shapes: Shape of each tensor of the base that it is to be added to.
        read_base: Reads a tensor of the base, for the size of the change.

    Raises:
        CheckpointError, ShapeError: The file cannot be read, holds no LoRA, or one that is not
            understood.
    """
    if isinstance(source, WeightsReader):
        return _describe(source, model_shapes, read_base)
    with open_weights(Path(source)) as reader:
        return _describe(reader, model_shapes, read_base)


@dataclass(kw_only=True)
class _Layers:
    """Gathers what is known of the modules of a group."""

    count: int = 0
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    origins: dict[str, None] = field(default_factory=dict)
    change: float = 0.0
    weight: float = 0.0

    def summed_up(self) -> LoraGroup:
        """Return the ranges."""
        return LoraGroup(
            layers=self.count,
            ranks=_range(self.ranks),
            alphas=_range(self.alphas),
            scales=_range(self.scales) or (1.0, 1.0),
            origins=tuple(self.origins),
            change=(self.change / self.weight) ** 0.5 if self.weight else None,
        )


def _describe(
    reader: WeightsReader, shapes: Shapes | None, read_base: ReadTensor | None
) -> LoraDescription:
    keys = group_keys(reader.keys())
    check_modules(reader, keys)
    scaling = LoraScaling.beside(reader.path, reader.metadata)
    fitted = None if shapes is None else LoraTensors(reader, scaling, shapes)
    places = {} if fitted is None else fitted.places()
    layers: dict[str, _Layers] = {}
    for module in keys.modules:
        if not is_other_component(module.path):
            path = places.get(module.path, (bare_path(module.path), ()))[0]
            group = layers.setdefault(_group(path, places.get(module.path)), _Layers())
            _add(
                group,
                module,
                LoraPiece(module=module, keys=module.keys, path=path),
                reader,
                scaling,
            )
    if fitted is not None and read_base is not None:
        for name in fitted.keys():  # noqa: SIM118
            group = layers.setdefault(group_of(name), _Layers())
            group.change += float(fitted.read(name).double().square().sum())
            group.weight += float(read_base(name).double().square().sum())
    ordered = {name: layers[name] for name in (*GROUPS, OTHER) if name in layers}
    unused = dict.fromkeys(keys.whole, "whole weights") | dict.fromkeys(keys.unknown, "not known")
    return LoraDescription(
        styles=styles_of([key for module in keys.modules for key in module.keys.values()]),
        adapters=keys.adapters,
        groups={name: group.summed_up() for name, group in ordered.items()},
        modules=scaling.modules,
        reached=None if fitted is None else tuple(fitted.keys()),
        strangers=unused if fitted is None else fitted.strangers(),
        unused_strengths=len(keys.unused_strengths),
        warnings=tuple(_warnings(ordered)),
    )


def _add(
    group: _Layers,
    module: LoraModule,
    piece: LoraPiece,
    reader: WeightsReader,
    scaling: LoraScaling,
) -> None:
    group.count += 1
    if any(part not in ("full", "bias", "modulation", "alpha") for part in module.keys):
        strength = strength_of(piece, reader, scaling)
        group.scales.append(strength.factor)
        group.origins[strength.origin] = None
        group.alphas += [] if strength.alpha is None else [strength.alpha]
        group.ranks += [] if strength.rank is None else [strength.rank]
    else:
        group.origins["plain differences"] = None


def _group(path: str, place: tuple[str, tuple[str, ...]] | None) -> str:
    """Name the parameter group of a module: of its tensor in the base, or by its own name."""
    if place is not None and place[1]:
        return group_of(place[1][0])
    template, number = split_number(path.replace(".", "_"))
    dotted = _DOTTED.get(template, path if "." in path else template).replace("{}", number)
    return group_of(f"{dotted}.weight")


_DOTTED = {
    flat: ours
    for names in reversed(STYLES)  # of two with one flat name, the first counts
    for theirs, ours in names.table.items()
    if not names.is_reordered(theirs)
    for flat in (theirs.replace(".", "_"), ours.replace(".", "_"))
}
"""The names of diffusers for flat ones, which have lost their dots."""

_STYLES = (
    ("LyCORIS (LoHa)", r"\.hada_"),
    ("LyCORIS (LoKr)", r"\.lokr_"),
    ("kohya (lora_unet_)", r"^lora_(?:unet|transformer)_|^lora_te"),
    ("LyCORIS (lycoris_)", r"^lycoris_"),
    ("VideoX-Fun or Hunyuan (lora_down, flat names)", r"^Hunyuan_video_I2V_lora_"),
    ("peft (base_model.model.)", r"^base_model\.model\."),
    ("ComfyUI and original code (diffusion_model.)", r"^(?:model\.)?diffusion_model\."),
    ("diffusers (transformer., unet.)", r"^(?:transformer(?:_2)?|unet)\."),
    ("DiffSynth (pipe.dit.)", r"^(?:pipe\.)?dit\."),
    ("plain differences (.diff)", r"\.diff(?:_[bm])?$"),
)


def styles_of(keys: Iterable[str]) -> tuple[str, ...]:
    """Name the styles in which keys are spelled."""
    keys = list(keys)
    found = [style for style, pattern in _STYLES if any(re.search(pattern, key) for key in keys)]
    return tuple(found) or ("without a prefix",)


def _warnings(groups: Mapping[str, _Layers]) -> Iterable[str]:
    unscaled = [
        max(group.ranks)
        for group in groups.values()
        if NO_ALPHA in group.origins and group.ranks and max(group.ranks) > HIGH_RANK
    ]
    if unscaled:
        yield (
            f"No alpha is known for a rank of {max(unscaled)}: the LoRA is used at alpha / rank "
            "= 1. If it was trained with another alpha, it is too strong or too weak."
        )
    for name, group in groups.items():
        if group.weight and group.change > group.weight:
            yield (
                f"The change of {name} is {(group.change / group.weight) ** 0.5:.1f} times as "
                "large as the weights: the scale looks wrong."
            )


def _range(values: list[Any]) -> tuple[Any, Any] | None:
    return (min(values), max(values)) if values else None
