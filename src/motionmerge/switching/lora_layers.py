"""A LoRA as pairs of matrices per layer of a model, and a recipe as signed weights of LoRAs.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.io.weights import open_weights
from motionmerge.merging.inputs.coverage import Missing, check_missing
from motionmerge.merging.inputs.sources import MemoryTensors, TensorSource
from motionmerge.merging.lora.keys import LoraModule, group_keys
from motionmerge.merging.lora.placement import (
    LoraPiece,
    check_modules,
    check_values,
    place,
    strength_of,
)
from motionmerge.merging.lora.products import rows_of
from motionmerge.merging.lora.scaling import LoraScaling
from motionmerge.merging.lora.task_vector import lora_terms
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import OWN_MODEL
from motionmerge.switching.switchable import BARE_MODULE

LoraSource = str | Path | Mapping[str, torch.Tensor]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_SIGNED = {"down", "up", "up_bias"}
"""Parts that a signed LoRA can have, beside a plain difference of a layer's bias."""
DENSE = "Use it in dense experts: a recipe with `base + lora(...)` and `base` as an input, or take "
DENSE += "recipe='lora-rescue', inputs={'base': MODEL, 'style': FILE}."


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to a layer's output.

        weight * alpha / rank * (up @ down @ x + bias)

    Attributes:
        down: `[rank, inputs, ...]`.
        up: `[outputs, rank, ...]`.
        alpha: The LoRA's own scale, times its rank.
        bias: `[outputs]`; most LoRAs have none.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[0]


@dataclass(frozen=True)
class SignedLora:
    """A LoRA as layers of the denoisers of a pipeline.

    Attributes:
        layers: For each denoiser, the LoRA's layers by name.
        left_out: What of the file goes nowhere in them, with the reason.
    """

    layers: Mapping[str, Mapping[str, LoraLayer]]
    left_out: Mapping[str, str]


def read_lora(
    source: LoraSource,
    denoisers: Mapping[str, nn.Module],
    *,
    name: str,
    only: str | None = None,
    missing: Missing = "error",
) -> SignedLora:
    """Read a LoRA for the denoisers of a pipeline; it goes to every one that has its layers.

    Args:
        source: A file, or its tensors.
        denoisers: The modules by their names in the pipeline.
        name: What to call it in errors.
        only: The one denoiser whose layers are wanted; by default all.
        missing: What to do with layers that no denoiser has: `error`, or `keep` (go on without).

    Raises:
        CheckpointError: It cannot be read, is no plain LoRA, holds NaN, or has layers that no
            denoiser has (under `error`) or that PEFT cannot adapt.
        ShapeError: The matrices of a layer are no pair.
        ConfigError: `missing` is neither `error` nor `keep`.
    """
    check_missing(missing)
    if isinstance(source, Mapping):
        return _read(MemoryTensors(source), LoraScaling(), denoisers, name, only, missing)
    with open_weights(Path(source)) as reader:
        scaling = LoraScaling.beside(Path(source), reader.metadata)
        return _read(reader, scaling, denoisers, name, only, missing)


def _read(
    file: TensorSource,
    scaling: LoraScaling,
    denoisers: Mapping[str, nn.Module],
    name: str,
    only: str | None,
    missing: Missing,
) -> SignedLora:
    keys = group_keys(file.keys())
    check_modules(file, keys)
    for module in keys.modules:
        _check_pair(module, file, name=name)
    check_values(file, keys, name=name)
    model = _Model(denoisers)
    placement = place(file, model.shapes, keys=keys, modules=scaling.modules)
    home = {
        tensor: pieces
        for tensor, pieces in placement.home.items()
        if only in (None, model.owners[tensor])
    }
    strangers = placement.strangers or dict.fromkeys(placement.home, f"not of `{only}`")
    if not home or (placement.strangers and missing == "error"):
        raise _strangers(strangers, name, any_left=bool(home))
    found: dict[str, dict[str, LoraLayer]] = {denoiser: {} for denoiser in denoisers}
    weights = {tensor: pieces for tensor, pieces in home.items() if tensor in model.layers}
    biases = dict(home)
    for tensor, pieces in weights.items():
        del biases[tensor]
        denoiser, layer = model.layers[tensor]
        model.check_adaptable(denoiser, layer, lora=name)
        bias = biases.pop(f"{tensor.removesuffix('.weight')}.bias", ())
        for piece in pieces:
            if not {"down", "up"} == piece.keys.keys():
                raise _not_signed(piece, name)
        found[denoiser][layer] = _layer(pieces, bias, model.shapes[tensor], file, scaling)
    for pieces in biases.values():
        raise _not_signed(pieces[0], name)
    return SignedLora(found, placement.strangers)


