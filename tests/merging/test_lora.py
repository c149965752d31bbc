"""LoRA files of every style are task vectors: judged by peft and by diffusers' own loader."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from torch import nn

from motionmerge.errors import CheckpointError, RecipeError, ShapeError
from motionmerge.io.weights import save_weights
from motionmerge.merging.algebra.groups import only
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.lora.task_vector import lora
from motionmerge.merging.merge import merge, realise
from motionmerge.merging.recipes.recipe import Recipe


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(12, 20)
        self.conv = nn.Conv2d(6, 8, 3)
        self.pointwise = nn.Conv2d(6, 8, 1)
        self.line = nn.Conv1d(6, 8, 3)
        self.volume = nn.Conv3d(6, 8, (3, 1, 1))


def randomised(module, *, scale=0.1):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


TARGETS = ["to_q", "conv", "pointwise"]
LINES = [*TARGETS, "line"]
EVERYTHING = [*LINES, "volume"]
PEFT = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=EVERYTHING),
    "rank-stabilised": peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=EVERYTHING, use_rslora=True
    ),
    "with a bias": peft.LoraConfig(r=3, lora_alpha=5, target_modules=EVERYTHING, lora_bias=True),
    "alpha of one layer": peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=EVERYTHING, alpha_pattern={"conv": 7}
    ),
    "rank of one layer": peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=EVERYTHING, rank_pattern={"conv": 2}
    ),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=LINES),
    "loha, rank and alpha of one layer": peft.LoHaConfig(
        r=3, alpha=5, target_modules=LINES, rank_pattern={"to_q": 2}, alpha_pattern={"conv": 7}
    ),
    "loha around a kernel": peft.LoHaConfig(
        r=3, alpha=5, target_modules=LINES, use_effective_conv2d=True
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=5, target_modules=TARGETS, decompose_both=True),
    "lokr of whole matrices": peft.LoKrConfig(r=64, alpha=5, target_modules=TARGETS),
    "lokr around a kernel": peft.LoKrConfig(
        r=2, alpha=5, target_modules=TARGETS, use_effective_conv2d=True, decompose_factor=2
    ),
    "lokr, rank and alpha of one layer": peft.LoKrConfig(
        r=2, alpha=5, target_modules=TARGETS, rank_pattern={"to_q": 1}, alpha_pattern={"conv": 7}
    ),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # about biases, which are 1-d
@pytest.mark.parametrize("config", PEFT.values(), ids=list(PEFT))
def test_what_peft_merges_is_what_we_add(config, tmp_path):
    block = randomised(Block())
    base = {name: value.clone() for name, value in block.state_dict().items()}
    adapted = peft.get_peft_model(block, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(kind in name for kind in ("lora_", "hada_", "lokr_")):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path)
    expected = adapted.merge_and_unload().state_dict()
    merged = Checkpoint.from_tensors(base, name="base") + lora(
        tmp_path / "adapter_model.safetensors", 1.0
    )
    result = merged.tensors()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, atol=1e-6, rtol=1e-5)
        is_target = name.removesuffix(".weight") in config.target_modules
        assert torch.equal(value, base[name]) is not is_target or name.endswith("bias")


def test_a_lokr_of_a_line_is_multiplied_as_lycoris_does_and_that_of_peft_is_refused():
    base = Checkpoint.from_tensors({"line.weight": torch.zeros(8, 6, 3)}, name="base")
    first, second = torch.randn(2, 2), torch.randn(4, 3, 3)
    parts = {"lokr_w1": first, "lokr_w2": second}
    merged = (base + lora({f"lycoris_line.{k}": v for k, v in parts.items()}, 1.0)).tensors()
    expected = torch.stack([torch.kron(first, second[..., i]) for i in range(3)], dim=-1)
    torch.testing.assert_close(merged["line.weight"], expected)
    with pytest.raises(CheckpointError, match="LoKr of a 1-d convolution"):
        (base + lora({f"base_model.model.line.{k}": v for k, v in parts.items()}, 1.0)).tensors()


@pytest.fixture(scope="module")
def wan():
    return randomised(
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=8, freq_dim=16, ffn_dim=16, num_layers=2, image_dim=4,
            added_kv_proj_dim=24, pos_embed_seq_len=None,
        )
    )  # fmt: skip


ORIGINAL = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
    "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.0.attn2.add_k_proj": "blocks.0.cross_attn.k_img",
    "blocks.0.attn2.add_v_proj": "blocks.0.cross_attn.v_img",
    "blocks.1.ffn.net.0.proj": "blocks.1.ffn.0",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "proj_out": "head.head",
}
STYLES = {
    "diffusers": lambda ours, wan: (f"transformer.{ours}", "lora_A.weight", "lora_B.weight"),
    "peft": lambda ours, wan: (f"base_model.model.{ours}", "lora_A.weight", "lora_B.weight"),
    "named adapter": lambda ours, wan: (ours, "lora_A.motion.weight", "lora_B.motion.weight"),
    "old diffusers": lambda ours, wan: (f"unet.{ours}", "lora.down.weight", "lora.up.weight"),
    "original": lambda ours, wan: (
        f"diffusion_model.{wan}", "lora_down.weight", "lora_up.weight",
    ),
    "kohya": lambda ours, wan: (
        f"lora_unet_{wan.replace('.', '_')}", "lora_down.weight", "lora_up.weight",
    ),
    "kohya, diffusers names": lambda ours, wan: (
        f"lora_transformer_{ours.replace('.', '_')}", "lora_down.weight", "lora_up.weight",
    ),
}  # fmt: skip


def lora_file(wan, style, *, rank=2, alpha=None):
    """A LoRA of the modules in ORIGINAL in one of the styles, the same numbers in each."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for ours, original in ORIGINAL.items():
        out, into = wan.get_parameter(f"{ours}.weight").shape
        path, down, up = STYLES[style](ours, original)
        tensors[f"{path}.{down}"] = torch.randn(rank, into, generator=generator)
        tensors[f"{path}.{up}"] = torch.randn(out, rank, generator=generator)
        if alpha is not None:
            tensors[f"{path}.alpha"] = torch.tensor(float(alpha))
    return tensors


