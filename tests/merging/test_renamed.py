"""One name space: folders of diffusers, original files and prefixed ones in one recipe."""

import itertools
import json
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from motionmerge import Checkpoint, lora, merge
from motionmerge.errors import CheckpointError, ShapeError
from motionmerge.merging.compare import compare
from motionmerge.merging.in_memory import apply, realise
from motionmerge.merging.inputs.piece_view import RenamedTensors
from motionmerge.merging.inputs.pieces import Piece, Pieced, composed, inverted, joined
from motionmerge.merging.inputs.renamed import in_one_name_space
from motionmerge.merging.inputs.sources import MemoryTensors, OpenInputs, Source
from motionmerge.merging.names.layout import to_theirs
from motionmerge.merging.names.original import STYLES
from motionmerge.merging.recipes.recipe import Recipe

from ..tiny.denoisers import DENOISERS, state_of
from .test_original_names import original_name

STYLES_BY_NAME = {names.style: names for names in STYLES}
FOLDER, ORIGINAL, PREFIXED = "folder", "original", "prefixed"


def noisy(state, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


def half(state):
    return {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}


def in_original_names(state, style):
    """Put an original checkpoint together by plain concatenation of rows."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layout = to_theirs(shapes, STYLES_BY_NAME[style]).layout
    return {
        name: torch.cat([state[p.name].flatten()[p.begin : p.end] for p in tensor.pieces]).reshape(
            tensor.shape
        )
        for name, tensor in layout.items()
    }


def write(state, form, style, folder):
    """Write a denoiser as a pipeline's folder, an original file, or one with ComfyUI's prefix."""
    folder.mkdir()
    if form == FOLDER:
        (folder / "transformer").mkdir()
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "X"}))
        save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
        return folder
    prefix = "model.diffusion_model." if form == PREFIXED else ""
    named = {prefix + name: t for name, t in in_original_names(state, style).items()}
    save_file(named, folder / "model.safetensors")
    return folder / "model.safetensors"


def expected_in(result, form, style):
    """Turn a result in names of diffusers into what a checkpoint of this form holds."""
    if form == FOLDER:
        return {f"transformer.{name}": tensor for name, tensor in result.items()}
    prefix = "model.diffusion_model." if form == PREFIXED else ""
    return {prefix + name: t for name, t in in_original_names(result, style).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


FAMILIES = [
    ("original Wan", "wan"),
    ("ComfyUI's HunyuanVideo", "hunyuan-video"),
    ("original LTX-2", "ltx-2.3"),
]
EXPRESSION = (
    "base + 0.75 * dare(-0.5 * (tuned - base), drop_rate=0.5, seed=1) + 0.1 * (other - base)"
)


@pytest.mark.parametrize("order", list(itertools.permutations([FOLDER, ORIGINAL, PREFIXED])))
@pytest.mark.parametrize(("style", "kind"), FAMILIES)
def test_forms_in_any_order_give_the_bits_of_converted_copies(style, kind, order, tmp_path):
    base = half(state_of(kind))
    states = {"base": base, "tuned": half(noisy(base, 1)), "other": half(noisy(base, 2))}
    paths = {
        name: write(states[name], form, style, tmp_path / name)
        for name, form in zip(states, order, strict=True)
    }
    recipe = Recipe.parse(
        json.dumps(
            {
                "inputs": {name: str(path) for name, path in paths.items()},
                "experts": {"all": EXPRESSION},
            }
        )
    )
    report = merge(recipe, tmp_path / "out")
    assert not report.unmatched
    # masks of `dare` are drawn by a tensor's name, which is that of the first checkpoint
    converted = {name: expected_in(state, order[0], style) for name, state in states.items()}
    wanted = realise(recipe, inputs=converted)["all"]
    assert_same(load_file(tmp_path / "out" / "all.safetensors"), wanted)
    if order[0] == FOLDER:
        plain = Checkpoint.from_tensors(base, name="base")
        tuned = Checkpoint.from_tensors(states["tuned"], name="tuned")
        sums = (plain + 0.5 * (tuned - plain)).tensors()
        same = Recipe.parse(
            json.dumps(
                {
                    "inputs": {name: str(path) for name, path in paths.items()},
                    "experts": {"all": "base + 0.5 * (tuned - base)"},
                }
            )
        )
        found = realise(same)["all"]
        assert_same(found, {f"transformer.{name}": tensor for name, tensor in sums.items()})


@pytest.mark.parametrize("names", STYLES, ids=lambda names: names.style)
def test_every_family_is_one_name_space_with_its_original(names):
    if "dealt by head" in names.style:
        pytest.skip("told from the stacked order by values alone: see the tests of MiniMax-H3")
    kinds = {"cosmos": "cosmos-2" if "2" in names.style else "cosmos", "wan-animate-2": "animate-2"}
    kind = kinds.get(names.family, names.family)
    state = state_of(kind)
    base = Checkpoint.from_tensors(state, name="base")
    tuned_state = noisy(state, 1)
    tuned = Checkpoint.from_tensors(in_original_names(tuned_state, names.style), name="tuned")
    plain = Checkpoint.from_tensors(tuned_state, name="tuned")
    assert_same((base + 0.5 * (tuned - base)).tensors(), (base + 0.5 * (plain - base)).tensors())
    there = (tuned + 0.5 * (base - tuned)).tensors()
    assert_same(there, in_original_names((plain + 0.5 * (base - plain)).tensors(), names.style))


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "_fsdp_wrapped_module.",
        "model.diffusion_model._orig_mod.",
        "module.model.",
        "pipe.dit.",
        "base_model.model.",
        "transformer.",
        "transformer._orig_mod.",
    ],
)
@pytest.mark.parametrize("style", [None, "original Wan"])
def test_wrappers_are_taken_off_however_many_there_are(prefix, style):
    state = state_of("wan text")
    tuned = noisy(state, 1)
    named = tuned if style is None else in_original_names(tuned, style)
    named = {f"{prefix}{name}": tensor for name, tensor in named.items()}
    base = Checkpoint.from_tensors(state, name="base")
    found = (base + 1.0 * (Checkpoint.from_tensors(named, name="tuned") - base)).tensors()
    plain = (base + 1.0 * (Checkpoint.from_tensors(tuned, name="tuned") - base)).tensors()
    assert_same(found, plain)


def test_wrappers_between_are_taken_off():
    state = state_of("wan text")
    tuned = noisy(state, 1)
    named = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): tensor
        for name, tensor in tuned.items()
    }
    base = Checkpoint.from_tensors(state, name="base")
    found = (base + 1.0 * (Checkpoint.from_tensors(named, name="tuned") - base)).tensors()
    plain = (base + 1.0 * (Checkpoint.from_tensors(tuned, name="tuned") - base)).tensors()
    assert_same(found, plain)


def test_other_parts_of_a_whole_models_file_are_left_out():
    state = state_of("wan text")
    tuned = in_original_names(noisy(state, 1), "original Wan")
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in tuned.items()}
    named["vae.decoder.conv1.weight"] = torch.ones(3)
    base = Checkpoint.from_tensors(state, name="base")
    assert (base + (Checkpoint.from_tensors(named, name="tuned") - base)).tensors().keys() == (
        state.keys()
    )


def test_what_the_tables_do_not_know_is_named_and_not_dropped():
    state = state_of("wan text")
    tuned = in_original_names(state, "original Wan") | {"blocks.0.strange.weight": torch.ones(2)}
    base = Checkpoint.from_tensors(state, name="base")
    mixed = base + (Checkpoint.from_tensors(tuned, name="tuned") - base)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.strange\.weight \(not in base\)"):
        mixed.tensors()


def test_a_layer_of_another_size_is_refused_with_both_shapes():
    state = state_of("wan text")
    tuned = in_original_names(state, "original Wan")
    tuned["patch_embedding.weight"] = torch.ones(24, 9, 1, 2, 2)
    base = Checkpoint.from_tensors(state, name="base")
    with pytest.raises(ShapeError, match=r"\[24, 4, 1, 2, 2\] in `base` but \[24, 9, 1, 2, 2\]"):
        (base + (Checkpoint.from_tensors(tuned, name="tuned") - base)).tensors()


def test_one_denoiser_is_never_guessed_to_be_one_of_two():
    state = state_of("wan text")
    two = {f"{m}.{n}": t for m in ("transformer", "transformer_2") for n, t in state.items()}
    tuned = Checkpoint.from_tensors(in_original_names(state, "original Wan"), name="tuned")
    base = Checkpoint.from_tensors(two, name="base")
    with pytest.raises(CheckpointError, match=r"one denoiser.*two") as caught:
        (base + (tuned - base)).tensors()
    assert "transformer_2" in caught.value.fix


def test_models_of_different_families_are_named_as_such():
    wan = Checkpoint.from_tensors(in_original_names(state_of("wan"), "original Wan"), name="wan")
    ltx = Checkpoint.from_tensors(state_of("ltx"), name="ltx")
    with pytest.raises(CheckpointError, match=r"`wan` has names of wan.*`ltx` has names of ltx"):
        (wan + (ltx - wan)).tensors()


@pytest.mark.parametrize("style", ["stacked", "dealt by head"])
@pytest.mark.parametrize("first", ["diffusers", "original"])
def test_the_rows_of_minimax_h3_are_told_by_comparing_values(style, first):
    name = f"original MiniMax-H3, q, k and v {style}"
    state = state_of("minimax-h3")
    tuned = noisy(state, 1)
    if first == "diffusers":
        base = Checkpoint.from_tensors(state, name="base")
        other = Checkpoint.from_tensors(in_original_names(tuned, name), name="tuned")
    else:
        base = Checkpoint.from_tensors(in_original_names(state, name), name="base")
        other = Checkpoint.from_tensors(tuned, name="tuned")
    plain_base = Checkpoint.from_tensors(state, name="base")
    plain = plain_base + 0.5 * (Checkpoint.from_tensors(tuned, name="tuned") - plain_base)
    wanted = plain.tensors()
    if first == "original":
        wanted = in_original_names(wanted, name)
    assert_same((base + 0.5 * (other - base)).tensors(), wanted)


def test_the_two_orders_of_minimax_h3_are_told_apart_under_the_same_names():
    state = state_of("minimax-h3")
    stacked, dealt = (f"original MiniMax-H3, q, k and v {s}" for s in ("stacked", "dealt by head"))
    tuned = noisy(state, 1)
    base = Checkpoint.from_tensors(in_original_names(state, stacked), name="base")
    other = Checkpoint.from_tensors(in_original_names(tuned, dealt), name="tuned")
    same = Checkpoint.from_tensors(in_original_names(tuned, stacked), name="tuned")
    assert_same((base + (other - base)).tensors(), (base + (same - base)).tensors())


def test_rows_of_minimax_h3_that_resemble_nothing_are_refused():
    base = Checkpoint.from_tensors(state_of("minimax-h3"), name="base")
    strange = {name: torch.randn_like(tensor) for name, tensor in state_of("minimax-h3").items()}
    named = in_original_names(strange, "original MiniMax-H3, q, k and v stacked")
    other = Checkpoint.from_tensors(named, name="tuned")
    with pytest.raises(CheckpointError, match="dealt by head") as caught:
        (base + (other - base)).tensors()
    assert "qkv_layout" in caught.value.fix


def test_the_view_agrees_with_a_live_module(tmp_path):
    state = state_of("hunyuan-video")
    original = in_original_names(state, "original HunyuanVideo")
    save_file(original, tmp_path / "original.safetensors")
    module = DENOISERS["hunyuan-video"]()
    recipe = Recipe.parse("inputs: {base: 'memory:base'}\nexperts: {all: base}")
    apply(recipe, module, inputs={"base": tmp_path / "original.safetensors"})
    assert_same(dict(module.state_dict()), state)


def test_two_forms_are_compared_tensor_by_tensor(tmp_path):
    state = state_of("ltx")
    save_file(state, tmp_path / "ours.safetensors")
    save_file(in_original_names(state, "original LTX-Video"), tmp_path / "theirs.safetensors")
    found = compare(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors")
    assert not found.only_first
    assert not found.only_second
    assert found.total.tensors == len(state)
    assert found.total.changed == 0


@pytest.mark.parametrize(
    ("kind", "style", "layer"),
    [
        ("wan", "original Wan", "blocks.1.attn2.to_k"),
        ("hunyuan-video", "ComfyUI's HunyuanVideo", "transformer_blocks.1.attn.to_k"),
        ("hunyuan-video", "original HunyuanVideo", "single_transformer_blocks.0.proj_mlp"),
        ("ltx-2", "original LTX-2", "transformer_blocks.0.audio_attn1.to_q"),
    ],
)
def test_a_lora_fits_an_anchor_in_original_names(kind, style, layer):
    state = state_of(kind)
    rows, columns = state[f"{layer}.weight"].shape
    generator = torch.Generator().manual_seed(3)
    up, down = (
        torch.randn(rows, 2, generator=generator),
        torch.randn(2, columns, generator=generator),
    )
    file = {
        f"transformer.{layer}.lora_A.weight": down,
        f"transformer.{layer}.lora_B.weight": up,
    }
    original = Checkpoint.from_tensors(in_original_names(state, style), name="base")
    plain = Checkpoint.from_tensors(state, name="base")
    assert_close(
        (original + lora(file, 1.0)).tensors(),
        in_original_names((plain + lora(file, 1.0)).tensors(), style),
    )
    if style == "original Wan":
        path = original_name(layer, style)
        theirs = {
            f"diffusion_model.{path}.lora_A.weight": down,
            f"diffusion_model.{path}.lora_B.weight": up,
        }
        assert_close(
            (original + lora(theirs, 1.0)).tensors(), (original + lora(file, 1.0)).tensors()
        )


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


@st.composite
def layouts(draw):
    """Some stored tensors, and others that are made of pieces of them."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    stored = {
        f"s{i}": torch.arange(size, dtype=torch.int16) + 100 * i for i, size in enumerate(sizes)
    }
    pieces = []
    for name, tensor in stored.items():
        cuts = sorted(draw(st.sets(st.integers(1, len(tensor)), max_size=3)) | {0, len(tensor)})
        pieces += [Piece(name, a, b) for a, b in itertools.pairwise(cuts)]
    order = draw(st.permutations(pieces))
    ends = sorted(draw(st.sets(st.integers(1, len(order)), max_size=3)) | {0, len(order)})
    layout = {}
    for number, (a, b) in enumerate(itertools.pairwise(ends)):
        count = sum(piece.end - piece.begin for piece in order[a:b])
        layout[f"m{number}"] = Pieced((count,), joined(order[a:b]))
    return stored, layout


