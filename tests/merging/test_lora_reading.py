"""How a LoRA file is read: dense and signed LoRAs alike, nothing added or left out silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from motionmerge.errors import CheckpointError, MotionMergeError, ShapeError
from motionmerge.exports.loras import export_loras
from motionmerge.io.weights import save_weights
from motionmerge.merging.algebra.groups import only
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.lora.report import describe_lora
from motionmerge.merging.lora.task_vector import lora
from motionmerge.merging.merge import merge, realise
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.switching.lora_layers import read_lora

Tensors = dict[str, torch.Tensor]
LAYERS = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.1.attn1.to_out.0", "proj_out")


def model(names: tuple[str, ...] = LAYERS, *, bias: bool = True) -> nn.Module:
    """A module with linear layers of these names."""
    root = nn.Module()
    for name in names:
        parent = root
        *parts, leaf = name.split(".")
        for part in parts:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(6, 6, bias=bias))
    return root


def pair(path: str, *, size: float = 1.0, rank: int = 1, style: str = "peft") -> Tensors:
    down, up = ("lora_A", "lora_B") if style == "peft" else ("lora_down", "lora_up")
    return {
        f"{path}.{down}.weight": torch.ones(rank, 6),
        f"{path}.{up}.weight": torch.full((6, rank), size / rank),
    }


def dense(base: Tensors, file: Tensors | Path) -> dict[str, float]:
    """Give by how much the first entry of each tensor changes."""
    merged = (Checkpoint.from_tensors(base, name="base") + lora(file, 1.0)).tensors()
    differences = {name: (merged[name] - base[name]).flatten()[0] for name in base}
    return {name: float(value) for name, value in differences.items() if value != 0}


def signed(denoisers: dict[str, nn.Module], file: Tensors | Path) -> dict[str, float]:
    """Give the same of the weights of a signed LoRA's layers."""
    found = {}
    for denoiser, layers in read_lora(file, denoisers, name="style").layers.items():
        prefix = "" if denoiser == "denoiser" else f"{denoiser}."
        for name, layer in layers.items():
            product = layer.alpha / layer.rank * layer.up @ layer.down
            found[f"{prefix}{name}.weight"] = float(product.flatten()[0])
    return found


def zeros(denoisers: dict[str, nn.Module]) -> Tensors:
    return {
        ("" if denoiser == "denoiser" else f"{denoiser}.") + name: torch.zeros_like(value)
        for denoiser, module in denoisers.items()
        for name, value in module.state_dict().items()
    }


def both_ways(denoisers: dict[str, nn.Module], file: Tensors | Path) -> dict[str, float]:
    """Read a file in both ways, which have to agree: what changes, or the error."""
    answers = []
    for read in (lambda: dense(zeros(denoisers), file), lambda: signed(denoisers, file)):
        try:
            answers.append(read())
        except MotionMergeError as error:
            answers.append(error)
    first, second = answers
    if isinstance(first, MotionMergeError):
        assert type(second) is type(first), second
        raise first
    assert first == second
    return first


WRAPPERS = (
    "base_model.model.", "diffusion_model.", "model.diffusion_model.", "_orig_mod.", "module.",
    "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "pipe.dit.", "dit.", "model.",
    "transformer.", "net.", "_forward_module.",
)  # fmt: skip
FLAT = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_", "Hunyuan_video_I2V_lora_")


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from(WRAPPERS), max_size=3, unique=True),
    st.sampled_from(LAYERS),
    st.sampled_from(["", ".default", ".my-adapter", ".v1.2", ".über adapter"]),
)
def test_wrappers_in_any_order_lead_to_the_same_layer(
    wrappers: list[str], layer: str, adapter: str
) -> None:
    path = "".join(wrappers) + layer
    file = {
        f"{path}.lora_A{adapter}.weight": torch.ones(1, 6),
        f"{path}.lora_B{adapter}.weight": torch.ones(6, 1),
    }
    assert both_ways({"denoiser": model()}, file) == {f"{layer}.weight": 1.0}


