"""Every tensor of DynamiCrafter falls into the group that its name says."""

from __future__ import annotations

import operator

import pytest
import torch

from motionmerge.errors import RecipeError
from motionmerge.merging.algebra.groups import (
    GROUPS,
    OTHER,
    count_parameters,
    group_of,
    only,
    restrict,
    restrictions,
    selects,
)
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.lora.task_vector import lora
from motionmerge.merging.recipes.parser import parse_expression
from motionmerge.models.dynamicrafter import DynamiCrafterUNet
from motionmerge.parameter_groups import FAMILIES, _first_group

from ..tiny.library import d
from .conftest import same_bits

EXAMPLES = {
    "unet.temporal_in.transformer_blocks.0.attn2.to_q.weight": "temporal",
    "unet.down_stages.0.temporal_attention.proj_in.weight": "temporal",
    "unet.down_stages.3.temporal_conv.conv1.2.weight": "temporal",
    "unet.up_stages.5.attention.transformer_blocks.0.attn1.to_q.weight": "spatial",
    "unet.up_stages.5.attention.transformer_blocks.0.attn2.to_k.weight": "cross_attention",
    "up_stages.5.attention.transformer_blocks.0.attn2.processor.to_k_ip.0.weight": (
        "cross_attention"
    ),
    "unet.down_stages.0.temporal_attention.fusion.proj.weight": "adapter",
    "unet.temporal_adapter.queries": "adapter",
    "image_projector.latents": "image_projector",
    "unet.mid_stages.0.resnet.conv1.weight": "residual",
    "conv_in.weight": "residual",
    "unet.time_embedding.linear_1.weight": "embeddings",
    "fps_embedding.linear_2.bias": "embeddings",
    "model.diffusion_model.init_attn.0.proj_in.weight": "temporal",
    "model.diffusion_model.input_blocks.1.2.transformer_blocks.0.attn1.to_q.weight": "temporal",
    "model.diffusion_model.input_blocks.1.0.temopral_conv.conv1.2.weight": "temporal",
    "model.diffusion_model.middle_block.2.proj_out.weight": "temporal",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": "spatial",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k_ip.weight": (
        "cross_attention"
    ),
    "model.diffusion_model.middle_block.1.proj_in.weight": "spatial",
    "model.diffusion_model.input_blocks.1.2.cc_projection.weight": "adapter",
    "queries": "adapter",
    "image_proj_model.latents": "image_projector",
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": "residual",
    "model.diffusion_model.input_blocks.3.0.op.weight": "residual",
    "model.diffusion_model.output_blocks.2.1.conv.weight": "residual",
    "model.diffusion_model.time_embed.0.weight": "embeddings",
    "first_stage_model.encoder.conv_in.weight": OTHER,
    "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": OTHER,
    "betas": OTHER,
}


@pytest.mark.parametrize(("name", "group"), EXAMPLES.items())
def test_a_name_belongs_to_its_group(name, group):
    assert group_of(name) == group


def test_every_parameter_of_our_unet_has_a_group():
    unet = DynamiCrafterUNet(
        block_out_channels=(32, 32),
        attention_levels=(True, False),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_text_tokens=4,
        num_image_tokens=2,
    )
    unet.add_temporal_adapter(text_dim=16, context_dim=16, num_frames=2)
    counts = count_parameters({f"unet.{n}": p.numel() for n, p in unet.named_parameters()})
    assert set(counts) == set(GROUPS) - {"image_projector", "joint", "audio"}


OURS = ("dynamicrafter", "consisti2v")
NAME = operator.attrgetter("name")
JOINT = {"joint", "cross_attention", "residual", "embeddings"}
UNET = {"temporal", "spatial", "cross_attention", "residual", "embeddings"}
WAN_IMAGE = {"image_dim": 8, "added_kv_proj_dim": 16, "pos_embed_seq_len": 4}
FROM_DIFFUSERS = {
    "svd": (UNET, {}),
    "i2vgen-xl": (UNET | {"image_projector"}, {}),
    "cogvideox": (
        JOINT - {"cross_attention"},
        {
            "use_learned_positional_embeddings": True,
            "use_rotary_positional_embeddings": True,
            "ofs_embed_dim": 8,
            "num_layers": 2,
        },
    ),
    "wan": (JOINT | {"image_projector"}, {"num_layers": 2, **WAN_IMAGE}),
    "skyreels-v2": (
        JOINT | {"image_projector"},
        {"num_layers": 2, "inject_sample_info": True, **WAN_IMAGE},
    ),
    "ltx": (JOINT, {"num_layers": 2}),
    "ltx-2": (JOINT | {"audio"}, {"num_layers": 2}),
    "hunyuan-video": (JOINT, {"num_layers": 2, "num_single_layers": 2}),
    "hunyuan-video-1.5": (JOINT | {"image_projector"}, {"num_layers": 2}),
    "kandinsky-5": (JOINT, {"num_visual_blocks": 2}),
    "kandinsky-6": (
        JOINT | {"audio"},
        {"num_visual_blocks": 2, "visual_token_type_num_embeddings": 2},
    ),
    "anyflow": (JOINT, {"num_layers": 2}),
    "helios": (JOINT, {"num_layers": 2}),
    "chronoedit": (JOINT | {"image_projector"}, {"num_layers": 2, **WAN_IMAGE}),
    "framepack": (
        JOINT | {"image_projector"},
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "has_image_proj": True,
            "has_clean_x_embedder": True,
        },
    ),
    "motif": (
        JOINT | {"image_projector"},
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "image_embed_dim": 8,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
    ),
    "sana-video": (JOINT, {"num_layers": 2}),
    "cosmos-2": (JOINT, {"num_layers": 2, "extra_pos_embed_type": "learnable"}),
    "minimax-h3": (
        {"joint", "residual", "embeddings", "audio"},
        {"num_layers": 2},
    ),
}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in OURS], ids=NAME)
@pytest.mark.parametrize("prefix", ["", "unet.", "transformer_2."])
def test_every_parameter_of_a_family_has_a_group(family, prefix):
    expected, config = FROM_DIFFUSERS[family.name]
    with torch.device("meta"):
        denoiser = getattr(d, family.denoiser)(**config)
    names = [prefix + name for name, _ in denoiser.named_parameters()]
    groups = {name: group_of(name) for name in names}
    assert set(groups.values()) == expected
    assert {name: _first_group(family.patterns, name) for name in names} == groups


