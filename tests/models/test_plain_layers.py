"""Fast paths read a layer's weight only where calling the layer would do no more than that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from motionmerge.models.diffusers_state import is_hooked, moves_weights
from motionmerge.models.dynamicrafter.adapter import TemporalFusion
from motionmerge.models.dynamicrafter.fast_layers import FastGEGLU
from motionmerge.models.plain_layers import is_plain_linear

HOOKS = {
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
    "hook": lambda layer: layer.register_forward_hook(lambda _, __, made: made + 1),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "own forward": lambda layer: setattr(layer, "forward", lambda x: x.new_ones(*x.shape[:-1], 4)),
    "parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "offload": lambda layer: accelerate.cpu_offload(layer, torch.device("cpu")),
    "fp8": lambda layer: apply_layerwise_casting(
        layer, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    ),
}


class Holder(nn.Module):
    """A layer that PEFT can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: Any = nn.Linear(6, 4)


@pytest.mark.parametrize("change", HOOKS.values(), ids=HOOKS)
def test_a_layer_whose_call_does_more_is_called(change: Callable[[Any], Any]) -> None:
    fusion, geglu = TemporalFusion(4, 2), FastGEGLU(6, 2)
    context, hidden, x = torch.randn(2, 3, 2), torch.randn(8, 3, 4), torch.randn(5, 6)
    tokens = context.repeat_interleave(4, 0)
    torch.nn.init.normal_(fusion.proj.weight)
    assert is_plain_linear(fusion.proj, hidden) and is_plain_linear(geglu.proj, x)
    for layer in (fusion.proj, geglu.proj):
        change(layer)
        assert not is_plain_linear(layer, x)
    with torch.no_grad():
        called = fusion.proj(torch.cat([hidden, tokens], -1))
        torch.testing.assert_close(fusion(hidden, context), called)
        value, gate = geglu.proj(x).chunk(2, -1)
        torch.testing.assert_close(geglu(x), value * nn.functional.gelu(gate))


def test_other_types_devices_and_subclasses_are_not_plain() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    assert not is_plain_linear(layer, x.double()) and not is_plain_linear(layer, x.to("meta"))
    assert not is_plain_linear(type("Other", (nn.Linear,), {})(6, 4), x)
    assert not is_plain_linear(nn.Identity(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_plain_linear(layer, x.bfloat16())
    layer.weight = type("Packed", (nn.Parameter,), {})(layer.weight.data)
    assert not is_plain_linear(layer, x), "as quantised weights have types of their own"


def test_a_lora_is_read_around_only_where_it_adds_nothing() -> None:
    holder, x = Holder(), torch.randn(3, 6)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"]), holder)
    layer = holder.layer
    assert not is_plain_linear(layer, x)
    layer.set_scale("default", 0)
    assert is_plain_linear(layer, x)
    layer.set_scale("default", 1)
    layer.merge()
    assert is_plain_linear(layer, x)
    layer.enable_adapters(False)  # a call takes it out of the weight
    assert not is_plain_linear(layer, x)
    layer.unmerge()
    assert is_plain_linear(layer, x)
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert not is_plain_linear(layer, x)


def test_a_zero_dora_still_changes_the_weight_s_length() -> None:
    holder = Holder()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"], use_dora=True), holder)
    holder.layer.set_scale("default", 0)
    assert not is_plain_linear(holder.layer, torch.randn(3, 6))


def test_hooks_inside_a_model_are_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_pre_hook(lambda *_: None)
    assert not is_hooked(model), "its own hooks are called by whoever calls it"
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    assert is_hooked(model) and not moves_weights(model)
    model = nn.Sequential(nn.Linear(4, 4))
    HOOKS["offload"](model[0])
    assert is_hooked(model) and moves_weights(model)
    model = nn.Sequential(nn.Linear(4, 4))
    HOOKS["hook"](model[0])
    assert is_hooked(model) and not moves_weights(model)
