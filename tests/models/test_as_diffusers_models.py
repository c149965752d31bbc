"""Our U-Nets under everything that diffusers offers for its own models.

What its test mixins check, in the same order: saving, training, memory, attention, LoRA, hot swap.
Offloading goes from the CPU to the CPU: weights on "meta" or in files between calls, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils.modeling import compute_module_sizes
from peft import LoraConfig

from motionmerge.errors import ConfigError
from motionmerge.models.dynamicrafter.cross_attention import NativeAttentionMixin

from ..tiny.unets import UNETS, TinyUNet

every_unet = pytest.mark.parametrize("tiny", UNETS.values(), ids=UNETS)
FP8 = torch.float8_e4m3fn


@torch.no_grad()
def predicted(unet: Any, tiny: TinyUNet, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    inputs = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in tiny.inputs().items()
    }
    made: torch.Tensor = unet(**inputs, return_dict=False)[0]
    assert torch.isfinite(made).all()
    return made


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    """Check equality up to the rounding of another order of sums."""
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5 * float(second.abs().max()))


def add_lora(unet: Any, seed: int, *, name: str = "one", rank: int = 2) -> None:
    """Add a LoRA to every linear layer and convolution of two dimensions."""
    layers = [
        layer.removesuffix(".base_layer")
        for layer, child in unet.named_modules()
        if isinstance(child, (torch.nn.Linear, torch.nn.Conv2d)) and ".lora_" not in layer
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"r": rank, "lora_alpha": 2 * rank, "init_lora_weights": False}
        unet.add_adapter(LoraConfig(target_modules=layers, **settings), adapter_name=name)
        for key, one in unet.named_parameters():
            if f"lora_B.{name}" in key:
                one.data.mul_(0.1)


@every_unet
@torch.no_grad()
def test_saved_in_any_way_it_is_loaded_with_every_bit(tiny: TinyUNet, tmp_path: Path) -> None:
    unet = tiny.make()
    expected = predicted(unet, tiny)
    assert torch.equal(predicted(unet, tiny), expected)
    assert torch.equal(unet(**tiny.inputs()).sample, expected)
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"max_shard_size": "40KB", "variant": "fp16"}, {"variant": "fp16"}),
    ]
    for number, (how, again) in enumerate(kinds):
        folder = tmp_path / str(number)
        unet.save_pretrained(folder, **how)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == ("max_shard_size" in how)
        loaded = type(unet).from_pretrained(folder, **again).requires_grad_(False)
        stored = loaded.state_dict()
        assert all(torch.equal(stored[name], one) for name, one in unet.state_dict().items())
        close(predicted(loaded, tiny), expected)  # weights in a file's memory may not be aligned
        if again:
            with pytest.raises(OSError, match="no file named"):
                type(unet).from_pretrained(folder)
    half = type(unet).from_pretrained(tmp_path / "0", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert predicted(half, tiny, torch.bfloat16).dtype == torch.bfloat16


@every_unet
def test_checkpointed_gradients_are_the_same(tiny: TinyUNet) -> None:
    if not tiny.make()._supports_gradient_checkpointing:  # diffusers' I2VGen-XL: refused by name
        with pytest.raises(ValueError, match="does not support gradient checkpointing"):
            tiny.make().enable_gradient_checkpointing()
        return
    gradients = []
    for is_checkpointed in (False, True):
        unet = tiny.make().requires_grad_(True)
        if is_checkpointed:
            unet.enable_gradient_checkpointing()
        unet(**tiny.inputs(), return_dict=False)[0].square().mean().backward()
        gradients.append({name: one.grad for name, one in unet.named_parameters()})
    plain, checkpointed = gradients
    assert all(value is not None and torch.isfinite(value).all() for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value)


@every_unet
def test_it_trains_under_autocast_with_weights_in_fp8(tiny: TinyUNet) -> None:
    unet = tiny.make().requires_grad_(True).train()
    unet.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        unet(**tiny.inputs(), return_dict=False)[0].float().square().mean().backward()
    gradients = {name: one.grad for name, one in unet.named_parameters()}
    assert all(one is not None for one in gradients.values())
    # On a CPU, torch's convolutions over frames have NaN in halves, also of diffusers' plain SVD.
    assert all(one.isfinite().all() or "temporal_res" in name for name, one in gradients.items())
    assert all(one.any() for name, one in gradients.items() if name.startswith("conv_in"))


def by_turns(unet: Any, folder: Path) -> None:
    accelerate.cpu_offload(unet, torch.device("cpu"))


def leaves_to_files(unet: Any, folder: Path) -> None:
    unet.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=str(folder))


def blocks_to_files(unet: Any, folder: Path) -> None:
    unet.enable_group_offload(
        "cpu",
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )


@pytest.mark.parametrize("offload", [by_turns, leaves_to_files, blocks_to_files])
@every_unet
def test_offloaded_it_predicts_the_same(
    tiny: TinyUNet, offload: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    unet = tiny.make()
    expected = predicted(unet, tiny)
    offload(unet, tmp_path)
    close(predicted(unet, tiny), expected)
    assert (offload is by_turns) == any(one.is_meta for one in unet.parameters())
    if offload is not by_turns:  # diffusers would read the weights that are there
        with pytest.raises(ConfigError, match="weights of an earlier group offload"):
            offload(tiny.make(), tmp_path)


@pytest.mark.parametrize("name", ["DynamiCrafter with adapter", "ConsistI2V"])
def test_loaded_in_part_and_the_rest_left_on_disk_it_predicts_the_same(
    name: str, tmp_path: Path
) -> None:
    tiny = UNETS[name]
    unet = tiny.make()
    expected = predicted(unet, tiny)
    unet.save_pretrained(tmp_path / "saved")
    limit = {"cpu": compute_module_sizes(unet)[""] // 2}
    split = type(unet).from_pretrained(
        tmp_path / "saved", device_map="auto", max_memory=limit, offload_folder=tmp_path / "rest"
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    close(predicted(split, tiny), expected)


@pytest.mark.parametrize("has_lora", [False, True], ids=["alone", "with LoRA"])
@every_unet
def test_weights_in_fp8_predict_as_weights_that_are_rounded_to_it(
    tiny: TinyUNet, has_lora: bool
) -> None:
    unet, rounded = tiny.make(), tiny.make()
    if has_lora:
        add_lora(unet, 1), add_lora(rounded, 1)
    unet.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    cast = [name for name, one in unet.named_parameters() if one.dtype == FP8]
    assert len(cast) > 10 and not any("norm" in name for name in cast)
    assert any("proj" in name and ("ff" in name or "fusion" in name) for name in cast)
    for name in cast:
        parameter = rounded.get_parameter(name)
        parameter.data = parameter.data.to(FP8).float()
    close(predicted(unet, tiny), predicted(rounded, tiny))


@every_unet
def test_own_processors_and_the_native_backend_change_no_bit(tiny: TinyUNet) -> None:
    unet = tiny.make()
    expected = predicted(unet, tiny)
    unet.set_attn_processor(dict(unet.attn_processors))
    unet.set_attention_backend("native")
    assert torch.equal(predicted(unet, tiny), expected)
    unet.reset_attention_backend()
    if isinstance(unet, NativeAttentionMixin):
        with pytest.raises(ConfigError, match="`flash` would have no effect"):
            unet.set_attention_backend("flash")
    with pytest.raises(ValueError, match="number of processors"):
        unet.set_attn_processor(dict(list(unet.attn_processors.items())[:1]))


@every_unet
def test_a_lora_acts_wherever_it_is_and_one_of_weight_0_changes_no_bit(
    tiny: TinyUNet, tmp_path: Path
) -> None:
    unet = tiny.make()
    expected = predicted(unet, tiny)
    add_lora(unet, 1)
    acting = predicted(unet, tiny)
    assert not torch.allclose(acting, expected, atol=1e-3)
    unet.set_adapters("one", 0.0)
    assert torch.equal(predicted(unet, tiny), expected)
    unet.set_adapters("one", 1.0)
    unet.disable_lora()
    assert torch.equal(predicted(unet, tiny), expected)
    unet.enable_lora()
    unet.fuse_lora()
    close(predicted(unet, tiny), acting)  # so no layer left its LoRA out
    unet.unfuse_lora()
    unet.save_lora_adapter(tmp_path, adapter_name="one")
    unet.unload_lora()
    close(predicted(unet, tiny), expected)
    unet.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    close(predicted(unet, tiny), acting)


@every_unet
def test_a_swapped_lora_acts_as_if_it_had_been_loaded(tiny: TinyUNet, tmp_path: Path) -> None:
    unet = tiny.make()
    add_lora(unet, 1)
    add_lora(unet, 2, name="two", rank=3)
    unet.set_adapter("two")
    acting = predicted(unet, tiny)
    for name in ("one", "two"):
        unet.save_lora_adapter(tmp_path / name, adapter_name=name)
    swapped = tiny.make()
    swapped.enable_lora_hotswap(target_rank=3)
    own = {"prefix": None, "adapter_name": "one", "use_safetensors": True}
    swapped.load_lora_adapter(tmp_path / "one", **own)
    assert not torch.allclose(predicted(swapped, tiny), acting, atol=1e-3)
    swapped.load_lora_adapter(tmp_path / "two", **own, hotswap=True)
    close(predicted(swapped, tiny), acting)


@torch.no_grad()
def test_a_lora_is_swapped_under_compiled_layers(tmp_path: Path) -> None:
    """The whole takes half a minute to compile; these have every fast path."""
    tiny = UNETS["DynamiCrafter with adapter"]
    acting = {}
    for number, rank in enumerate((2, 3)):
        unet = tiny.make()
        add_lora(unet, number, rank=rank)
        unet.save_lora_adapter(tmp_path / str(rank), adapter_name="one")
        acting[rank] = predicted(unet, tiny)
    unet = tiny.make()
    unet.enable_lora_hotswap(target_rank=3)
    own = {"prefix": None, "adapter_name": "one", "use_safetensors": True}
    unet.load_lora_adapter(tmp_path / "2", **own)
    unet.temporal_in.compile(backend="eager", fullgraph=True)
    close(predicted(unet, tiny), acting[2])
    unet.load_lora_adapter(tmp_path / "3", **own, hotswap=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        close(predicted(unet, tiny), acting[3])
