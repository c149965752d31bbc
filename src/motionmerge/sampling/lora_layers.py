"""A LoRA as pairs of matrices per layer of a model, and a recipe as signed weights of LoRAs.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.io.weights import open_weights
from motionmerge.merge.algebra import Scaled, Sum, TaskVector
from motionmerge.merge.lora import Lora, LoraScaling
from motionmerge.merge.lora_names import LoraModule, ModelNames, group_keys
from motionmerge.merge.recipe import Recipe
from motionmerge.merge.sources import MemoryTensors
from motionmerge.sampling.switching import BARE_MODULE

LoraSource = str | Path | Mapping[str, torch.Tensor]

OWN_MODEL = "memory:base"
"""The input of a recipe that stands for the model in the pipeline."""

_PARTS = {"down", "up", "alpha", "up_bias", "bias"}


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


def read_lora(
    source: LoraSource, denoisers: Mapping[str, nn.Module], *, name: str
) -> dict[str, dict[str, LoraLayer]]:
    """Read a LoRA for the denoisers of a pipeline; it goes to every one that has its layers.

    Args:
        source: A file, or its tensors.
        denoisers: The modules by their names in the pipeline.
        name: What to call it in errors.

    Returns:
        For each denoiser, the LoRA's layers by name.

    Raises:
        CheckpointError: It cannot be read, is no plain LoRA, or has layers that no denoiser has.
        ShapeError: The matrices of a layer are no pair.
    """
    if isinstance(source, Mapping):
        tensors, scaling = dict(source), LoraScaling({})
    else:
        with open_weights(Path(source)) as reader:
            tensors = {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118
            scaling = LoraScaling.beside(Path(source), reader.metadata)
    modules, unknown = group_keys(tensors)
    for module in modules:
        if not {"down", "up"} <= module.keys.keys() <= _PARTS:
            unknown += module.keys.values()
    if unknown or not modules:
        raise CheckpointError(
            f"The LoRA `{name}` is not made of pairs of matrices alone: "
            f"{len(unknown)} of its tensors are not, `{(unknown or ['(no tensors)'])[0]}` first.",
            fix="use it in dense experts: a recipe with `base + lora(...)` and `base` as an input.",
        )
    prefixed = {
        f"{denoiser}.{layer}.weight".removeprefix(f"{BARE_MODULE}."): (denoiser, layer)
        for denoiser, module in denoisers.items()
        for layer in _layers_with_weights(module)
    }
    model = ModelNames(prefixed)
    found: dict[str, dict[str, LoraLayer]] = {denoiser: {} for denoiser in denoisers}
    for lora_module in modules:
        places = model.weights(lora_module.path)
        if not places:
            raise CheckpointError(
                f"The LoRA `{name}` has the layer `{lora_module.path}`, which the model has not.",
                fix="use a LoRA for this model and these denoisers.",
            )
        _check_pair(lora_module, tensors, name=name)
        for place in places:
            denoiser, layer = prefixed[place]
            found[denoiser][layer] = _layer(lora_module, tensors, scaling)
    return found


def _layers_with_weights(module: nn.Module) -> list[str]:
    """List the layers of a module; one with LoRAs counts once, without what is inside it."""
    inside = [f"{name}." for name, child in module.named_modules() if hasattr(child, "base_layer")]
    return [
        name
        for name, child in module.named_modules()
        if hasattr(child, "weight") and not name.startswith(tuple(inside))
    ]


def _check_pair(module: LoraModule, tensors: Mapping[str, torch.Tensor], *, name: str) -> None:
    """Refuse matrices that have no rank in common, and an alpha that is no number."""
    down, up = (list(tensors[module.keys[part]].shape) for part in ("down", "up"))
    if min(len(down), len(up)) < 2 or down[0] != up[1] or down[0] == 0:
        raise ShapeError(
            f"`{module.path}` of the LoRA `{name}` has the shapes {down} and {up}; expected "
            "[rank, inputs] and [outputs, rank], with a rank of 1 or more.",
            fix="download the file again.",
        )
    if "alpha" in module.keys and tensors[module.keys["alpha"]].numel() != 1:
        shape = list(tensors[module.keys["alpha"]].shape)
        raise ShapeError(
            f"The alpha of `{module.path}` in the LoRA `{name}` has shape {shape}; expected one "
            "number.",
            fix="download the file again.",
        )


def _layer(
    module: LoraModule, tensors: Mapping[str, torch.Tensor], scaling: LoraScaling
) -> LoraLayer:
    parts = {part: tensors[key] for part, key in module.keys.items()}
    rank = parts["down"].shape[0]
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    factor = scaling.factor(module.path, rank=rank, alpha=alpha)
    bias = parts.get("up_bias")
    if "bias" in parts:  # a plain difference, which alpha / rank does not scale
        bias = parts["bias"] / factor + (0 if bias is None else bias)
    return LoraLayer(parts["down"], parts["up"], factor * rank, bias)


def loras_of_recipe(
    recipe: Recipe, inputs: Mapping[str, LoraSource]
) -> tuple[dict[str, LoraSource], dict[str, dict[str, float]]] | None:
    """Read a recipe as weights of LoRAs on the model that is loaded.

        inputs:  {base: "memory:base", style: style.safetensors}
        experts: {dynamics: "base - lora(style, 0.25)", consistency: "base + lora(style, 1.0)"}

    Args:
        recipe: The recipe.
        inputs: What replaces its inputs.

    Returns:
        The LoRAs, and for each expert the weight of each; None if the experts are more than that
        or are built on weights that have to be read.

    Raises:
        CheckpointError: A file is missing or is not the one that the recipe pins.
    """
    weights: dict[str, dict[str, float]] = {}
    for name, expert in recipe.experts.items():
        base = expert.anchor.name
        terms = [term for vector in expert.vectors for term in _terms(vector)]
        if recipe.inputs[base].path != OWN_MODEL or base in inputs or None in dict(terms):
            return None
        weights[name] = {}
        for lora, weight in terms:
            weights[name][str(lora)] = weights[name].get(str(lora), 0.0) + weight
    used = list(dict.fromkeys(lora for own in weights.values() for lora in own))
    if not used:
        return None
    origins = {lora: recipe.origin(lora, inputs.get(lora)) for lora in used}
    recipe.check_pins(origins, overridden=inputs)
    loras: dict[str, LoraSource] = {
        lora: {key: origin.read(key) for key in origin.keys()}  # noqa: SIM118
        if isinstance(origin, MemoryTensors)
        else origin
        for lora, origin in origins.items()
    }
    return loras, weights


def named_loras(
    lora: LoraSource | Mapping[str, LoraSource],
    weights: Mapping[str, float | Mapping[str, float]] | None,
    *,
    motion: float | None,
) -> tuple[dict[str, LoraSource], dict[str, dict[str, float]]]:
    """Spell out the short forms: one LoRA without a name, one weight for all, `motion`.

    Raises:
        ConfigError: Neither `weights` nor `motion` is given, or both.
    """
    single = isinstance(lora, (str, Path)) or any(torch.is_tensor(v) for v in lora.values())
    loras: dict[str, Any] = {"lora": lora} if single else dict(lora)  # type: ignore[arg-type]
    if (weights is None) == (motion is None):
        raise ConfigError(
            "A LoRA needs either weights or motion.",
            fix="pass motion=0.25, or weights={'dynamics': -0.25, 'consistency': 1.0}.",
        )
    if motion is not None:
        weights = {"dynamics": -motion, "consistency": 1.0}
    spelled = {
        expert: dict(own) if isinstance(own, Mapping) else dict.fromkeys(loras, own)
        for expert, own in (weights or {}).items()
    }
    return loras, spelled


def _terms(vector: TaskVector) -> list[tuple[str | None, float]]:
    """The LoRAs in a task vector with their weights; None stands for anything else."""
    if isinstance(vector, Lora):
        return [(vector.source.name, vector.scale)]
    if isinstance(vector, Scaled):
        return [(name, vector.factor * weight) for name, weight in _terms(vector.vector)]
    if isinstance(vector, Sum):
        return _terms(vector.left) + _terms(vector.right)
    return [(None, 0.0)]
