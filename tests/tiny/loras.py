"""LoRAs with signed weights as arguments of `experts`, from files or from tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from motionmerge.merging.recipes.recipe import Recipe

LoraSource = str | Path | Mapping[str, torch.Tensor]


def with_weights(
    lora: LoraSource | Mapping[str, LoraSource],
    weights: Mapping[str, float | Mapping[str, float]],
) -> dict[str, Any]:
    """One LoRA, `style`, or several by name, with a weight for each expert."""
    single = isinstance(lora, (str, Path)) or any(map(torch.is_tensor, lora.values()))
    inputs = {"style": lora} if single else dict(lora)
    memory = {name: f"memory:{name}" for name in inputs}
    return {"recipe": Recipe.of_loras(weights, memory), "inputs": inputs}


def with_motion(lora: LoraSource, motion: float) -> dict[str, Any]:
    """The motion knob of one LoRA."""
    recipe = Recipe.knob(lora="memory:style", motion=motion)
    return {"recipe": recipe, "inputs": {"style": lora}}
