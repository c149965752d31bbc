"""Exports as scaled fp8: the codes are those of plain arithmetic, under the names of the file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.exports.files import export_comfyui, export_files
from motionmerge.exports.loras import export_loras
from motionmerge.exports.names import naming, nothing
from motionmerge.exports.two_experts import export_two_experts
from motionmerge.io.weights import open_weights
from motionmerge.merging.merge import merge
from motionmerge.merging.recipes.recipe import Recipe

from ..tiny.denoisers import state_of

MORE = Recipe.parse("inputs: {base: a, tuned: b}\nexperts: {more: base + 2.0 * (tuned - base)}")
CODES = torch.float8_e4m3fn


def inputs_of(kind, *, seed=1, step=0.05):
    base, generator = state_of(kind), torch.Generator().manual_seed(seed)
    tuned = {n: v + step * torch.randn(v.shape, generator=generator) for n, v in base.items()}
    return {"base": base, "tuned": tuned}


def quantised(weight):
    scale = weight.abs().max() / 448
    return (weight / scale).to(CODES), scale


def as_codes(state, style, *, prefix="", odd=1.0):
    """Store the matrices inside blocks as codes, with scales `odd` times what they should be."""
    stored = {}
    for name, value in state.items():
        name = prefix + name
        if value.ndim != 2 or "blocks." not in name or "norm" in name:
            stored[name] = value
            continue
        codes, scale = quantised(value)
        layer = name.removesuffix(".weight")
        stored |= {name: (codes.float() / odd).to(CODES), f"{layer}.{style}": scale * odd}
        if style == "weight_scale":
            text = b'{"format": "float8_e4m3fn"}'
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if style == "scale_weight":
        stored[f"{prefix}scaled_fp8"] = torch.zeros(0, dtype=CODES)
    return stored


def same_codes(first, second):
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)))


def codes_in(state):
    return {n for n, v in state.items() if v.dtype == CODES and not n.endswith("scaled_fp8")}


@pytest.mark.parametrize("kind", ["wan", "hunyuan-video", "hunyuan-video-1.5", "ltx", "ltx-2"])
def test_codes_are_the_plain_file_divided_by_its_largest_value(kind, tmp_path):
    inputs = inputs_of(kind)
    export_comfyui(MORE, tmp_path / "plain", inputs=inputs)
    written = export_comfyui(MORE, tmp_path, inputs=inputs, dtype="fp8_scaled")["more"]
    plain = load_file(tmp_path / "plain" / "more.safetensors")
    found = load_file(tmp_path / "more.safetensors")
    codes = codes_in(found)
    assert codes and written.tensors == len(found)
    for name, value in plain.items():
        if name not in codes:
            assert torch.equal(found[name], value)
            continue
        wanted, scale = quantised(value)
        layer = name.removesuffix(".weight")
        assert same_codes(found[name], wanted)
        assert torch.equal(found[f"{layer}.weight_scale"], scale)
        text = bytes(found[f"{layer}.comfy_quant"].tolist())
        assert json.loads(text) == {"format": "float8_e4m3fn"}
    assert found.keys() - plain.keys() == {
        f"{name.removesuffix('.weight')}.{last}"
        for name in codes
        for last in ("weight_scale", "comfy_quant")
    }
    assert f"{len(codes)} weights are written as fp8 codes" in str(written)


def test_the_layers_do_not_depend_on_the_names_in_which_they_are_written(tmp_path):
    """Also those of an original name with a number at its end, as `time_projection.1.weight`."""
    inputs = inputs_of("wan")
    export_comfyui(MORE, tmp_path, inputs=inputs, dtype="fp8_scaled")
    export_comfyui(MORE, tmp_path / "plain", inputs=inputs)
    names = {"base": tmp_path / "plain" / "more.safetensors", "tuned": inputs["tuned"]}
    one = Recipe.parse("inputs: {base: a}\nexperts: {one: base}")
    merge(one, tmp_path, inputs={"base": names["base"]}, dtype="fp8_scaled")
    merge(MORE, tmp_path / "ours", inputs=inputs, dtype="fp8_scaled")
    exported, merged, ours = (
        codes_in(load_file(tmp_path / name))
        for name in ("more.safetensors", "one.safetensors", "ours/more.safetensors")
    )
    assert exported == merged and len(ours) == len(exported)
    assert all(name.startswith("blocks.") for name in exported | ours)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("style", ["scale_weight", "weight_scale"])
def test_the_style_of_the_checkpoint_at_the_front_comes_back_without_its_prefix(
    style, prefix, tmp_path
):
    export_comfyui(MORE, tmp_path / "plain", inputs=inputs_of("wan"))
    original = load_file(tmp_path / "plain" / "more.safetensors")
    save_file(as_codes(original, style, prefix=prefix), tmp_path / "base.safetensors")
    bumped = {prefix + name: value + 0.01 for name, value in original.items()}
    save_file(bumped, tmp_path / "tuned.safetensors")
    inputs = {name: tmp_path / f"{name}.safetensors" for name in ("base", "tuned")}
    export_comfyui(MORE, tmp_path / "out", inputs=inputs, dtype="fp8_scaled")
    found = load_file(tmp_path / "out" / "more.safetensors")
    assert found.keys() == as_codes(original, style).keys()
    assert codes_in(found) == codes_in(as_codes(original, style))


def test_what_no_vector_reaches_keeps_its_codes_under_its_new_name(tmp_path):
    state = as_codes(state_of("wan"), "weight_scale", odd=2.0)  # not max / 448, were it computed
    save_file(state, tmp_path / "base.safetensors")
    tuned = {name: value + 0.01 for name, value in state_of("wan").items()}
    recipe = Recipe.parse(
        "inputs: {base: a, tuned: b}\n"
        "experts: {more: 'base + 2.0 * only(tuned - base, \"blocks.0.attn1.*\")'}"
    )
    inputs = {"base": tmp_path / "base.safetensors", "tuned": tuned}
    written = export_comfyui(recipe, tmp_path, inputs=inputs, dtype="fp8_scaled")["more"]
    found = load_file(tmp_path / "more.safetensors")
    for ours, theirs in (("blocks.1.attn1.to_q", "blocks.1.self_attn.q"),
                         ("blocks.0.ffn.net.2", "blocks.0.ffn.2")):  # fmt: skip
        for last in ("weight", "weight_scale"):
            assert same_codes(found[f"{theirs}.{last}"], state[f"{ours}.{last}"])
    moved = "blocks.0.self_attn.q.weight_scale"
    assert not torch.equal(found[moved], state["blocks.0.attn1.to_q.weight_scale"])
    assert "of them as they were" in written.note


def test_three_scales_become_one_where_their_weights_are_joined(tmp_path):
    state = {n: v * (1 + n.count("to_k")) for n, v in state_of("hunyuan-video").items()}
    stored = as_codes(state, "weight_scale")
    save_file(stored, tmp_path / "base.safetensors")
    one = Recipe.parse("inputs: {base: a}\nexperts: {one: base}")
    inputs = {"base": tmp_path / "base.safetensors"}
    export_comfyui(one, tmp_path, inputs=inputs, dtype="fp8_scaled")
    found = load_file(tmp_path / "one.safetensors")
    parts = [
        stored[f"transformer_blocks.0.attn.{it}.weight"].float()
        * stored[f"transformer_blocks.0.attn.{it}.weight_scale"]
        for it in ("to_q", "to_k", "to_v")
    ]
    codes, scale = quantised(torch.cat(parts))
    assert torch.equal(found["double_blocks.0.img_attn_qkv.weight_scale"], scale)
    assert same_codes(found["double_blocks.0.img_attn_qkv.weight"], codes)


@pytest.mark.parametrize("kind", ["wan", "hunyuan-video"])
def test_survival_is_counted_after_codes_are_made(kind, tmp_path):
    inputs = inputs_of(kind, step=2e-4)
    base = Recipe.parse("inputs: {base: a, tuned: b}\nexperts: {start: base}")
    for recipe in (base, MORE):
        export_comfyui(recipe, tmp_path, inputs=inputs)
    start, ideal = (load_file(tmp_path / f"{name}.safetensors") for name in ("start", "more"))
    written = export_comfyui(MORE, tmp_path / "out", inputs=inputs, dtype="fp8_scaled")["more"]
    found = load_file(tmp_path / "out" / "more.safetensors")
    changed = survived = 0
    for name, value in ideal.items():
        kept, stored = start[name], found[name].float()
        if found[name].dtype == CODES:
            kept = (kept / found[f"{name}_scale"]).to(CODES).float()
        changed += int((value != start[name]).sum())
        survived += int((stored != kept)[value != start[name]].sum())
    assert written.survived == pytest.approx(survived / changed, abs=1e-3)
    assert written.survived < 0.7


def test_a_dry_run_says_what_will_be_written(tmp_path):
    options = {"inputs": inputs_of("ltx"), "dtype": "fp8_scaled"}
    planned = export_comfyui(MORE, tmp_path / "out", **options, dry_run=True)["more"]
    assert not (tmp_path / "out").exists()
    written = export_comfyui(MORE, tmp_path / "out", **options)["more"]
    assert (planned.num_bytes, planned.note) == (written.num_bytes, written.note)
    with open_weights(tmp_path / "out" / "more.safetensors") as reader:
        assert Recipe.parse(reader.metadata["motionmerge.recipe"]).experts == MORE.experts


def test_exports_that_nothing_loads_as_scaled_fp8_are_refused_by_name(tmp_path):
    for refused in (
        lambda: export_two_experts(MORE, tmp_path / "wan", tmp_path / "out", dtype="fp8_scaled"),
        lambda: export_loras(MORE, tmp_path / "out", rank=4, dtype="fp8_scaled"),
        lambda: export_files(
            MORE,
            tmp_path / "out",
            names=naming("single_file", nothing),
            opener=lambda *_: pytest.fail("opened"),
            dtype="fp8_scaled",
        ),
    ):
        with pytest.raises(ConfigError, match=r"export comfyui(.|\n)*Use bf16 here"):
            refused()
    assert not list(tmp_path.iterdir())


def test_nan_found_in_the_pass_that_measures_scales_leaves_nothing(tmp_path):
    inputs = inputs_of("ltx")
    inputs["tuned"]["transformer_blocks.0.attn1.to_q.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        export_comfyui(MORE, tmp_path / "new" / "out", inputs=inputs, dtype="fp8_scaled")
    assert not list(tmp_path.iterdir())
