"""Scaled fp8 is written as ComfyUI reads it, and what of a change survives it is counted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.compute import scaled_fp8
from motionmerge.merging.compute.scaled_fp8 import Maxima, quantise
from motionmerge.merging.compute.survey import SAMPLE
from motionmerge.merging.merge import merge
from motionmerge.merging.recipes.recipe import Recipe

NAMES = ("blocks.0.attn.q", "blocks.1.attn.q")
FORMULA = "base - 0.25 * (tuned - base)"


def randn(*shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantised(weight):
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def state_of(seed, style):
    """Give a state dict in one of the styles, and the values that it stands for."""
    state, values = {}, {}
    for number, layer in enumerate(NAMES):
        codes, scale = quantised(randn(48, 64, seed=10 * seed + number))
        state |= {f"{layer}.weight": codes, f"{layer}.{style}": scale}
        values[f"{layer}.weight"] = codes.float() * scale
        if style == "weight_scale":
            text = b'{"format": "float8_e4m3fn"}'
            state[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if style == "scale_weight":
        state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    plain = {"blocks.0.norm.weight": randn(64, seed=seed), "head.weight": randn(8, 64, seed=seed)}
    return state | plain, values | plain


def carry_out(folder, formula, base, tuned=None, **options):
    """Merge two state dicts; give what the file holds, and the report."""
    inputs = {}
    for name, state in {"base": base, "tuned": base if tuned is None else tuned}.items():
        inputs[name] = folder / f"{name}.safetensors"
        save_weights(inputs[name], state)
    recipe = Recipe.parse(f"inputs: {{base: b, tuned: t}}\nexperts: {{m: '{formula}'}}")
    options = {"dtype": "fp8_scaled", "overwrite": True} | options
    report = merge(recipe, folder / "out", inputs=inputs, **options)
    return load_file(folder / "out" / "m.safetensors"), report.experts["m"], report


def same_codes(first, second):
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)))


@pytest.mark.parametrize("style", ["scale_weight", "weight_scale"])
def test_the_anchors_style_and_layers_come_back_with_new_scales(style, tmp_path):
    base, values = state_of(1, style)
    tuned, moved = state_of(2, style)
    found, expert, _ = carry_out(tmp_path, FORMULA, base, tuned)
    assert found.keys() == base.keys()
    for name in NAMES:
        start, end = values[f"{name}.weight"], moved[f"{name}.weight"]
        codes, scale = quantised(start - 0.25 * (end - start))
        assert torch.equal(found[f"{name}.{style}"], scale)
        assert same_codes(found[f"{name}.weight"], codes)
    assert found["head.weight"].dtype == torch.float32
    if style == "scale_weight":
        assert same_codes(found["scaled_fp8"], base["scaled_fp8"])
    else:
        text = bytes(found[f"{NAMES[0]}.comfy_quant"].tolist())
        assert json.loads(text) == {"format": "float8_e4m3fn"}
    assert f"2 weights are written as fp8 codes and scales (`{style}`)" in expert.note


def test_the_result_is_read_again_as_what_was_written(tmp_path):
    base, _ = state_of(1, "weight_scale")
    tuned, _ = state_of(2, "weight_scale")
    first, _, _ = carry_out(tmp_path, FORMULA, base, tuned)
    again, _, _ = carry_out(tmp_path, "base", first)
    assert first.keys() == again.keys()
    assert all(
        same_codes(first[name], again[name])
        for name in first
        if "weight" in name and "norm" not in name
    )


def test_adding_nothing_gives_the_same_codes_where_the_scale_is_the_same(tmp_path):
    base, _ = state_of(1, "weight_scale")
    tuned, _ = state_of(2, "weight_scale")
    found, _, _ = carry_out(tmp_path, "base + 0.0 * (tuned - base)", base, tuned)
    for name in NAMES:
        torch.testing.assert_close(
            found[f"{name}.weight_scale"], base[f"{name}.weight_scale"], rtol=2e-7, atol=0
        )
        assert same_codes(found[f"{name}.weight"], base[f"{name}.weight"])


def test_what_no_vector_reaches_keeps_codes_and_scale_bit_for_bit(tmp_path):
    base, _ = state_of(1, "weight_scale")
    base[f"{NAMES[1]}.weight_scale"] *= 3  # not what max / 448 would give, were it computed
    base[f"{NAMES[1]}.weight"] = (base[f"{NAMES[1]}.weight"].float() / 3).to(torch.float8_e4m3fn)
    tuned, _ = state_of(2, "weight_scale")
    formula = 'base - 0.25 * only(tuned - base, "blocks.0.*")'
    found, expert, _ = carry_out(tmp_path, formula, base, tuned)
    for last in ("weight", "weight_scale"):
        assert same_codes(found[f"{NAMES[1]}.{last}"], base[f"{NAMES[1]}.{last}"])
    assert "1 of them as they were" in expert.note
    assert expert.copied == 2


def test_int8_and_scales_of_rows_become_fp8_with_one_scale(tmp_path):
    base, _ = state_of(1, "weight_scale")
    scale = torch.rand(48, 1) / 1000
    codes = torch.randint(-127, 128, (48, 64), dtype=torch.int8)
    name = NAMES[0]
    base |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    del base[f"{name}.comfy_quant"]
    found, _, _ = carry_out(tmp_path, "base", base)
    wanted, new = quantised(codes.float() * scale)
    assert torch.equal(found[f"{name}.weight_scale"], new)
    assert same_codes(found[f"{name}.weight"], wanted)


def test_of_an_unquantised_anchor_matrices_inside_blocks_become_codes(tmp_path):
    plain = {
        "blocks.0.attn.q.weight": randn(48, 64).bfloat16(),
        "blocks.0.attn.q.bias": randn(48).bfloat16(),
        "blocks.0.norm.weight": randn(8, 8).bfloat16(),
        "blocks.0.mod.weight": randn(8, 8).bfloat16(),
        "blocks.0.conv.weight": randn(8, 8, 3, 3).bfloat16(),
        "patch_embedding.0.weight": randn(8, 8).bfloat16(),
        "head.weight": randn(8, 8).bfloat16(),
        "steps": torch.tensor(3),
    }
    found, _, report = carry_out(tmp_path, "base", plain)
    is_codes = {name for name, value in found.items() if value.dtype == torch.float8_e4m3fn}
    assert is_codes == {"blocks.0.attn.q.weight"}
    assert found.keys() - plain.keys() == {
        "blocks.0.attn.q.weight_scale",
        "blocks.0.attn.q.comfy_quant",
    }
    codes, _ = quantised(plain["blocks.0.attn.q.weight"].float())
    assert same_codes(found["blocks.0.attn.q.weight"], codes)
    assert report.bytes_written == sum(v.numel() * v.element_size() for v in found.values())


def test_a_file_with_nothing_to_quantise_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no weight"):
        carry_out(tmp_path, "base", {"head.bias": randn(8)})


@pytest.mark.parametrize("options", [{"layout": "pipeline"}, {"stochastic_rounding": 0}])
def test_options_that_do_not_go_with_codes_are_refused(options, tmp_path):
    with pytest.raises(ConfigError):
        carry_out(tmp_path, "base", state_of(1, "weight_scale")[0], **options)


def test_a_dry_run_says_what_will_be_written(tmp_path):
    base, _ = state_of(1, "weight_scale")
    save_weights(tmp_path / "base.safetensors", base)
    recipe = Recipe.parse("inputs: {base: b}\nexperts: {m: base}")
    inputs = {"base": tmp_path / "base.safetensors"}
    report = merge(recipe, tmp_path / "out", inputs=inputs, dtype="fp8_scaled", dry_run=True)
    size = sum(value.numel() * value.element_size() for value in base.values())
    assert report.disk_bytes == size
    assert "fp8 codes" in report.experts["m"].note
    assert not (tmp_path / "out").exists()


def test_shards_hold_codes_and_scales(tmp_path):
    base, _ = state_of(1, "weight_scale")
    save_weights(tmp_path / "base.safetensors", base)
    recipe = Recipe.parse("inputs: {base: b}\nexperts: {m: base}")
    inputs = {"base": tmp_path / "base.safetensors"}
    merge(recipe, tmp_path / "out", inputs=inputs, dtype="fp8_scaled", max_shard_size=4000)
    with open_weights(tmp_path / "out" / "m") as written:
        assert len(written.files) > 1
        assert set(written.keys()) == base.keys()
        assert same_codes(written.read(f"{NAMES[0]}.weight"), base[f"{NAMES[0]}.weight"])


def test_survival_is_counted_after_codes_are_made(tmp_path):
    base, values = state_of(1, "weight_scale")
    tuned = {
        name: value + 1e-3 * randn(*value.shape, seed=5) if value.ndim > 1 else value
        for name, value in values.items()
        if name.endswith("q.weight")
    }
    tuned = {**{n: v for n, v in values.items() if n not in tuned}, **tuned}
    found, expert, report = carry_out(tmp_path, "base + 1.0 * (tuned - base)", base, tuned)
    changed = survived = 0
    for name in NAMES:
        start, end, stored = (  # as many as are looked at
            held[f"{name}.weight"].flatten()[:SAMPLE] for held in (values, tuned, found)
        )
        kept = (start / found[f"{name}.weight_scale"]).to(torch.float8_e4m3fn).float()
        changed += int((start != end).sum())
        survived += int((stored.float() != kept)[start != end].sum())
    assert expert.survived == pytest.approx(survived / changed)
    assert expert.survived < 0.2
    assert "rounding swallowed" in str(report)


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.zeros(48, 64), 1.0),
        (torch.full((48, 64), 1e-42), 2.0**-126),
        (torch.full((48, 64), -3e38), 3e38 / 448),
        (torch.eye(48, 64), 1 / 448),
    ],
)
def test_weights_of_any_size_have_a_scale(weight, scale, tmp_path):
    found, _, _ = carry_out(tmp_path, "base", {"blocks.0.q.weight": weight})
    assert found["blocks.0.q.weight_scale"].item() == pytest.approx(scale, rel=1e-6)
    again = found["blocks.0.q.weight"].float() * found["blocks.0.q.weight_scale"]
    torch.testing.assert_close(again, weight, rtol=0.07, atol=1e-40)


def test_nan_stays_nan_if_it_is_allowed_and_infinity_is_refused(tmp_path):
    weight = randn(48, 64)
    weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        carry_out(tmp_path, "base", {"blocks.0.q.weight": weight})
    found, _, _ = carry_out(tmp_path, "base", {"blocks.0.q.weight": weight}, allow_nonfinite=True)
    is_nan = found["blocks.0.q.weight"].float().isnan()
    assert bool(is_nan[0, 0])
    assert int(is_nan.sum()) == 1
    weight[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="infinity"):
        carry_out(tmp_path, "base", {"blocks.0.q.weight": weight}, allow_nonfinite=True)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(-464, 464, width=32), min_size=1, max_size=70), st.booleans())
def test_codes_are_those_of_torch(values, is_compiled):
    values = np.array(values, np.float32)
    with pytest.MonkeyPatch.context() as patched:
        if not is_compiled:
            patched.setattr(scaled_fp8, "compiled_kernels", lambda: None)
        found = quantise(values, np.float32(1))
    wanted = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(found, wanted)


def test_every_code_and_every_middle_between_two_is_rounded_as_torch_does():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])])
    values = torch.cat([near, -near])
    wanted = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(quantise(values.numpy(), np.float32(1)), wanted)


def test_the_largest_magnitude_is_found_piece_by_piece():
    maxima = Maxima()
    for begin, piece in enumerate(([1.0, -3.0], [float("nan"), 2.0])):
        maxima.write_at("a", 8 * begin, np.array(piece, np.float32).data.cast("B"))
    assert maxima.scales(["a"]) == {"a": np.float32(3) / np.float32(448)}


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("formula", ["base", "base + 0.5 * (tuned - base)"])
def test_what_does_not_fit_into_plain_fp8_is_refused(dtype, formula, tmp_path):
    largest = {"fp8_e4m3fn": 448.0, "fp8_e5m2": 57344.0}[dtype]
    fits, lost = torch.full((4, 4), largest), torch.full((4, 4), 1.1 * largest)
    found, _, _ = carry_out(tmp_path, formula, {"a.weight": fits}, dtype=dtype)
    assert torch.equal(found["a.weight"].float(), fits)
    with pytest.raises(CheckpointError, match="does not fit"):
        carry_out(tmp_path, formula, {"a.weight": lost}, dtype=dtype)