def plain(layout, stored):
    return {
        name: torch.cat([stored[p.name][p.begin : p.end] for p in tensor.pieces])
        for name, tensor in layout.items()
    }


@given(layouts(), st.data())
@settings(max_examples=200, deadline=None)
def test_any_part_of_a_tensor_in_pieces_is_that_of_the_plain_tensor(case, data):
    stored, layout = case
    view = RenamedTensors(MemoryTensors(stored), layout)
    for name, tensor in plain(layout, stored).items():
        assert view.shape(name) == tuple(tensor.shape)
        assert torch.equal(view.read(name), tensor)
        whole = tensor.numpy().tobytes()
        begin = data.draw(st.integers(0, len(whole) - 1))
        end = data.draw(st.integers(begin + 1, len(whole)))
        target = bytearray(end - begin)
        view.read_into(name, begin, memoryview(target))
        assert bytes(target) == whole[begin:end]


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_a_layout_turned_round_gives_the_stored_tensors_back(case):
    stored, layout = case
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    back = inverted(layout, shapes)
    made = plain(layout, stored)
    assert {name: tensor.tolist() for name, tensor in plain(back, made).items()} == {
        name: tensor.tolist() for name, tensor in stored.items()
    }
    there_and_back = composed(back, layout)
    assert all(
        tensor.pieces == (Piece(name, 0, math.prod(shapes[name])),)
        for name, tensor in there_and_back.items()
    )