@pytest.mark.parametrize("prefix", FLAT)
@pytest.mark.parametrize("wrapper", ["", "_orig_mod_", "_fsdp_wrapped_module_"])
@pytest.mark.parametrize("layer", LAYERS)
def test_flat_names_lead_to_the_same_layer(prefix: str, wrapper: str, layer: str) -> None:
    path = f"{prefix}{wrapper}{layer.replace('.', '_')}"
    file = pair(path, style="kohya") | {f"{path}.alpha": torch.tensor([0.5])}
    assert both_ways({"denoiser": model()}, file) == {f"{layer}.weight": 0.5}


@pytest.mark.parametrize("between", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_compiled_blocks_have_their_names_back(between: str) -> None:
    file = pair(f"transformer.blocks.0.{between}.attn1.to_q")
    assert both_ways({"denoiser": model()}, file) == {"blocks.0.attn1.to_q.weight": 1.0}
    compiled = model(("blocks.0._orig_mod.attn1.to_q",))
    assert dense(zeros({"denoiser": compiled}), pair("blocks.0.attn1.to_q"))


@pytest.mark.parametrize("layer", ["model.to_q", "module.to_q", "dit.to_q"])
def test_a_models_own_names_are_not_taken_for_wrappers(layer: str) -> None:
    net = {"denoiser": model((layer, "to_q"))}
    assert both_ways(net, pair(layer)) == {f"{layer}.weight": 1.0}
    assert both_ways(net, pair("to_q")) == {"to_q.weight": 1.0}
    assert both_ways(net, pair(f"base_model.model.{layer}")) == {f"{layer}.weight": 1.0}
    assert both_ways(net, pair("base_model.model.to_q")) == {"to_q.weight": 1.0}
    assert both_ways(net, pair(f"transformer.{layer}")) == {f"{layer}.weight": 1.0}


def test_names_that_differ_in_punctuation_alone_are_told_apart_or_refused() -> None:
    net = {"denoiser": model(("a.b_c", "a_b.c"))}
    assert both_ways(net, pair("a.b_c")) == {"a.b_c.weight": 1.0}
    assert both_ways(net, pair("a_b.c")) == {"a_b.c.weight": 1.0}
    with pytest.raises(CheckpointError, match=r"`a\.b_c\.weight` or `a_b\.c\.weight`"):
        both_ways(net, pair("lora_unet_a_b_c", style="kohya"))


Q = "blocks.0.attn1.to_q"
TWICE = {
    "original and diffusers": ("diffusion_model.blocks.0.self_attn.q", f"transformer.{Q}"),
    "kohya and peft": ("lora_unet_blocks_0_attn1_to_q", f"base_model.model.{Q}"),
    "with and without a wrapper": (f"_orig_mod.{Q}", Q),
    "a fused one and a part of it": ("diffusion_model.blocks.0.self_attn.qkv", Q),
}


@pytest.mark.parametrize("paths", TWICE.values(), ids=list(TWICE))
@pytest.mark.parametrize("size", [1.0, 2.0])
def test_two_modules_for_one_tensor_are_refused_by_both_keys(
    paths: tuple[str, str], size: float
) -> None:
    names = tuple(f"blocks.0.attn1.to_{part}" for part in "qkv")
    file = pair(paths[0], style="kohya") | pair(paths[1], size=size)
    if "qkv" in paths[0]:
        file[f"{paths[0]}.lora_up.weight"] = torch.ones(18, 1)
    with pytest.raises(CheckpointError) as caught:
        both_ways({"denoiser": model(names)}, file)
    assert all(f"`{path}.lora_" in str(caught.value) for path in paths)


def test_one_part_with_two_keys_is_refused_by_both() -> None:
    file = pair(Q) | pair(Q, style="kohya")
    with pytest.raises(CheckpointError, match=rf"`{Q}.lora_A.weight` and `{Q}.lora_down.weight`"):
        both_ways({"denoiser": model()}, file)


SEVERAL_WAYS = {
    "a LoRA and its product": ("lora_A.weight", "lora_B.weight", "diff"),
    "a LoRA and a LoKr": ("lora_A.weight", "lora_B.weight", "lokr_w1", "lokr_w2"),
    "a LoRA and a LoHa": (
        "lora_A.weight", "lora_B.weight", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    ),
    "a matrix and its own factors": ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}  # fmt: skip


@pytest.mark.parametrize("parts", SEVERAL_WAYS.values(), ids=list(SEVERAL_WAYS))
def test_a_weight_that_is_changed_in_several_ways_is_refused(parts: tuple[str, ...]) -> None:
    """Other programs take one of the ways, and not all the same."""
    file = {f"{Q}.{part}": torch.ones(6, 6) for part in parts}
    base = Checkpoint.from_tensors(zeros({"denoiser": model()}), name="base")
    for way in (
        lambda: (base + lora(file, 1.0)).tensors(),
        lambda: read_lora(file, {"denoiser": model()}, name="style", missing="keep"),
    ):
        with pytest.raises(CheckpointError, match=f"mean the weight of `{Q}`: .*{parts[-1]}"):
            way()


@pytest.mark.parametrize("left", ["lora_A", "lora_B"])
def test_one_matrix_without_the_other_is_no_matter_of_dense_weights(left: str) -> None:
    file = pair("proj_out") | {f"{Q}.{left}.weight": torch.ones(6, 6)}
    base = Checkpoint.from_tensors(zeros({"denoiser": model()}), name="base")
    for way in (
        lambda: (base + lora(file, 1.0)).tensors(),
        lambda: read_lora(file, {"denoiser": model()}, name="style"),
    ):
        with pytest.raises(CheckpointError, match=r"(?s)incomplete.*Fix: Download the file again"):
            way()


@pytest.mark.parametrize(
    ("first", "second"), [("default", "other"), ("", "other"), ("my-style", "my.style")]
)
@pytest.mark.parametrize("layer", [Q, "proj_out"])
def test_several_adapters_in_a_file_are_refused_by_name(
    first: str, second: str, layer: str
) -> None:
    file = {}
    for path, adapter in ((Q, first), (layer, second)):
        named = f".{adapter}" if adapter else ""
        file |= {
            f"{path}.lora_A{named}.weight": torch.ones(1, 6),
            f"{path}.lora_B{named}.weight": torch.ones(6, 1),
        }
    with pytest.raises(CheckpointError, match=f"(?s)several adapters: .*`{second}`.*Fix: Save one"):
        both_ways({"denoiser": model()}, file)


TWO = ("transformer", "transformer_2")


@pytest.mark.parametrize("wrapper", ["", "base_model.model.", "_orig_mod."])
def test_a_file_that_names_the_second_denoiser_means_the_first_by_the_plain_name(
    wrapper: str,
) -> None:
    nets = {name: model() for name in TWO}
    second = f"{wrapper}transformer_2.{Q}"
    file = pair(f"{wrapper}transformer.{Q}") | pair(second, size=10)
    expected = {f"transformer.{Q}.weight": 1.0, f"transformer_2.{Q}.weight": 10.0}
    assert both_ways(nets, file) == expected
    assert both_ways(nets, dict(reversed(file.items()))) == expected
    assert both_ways(nets, pair(f"transformer.{Q}")) == dict.fromkeys(expected, 1.0)
    assert both_ways(nets, pair(f"transformer_2.{Q}")) == {f"transformer_2.{Q}.weight": 1.0}


@pytest.mark.parametrize("front", ["pipe.", ""])
def test_the_two_denoisers_of_diffsynth_studio_are_told_apart(front: str) -> None:
    nets = {name: model() for name in TWO}
    first, second = (pair(f"{front}{dit}.blocks.0.self_attn.q") for dit in ("dit", "dit2"))
    wanted = [f"{name}.{Q}.weight" for name in TWO]
    assert both_ways(nets, first) == dict.fromkeys(wanted, 1.0)
    assert both_ways(nets, second) == {wanted[1]: 1.0}
    larger = pair(f"{front}dit2.blocks.0.self_attn.q", size=10)
    assert both_ways(nets, first | larger) == dict(zip(wanted, (1.0, 10.0), strict=True))


@pytest.mark.parametrize("adapter", ["default", "my-style"])
@pytest.mark.parametrize("parts", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_an_adapters_name_may_follow_either_spelling(adapter: str, parts: tuple[str, str]) -> None:
    down, up = (f"diffusion_model.{Q}.{part}.{adapter}.weight" for part in parts)
    file = {down: torch.ones(1, 6), up: torch.ones(6, 1)}
    assert both_ways({"denoiser": model()}, file) == {f"{Q}.weight": 1.0}


def test_a_modules_name_is_not_taken_for_the_beginning_of_a_layers() -> None:
    """`transformer_blocks.{}.norm2` is what MiniMax-H3's `blocks.{}.norm2` is in diffusers."""
    norm = "blocks.0.norm2"
    nets = {name: model((norm,)) for name in TWO}
    file = pair(f"transformer.{norm}") | pair(f"transformer_2.{norm}", size=10)
    expected = {f"transformer.{norm}.weight": 1.0, f"transformer_2.{norm}.weight": 10.0}
    assert both_ways(nets, file) == expected


def test_a_layer_for_both_denoisers_beside_one_of_the_second_is_refused() -> None:
    file = pair(Q) | pair(f"transformer_2.{Q}")
    with pytest.raises(CheckpointError, match=r"mean `transformer_2\."):
        both_ways({name: model() for name in TWO}, file)


def test_what_is_exported_for_two_denoisers_comes_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        f"{module}.{name}": torch.randn(value.shape, generator=generator)
        for module in TWO
        for name, value in model(bias=False).state_dict().items()
    }
    tuned = {
        name: value + torch.randn(6, 1, generator=generator) @ torch.ones(1, 6)
        for name, value in base.items()
    }
    recipe = Recipe.parse(
        "inputs: {base: 'memory:base', tuned: 'memory:tuned'}\nexperts: {m: base + (tuned - base)}"
    )
    export_loras(recipe, tmp_path, rank=1, inputs={"base": base, "tuned": tuned})
    back = Checkpoint.from_tensors(base, name="base") + lora(tmp_path / "m.safetensors", 1.0)
    for name, value in back.tensors().items():
        torch.testing.assert_close(value, tuned[name], atol=1e-5, rtol=1e-5)


WHOLE = {
    "a bare name": "patch_embedding.weight",
    "the model's own name": "transformer.proj_out.weight",
    "modules_to_save of peft": "base_model.model.proj_out.weight",
    "a whole bias": "base_model.model.proj_out.bias",
    "a whole weight beside a pair": f"{Q}.weight",
}


@pytest.mark.parametrize("key", WHOLE.values(), ids=list(WHOLE))
def test_whole_weights_are_listed_and_never_added(key: str) -> None:
    net = {"transformer": model()}
    file = pair(Q) | {key: torch.full((6, 6), 3.5)}
    with pytest.raises(CheckpointError, match=f"{key}.*whole weights"):
        both_ways(net, file)
    recipe = Recipe.parse(
        "inputs: {b: 'memory:b', l: 'memory:l'}\nexperts: {m: 'b + lora(l, 1.0)'}"
    )
    kept = realise(recipe, inputs={"b": zeros(net), "l": file}, missing="keep")["m"]
    assert {name for name, value in kept.items() if value.any()} == {f"transformer.{Q}.weight"}
    read = read_lora(file, net, name="style", missing="keep")
    assert list(read.layers["transformer"]) == [Q]
    assert list(read.left_out) == [key]


@pytest.mark.parametrize(
    "formula", ["b + lora(l, 1.0)", "b + only(lora(l, 1.0), 're:to_q')", "b - 0.5 * lora(l, 1.0)"]
)
def test_what_fits_nothing_is_counted_whatever_restricts_the_vector(
    tmp_path: Path, formula: str
) -> None:
    file = pair(f"diffusion_model.{Q}")
    strangers = ["diffusion_model.blocks.7.attn1.to_q", "typo.layer", "text_encoder.q_proj"]
    for path in strangers:
        file |= pair(path)
    file["nothing.known"] = torch.ones(3)
    save_weights(tmp_path / "l.safetensors", file)
    save_weights(tmp_path / "b.safetensors", zeros({"denoiser": model()}))
    text = f'inputs: {{b: b.safetensors, l: l.safetensors}}\nexperts: {{m: "{formula}"}}'
    recipe = Recipe.parse(text, folder=tmp_path)
    with pytest.raises(CheckpointError) as caught:
        merge(recipe, tmp_path / "out", dry_run=True)
    assert all(name in str(caught.value) for name in [*strangers, "nothing.known"])
    for dry_run in (True, False):
        report = merge(recipe, tmp_path / "out", dry_run=dry_run, missing="keep")
        assert set(report.unmatched) == {*strangers, "nothing.known"}
    assert report.experts["m"].computed == 1


@pytest.mark.parametrize("key", ["blocks.0.attn1.to_k.alpha", "blocks_0_attn1_to_q.alpha"])
def test_an_alpha_of_a_layer_that_the_file_does_not_hold_is_no_lora_and_is_listed(key: str) -> None:
    """It may be meant for a layer that the file spells otherwise, whose strength it would be."""
    alpha = {key: torch.tensor(4.0)}
    with pytest.raises(CheckpointError, match=f"`?{key}`? .no known part of a LoRA"):
        both_ways({"denoiser": model()}, pair(Q) | alpha)
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        both_ways({"denoiser": model()}, alpha)
    read = read_lora(pair(Q) | alpha, {"denoiser": model()}, name="style", missing="keep")
    assert list(read.left_out) == [key]


@pytest.mark.parametrize("key", ["blocks.1.attn1.to_out.0.alpha", "blocks.7.attn1.to_q.alpha"])
def test_alphas_of_layers_that_were_taken_out_are_counted_as_unused(
    key: str, tmp_path: Path
) -> None:
    """All other layers have their own, so it is nobody's under another spelling."""
    layer = pair(Q) | {f"{Q}.alpha": torch.tensor(2.0)}
    file = layer | {key: torch.tensor(4.0), f"{LAYERS[1]}.diff_b": torch.ones(6)}
    found = dense(zeros({"denoiser": model()}), file)
    assert found == {f"{Q}.weight": 2.0, f"{LAYERS[1]}.bias": 1.0}
    assert both_ways({"denoiser": model()}, layer | {key: torch.tensor(4.0)}) == {
        f"{Q}.weight": 2.0
    }
    save_weights(tmp_path / "l.safetensors", file)
    save_weights(tmp_path / "b.safetensors", zeros({"denoiser": model()}))
    text = 'inputs: {b: b.safetensors, l: l.safetensors}\nexperts: {m: "b + lora(l, 1.0)"}'
    report = merge(Recipe.parse(text, folder=tmp_path), tmp_path / "out")
    assert not report.unmatched and report.unused_strengths == 1
    assert "Unused: a strength (alpha)" in str(report)
    assert describe_lora(tmp_path / "l.safetensors").unused_strengths == 1


OTHERS = {
    "DoRA": "dora_scale", "OFT": "oft_blocks", "BOFT": "boft_R", "(IA)3": "ia3_l",
    "GLoRA": "a1.weight", "AdaLoRA": "lora_E", "VeRA": "vera_lambda_b",
    "set_weight": "set_weight", "reshapes": "reshape_weight", "embedding": "lora_embedding_A",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "part"), OTHERS.items(), ids=list(OTHERS))
