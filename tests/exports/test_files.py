"""Whole experts as single files: diffusers converts them back, ComfyUI finds what it looks for."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.exports.files import export_comfyui
from motionmerge.exports.loras import export_loras
from motionmerge.io.weights import open_weights
from motionmerge.merging.merge import merge, realise
from motionmerge.merging.recipes.recipe import Recipe

from ..tiny.denoisers import DENOISERS, state_of
from ..tiny.library import file_converters

MORE = Recipe.parse(
    "inputs: {base: a, tuned: b}\n"
    "experts: {more: 'base + 2 * dare(tuned - base, drop_rate=0.5, seed=1)'}"
)
CONVERTERS = {
    "wan": file_converters.convert_wan_transformer_to_diffusers,
    "vace": file_converters.convert_wan_transformer_to_diffusers,
    "hunyuan-video": file_converters.convert_hunyuan_video_transformer_to_diffusers,
    "ltx": file_converters.convert_ltx_transformer_checkpoint_to_diffusers,
    "ltx-2": file_converters.convert_ltx2_transformer_to_diffusers,
}


def inputs_of(kind):
    base, generator = state_of(kind), torch.Generator().manual_seed(1)
    return {
        "base": base,
        "tuned": {
            name: value + 0.05 * torch.randn(value.shape, generator=generator)
            for name, value in base.items()
        },
    }


UNKNOWN_TO_CONVERTERS = ("single_transformer_blocks.", "condition_embedder.image_embedder.pos_")
"""Their sizes are fixed in a converter (3072 channels), or it leaves the name as it is."""


@pytest.mark.parametrize("kind", CONVERTERS)
def test_diffusers_converts_the_file_back_to_the_expert(kind, tmp_path):
    inputs = {
        name: {n: v for n, v in state.items() if not n.startswith(UNKNOWN_TO_CONVERTERS)}
        for name, state in inputs_of(kind).items()
    }
    written = export_comfyui(MORE, tmp_path, inputs=inputs)["more"]
    expert = realise(MORE, inputs=inputs)["more"]
    held = load_file(tmp_path / "more.safetensors")
    assert written.tensors == len(held) and not written.left_out
    found = CONVERTERS[kind](dict(held))
    assert found.keys() == expert.keys()
    assert all(torch.equal(found[name], expert[name]) for name in expert)


FOUND_BY_COMFYUI = {
    "wan": ("head.modulation", "head.head.weight", "patch_embedding.weight", "img_emb.proj.0.bias",
            "blocks.0.ffn.0.weight"),
    "hunyuan-video": ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight",
                      "vector_in.in_layer.weight", "double_blocks.0.img_attn_qkv.weight",
                      "txt_in.input_embedder.weight", "final_layer.linear.weight"),
    "hunyuan-video-1.5": ("txt_in.individual_token_refiner.blocks.0.norm1.weight",
                          "double_blocks.0.img_attn_qkv.weight", "vision_in.proj.0.weight"),
    "ltx": ("adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight",
            "transformer_blocks.0.attn2.to_k.weight"),
}  # fmt: skip
"""Names by which ComfyUI tells a model, and reads its sizes from their shapes."""


@pytest.mark.parametrize("kind", FOUND_BY_COMFYUI)
def test_the_names_by_which_comfyui_knows_a_model_are_there_without_a_prefix(kind, tmp_path):
    export_comfyui(MORE, tmp_path, inputs=inputs_of(kind))
    with open_weights(tmp_path / "more.safetensors") as reader:
        assert set(FOUND_BY_COMFYUI[kind]) <= set(reader.keys())
        if kind == "wan":  # width, and four entries of a patch for each channel
            assert reader.shape("head.modulation") == (1, 2, 24)
            assert reader.shape("head.head.weight") == (4 * 4, 24)
            assert reader.shape("patch_embedding.weight") == (24, 4, 1, 2, 2)
        assert Recipe.parse(reader.metadata["motionmerge.recipe"]).experts == MORE.experts


@pytest.mark.parametrize("kind", DENOISERS)
def test_an_exported_file_is_an_input_like_the_folder_that_it_came_from(kind, tmp_path):
    inputs = inputs_of(kind)
    export_comfyui(MORE, tmp_path / "once", inputs=inputs)
    files = {}
    for name, state in inputs.items():
        still = Recipe.parse(f"inputs: {{{name}: a}}\nexperts: {{{name}: {name}}}")
        export_comfyui(still, tmp_path, inputs={name: state})
        files[name] = tmp_path / f"{name}.safetensors"
    plain = Recipe.parse("inputs: {base: a, tuned: b}\nexperts: {more: base + 2 * (tuned - base)}")
    export_comfyui(plain, tmp_path / "again", inputs=files)
    export_comfyui(plain, tmp_path / "ours", inputs=inputs)
    found, wanted = (load_file(tmp_path / n / "more.safetensors") for n in ("again", "ours"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def pair(tmp_path):
    """A folder with two denoisers, which change at 0.9."""
    for module, seed in (("transformer", 0.0), ("transformer_2", 1.0)):
        (tmp_path / "wan" / module).mkdir(parents=True)
        state = {name: value + seed for name, value in state_of("wan").items()}
        save_file(state, tmp_path / "wan" / module / "diffusion_pytorch_model.safetensors")
    (tmp_path / "wan" / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    return tmp_path / "wan"


def test_a_pair_becomes_a_file_for_each_denoiser(pair, tmp_path):
    recipe = Recipe.parse(
        f"inputs: {{base: {pair}}}\nexperts: {{fast: base, calm: base}}\n"
        "schedule: [{expert: fast, above: 0.9}, {expert: calm}]"
    )
    written = export_comfyui(recipe, tmp_path / "out")
    assert list(written) == ["fast_high_noise", "calm_low_noise"]
    high, low = (load_file(found.path) for found in written.values())
    assert high.keys() == low.keys()
    assert all(torch.equal(low[name], value + 1.0) for name, value in high.items())
    one = Recipe.parse(f"inputs: {{base: {pair}}}\nexperts: {{same: base}}")
    assert list(export_comfyui(one, tmp_path / "out")) == ["same_high_noise", "same_low_noise"]


def test_what_is_printed_fits_the_files_that_were_written(pair, tmp_path):
    recipe = Recipe.parse(
        f"inputs: {{base: {pair}}}\nexperts: {{fast: base, calm: base}}\n"
        "schedule: [{expert: fast, above: 0.9}, {expert: calm}]"
    )
    comfyui, wan2gp = export_comfyui(recipe, tmp_path / "out", dry_run=True).usage
    assert "fast_high_noise where it is noisy, calm_low_noise after that" in comfyui
    assert "`URLs` names fast_high_noise, `URLs2` calm_low_noise" in wan2gp


@pytest.mark.parametrize(
    ("kind", "first", "lines"),
    [
        ("wan", "ComfyUI loads it: ", 2),
        ("hunyuan-video-1.5", "ComfyUI loads it: ", 2),
        ("kandinsky-5", "ComfyUI loads it: ", 1),
        ("ltx", "ComfyUI loads it as LTX-Video 0.9.0 or 0.9.1", 1),
        ("ltx-2", "Not for ComfyUI: the connectors are absent", 1),
        ("minimax-h3", "Not for ComfyUI, which does not open a file without `rope.inv_freq`", 1),
        ("cosmos-2", "Not for ComfyUI, which leaves out `crossattn_proj`", 1),
        ("cogvideox", "Not for ComfyUI, which computes a CogVideoX with", 1),
        ("animate-2", "The names are those of the original wan-animate-2", 1),
    ],
)
def test_what_comfyui_makes_of_a_file_is_said(kind, first, lines, tmp_path):
    usage = export_comfyui(MORE, tmp_path / "out", inputs=inputs_of(kind), dry_run=True).usage
    assert usage[0].startswith(first) and len(usage) == lines


def test_a_single_file_of_ltx_says_itself_which_version_it_is(tmp_path):
    one = Recipe.parse("inputs: {base: a}\nexperts: {ltx: base}")
    export_comfyui(one, tmp_path, inputs={"base": state_of("ltx")})
    save_file(
        load_file(tmp_path / "ltx.safetensors"), tmp_path / "ltx.safetensors", {"config": "{}"}
    )
    recipe = f"inputs: {{base: {tmp_path / 'ltx.safetensors'}}}\nexperts: {{same: base}}"
    usage = export_comfyui(Recipe.parse(recipe), tmp_path / "out", dry_run=True).usage
    assert usage[0].startswith("ComfyUI loads it: ")


def test_tensors_that_some_inputs_lack_are_listed_when_they_are_kept(tmp_path):
    inputs = inputs_of("ltx")
    name = "transformer_blocks.0.attn1.to_q.weight"
    del inputs["tuned"][name]
    with pytest.raises(CheckpointError, match="missing on one side"):
        export_comfyui(MORE, tmp_path, inputs=inputs)
    written = export_comfyui(MORE, tmp_path, inputs=inputs, missing="keep")
    assert written.unmatched == {name: ("tuned",)}
    found = export_loras(MORE, tmp_path / "loras", rank=2, inputs=inputs, missing="keep")
    assert found.unmatched == {name: ("tuned",)}


def test_a_merge_or_export_that_fails_leaves_no_folder_that_it_made(tmp_path):
    inputs = inputs_of("ltx")
    inputs["tuned"]["proj_out.weight"][0, 0] = float("nan")
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "new", tmp_path / "new" / "deep", tmp_path / "there" / "out"):
        for write in (
            merge,
            export_comfyui,
            partial(export_loras, rank=2),
        ):
            with pytest.raises(CheckpointError, match="NaN"):
                write(MORE, folder, inputs=inputs)
            assert [path.name for path in tmp_path.iterdir()] == ["there"]
            assert not list((tmp_path / "there").iterdir())
    with pytest.raises(CheckpointError, match="NaN"):
        merge(MORE, tmp_path / "there", inputs=inputs)
    assert not list((tmp_path / "there").iterdir())


def test_a_file_is_rounded_once_like_that_of_merge_and_says_what_survives(tmp_path):
    inputs = inputs_of("ltx")
    paths = {}
    for name, state in inputs.items():
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(state, paths[name])
    found = export_comfyui(MORE, tmp_path / "out", inputs=paths, dtype="bf16")["more"]
    report = merge(MORE, tmp_path / "merged", inputs=paths, dtype="bf16").experts["more"]
    assert found.survived == pytest.approx(report.survived, rel=1e-6) and found.survived < 1
    assert found.cosine == pytest.approx(report.cosine, rel=1e-6)
    ours = load_file(tmp_path / "merged" / "more.safetensors")
    held = CONVERTERS["ltx"](load_file(tmp_path / "out" / "more.safetensors"))
    assert all(torch.equal(held[name], value) for name, value in ours.items())


def test_pieces_of_different_dtypes_are_refused_unless_one_is_chosen(tmp_path):
    inputs = inputs_of("hunyuan-video")
    name = "transformer_blocks.0.attn.to_k.weight"
    for state in inputs.values():
        state[name] = state[name].bfloat16()
    with pytest.raises(CheckpointError, match="different dtypes") as error:
        export_comfyui(MORE, tmp_path, inputs=inputs)
    assert "`dtype`" in error.value.fix and not list(tmp_path.iterdir())
    export_comfyui(MORE, tmp_path, inputs=inputs, dtype="bf16")


def test_what_is_there_or_unknown_is_refused_before_any_work(tmp_path):
    inputs = inputs_of("ltx")
    assert export_comfyui(MORE, tmp_path / "out", inputs=inputs, dry_run=True)["more"].path is None
    assert not (tmp_path / "out").exists()
    export_comfyui(MORE, tmp_path, inputs=inputs)
    with pytest.raises(ConfigError, match="exists already"):
        export_comfyui(MORE, tmp_path, inputs=inputs)
    export_comfyui(MORE, tmp_path, inputs=inputs, overwrite=True)
    odd = {"base": {"a.weight": torch.ones(4, 4)}, "tuned": {"a.weight": torch.zeros(4, 4)}}
    with pytest.raises(ConfigError, match="No original names are known"):
        export_comfyui(MORE, tmp_path / "odd", inputs=odd)