def test_a_renamed_tensor_lies_where_the_stored_one_does(tmp_path):
    state = state_of("hunyuan-video")
    original = in_original_names(state, "original HunyuanVideo")
    save_file(original, tmp_path / "original.safetensors")
    ours = Source("ours", MemoryTensors(state))
    theirs = Source("theirs", tmp_path / "original.safetensors")
    with OpenInputs([ours, theirs]) as opened, OpenInputs([theirs]) as alone:
        name = "transformer_blocks.0.attn.to_k.weight"
        _, begin = opened.place(theirs, name)
        _, start = alone.place(theirs, "double_blocks.0.img_attn_qkv.weight")
        assert begin == start + 20 * 20 * 4
        assert opened.place(theirs, "norm_out.linear.weight") is None
        assert not opened.names(theirs)[len(state) :]


def test_pieces_of_several_dtypes_are_refused():
    state = state_of("hunyuan-video")
    mixed = dict(state)
    mixed["transformer_blocks.0.attn.to_q.weight"] = state[
        "transformer_blocks.0.attn.to_q.weight"
    ].half()
    original = Checkpoint.from_tensors(
        in_original_names(state, "original HunyuanVideo"), name="base"
    )
    tuned = Checkpoint.from_tensors(mixed, name="tuned")
    with pytest.raises(CheckpointError, match="several dtypes"):
        (original + (tuned - original)).tensors()


def test_names_that_fit_are_left_alone():
    state = MemoryTensors(state_of("ltx"))
    other = MemoryTensors(state_of("ltx"))
    found = in_one_name_space({"a": state, "b": other})
    assert found["a"] is state
    assert found["b"] is other
