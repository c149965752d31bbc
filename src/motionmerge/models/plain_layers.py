"""Which layers a fast path may read the weights of, instead of calling them.

A call may do more than the layer's arithmetic: bring weights that wait elsewhere, cast them, add a
LoRA. Whoever reads the weight around such a call computes without all that, or with whatever lies
in the memory meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn


def is_plain_linear(layer: nn.Module, values: torch.Tensor) -> bool:
    """Return whether `layer(values)` is the product with `layer.weight`, plus `layer.bias`.

    Not where hooks run, `forward` was replaced (as accelerate and diffusers do to offload and cast
    weights), the weight is quantised, or a LoRA is added. A LoRA that adds nothing, as its weight
    is 0 or it is in the layer's weight already, changes no bit by this.
    """
    if type(layer) is LoraLinear:
        base: Any = layer.base_layer
        return is_only_called(layer) and _adds_nothing(layer) and is_plain_linear(base, values)
    if type(layer) is not nn.Linear or not is_only_called(layer):
        return False
    weight = layer.weight
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.device == values.device
        and (weight.dtype == values.dtype or torch.is_autocast_enabled(values.device.type))
    )


def is_only_called(layer: nn.Module) -> bool:
    """Return whether a call runs the class's `forward`, and nothing before and after it."""
    return "forward" not in vars(layer) and not (
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or nn.modules.module._has_any_global_hook()
    )


def _adds_nothing(layer: LoraLinear) -> bool:
    if layer.disable_adapters:
        return not layer.merged  # else the call takes it out of the weight first
    if layer.merged:  # then the call adds nothing that is not in the weight
        return True
    used = [name for name in layer.active_adapters if name in layer.lora_A]
    return all(_is_zero(layer.scaling[name]) and name not in layer.lora_variant for name in used)


def _is_zero(weight: Any) -> bool:
    """Return whether a LoRA's weight is 0 and stays so; one that is a tensor is for swapping."""
    if torch.is_tensor(weight) and torch.compiler.is_compiling():
        return False  # a compiled call cannot depend on it, and is kept when it changes
    return bool(weight == 0)