def changed(base, merged):
    return {name for name, value in base.items() if not torch.equal(value, merged[name])}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_every_style_of_keys_means_the_same(wan, style, prefix):
    base = {prefix + name: value for name, value in wan.state_dict().items()}
    start = Checkpoint.from_tensors(base, name="base")
    merged = (start + lora(lora_file(wan, style, alpha=3), 0.5)).tensors()
    reference = (start + lora(lora_file(wan, "diffusers", alpha=3), 0.5)).tensors()
    assert changed(base, merged) == {f"{prefix}{path}.weight" for path in ORIGINAL}
    assert not changed(reference, merged)


@pytest.mark.parametrize("alpha", [None, 1, 3])
def test_diffusers_loads_and_fuses_a_wan_lora_to_the_same_weights(wan, alpha):
    tensors = lora_file(wan, "original", alpha=alpha)
    if alpha is not None:  # which diffusers reads in the blocks only
        tensors = {key: value for key, value in tensors.items() if ".blocks." in key}
    base = {name: value.clone() for name, value in wan.state_dict().items()}
    loaded = WanTransformer3DModel.from_config(wan.config)
    loaded.load_state_dict(base)
    state = WanImageToVideoPipeline.lora_state_dict({k: v.clone() for k, v in tensors.items()})
    loaded.load_lora_adapter(state, prefix="transformer")
    loaded.fuse_lora()
    loaded.unload_lora()
    merged = (Checkpoint.from_tensors(base, name="base") + lora(tensors, 1.0)).tensors()
    assert changed(base, merged)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-4)