@pytest.mark.parametrize("missing", ["error", "keep"])
def test_other_kinds_of_adapters_are_refused_by_name(kind: str, part: str, missing: str) -> None:
    file = pair(Q) | {f"diffusion_model.{Q}.{part}": torch.ones(6, 6)}
    with pytest.raises(
        CheckpointError, match=rf"(?s){part}.*{kind.replace('(', '.').replace(')', '.')}"
    ):
        both_ways({"denoiser": model()}, file)
    with pytest.raises(CheckpointError):
        read_lora(file, {"denoiser": model()}, name="style", missing=missing)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["scalar", "lora_A.bias", "lora_down.bias", "rank", "lora_A"])
def test_an_unknown_part_of_a_layer_is_never_left_out(part: str) -> None:
    file = pair(Q) | {f"{Q}.{part}": torch.ones(1)}
    with pytest.raises(CheckpointError, match=f"`{Q}.{part}`.*nothing is known"):
        read_lora(file, {"denoiser": model()}, name="style", missing="keep")
    with pytest.raises(CheckpointError, match=f"`{Q}.{part}`.*nothing is known"):
        both_ways({"denoiser": model()}, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_named_before_anything_is_computed(
    tmp_path: Path, value: float, part: str, dtype: torch.dtype
) -> None:
    file = pair(Q) | pair("proj_out") | {f"{Q}.alpha": torch.tensor(1.0)}
    file = {key: tensor.to(dtype) for key, tensor in file.items()}
    file[f"{Q}.{part}"].view(-1)[:1] = value
    words = rf"NaN or infinity in 1 of its tensors: `{Q}.{part}` in 1 entries"
    with pytest.raises(CheckpointError, match=words):
        both_ways({"denoiser": model()}, file)
    save_weights(tmp_path / "l.safetensors", file)
    save_weights(tmp_path / "b.safetensors", zeros({"denoiser": model()}))
    text = "inputs: {b: b.safetensors, l: l.safetensors}\nexperts: {m: 'b + lora(l, 1.0)'}"
    recipe = Recipe.parse(text, folder=tmp_path)
    with pytest.raises(CheckpointError, match=words):
        merge(recipe, tmp_path / "out", dry_run=True)
    with pytest.raises(CheckpointError, match="NaN"):
        merge(recipe, tmp_path / "out", dry_run=True)
    merge(recipe, tmp_path / "out", dry_run=True, allow_nonfinite=True)


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((0, 6), (6, 0)), ((1, 6), (0,))])
def test_empty_tensors_are_refused_by_name(shapes: tuple[tuple[int, ...], ...]) -> None:
    file = pair("proj_out")
    file |= {
        f"{Q}.lora_A.weight": torch.ones(shapes[0]),
        f"{Q}.lora_B.weight": torch.ones(shapes[1]),
    }
    with pytest.raises(ShapeError, match=rf"`{Q}\.lora_.*holds no numbers"):
        both_ways({"denoiser": model()}, file)


