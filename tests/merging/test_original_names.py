"""Tables of original names, held against the converters of diffusers."""

import re

import diffusers
import pytest
import torch

from motionmerge.errors import ConfigError
from motionmerge.exports.names import renamed
from motionmerge.merging.names.layout import to_ours, to_theirs
from motionmerge.merging.names.original import STYLES, family_of_names, spellings
from motionmerge.merging.names.rules import numbered, parts_of
from motionmerge.parameter_groups import group_of

from ..tiny.denoisers import DENOISERS, state_of
from ..tiny.library import file_converters, lora_converters

STYLES_BY_NAME = {names.style: names for names in STYLES}
CONVERTERS = {
    "original Wan": file_converters.convert_wan_transformer_to_diffusers,
    "original Wan Animate 2": file_converters.convert_wan_animate_2_transformer_to_diffusers,
    "original HunyuanVideo": file_converters.convert_hunyuan_video_transformer_to_diffusers,
    "original LTX-Video": file_converters.convert_ltx_transformer_checkpoint_to_diffusers,
    "original LTX-2": file_converters.convert_ltx2_transformer_to_diffusers,
    "original Cosmos 1.0": file_converters.convert_cosmos_transformer_checkpoint_to_diffusers,
    "original Cosmos 2": file_converters.convert_cosmos_transformer_checkpoint_to_diffusers,
    "original MiniMax-H3, q, k and v stacked": lambda state: (
        file_converters.convert_minimax_h3_transformer_checkpoint_to_diffusers(state, {})
    ),
    "original MiniMax-H3, q, k and v dealt by head": lambda state: (
        file_converters.convert_minimax_h3_transformer_checkpoint_to_diffusers(
            state,
            {"num_attention_heads": 2, "attention_head_dim": 16},
            qkv_layout="interleaved",
        )
    ),
}
KINDS = {
    "original Wan": ("wan", "wan text", "skyreels-v2", "chronoedit", "vace", "animate"),
    "original Wan Animate 2": ("animate-2",),
    "original HunyuanVideo": ("hunyuan-video",),
    "ComfyUI's HunyuanVideo": ("hunyuan-video",),
    "original HunyuanVideo 1.5": ("hunyuan-video-1.5",),
    "ComfyUI's HunyuanVideo 1.5": ("hunyuan-video-1.5",),
    "original LTX-Video": ("ltx",),
    "original LTX-2": ("ltx-2", "ltx-2.3"),
    "original Cosmos 1.0": ("cosmos",),
    "original Cosmos 2": ("cosmos-2",),
    "ComfyUI's CogVideoX": ("cogvideox",),
    "original CogVideoX": ("cogvideox",),
    "original Kandinsky 5": ("kandinsky-5",),
    "original MiniMax-H3, q, k and v stacked": ("minimax-h3",),
    "original MiniMax-H3, q, k and v dealt by head": ("minimax-h3",),
}
EACH = [(style, kind) for style, kinds in KINDS.items() for kind in kinds]


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def made(layout, state):
    """Put tensors together from their pieces."""
    return {
        name: torch.cat([state[p.name].flatten()[p.begin : p.end] for p in tensor.pieces]).reshape(
            tensor.shape
        )
        for name, tensor in layout.items()
    }


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def test_every_way_of_naming_and_every_denoiser_is_tried():
    assert set(KINDS) == set(STYLES_BY_NAME)
    assert {kind for kinds in KINDS.values() for kind in kinds} == set(DENOISERS)


@pytest.mark.parametrize(("style", "kind"), EACH)
def test_every_tensor_has_an_original_name_and_comes_back(style, kind):
    state, names = state_of(kind), STYLES_BY_NAME[style]
    there = to_theirs(shapes_of(state), names)
    assert not there.left
    original = made(there.layout, state)
    back = to_ours(shapes_of(original), names)
    assert not back.left
    assert_equal(made(back.layout, original), state)


ONLY_IN_CONTEXT = {
    "animate": ("motion_encoder.",),  # of no known group
    "minimax-h3": ("norm2.",),  # `blocks.0.norm2` is Wan's, which is another layer
}


@pytest.mark.parametrize(("style", "kind"), EACH)
def test_original_names_are_in_the_group_of_the_tensors_that_they_stand_for(style, kind):
    shapes = shapes_of(state_of(kind))
    for name, tensor in to_theirs(shapes, STYLES_BY_NAME[style]).layout.items():
        if not any(part in name for part in ONLY_IN_CONTEXT.get(kind, ())):
            assert {group_of(piece.name) for piece in tensor.pieces} == {group_of(name)}, name


