"""Codes and scales are read as the weights they stand for, however they are named, or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionmerge.errors import CheckpointError, MotionMergeError, ShapeError
from motionmerge.io.quantised import describe_quantisation, find_quantisation
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.algebra.groups import only
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.compare import compare
from motionmerge.merging.inputs import dequantised as module
from motionmerge.merging.inputs.dequantised import dequantised, values_of_codes
from motionmerge.merging.inputs.sources import MemoryTensors, OpenInputs, Source
from motionmerge.merging.lora.task_vector import lora
from motionmerge.merging.merge import apply, merge, realise
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.tensors import DType

LAYER = "blocks.0.attn1.to_q"
CODES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}
LARGEST = {"e4m3fn": 448, "e5m2": 57344, "int8": 127}


def randn(*shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_bytes(settings):
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def expanded(scale, shape, block):
    """Repeat the scales of blocks of a matrix to its own shape, cut off at the ends."""
    whole = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[: shape[0], : shape[1]]


def quantise(weight, codes, scale):
    scaled = weight / scale
    return scaled.round().to(torch.int8) if codes == "int8" else scaled.to(CODES[codes])


def checkpoint(seed=0, *, codes="e4m3fn", key="scale_weight", granularity="tensor", **more):
    """Give a state dict with one quantised layer, and the weights that it stands for."""
    weight = randn(24, 32, seed=seed)
    if granularity == "tensor":
        scale = weight.abs().max() / LARGEST[codes]
    elif granularity == "row":
        scale = weight.abs().amax(1, keepdim=True) / LARGEST[codes]
    held = quantise(weight, codes, scale)
    bias = randn(24, seed=seed + 1000).bfloat16()
    state = {f"{LAYER}.weight": held, f"{LAYER}.{key}": scale, f"{LAYER}.bias": bias, **more}
    return state, {f"{LAYER}.weight": held.float() * scale, f"{LAYER}.bias": bias}


def lora_file():
    down, up = randn(2, 32, seed=7) * 10, randn(24, 2, seed=8) * 10
    tensors = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
    return {f"transformer.{key}": value for key, value in tensors.items()}, up @ down


def values(state, metadata=None):
    """Read all tensors of a state dict as the engine sees them."""
    view = dequantised(MemoryTensors(state), metadata or {}, called="base")
    return {name: view.read(name) for name in view.keys()}  # noqa: SIM118


@pytest.mark.parametrize("codes", CODES)
def test_every_code_has_the_value_that_torch_gives_it(codes):
    dtype = {"e4m3fn": DType.FP8_E4M3FN, "e5m2": DType.FP8_E5M2, "int8": DType.INT8}[codes]
    every = torch.arange(256, dtype=torch.uint8).view(CODES[codes]).float()
    assert np.array_equal(values_of_codes(dtype), every.numpy(), equal_nan=True)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("key", ["scale_weight", "weight_scale", "weight_scale_inv"])
def test_weights_are_codes_times_scales_whatever_the_names(codes, granularity, key):
    state, weights = checkpoint(codes=codes, key=key, granularity=granularity)
    found = values({**state, f"{LAYER}.input_scale": torch.tensor(0.3)})
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight)


@pytest.mark.parametrize(
    ("shape", "scales", "block"),
    [
        ((256, 384), (2, 3), (128, 128)),  # DeepSeek, transformers, int8_blockwise
        ((200, 130), (2, 2), (128, 128)),  # the last blocks are cut off
        ((64, 256), (1, 2), (64, 128)),
        ((24, 64), (24, 2), (1, 32)),  # groups along the inputs
    ],
)
def test_scales_of_blocks_are_dealt_over_the_matrix(shape, scales, block):
    weight, scale = randn(*shape), 0.01 + torch.rand(scales)
    codes = weight.mul(50).to(torch.float8_e4m3fn)
    held = {f"{LAYER}.weight": codes, f"{LAYER}.weight_scale_inv": scale}
    found = values(held)[f"{LAYER}.weight"]
    assert torch.equal(found, codes.float() * expanded(scale, shape, block))


def test_scales_of_blocks_along_a_row_have_a_last_side_of_one():
    codes, scale = randn(24, 64).mul(50).to(torch.float8_e4m3fn), torch.rand(24, 4, 1)
    found = values({f"{LAYER}.weight": codes, f"{LAYER}.scale_weight": scale})
    wanted = (codes.float().view(24, 4, 16) * scale).view(24, 64)
    assert torch.equal(found[f"{LAYER}.weight"], wanted)


def test_convolutions_have_a_scale_for_each_output_channel():
    codes, scale = randn(8, 4, 3, 3).mul(50).to(torch.float8_e4m3fn), torch.rand(8, 1, 1, 1)
    found = values({f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": scale})
    assert torch.equal(found[f"{LAYER}.weight"], codes.float() * scale)


def test_a_group_size_says_which_of_two_ways_is_meant():
    codes, scale = randn(200, 200).mul(50).to(torch.float8_e4m3fn), torch.rand(2, 2)
    held = {f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": scale}
    with pytest.raises(CheckpointError, match="more than one way"):
        values(held)
    settings = {"format": "float8_e4m3fn_blockwise", "group_size": 128}
    found = values({**held, f"{LAYER}.comfy_quant": as_bytes(settings)})
    wanted = codes.float() * expanded(scale, (200, 200), (128, 128))
    assert torch.equal(found[f"{LAYER}.weight"], wanted)


def test_int8_of_bitsandbytes_is_in_units_of_127ths():
    codes = torch.randint(-127, 128, (24, 32), dtype=torch.int8)
    scale, order = torch.rand(24) + 0.1, torch.tensor(0, dtype=torch.uint8)
    held = {f"{LAYER}.weight": codes, f"{LAYER}.SCB": scale, f"{LAYER}.weight_format": order}
    found = values(held)
    assert found.keys() == {f"{LAYER}.weight"}
    assert torch.equal(found[f"{LAYER}.weight"], codes.float() * (scale / 127)[:, None])
    with pytest.raises(CheckpointError, match="order"):
        values({**held, f"{LAYER}.weight_format": torch.tensor(2, dtype=torch.uint8)})


def test_settings_may_stand_in_the_header_without_the_prefix_and_codes_may_be_bytes():
    state, weights = checkpoint(key="weight_scale")
    state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"].view(torch.uint8)
    state = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    layers = {LAYER: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    found = values(state, metadata)
    name = f"model.diffusion_model.{LAYER}.weight"
    assert torch.equal(found[name], weights[f"{LAYER}.weight"])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_piece_of_a_weight_is_that_piece_of_the_whole(data):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    scale = torch.rand(data.draw(st.sampled_from([(), (rows,), (rows, 1)])))
    state = {"a.weight": codes.view(torch.float8_e5m2), "a.scale_weight": scale}
    wanted = state["a.weight"].float() * (scale if scale.ndim != 1 else scale[:, None])
    view = dequantised(MemoryTensors(state), {}, called="base")
    whole = wanted.numpy().tobytes()
    begin = data.draw(st.integers(0, len(whole)))
    piece = bytearray(data.draw(st.integers(0, len(whole) - begin)))
    view.read_into("a.weight", begin, memoryview(piece))
    found = np.frombuffer(bytes(whole[:begin]) + bytes(piece) + whole[begin + len(piece) :], "f4")
    assert np.array_equal(found, wanted.flatten().numpy(), equal_nan=True)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_without_compiled_kernels_the_bits_are_the_same(granularity, monkeypatch):
    state, weights = checkpoint(granularity=granularity)
    monkeypatch.setattr(module, "compiled_kernels", lambda: None)
    assert torch.equal(values(state)[f"{LAYER}.weight"], weights[f"{LAYER}.weight"])


def test_codes_without_any_scale_are_plain_numbers():
    codes = randn(24, 32).to(torch.float8_e4m3fn)
    marker = torch.zeros(0, dtype=torch.float8_e4m3fn)
    assert values({"a.weight": codes})["a.weight"].dtype == torch.float8_e4m3fn
    assert values({"a.weight": codes, "scaled_fp8": marker}).keys() == {"a.weight"}


@pytest.mark.parametrize("side", ["base", "tuned", "both"])
@pytest.mark.parametrize("codes", CODES)
def test_extrapolation_has_the_bits_of_plain_arithmetic(side, codes, tmp_path):
    states = {}
    for seed, name in enumerate(("base", "tuned")):
        state, weights = checkpoint(seed, codes=codes, granularity="row")
        states[name] = weights
        save_weights(tmp_path / f"{name}.safetensors", state if side in (name, "both") else weights)
    recipe = Recipe.parse(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\n"
        "experts: {m: 'base - 0.25 * (tuned - base)'}"
    )
    inputs = {name: tmp_path / f"{name}.safetensors" for name in states}
    report = merge(recipe, tmp_path / "out", inputs=inputs)
    with open_weights(tmp_path / "out" / "m.safetensors") as written:
        assert set(written.keys()) == states["base"].keys()
        for name, base in states["base"].items():
            wanted = base.float() - 0.25 * (states["tuned"][name].float() - base.float())
            is_codes = name.endswith("weight") and side != "tuned"
            dtype = torch.bfloat16 if is_codes else base.dtype
            assert torch.equal(written.read(name), wanted.to(dtype))
    assert ("written in bf16" in str(report)) == (side != "tuned")
    found = realise(recipe, inputs=inputs)["m"]
    assert found[f"{LAYER}.weight"].dtype == (torch.float32 if side == "tuned" else torch.bfloat16)


@pytest.mark.parametrize("codes", ["e4m3fn", "int8"])
def test_what_no_vector_reaches_is_written_in_bf16_too(codes, tmp_path):
    base, weights = checkpoint(0, codes=codes)
    tuned, _ = checkpoint(1, codes=codes)
    start, end = (
        Checkpoint.from_tensors(base, name="base"),
        Checkpoint.from_tensors(tuned, name="tuned"),
    )
    found = (start + only(end - start, "*.bias")).tensors()
    assert torch.equal(found[f"{LAYER}.weight"], weights[f"{LAYER}.weight"].bfloat16())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_dtype_that_is_asked_for_is_that_of_the_values(dtype, tmp_path):
    state, weights = checkpoint()
    save_weights(tmp_path / "base.safetensors", state)
    recipe = Recipe.parse("inputs: {base: x}\nexperts: {m: base}")
    inputs = {"base": tmp_path / "base.safetensors"}
    merge(recipe, tmp_path / "out", inputs=inputs, dtype=dtype)
    with open_weights(tmp_path / "out" / "m.safetensors") as written:
        found = written.read(f"{LAYER}.weight")
    assert torch.equal(found, weights[f"{LAYER}.weight"].to(found.dtype))
    assert {"fp32": 4, "fp16": 2, "bf16": 2}[dtype] == found.element_size()


@pytest.mark.parametrize("codes", CODES)
def test_a_lora_on_codes_changes_the_weight_by_its_product(codes):
    state, weights = checkpoint(codes=codes)
    adapter, product = lora_file()
    changed = Checkpoint.from_tensors(state, name="base") + lora(adapter, 0.5)
    wanted = weights[f"{LAYER}.weight"] + 0.5 * product
    assert torch.equal(changed.tensors()[f"{LAYER}.weight"], wanted.bfloat16())


def test_apply_gives_a_live_module_the_values_of_codes():
    state, weights = checkpoint()
    live = torch.nn.Linear(32, 24)
    recipe = Recipe.parse("inputs: {base: x}\nexperts: {m: base}")
    apply(recipe, live, inputs={"base": {k.removeprefix(LAYER + "."): v for k, v in state.items()}})
    assert torch.equal(live.weight.detach(), weights[f"{LAYER}.weight"])


def test_comparing_codes_compares_the_values():
    state, weights = checkpoint()
    assert not compare(
        Checkpoint.from_tensors(state, name="a"), Checkpoint.from_tensors(weights, name="b")
    ).changed


NF4 = {
    f"{LAYER}.weight": torch.zeros(288, 1, dtype=torch.uint8),
    f"{LAYER}.weight.absmax": torch.ones(9),
    f"{LAYER}.weight.quant_map": torch.linspace(-1, 1, 16),
    f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
}
BYTES = torch.zeros(24, 16, dtype=torch.uint8)
INT8 = torch.ones(24, 32, dtype=torch.int8)
FOREIGN = {
    "bitsandbytes 4-bit": NF4,
    "torchao": {f"{LAYER}.weight:qdata": INT8, f"{LAYER}.weight:scale": torch.ones(24)},
    "torchao 2": {f"{LAYER}._weight_qdata": INT8, f"{LAYER}._weight_scale": torch.ones(24)},
    "optimum-quanto": {f"{LAYER}.weight._data": INT8, f"{LAYER}.weight._scale": torch.ones(24)},
    "SVDQuant": {f"{LAYER}.qweight": INT8, f"{LAYER}.wscales": torch.ones(2, 24)},
    "HQQ": {f"{LAYER}.W_q": BYTES, f"{LAYER}.scale": torch.ones(24), f"{LAYER}.zero": BYTES},
    "GPTQ or AWQ": {f"{LAYER}.qweight": INT8.int(), f"{LAYER}.qzeros": INT8.int()},
    "nvfp4": {
        f"{LAYER}.weight": BYTES,
        f"{LAYER}.weight_scale": torch.ones(24, 2).to(torch.float8_e4m3fn),
        f"{LAYER}.weight_scale_2": torch.tensor(1.0),
        f"{LAYER}.comfy_quant": as_bytes({"format": "nvfp4"}),
    },
    "mxfp8": {
        f"{LAYER}.weight": randn(24, 32).to(torch.float8_e4m3fn),
        f"{LAYER}.weight_scale": torch.ones(24, 1, dtype=torch.uint8),
    },
    "convrot": {
        f"{LAYER}.weight": INT8,
        f"{LAYER}.weight_scale": torch.ones(24, 1),
        f"{LAYER}.comfy_quant": as_bytes({"format": "int8_tensorwise", "convrot": True}),
    },
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_codes_that_are_not_read_are_refused_by_name_and_described(kind):
    state = FOREIGN[kind]
    start = Checkpoint.from_tensors(state, name="base")
    adapter, _ = lora_file()
    name = kind.removesuffix(" 2")
    for work in (
        lambda: (
            start - 0.25 * (Checkpoint.from_tensors(dict(state), name="tuned") - start)
        ).tensors(),
        lambda: (start + lora(adapter, 1.0)).tensors(),
        lambda: compare(start, Checkpoint.from_tensors(dict(state), name="other")),
    ):
        with pytest.raises(CheckpointError, match=name) as caught:
            work()
        assert "unquantised" in caught.value.fix
    assert name in describe_quantisation(MemoryTensors(state), {})


def faulty(**more):
    state, _ = checkpoint()
    state |= {f"{LAYER}.{last}": value for last, value in more.items()}
    return {name: value for name, value in state.items() if value is not None}


FAULTS = {
    "two scales": faulty(weight_scale=torch.tensor(1.0)),
    "no `weight`": faulty(weight=None),
    "beside a weight in bf16": faulty(weight=randn(24, 32).bfloat16()),
    "do not fit": faulty(scale_weight=torch.ones(7)),
    "weight_scale_2": faulty(weight_scale_2=torch.tensor(1.0)),
    "pre_quant_scale": faulty(pre_quant_scale=torch.ones(32)),
    "zero_point": faulty(zero_point=torch.ones(24)),
    "not JSON": faulty(comfy_quant=torch.ones(3, dtype=torch.uint8)),
    "not read: format float9": faulty(comfy_quant=as_bytes({"format": "float9"})),
    "marked as int8_tensorwise": faulty(comfy_quant=as_bytes({"format": "int8_tensorwise"})),
    "has no scale": faulty(scale_weight=None, comfy_quant=as_bytes({"format": "float8_e4m3fn"})),
    "has `scale`, which is not read": faulty(scale_weight=None, scale=torch.tensor(0.5)),
    "has `weight_scales`": faulty(scale_weight=None, weight_scales=torch.ones(24)),
    **{
        f"has `{last}`": faulty(scale_weight=None, **{last: torch.ones(24)})
        for last in ("weight_s", "weight_amax", "_extra_state", "input_scale")
    },
    "has `max_scale`": faulty(scale_weight=None, **{"weight.max_scale": torch.ones(24)}),
    "holds nan": faulty(scale_weight=torch.tensor(float("nan"))),
    "holds inf": faulty(scale_weight=torch.tensor(float("inf"))),
    "holds -1.0": faulty(scale_weight=torch.tensor(-1.0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_scales_and_weights_that_do_not_belong_together_are_refused(fault):
    with pytest.raises(CheckpointError, match=fault):
        values(FAULTS[fault])


def test_fp8_whose_scales_are_in_a_file_beside_it_is_refused(tmp_path):
    """As HunyuanVideo publishes it: `..._fp8.pt` and `..._fp8_map.pt`."""
    state, _ = checkpoint()
    del state[f"{LAYER}.scale_weight"]
    torch.save(state, tmp_path / "states_fp8.pt")
    start = Checkpoint.load(tmp_path / "states_fp8.pt")
    change, _ = lora_file()
    (start + lora(change, 1.0)).tensors()
    torch.save({LAYER: torch.tensor(0.01)}, tmp_path / "states_fp8_map.pt")
    with pytest.raises(CheckpointError, match=r"scales are in states_fp8_map\.pt"):
        (start + lora(change, 1.0)).tensors()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("entries", [0, 2])
def test_the_marker_of_comfyui_is_no_empty_weight_whatever_its_size(prefix, entries, tmp_path):
    state, weight = checkpoint()
    marker = torch.zeros(entries, dtype=torch.float8_e4m3fn)
    named = {prefix + name: value for name, value in (state | {"scaled_fp8": marker}).items()}
    save_weights(tmp_path / "base.safetensors", named)
    change, product = lora_file()
    scaled = Checkpoint.load(tmp_path / "base.safetensors") + lora(change, 1.0)
    found = scaled.tensors()[f"{prefix}{LAYER}.weight"].float()
    wanted = weight[f"{LAYER}.weight"] + product
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-6)


def test_a_scale_of_zero_makes_zeros():
    found = values(faulty(scale_weight=torch.tensor(0.0)))
    assert not found[f"{LAYER}.weight"].any()


def test_a_code_that_is_nan_is_refused_like_any_nan():
    state, _ = checkpoint()
    state[f"{LAYER}.weight"].view(torch.uint8)[3, 5] = 0x7F
    start = Checkpoint.from_tensors(state, name="base")
    adapter, _ = lora_file()
    with pytest.raises(CheckpointError, match="NaN"):
        (start + lora(adapter, 1.0)).tensors()


def test_a_header_that_lists_a_layer_that_is_not_there_is_refused():
    state, _ = checkpoint(key="weight_scale")
    layers = {"blocks.9.attn1.to_q": {"format": "float8_e4m3fn"}}
    with pytest.raises(CheckpointError, match="0 tensors fit"):
        values(state, {"_quantization_metadata": json.dumps({"layers": layers})})


def test_integers_that_a_vector_should_change_are_refused_and_buffers_are_copied():
    weights = {f"{LAYER}.weight": INT8, "steps": torch.arange(5), f"{LAYER}.bias": randn(24)}
    adapter, _ = lora_file()
    start = Checkpoint.from_tensors(weights, name="base")
    other = Checkpoint.from_tensors(dict(weights), name="tuned")
    for changed in (start + lora(adapter, 1.0), start - 0.5 * (other - start)):
        with pytest.raises(ShapeError, match="codes"):
            changed.tensors()
    with pytest.raises(MotionMergeError, match="codes"):
        compare(start, other)
    plain = {"steps": torch.arange(5), f"{LAYER}.weight": randn(24, 32)}
    found = (Checkpoint.from_tensors(plain, name="plain") + lora(adapter, 1.0)).tensors()
    assert torch.equal(found["steps"], plain["steps"])


def test_layers_may_be_quantised_in_different_ways(tmp_path):
    first, wanted = checkpoint(0, codes="int8", key="weight_scale")
    state = {**first, "blocks.1.k.weight": randn(8, 8), "blocks.2.k.weight": randn(4, 4).half()}
    other, more = checkpoint(1, codes="e5m2", key="scale_weight")
    state |= {f"x.{name}": value for name, value in other.items()}
    save_weights(tmp_path / "mixed.safetensors", state)
    source = Source("base", tmp_path / "mixed.safetensors")
    with OpenInputs([source]) as opened:
        assert len(opened.names(source)) == len(state) - 2
        found = opened.value(source, f"x.{LAYER}.weight")
        assert torch.equal(found, more[f"{LAYER}.weight"])
        assert torch.equal(opened.value(source, f"{LAYER}.weight"), wanted[f"{LAYER}.weight"])
    with open_weights(tmp_path / "mixed.safetensors") as reader:
        words = describe_quantisation(reader, reader.metadata)
        assert find_quantisation(reader, {}, called="x").weights.keys() == {
            f"{LAYER}.weight",
            f"x.{LAYER}.weight",
        }
    assert words == "int8 with `weight_scale`: 1 layers, fp8_e5m2 with `scale_weight`: 1 layers"


def test_tensors_of_torchao_in_memory_are_refused():
    class Flattened(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

    with pytest.raises(CheckpointError, match="Flattened"):
        MemoryTensors({"a.weight": torch.ones(2).as_subclass(Flattened)})


def test_codes_without_a_scale_behind_comfyuis_marker_are_their_own_values(tmp_path):
    weight = torch.tensor([[0.5, -2.0], [448.0, 1.0]]).to(torch.float8_e4m3fn)
    marker = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    save_weights(tmp_path / "fp8.safetensors", {"a.weight": weight, **marker})
    read = Checkpoint.load(tmp_path / "fp8.safetensors").tensors()
    assert list(read) == ["a.weight"]
    assert torch.equal(read["a.weight"].float(), weight.float())