def test_plain_differences_of_norms_and_bare_parameters_are_added(wan):
    base = wan.state_dict()
    tensors = {
        "diffusion_model.blocks.0.norm3.diff": torch.ones(24),
        "diffusion_model.blocks.0.norm3.diff_b": torch.ones(24),
        "diffusion_model.blocks.1.modulation.diff": torch.ones(1, 6, 24),
        "diffusion_model.head.modulation.diff": torch.ones(1, 2, 24),
    }
    merged = (Checkpoint.from_tensors(base, name="base") + lora(tensors, 0.5)).tensors()
    names = ["blocks.0.norm2.weight", "blocks.0.norm2.bias"]
    names += ["blocks.1.scale_shift_table", "scale_shift_table"]
    assert changed(base, merged) == set(names)
    for name in names:
        torch.testing.assert_close(merged[name], base[name] + 0.5)


def test_a_locon_kernel_is_multiplied_from_both_sides():
    base = {"unet.conv.weight": torch.zeros(5, 4, 3, 3)}
    up, mid, down = torch.randn(5, 2, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(2, 4, 1, 1)
    tensors = {
        "lora_unet_conv.lora_up.weight": up,
        "lora_unet_conv.lora_mid.weight": mid,
        "lora_unet_conv.lora_down.weight": down,
        "lora_unet_conv.alpha": torch.tensor(1.0),
    }
    merged = (Checkpoint.from_tensors(base, name="base") + lora(tensors, 1.0)).tensors()
    image = torch.randn(1, 4, 6, 6)
    conv = nn.functional.conv2d
    expected = conv(conv(conv(image, down), mid), up) / 2
    torch.testing.assert_close(conv(image, merged["unet.conv.weight"]), expected)


def test_alpha_in_the_header_that_diffusers_writes_counts(wan, tmp_path):
    settings = {"transformer.r": 2, "transformer.lora_alpha": 6}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    save_weights(tmp_path / "lora.safetensors", lora_file(wan, "diffusers"), metadata)
    start = Checkpoint.from_tensors(wan.state_dict(), name="base")
    merged = (start + lora(tmp_path / "lora.safetensors", 1.0)).tensors()
    expected = (start + lora(lora_file(wan, "diffusers", alpha=6), 1.0)).tensors()
    assert not changed(expected, merged)


def test_a_model_with_two_denoisers_gets_it_in_both_or_in_the_one_that_is_meant(wan):
    state = wan.state_dict()
    base = {f"{m}.{name}": v for m in ("transformer", "transformer_2") for name, v in state.items()}
    start = Checkpoint.from_tensors(base, name="base")
    vector = lora(lora_file(wan, "original"), 1.0)
    assert len(changed(base, (start + vector).tensors())) == 2 * len(ORIGINAL)
    low_noise = (start + only(vector, "transformer_2.*")).tensors()
    assert len(changed(base, low_noise)) == len(ORIGINAL)
    explicit = {
        f"transformer_2.{key.removeprefix('transformer.')}": value
        for key, value in lora_file(wan, "diffusers").items()
    }
    assert not changed(low_noise, (start + lora(explicit, 1.0)).tensors())


@pytest.fixture
def files(wan, tmp_path):
    save_weights(tmp_path / "base.safetensors", dict(wan.state_dict()))
    save_weights(tmp_path / "fast motion.safetensors", lora_file(wan, "original", alpha=1))
    return tmp_path


RESCUE = """
inputs:
  base: base.safetensors
experts:
  dynamics: base - 0.25 * dare(lora("fast motion.safetensors", 1.0), drop_rate=0.5, seed=0)
  consistency: base + lora("fast motion.safetensors", 1.0)
schedule:
  - {expert: dynamics, above: 0.9}
  - {expert: consistency}
"""


def test_a_file_in_quotes_becomes_an_input_that_is_hashed_and_moves_with_the_recipe(files):
    recipe = Recipe.parse(RESCUE, folder=files)
    assert str(recipe.experts["consistency"]) == "base + lora(fast_motion, 1.0)"
    assert recipe.inputs["fast_motion"].path == "fast motion.safetensors"
    assert Recipe.parse(recipe.print()) == recipe
    merge(recipe, files / "out")
    written = Recipe.load(files / "out" / "recipe.yaml")
    assert written.inputs["fast_motion"].path == "../fast motion.safetensors"
    assert written.inputs["fast_motion"].sha256


def test_a_lora_merges_to_a_file_as_in_memory(files):
    recipe = Recipe.parse(RESCUE, folder=files)
    report = merge(recipe, files / "out")
    assert report.experts["consistency"].computed == len(ORIGINAL)
    for expert, tensors in realise(recipe).items():
        written = Checkpoint.load(files / "out" / f"{expert}.safetensors").tensors()
        assert not changed(tensors, written)
    dry = merge(recipe, files / "out", dry_run=True)
    assert dry.experts["consistency"].computed == len(ORIGINAL)


def test_an_input_may_be_replaced_by_a_lora_in_memory(files, wan):
    recipe = Recipe.parse(RESCUE, folder=files)
    silent = {key: value * 0 for key, value in lora_file(wan, "original").items()}
    tensors = realise(recipe, inputs={"fast_motion": silent})["consistency"]
    assert not changed(wan.state_dict(), tensors)


def test_keys_that_fit_nothing_are_listed_and_refused_unless_allowed(files, wan):
    tensors = lora_file(wan, "original") | {
        "lora_te_text_model_encoder.lora_down.weight": torch.ones(2, 4),
        "lora_te_text_model_encoder.lora_up.weight": torch.ones(4, 2),
        "diffusion_model.blocks.7.self_attn.q.diff_b": torch.ones(24),
        "something.else": torch.ones(3),
    }
    recipe = Recipe.parse(RESCUE, folder=files)
    with pytest.raises(CheckpointError) as caught:
        realise(recipe, inputs={"fast_motion": tensors})
    for key in ("lora_te_text_model_encoder", "blocks.7.self_attn.q.diff_b", "something.else"):
        assert key in str(caught.value)
    assert "missing='keep'" in str(caught.value)
    kept = realise(recipe, inputs={"fast_motion": tensors}, missing="keep")["consistency"]
    assert len(changed(wan.state_dict(), kept)) == len(ORIGINAL)


def test_a_lora_that_fits_nothing_at_all_is_refused_even_then(files):
    tensors = {"unet.mid.to_q.lora_A.weight": torch.ones(2, 4)}
    tensors["unet.mid.to_q.lora_B.weight"] = torch.ones(4, 2)
    with pytest.raises(CheckpointError, match="no tensor name in common"):
        realise(Recipe.parse(RESCUE, folder=files), inputs={"fast_motion": tensors}, missing="keep")


BROKEN = {
    "a DoRA": ({"dora_scale": (24, 1)}, CheckpointError, "DoRA"),
    "half a LoRA": ({"lora_down.weight": (2, 24)}, CheckpointError, "incomplete"),
    "two ranks": (
        {"lora_down.weight": (2, 24), "lora_up.weight": (24, 3)},
        CheckpointError,
        "incomplete or damaged",
    ),
    "another width": (
        {"lora_down.weight": (2, 7), "lora_up.weight": (24, 2)},
        ShapeError,
        r"\[24, 24\] in `base` but \[24, 7\] in `lora_tensors`",
    ),
    "no LoRA": ({"weight": (24, 24)}, CheckpointError, "holds no LoRA"),
}


@pytest.mark.parametrize(("parts", "error", "message"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_lora_is_refused(wan, parts, error, message):
    path = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{path}.{part}": torch.ones(shape) for part, shape in parts.items()}
    with pytest.raises(error, match=message):
        (Checkpoint.from_tensors(wan.state_dict(), name="base") + lora(tensors, 1.0)).tensors()


@pytest.mark.parametrize(("file", "scale"), [(3, 1.0), ("x.safetensors", "1"), ("x", float("nan"))])
def test_a_lora_that_means_nothing_is_refused_at_once(file, scale):
    with pytest.raises(RecipeError, match=r"`lora\(\)` got"):
        lora(file, scale)


def test_a_merged_checkpoint_is_no_lora():
    base = Checkpoint.from_tensors({"w": torch.ones(2, 2)}, name="base")
    with pytest.raises(RecipeError, match="not a file"):
        lora(base + (base - base), 1.0)