class _Model:
    """The tensors of some denoisers, as a LoRA file may mean them.

    Attributes:
        shapes: Shape of each tensor, of quantised layers that of the weight which they stand for.
        layers: By the name of a weight, its denoiser and its layer in it.
        owners: By the name of a tensor, its denoiser.
    """

    def __init__(self, denoisers: Mapping[str, nn.Module]) -> None:
        self._denoisers = {
            name: getattr(module, "_orig_mod", module) for name, module in denoisers.items()
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.layers: dict[str, tuple[str, str]] = {}
        self.owners: dict[str, str] = {}
        for denoiser, module in self._denoisers.items():
            prefix = "" if denoiser == BARE_MODULE else f"{denoiser}."
            for layer in _layers_with_weights(module):
                child = module.get_submodule(layer)
                path = f"{prefix}{layer}." if layer else prefix
                self.layers[f"{path}weight"] = (denoiser, layer)
                self.shapes[f"{path}weight"] = shape = _shape_of_weight(child)
                if getattr(child, "bias", None) is not None:
                    self.shapes[f"{path}bias"] = shape[:1]
            for name, parameter in module.named_parameters():
                leaf = name.rpartition(".")[2]
                if leaf not in ("weight", "bias") and ".lora_" not in name:
                    self.shapes.setdefault(f"{prefix}{name}", tuple(parameter.shape))
            for tensor in self.shapes:
                self.owners.setdefault(tensor, denoiser)

    def check_adaptable(self, denoiser: str, layer: str, *, lora: str) -> None:
        """Refuse a layer that PEFT has no adapter for.

        Raises:
            CheckpointError: Such a layer.
            ConfigError: The layer alone is compiled, which keeps the one that it was made from.
        """
        if layer.rpartition(".")[2] == "_orig_mod":
            raise ConfigError(
                f"`{layer.removesuffix('._orig_mod')}` is compiled by itself, which would leave "
                f"the layers of the LoRA `{lora}` out.",
                fix="Compile the whole denoiser or its blocks, not single layers.",
            )
        child = self._denoisers[denoiser].get_submodule(layer)
        is_linear = hasattr(child, "in_features") and hasattr(child, "out_features")
        if (
            not is_linear
            and not isinstance(child, _CONVOLUTIONS)
            and not hasattr(child, "base_layer")
        ):
            raise CheckpointError(
                f"The LoRA `{lora}` changes `{layer}`, a {type(child).__name__}, to which PEFT "
                "cannot add layers.",
                fix=DENSE,
            )


def _layers_with_weights(module: nn.Module) -> list[str]:
    """List the layers of a module; one with LoRAs counts once, without what is inside it."""
    children = {
        name: child
        for name, child in module.named_modules()
        if getattr(child, "weight", None) is not None and not hasattr(child, "_orig_mod")
    }
    inside = tuple(f"{name}." for name, child in children.items() if hasattr(child, "base_layer"))
    return [name for name in children if not name.startswith(inside)]


def _shape_of_weight(layer: Any) -> tuple[int, ...]:
    """Return the shape that a layer's weight has, or had before it was quantised and packed."""
    layer = getattr(layer, "base_layer", layer)
    if isinstance(getattr(layer, "in_features", None), int) and layer.weight.ndim <= 2:
        return (layer.out_features, layer.in_features)
    return tuple(layer.weight.shape)


def _check_pair(module: LoraModule, file: TensorSource, *, name: str) -> None:
    """Refuse one matrix without the other, and matrices that have no rank in common."""
    found = module.keys.keys() & {"down", "up"}
    if not found:
        return
    if len(found) == 1:
        key = module.keys[found.pop()]
        raise CheckpointError(
            f"The LoRA `{name}` is incomplete: `{key}` has no second matrix.",
            fix="Download the file again.",
        )
    down, up = (list(file.shape(module.keys[part])) for part in ("down", "up"))
    if min(len(down), len(up)) < 2 or down[0] != up[1]:
        raise ShapeError(
            f"`{module.path}` of the LoRA `{name}` has the shapes {down} and {up}; expected "
            "[rank, inputs] and [outputs, rank], with a rank of 1 or more.",
            fix="Download the file again.",
        )


def _layer(
    weight: Sequence[LoraPiece],
    bias: Sequence[LoraPiece],
    shape: Sequence[int],
    file: TensorSource,
    scaling: LoraScaling,
) -> LoraLayer:
    """Build a layer; parts of a fused one are stacked, each in its rows."""
    pairs = [
        (
            file.read(piece.module.keys["down"]),
            rows_of(file.read(piece.module.keys["up"]), piece.rows),
        )
        for piece in weight
    ]
    factors = [strength_of(piece, file, scaling).factor for piece in weight]
    plain = any("bias" in piece.keys for piece in bias)
    own = len(weight) == 1 and weight[0].place is None and (factors[0] != 0 or not plain)
    if own and [piece.module for piece in bias] in ([], [weight[0].module]):
        (down, up), factor = pairs[0], factors[0]
    else:
        down, up = _stacked(pairs, factors, [piece.place for piece in weight], rows=shape[0])
        factor = 1.0
    return LoraLayer(down, up, factor * down.shape[0], _bias(bias, shape[0], factor, file, scaling))


def _stacked(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    factors: Sequence[float],
    places: Sequence[slice | None],
    *,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join pairs to one pair whose product has that of each in its rows, times its factor."""
    down = torch.cat([down.float() for down, _ in pairs])
    up = torch.zeros(rows, down.shape[0], *pairs[0][1].shape[2:])
    start = 0
    for (own, one), factor, rows_here in zip(pairs, factors, places, strict=True):
        rows_of(up, rows_here)[:, start : start + own.shape[0]] = one.float() * factor
        start += own.shape[0]
    return down, up


def _bias(
    pieces: Sequence[LoraPiece], rows: int, factor: float, file: TensorSource, scaling: LoraScaling
) -> torch.Tensor | None:
    """Add a layer's biases up, divided by the factor that the whole layer is multiplied with."""
    if not pieces:
        return None
    total = torch.zeros(rows)
    for piece in pieces:
        here = rows_of(total, piece.place)
        parts = {part: rows_of(file.read(key), piece.rows) for part, key in piece.keys.items()}
        if "up_bias" in parts:
            own = strength_of(piece, file, scaling).factor
            here += parts["up_bias"].float() * (1.0 if own == factor else own / factor)
        if "bias" in parts:  # a plain difference, which alpha / rank does not scale
            here += parts["bias"].float() / factor
    return total


def _not_signed(piece: LoraPiece, name: str) -> CheckpointError:
    key = next((key for part, key in piece.keys.items() if part not in _SIGNED), None)
    return CheckpointError(
        f"The LoRA `{name}` is not made of pairs of matrices alone: "
        f"`{key or next(iter(piece.keys.values()))}` cannot be used without dense weights.",
        fix=DENSE,
    )


def _strangers(strangers: Mapping[str, str], name: str, *, any_left: bool) -> CheckpointError:
    lines = [f"  `{key}` ({why})" for key, why in strangers.items()]
    listed = "\n".join(lines[:10] + ([f"  ... {len(lines) - 10} more"] if lines[10:] else []))
    return CheckpointError(
        f"{len(lines)} of the layers or keys of the LoRA `{name}` cannot be used:\n{listed}",
        fix="Use a LoRA for this model and these denoisers"
        + (", or go on without these layers: `missing='keep'`." * any_left or "."),
    )


def loras_of_recipe(
    bound: BoundRecipe,
) -> tuple[dict[str, LoraSource], dict[str, dict[str, float]]] | None:
    """Read a recipe as weights of LoRAs on the model that is loaded.

        inputs:  {base: "memory:base", style: style.safetensors}
        experts: {dynamics: "base - lora(style, 0.25)", consistency: "base + lora(style, 1.0)"}

    Args:
        bound: The recipe.

    Returns:
        The LoRAs, and for each expert the weight of each; None if the experts are more than that
        or are built on weights that have to be read.

    Raises:
        CheckpointError: A file is missing or is not the one that the recipe pins.
    """
    recipe = bound.recipe
    weights: dict[str, dict[str, float]] = {}
    for name, expert in recipe.experts.items():
        base = expert.anchor.name
        terms = [term for vector in expert.vectors for term in lora_terms(vector)]
        if recipe.inputs[base].path != OWN_MODEL or base in bound.origins or None in dict(terms):
            return None
        weights[name] = {}
        for lora, weight in terms:
            weights[name][str(lora)] = weights[name].get(str(lora), 0.0) + weight
    used = list(dict.fromkeys(lora for own in weights.values() for lora in own))
    if not used:
        return None
    bound.check_pins()
    origins = {lora: bound.origins[lora] for lora in used}
    loras: dict[str, LoraSource] = {
        lora: {key: origin.read(key) for key in origin.keys()}  # noqa: SIM118
        if isinstance(origin, MemoryTensors)
        else origin
        for lora, origin in origins.items()
    }
    return loras, weights


def is_own_model(bound: BoundRecipe) -> bool:
    """Check whether every expert of a recipe is the model that is loaded, as it is."""
    anchors = {expert.anchor.name for expert in bound.recipe.experts.values()}
    are_plain = not any(expert.vectors for expert in bound.recipe.experts.values())
    own = [bound.recipe.inputs[name].path == OWN_MODEL for name in anchors]
    return are_plain and all(own) and anchors.isdisjoint(bound.origins)
