"""Experts on a quantised model: LoRAs beside its packed weights, of which no bit changes.

Run them with `make test-quantised`, which installs what quantises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from motionmerge.errors import CheckpointError
from motionmerge.switching.expert_bank import attached_bank, experts

from ..tiny.loras import with_weights
from ..tiny.pipelines import generate, tiny
from .test_lora_bank import ALPHA, RANK, RESCUE, family_named, lora_for

FAMILY = family_named("Wan 2.1")


def with_torchao(blocks: nn.Module, config: str) -> None:
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    torchao.quantize_(blocks, getattr(torchao, config)())


def with_bitsandbytes(blocks: nn.Module, make: Callable[[int, int], nn.Module]) -> None:
    """Replace every linear layer, as diffusers does when it loads a quantised model."""
    for parent in list(blocks.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                packed = make(layer.in_features, layer.out_features)
                packed.load_state_dict(layer.state_dict())
                setattr(parent, name, packed.to("cpu").eval())


def int8(inputs: int, outputs: int) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    return bitsandbytes.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False)


def nf4(inputs: int, outputs: int) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    layer = bitsandbytes.nn.Linear4bit(
        inputs, outputs, quant_type="nf4", compute_dtype=torch.float32
    )
    # Where the processor has AVX512-BF16, it packs weights at the first call, and takes multiples
    # of 32 alone: tiny layers are none.
    layer.support_avx512bf16_for_cpu = False
    return layer


QUANTISED: dict[str, Callable[[nn.Module], None]] = {
    "torchao int8 weights": lambda blocks: with_torchao(blocks, "Int8WeightOnlyConfig"),
    "torchao int8": lambda blocks: with_torchao(blocks, "Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes int8": lambda blocks: with_bitsandbytes(blocks, int8),
    "bitsandbytes nf4": lambda blocks: with_bitsandbytes(blocks, nf4),
}


@pytest.fixture(params=QUANTISED)
def pipeline(request: pytest.FixtureRequest) -> Any:
    """A tiny Wan whose blocks are quantised."""
    made = tiny(FAMILY)
    QUANTISED[request.param](made.transformer.blocks)
    kinds = {type(tensor.data).__name__ for tensor in made.transformer.blocks.parameters()}
    stored = {tensor.dtype for tensor in made.transformer.blocks.parameters()}
    assert "Int8Tensor" in kinds or stored & {torch.int8, torch.uint8}
    return made


def bits(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Copy every plain tensor of which a model's packed ones are made."""

    def inner(tensor: Any) -> Iterator[torch.Tensor]:
        if not hasattr(tensor, "__tensor_flatten__"):
            yield tensor.detach().clone()
            return
        for name in tensor.__tensor_flatten__()[0]:
            yield from inner(getattr(tensor, name))

    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: list(inner(tensor)) for name, tensor in tensors}


def same_bits(left: dict[str, list[torch.Tensor]], right: dict[str, list[torch.Tensor]]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(one, other)
        for name in left
        for one, other in zip(left[name], right[name], strict=True)
    )


def add_by_hand(model: nn.Module, lora: dict[str, torch.Tensor], weight: float) -> list[Any]:
    """Add a LoRA to what layers give, whatever their weights are packed as."""

    def hook(name: str) -> Callable[..., torch.Tensor]:
        down, up = (lora[f"transformer.{name}.lora_{one}.weight"] for one in "AB")
        scale = weight * ALPHA / RANK
        return lambda _, inputs, output: output + scale * (inputs[0] @ down.T @ up.T)

    named = [(name, child) for name, child in model.named_modules()]
    return [
        child.register_forward_hook(hook(name))
        for name, child in named
        if f"transformer.{name}.lora_A.weight" in lora
    ]


def test_signed_loras_change_no_bit_of_a_quantised_model(pipeline: Any) -> None:
    model, lora = pipeline.transformer, lora_for(tiny(FAMILY), FAMILY)
    plain, before = generate(pipeline, FAMILY), bits(pipeline.transformer)
    modules = [(name, type(module)) for name, module in model.named_modules()]

    none = dict.fromkeys(RESCUE, 0.0)
    with experts(pipeline, **with_weights(lora, none), boundary=FAMILY.boundary):
        assert torch.equal(generate(pipeline, FAMILY), plain)
    with experts(pipeline, **with_weights(lora, RESCUE), boundary=FAMILY.boundary):
        signed = generate(pipeline, FAMILY)
    assert same_bits(bits(model), before)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert torch.equal(generate(pipeline, FAMILY), plain)

    for weight in (-0.25, 1.0):
        with experts(pipeline, **with_weights(lora, {"all": weight})):
            ours = generate(pipeline, FAMILY)
        hooks = add_by_hand(model, lora, weight)
        torch.testing.assert_close(ours, generate(pipeline, FAMILY), atol=1e-3, rtol=1e-3)
        for hook in hooks:
            hook.remove()
        assert not torch.equal(ours, plain) and not torch.equal(ours, signed)


def test_dense_weights_of_a_quantised_layer_are_refused(pipeline: Any) -> None:
    before = bits(pipeline.transformer)
    dense = {
        f"transformer.{name}": tensor + 0.1
        for name, tensor in tiny(FAMILY).transformer.state_dict().items()
    }
    with pytest.raises(CheckpointError, match=r"quantised.*(?s:.)*Fix: Load the model in bf16"):
        experts(pipeline, {"one": dense})
    assert same_bits(bits(pipeline.transformer), before)
    assert attached_bank(pipeline.transformer) is None


def test_dense_weights_of_layers_that_are_not_quantised_are_switched(pipeline: Any) -> None:
    model = pipeline.transformer
    plain, name = generate(pipeline, FAMILY), "proj_out.weight"
    weight = model.state_dict()[name] + 0.1
    with experts(pipeline, {"one": {f"transformer.{name}": weight}}):
        assert torch.equal(model.proj_out.weight, weight)
        assert not torch.equal(generate(pipeline, FAMILY), plain)
    assert torch.equal(generate(pipeline, FAMILY), plain)