@pytest.mark.parametrize(("style", "kind"), [(s, k) for s, k in EACH if s in CONVERTERS])
def test_names_and_values_are_those_of_the_converter_of_diffusers(style, kind):
    state, names = state_of(kind), STYLES_BY_NAME[style]
    original = made(to_theirs(shapes_of(state), names).layout, state)
    original = {name: tensor for name, tensor in original.items() if not beyond(name)}
    state = {name: tensor for name, tensor in state.items() if not beyond(name)}
    if kind == "cosmos":
        original = Remembering({f"net.{name}": tensor for name, tensor in original.items()})
    assert_equal(CONVERTERS[style](original), state)


class Remembering(dict):
    """Has what was taken out: diffusers 0.42 looks for the first Cosmos after it took all out."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.names = set(tensors)

    def __contains__(self, name):
        return name in self.names


def beyond(name):
    """Tell whether the converter does not know a tensor, or takes the full size for granted."""
    parts = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".proj_mlp.", ".linear1.")
    return (
        (name.startswith("single_") and any(part in name for part in parts))
        or "prompt_adaln" in name  # LTX-2.3, which the converter of LoRAs knows
        or name.endswith(("emb_pos", "pos_embed"))  # Wan 2.1 FLF2V: rests on a reading
        or name.startswith("fps_projection.")  # SkyReels-V2: the same
    )


def test_a_fused_layer_of_unequal_parts_is_cut_as_the_converter_does():
    """The converter takes 3072 columns for granted, so that the layer is of full size."""
    hidden, mlp = 3072, 5
    generator = torch.Generator().manual_seed(0)
    original = {
        "single_blocks.0.linear1.weight": torch.randn(3 * hidden + mlp, 2, generator=generator),
        "single_blocks.0.linear1.bias": torch.randn(3 * hidden + mlp, generator=generator),
        "single_blocks.0.linear2.weight": torch.randn(hidden, 2, generator=generator),
    }
    converted = file_converters.convert_hunyuan_video_transformer_to_diffusers(dict(original))
    found = to_ours(shapes_of(original), STYLES_BY_NAME["original HunyuanVideo"])
    assert_equal(made(found.layout, original), converted)


@pytest.mark.parametrize("names", STYLES, ids=lambda names: names.style)
def test_every_table_is_a_bijection(names):
    ours = [part for path in names.table.values() for part in parts_of(path)]
    assert len(ours) == len(set(ours))
    assert not names.table.keys() & names.also.keys()
    also = {part for path in names.also.values() for part in parts_of(path)}
    assert {path.removesuffix(".weight") for path in also} <= set(ours)
    for extra in (names.orders, names.interleaved, names.alike):
        assert extra.keys() <= names.table.keys()
    assert {name.rpartition(".")[0] for name in names.ones} <= names.table.keys()


@pytest.mark.parametrize(("style", "kind"), EACH)
def test_the_family_is_told_by_either_names(style, kind):
    state, names = state_of(kind), STYLES_BY_NAME[style]
    original = to_theirs(shapes_of(state), names).layout
    assert family_of_names(state) == names.family
    assert family_of_names(original) == names.family
    prefixed = [f"model.diffusion_model._orig_mod.{name}" for name in original]
    assert family_of_names([*prefixed, "first_stage_model.decoder.conv_in.weight"]) == names.family
    assert family_of_names(f"transformer.{name}" for name in state) == names.family


def test_a_family_is_never_guessed():
    assert family_of_names([]) is None
    assert family_of_names(["proj_out.weight"]) is None
    assert family_of_names(["blocks.0.attn1.to_q.weight", "something.else"]) is None
    two = ["transformer.blocks.0.attn1.to_q.weight", "transformer_2.blocks.0.attn1.to_q.weight"]
    assert family_of_names(two) is None


def test_whole_models_are_written_in_the_spelling_of_comfyui():
    state = state_of("hunyuan-video")
    layout = renamed(shapes_of(state), "comfyui")
    assert "double_blocks.1.img_attn.qkv.weight" in layout
    assert "double_blocks.1.img_attn.norm.query_norm.weight" in layout
    assert "guidance_in.in_layer.bias" in layout
    assert layout["single_blocks.0.linear1.weight"].shape == (3 * 20 + 40, 20)
    swapped = made(layout, state)["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(swapped, state["norm_out.linear.weight"].roll(20, 0))
    original = made(layout, state)
    older = {re.sub(r"(query|key)_norm\.weight", r"\1_norm.scale", name): name for name in original}
    assert len(older.keys() - original.keys()) == 12  # what ComfyUI had until February 2026
    back = to_ours(
        {name: tuple(original[now].shape) for name, now in older.items()},
        STYLES_BY_NAME["ComfyUI's HunyuanVideo"],
    )
    assert not back.left
    assert_equal(made(back.layout, {name: original[now] for name, now in older.items()}), state)


def test_a_model_with_a_tensor_that_no_table_knows_is_refused():
    shapes = shapes_of(state_of("wan"))
    with pytest.raises(ConfigError, match="No original names are known"):
        renamed({**shapes, "blocks.0.strange": (1,)}, "original")


def original_name(path, style):
    """Return what the original calls a layer of diffusers."""
    names = STYLES_BY_NAME[style]
    template, number, leaf = names.ours.find_tensor(path)
    return numbered(names.homes[template], number) + leaf


def linear_layers(kind):
    return [
        (name, layer)
        for name, layer in DENOISERS[kind]().named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]


@pytest.mark.parametrize("kind", ["ltx-2", "ltx-2.3"])
def test_every_layer_of_ltx_2_is_found_by_the_name_that_the_converter_of_loras_knows(kind):
    layers = linear_layers(kind)
    assert len(layers) > 50
    for name, _ in layers:
        original = original_name(name, "original LTX-2")
        key = f"diffusion_model.{original}.lora_A.weight"
        assert set(lora_converters._convert_non_diffusers_ltx2_lora_to_diffusers({key: None})) == {
            f"transformer.{name}.lora_A.weight"
        }
        assert spellings(original.replace(".", "_"))[0].path == name.replace(".", "_")


def test_swapped_halves_of_a_lora_are_turned_as_the_converter_does():
    up = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    for key in ("final_layer.adaLN_modulation.1", "final_layer_adaLN_modulation_1"):
        (spelling,) = (s for s in spellings(key.replace(".", "_")) if s.path == "norm_out_linear")
        rows = spelling.rows_in_ours(len(up))
        assert rows is not None
        ours = torch.cat([up[part] for part in rows])
        wanted = lora_converters._convert_hunyuan_video_lora_to_diffusers(
            {"final_layer.adaLN_modulation.1.lora_B.weight": up}
        )
        assert torch.equal(ours, wanted["transformer.norm_out.linear.lora_B.weight"])
    (spelling,) = spellings("double_blocks_0_img_attn_qkv")
    assert spelling.rows_in_ours(30) is None


@pytest.mark.parametrize("infix", ["", ".default"])
@pytest.mark.parametrize("stack", ["blocks.1", "token_refiner.blocks.0"])
def test_the_dialects_of_minimax_h3_are_turned_as_the_converter_does(infix, stack):
    """DiffSynth-Studio, which deals q, k and v by head, writes `.default`."""
    generator = torch.Generator().manual_seed(0)
    ups = {"attn.qkv_proj": 2 * 3 * 128, "mlp.fc1": 12, "mlp.fc2": 6, "attn.out_proj": 6}
    file = {}
    for layer, rows in ups.items():
        file[f"{stack}.{layer}.lora_A{infix}.weight"] = torch.ones(2, 5)
        file[f"{stack}.{layer}.lora_B{infix}.weight"] = torch.randn(rows, 2, generator=generator)
    wanted = lora_converters._convert_non_diffusers_minimax_h3_lora_to_diffusers(dict(file))
    our_stack = stack.replace("token_refiner.blocks", "token_refiner.refiner_blocks")
    our_stack = our_stack if our_stack.startswith("token") else f"transformer_{our_stack}"
    for layer in ups:
        up = file[f"{stack}.{layer}.lora_B{infix}.weight"]
        head_dim = 128 if infix and layer == "attn.qkv_proj" else None
        (spelling,) = spellings(f"{stack}.{layer}".replace(".", "_"))
        rows = spelling.rows_in_ours(len(up), head_dim=head_dim)
        ours = up if rows is None else torch.cat([up[part] for part in rows])
        wanted_ups = [
            tensor
            for name, tensor in wanted.items()
            if name.endswith(".lora_B.weight") and belongs(name, spelling.path)
        ]
        assert torch.equal(torch.cat(wanted_ups), ours), layer


def belongs(name, flat):
    """Tell whether a tensor is of a flat layer, or of a part of a fused one."""
    path = name.removeprefix("transformer.").removesuffix(".lora_B.weight")
    return path.replace(".", "_") in {
        part.replace(".", "_") for part in parts_of(flat.replace("_to_qkv", ".to_qkv"))
    }


def test_the_names_hold_for_the_versions_of_diffusers_that_are_installed():
    assert all(hasattr(diffusers, type(build()).__name__) for build in DENOISERS.values())