def test_every_family_is_known_by_name():
    assert {family.name for family in FAMILIES} == {*FROM_DIFFUSERS, *OURS}


def test_only_restricts_a_task_vector_to_a_group(pair, states):
    merged = (pair[0] + only(pair[1] - pair[0], "temporal")).tensors()
    for name, value in states[0].items():
        changed = value.ndim > 0 and "temporal" in name
        assert same_bits(merged[name], value) is not changed


def test_a_restriction_reaches_every_difference_and_is_read_back():
    def parsed(text):
        return parse_expression(text, ("base", "tuned", "style", "light"))

    plain = parsed(
        "base - 0.5 * dare(tuned - base, drop_rate=0.4, seed=0)"
        " + ties(tuned - base, 2 * (style - base), keep=0.3) + lora(light, 0.8)"
    )
    restricted = restrict(plain, "temporal")
    assert str(restricted) == (
        'base - 0.5 * dare(only(tuned - base, "temporal"), drop_rate=0.4, seed=0)'
        ' + ties(only(tuned - base, "temporal"), 2 * only(style - base, "temporal"), keep=0.3)'
        ' + only(lora(light, 0.8), "temporal")'
    )
    assert parsed(str(restricted)) == restricted and restrict(restricted, None) == plain
    assert set(restrictions(plain)) == {None} and set(restrictions(restricted)) == {"temporal"}
    assert str(restrict(restricted, "*.attn1.*")).count('"*.attn1.*"') == 4
    nested = parsed('base + only(only(tuned - base, "temporal"), "*.attn1.*")')
    assert set(restrictions(nested)) == {"temporal", "*.attn1.*"}
    with pytest.raises(RecipeError, match="tempral"):
        restrict(plain, "tempral")


@pytest.mark.parametrize("pattern", ["*.temporal_*", r"re:temporal_\w+"])
def test_globs_and_regular_expressions_select_too(states, pattern):
    expected = [name for name in states[0] if "temporal_" in name]
    assert list(filter(selects(pattern), states[0])) == expected


def test_a_tensor_outside_the_group_may_be_missing_on_one_side(pair, states):
    base, tuned = states
    partial = {name: value for name, value in tuned.items() if "temporal" in name}
    second = Checkpoint.from_tensors(partial, name="tuned")
    merged = (pair[0] + only(second - pair[0], "temporal")).tensors()
    assert list(merged) == list(base)


def test_a_group_that_matches_nothing_is_refused_with_the_groups_that_exist(pair):
    with pytest.raises(RecipeError, match=r"matches none(.|\n)*spatial, temporal"):
        (pair[0] + only(pair[1] - pair[0], "adapter")).tensors()


def test_a_group_of_which_a_lora_changes_nothing_is_refused_with_the_groups_of_the_lora():
    names = ("transformer_blocks.0.attn1.to_q.weight", "temporal_transformer_blocks.0.to_q.weight")
    base = Checkpoint.from_tensors({name: torch.ones(4, 4) for name in names}, name="base")
    layer = "transformer_blocks.0.attn1.to_q"
    style = {f"{layer}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    selected = group_of(names[0])
    with pytest.raises(RecipeError, match=rf"is nothing.*changes 1 tensors(.|\n)*{selected}"):
        (base + only(lora(style, 1.0), "temporal_*")).tensors()
    assert not torch.equal(
        (base + only(lora(style, 1.0), selected)).tensors()[names[0]], torch.ones(4, 4)
    )


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("temporl", "`temporal`"), ("re:(", "regular expression"), ("*" * 500, "under 200")],
)
def test_a_mistyped_group_or_pattern_is_refused_at_once(pair, pattern, hint):
    with pytest.raises(RecipeError, match=hint):
        only(pair[1] - pair[0], pattern)


def test_groups_do_not_overlap():
    for name in EXAMPLES:
        assert sum(selects(group)(name) for group in GROUPS) <= 1