@pytest.mark.parametrize("alpha", [torch.tensor(0.5), torch.tensor([0.5])])
def test_alpha_is_one_number(alpha: torch.Tensor) -> None:
    assert both_ways({"denoiser": model()}, pair(Q) | {f"{Q}.alpha": alpha}) == {f"{Q}.weight": 0.5}
    for other in (torch.ones(2), torch.ones(1, 1)):
        with pytest.raises(ShapeError, match="one number"):
            both_ways({"denoiser": model()}, pair(Q) | {f"{Q}.alpha": other})


@pytest.mark.parametrize("key", ["diff_m", "modulation.diff"])
def test_the_difference_of_a_modulation_is_added(key: str) -> None:
    base = {
        "blocks.0.scale_shift_table": torch.zeros(1, 6, 4),
        "scale_shift_table": torch.zeros(1, 2, 4),
    }
    file = {
        f"diffusion_model.blocks.0.{key}": torch.ones(1, 6, 4),
        f"diffusion_model.head.{key}": 2 * torch.ones(1, 2, 4),
    }
    assert dense(base, file) == {"blocks.0.scale_shift_table": 1.0, "scale_shift_table": 2.0}
    only_one = Checkpoint.from_tensors(base, name="base") + only(lora(file, 1.0), "blocks.*")
    assert not only_one.tensors()["scale_shift_table"].any()


def test_a_bias_of_the_upper_matrix_is_scaled_as_the_product_is() -> None:
    file = pair(Q, style="kohya") | {f"{Q}.lora_up.bias": torch.ones(6)}
    file |= {f"{Q}.alpha": torch.tensor(2.0)}
    found = dense(zeros({"denoiser": model()}), file)
    assert found == {f"{Q}.weight": 2.0, f"{Q}.bias": 2.0}
    layer = read_lora(file, {"denoiser": model()}, name="style").layers["denoiser"][Q]
    assert layer.alpha == 2.0
    assert layer.bias is not None and torch.equal(layer.bias, torch.ones(6))


def test_a_model_given_as_a_lora_is_no_lora() -> None:
    net = {"denoiser": model()}
    with pytest.raises(CheckpointError, match=r"(?s)holds no LoRA.*`\(tuned - base\)`"):
        both_ways(net, dict(net["denoiser"].state_dict()))


def test_a_lora_in_a_folder_of_peft_is_read_with_its_settings(tmp_path: Path) -> None:
    save_weights(tmp_path / "adapter_model.safetensors", pair(f"base_model.model.{Q}"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "r": 1}))
    assert both_ways({"denoiser": model()}, tmp_path) == {f"{Q}.weight": 3.0}
