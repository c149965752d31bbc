"""A LoRA of a fused projection fits single ones and the other way round, as peft multiplies it."""

from __future__ import annotations

import peft
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from torch import nn

from motionmerge.errors import CheckpointError, ShapeError
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.lora.task_vector import lora

ROWS = {"to_q": 12, "to_k": 6, "to_v": 6}  # heads share keys and values


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(8, sum(ROWS.values()))


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        for name, rows in ROWS.items():
            self.add_module(name, nn.Linear(8, rows))


class FusedKernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Conv2d(8, sum(ROWS.values()), 3)


class SingleKernels(nn.Module):
    def __init__(self):
        super().__init__()
        for name, rows in ROWS.items():
            self.add_module(name, nn.Conv2d(8, rows, 3))


def adapted(module, config):
    """Give what peft saves of an adapter with random numbers, and what it adds to the weights."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wrapped = peft.get_peft_model(module, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(kind in name for kind in ("lora_", "hada_", "lokr_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    saved = peft.get_peft_model_state_dict(wrapped)
    after = wrapped.merge_and_unload().state_dict()
    return saved, {name: after[name] - before[name] for name in before}


def changes(base, vector):
    merged = (Checkpoint.from_tensors(base, name="base") + vector).tensors()
    return {name: merged[name] - base[name] for name in base}


def zeros(module):
    return {name: torch.zeros_like(value) for name, value in module.state_dict().items()}


TARGETS = ["to_qkv", "to_q", "to_k", "to_v"]
PEFT = {
    "lora": peft.LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS),
    "lora with a bias": peft.LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS, lora_bias=True),
    "loha": peft.LoHaConfig(r=3, alpha=3, target_modules=TARGETS),
    "loha around a kernel": peft.LoHaConfig(
        r=3, alpha=3, target_modules=TARGETS, use_effective_conv2d=True
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=2, target_modules=TARGETS, decompose_both=True),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # about biases, which are 1-d
@pytest.mark.parametrize("config", PEFT.values(), ids=list(PEFT))
@pytest.mark.parametrize(("fused", "single"), [(Fused, Single), (FusedKernel, SingleKernels)])
def test_the_rows_of_a_fused_lora_are_dealt_over_the_single_projections(config, fused, single):
    saved, expected = adapted(fused(), config)
    found = changes(zeros(single()), lora(saved, 0.5))
    for leaf in ("weight", "bias"):
        parts = [found[f"{name}.{leaf}"] for name in ROWS]
        torch.testing.assert_close(torch.cat(parts), 0.5 * expected[f"to_qkv.{leaf}"])


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # about biases, which are 1-d
@pytest.mark.parametrize("config", PEFT.values(), ids=list(PEFT))
@pytest.mark.parametrize(("fused", "single"), [(Fused, Single), (FusedKernel, SingleKernels)])
def test_single_loras_are_stacked_in_a_fused_projection(config, fused, single):
    saved, expected = adapted(single(), config)
    found = changes(zeros(fused()), lora(saved, 0.5))
    for leaf in ("weight", "bias"):
        parts = [expected[f"{name}.{leaf}"] for name in ROWS]
        torch.testing.assert_close(found[f"to_qkv.{leaf}"], 0.5 * torch.cat(parts))


@pytest.mark.parametrize(
    "present", [("to_q", "to_v"), ("to_q",), ("to_v",), ("to_k",)], ids="+".join
)
def test_projections_that_have_no_lora_keep_their_rows(present):
    saved, expected = adapted(
        Single(), peft.LoraConfig(r=3, lora_alpha=3, target_modules=list(present))
    )
    found = changes(zeros(Fused()), lora(saved, 1.0))["to_qkv.weight"]
    parts = [expected[f"{name}.weight"] for name in ROWS]
    torch.testing.assert_close(found, torch.cat(parts))
    assert any(not part.any() for part in parts)


def factors(path, rows, columns, *, rank=2, alpha=None):
    generator = torch.Generator().manual_seed(len(path))
    tensors = {
        f"{path}.lora_down.weight": torch.randn(rank, columns, generator=generator),
        f"{path}.lora_up.weight": torch.randn(rows, rank, generator=generator),
    }
    return tensors if alpha is None else tensors | {f"{path}.alpha": torch.tensor(float(alpha))}


SPELLINGS = {
    "kohya": ("lora_unet_blocks_0_self_attn_qkv", "blocks.0.attn1.to_{}"),
    "original": ("diffusion_model.blocks.0.self_attn.qkv", "transformer.blocks.0.self_attn.{}"),
    "qkv_proj": ("transformer.layers.3.qkv_proj", "layers.3.{}_proj"),
    "diffusers": ("transformer.blocks.0.attn.to_qkv", "transformer.blocks.0.attn.to_{}"),
}


@pytest.mark.parametrize(("path", "name"), SPELLINGS.values(), ids=list(SPELLINGS))
def test_a_fused_projection_is_found_in_every_style(path, name):
    base = {f"{name.format(part)}.weight": torch.zeros(4, 5) for part in "qkv"}
    tensors = factors(path, 12, 5, alpha=1)
    product = tensors[f"{path}.lora_up.weight"] @ tensors[f"{path}.lora_down.weight"] / 2
    found = changes(base, lora(tensors, 1.0))
    torch.testing.assert_close(torch.cat(list(found.values())), product)


def test_two_fused_projections_with_different_names_are_the_same():
    base = {"attn.to_qkv.weight": torch.zeros(12, 5)}
    found = changes(base, lora(factors("lora_unet_attn_qkv", 12, 5), 1.0))
    assert found["attn.to_qkv.weight"].count_nonzero() == 60


def test_each_of_two_denoisers_gets_the_rows():
    names = [f"{m}.attn.to_{p}.weight" for m in ("transformer", "transformer_2") for p in "qkv"]
    base = {name: torch.zeros(4, 5) for name in names}
    both = changes(base, lora(factors("attn.to_qkv", 12, 5), 1.0))
    assert all(value.any() for value in both.values())
    second = changes(base, lora(factors("transformer_2.attn.to_qkv", 12, 5), 1.0))
    assert [bool(value.any()) for value in second.values()] == 3 * [False] + 3 * [True]


def test_rows_that_do_not_add_up_are_named():
    single = {f"attn.to_{part}.weight": torch.zeros(4, 5) for part in "qkv"}
    with pytest.raises(ShapeError, match=r"`attn.to_qkv` for `attn.to_q.weight`.*4 \+ 4 \+ 4 are"):
        changes(single, lora(factors("attn.to_qkv", 15, 5), 1.0))
    fused = {"attn.to_qkv.weight": torch.zeros(12, 5)}
    with pytest.raises(ShapeError, match=r"`attn.to_qkv.weight`.* 5 \+ \? \+ \? are not 12"):
        changes(fused, lora(factors("attn.to_q", 5, 5), 1.0))
    with pytest.raises(ShapeError, match=r"4 \+ 4 \+ 5 are not 12"):
        changes(
            fused,
            lora({k: v for p, n in zip("qkv", (4, 4, 5), strict=True)
                  for k, v in factors(f"attn.to_{p}", n, 5).items()}, 1.0),
        )  # fmt: skip
    with pytest.raises(ShapeError, match=r"\[12, 5\] in `base` but \[12, 7\]"):
        changes(fused, lora(factors("attn.to_q", 4, 7), 1.0))


def test_a_fused_key_is_listed_if_the_model_lacks_one_of_its_parts():
    base = {f"attn.to_{part}.weight": torch.zeros(4, 5) for part in "qk"}
    with pytest.raises(CheckpointError, match="no tensor name in common"):
        changes(base, lora(factors("attn.to_qkv", 12, 5), 1.0))


@pytest.fixture(scope="module")
def hunyuan():
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )  # fmt: skip


HUNYUAN = {
    "double_blocks.0.img_attn_qkv": (48, 16),
    "double_blocks.0.txt_attn_qkv": (48, 16),
    "double_blocks.0.img_attn_proj": (16, 16),
    "double_blocks.0.txt_attn_proj": (16, 16),
    "double_blocks.0.img_mlp.fc1": (64, 16),
    "double_blocks.0.img_mlp.fc2": (16, 64),
    "double_blocks.0.txt_mlp.fc1": (64, 16),
    "double_blocks.0.img_mod.linear": (96, 16),
    "double_blocks.0.txt_mod.linear": (96, 16),
    "single_blocks.0.linear2": (16, 80),
    "single_blocks.0.modulation.linear": (48, 16),
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj": (16, 16),
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1": (64, 16),
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1": (32, 16),
    "txt_in.c_embedder.linear_1": (16, 8),
    "vector_in.in_layer": (16, 8),
    "time_in.mlp.2": (16, 16),
    "final_layer.linear": (16, 16),
}


def test_an_original_hunyuan_video_lora_is_what_diffusers_makes_of_it(hunyuan):
    tensors = {}
    for path, (rows, columns) in HUNYUAN.items():
        for key, value in factors(f"diffusion_model.{path}", rows, columns).items():
            tensors[key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")] = value
    base = zeros(hunyuan)
    found = changes(base, lora(tensors, 1.0))
    expected = changes(base, lora(_convert_hunyuan_video_lora_to_diffusers(dict(tensors)), 1.0))
    assert sum(bool(value.any()) for value in found.values()) == len(HUNYUAN) + 4
    assert all(torch.equal(found[name], expected[name]) for name in base)


@pytest.mark.parametrize("style", ["diffusion_model.single_blocks.0.linear1",
                                   "lora_unet_single_blocks_0_linear1"])  # fmt: skip
def test_the_first_matrix_of_a_single_block_is_attention_and_feed_forward(hunyuan, style):
    tensors = factors(style, 3 * 16 + 64, 16)
    found = changes(zeros(hunyuan), lora(tensors, 1.0))
    block = "single_transformer_blocks.0"
    names = [f"{block}.attn.to_{part}.weight" for part in "qkv"] + [f"{block}.proj_mlp.weight"]
    product = tensors[f"{style}.lora_up.weight"] @ tensors[f"{style}.lora_down.weight"]
    torch.testing.assert_close(torch.cat([found[name] for name in names]), product)
    original = {f"{style.removeprefix('lora_unet_')}.weight": torch.zeros(112, 16)}
    back = {}
    for name in names:
        rows = len(found[name])
        back |= factors(f"transformer.{name.removesuffix('.weight')}", rows, 16)
    (whole,) = changes(original, lora(back, 1.0)).values()
    parts = [changes(zeros(hunyuan), lora(back, 1.0))[name] for name in names]
    torch.testing.assert_close(whole, torch.cat(parts))
