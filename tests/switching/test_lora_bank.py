"""LoRAs with a signed weight per expert, on every pipeline and without dense weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError, RecipeError, ShapeError
from motionmerge.io.weights import save_weights
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.switching.expert_bank import attached_bank, experts

from ..tiny.library import IS_OLDER, skip_older
from ..tiny.loras import with_motion, with_weights
from ..tiny.pipelines import FAMILIES, OURS, Family, generate, tiny, weights_of

Weights = dict[str, torch.Tensor]
RANK, ALPHA = 2, 3.0
RESCUE = {"dynamics": -0.25, "consistency": 1.0}

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
ours_too = pytest.mark.parametrize("family", (*FAMILIES, *OURS), ids=lambda family: family.name)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def lora_for(pipeline: Any, family: Family, *, seed: int = 0) -> Weights:
    """A random LoRA of every second linear layer of the first denoiser, as a file has it."""
    denoiser = family.denoisers[0]
    generator = torch.Generator().manual_seed(seed)
    linear = [
        (name, child)
        for name, child in getattr(pipeline, denoiser).named_modules()
        if isinstance(child, nn.Linear)
    ][::2]
    tensors = {}
    for name, child in linear:
        layer = f"{denoiser}.{name}"
        tensors[f"{layer}.lora_A.weight"] = torch.randn(
            RANK, child.in_features, generator=generator
        )
        tensors[f"{layer}.lora_B.weight"] = 0.3 * torch.randn(
            child.out_features, RANK, generator=generator
        )
        tensors[f"{layer}.alpha"] = torch.tensor(ALPHA)
    return tensors


def with_lora(weights: Weights, lora: Weights, weight: float) -> Weights:
    """Add `weight * alpha / rank * B @ A` to dense weights, by hand, in every denoiser."""
    merged = {}
    for name, tensor in weights.items():
        layer = name.replace("transformer_2.", "transformer.").removesuffix(".weight")
        added = torch.zeros_like(tensor)
        if f"{layer}.lora_A.weight" in lora:
            product = lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
            added = weight * ALPHA / RANK * product
        merged[name] = tensor + added
    return merged


@ours_too
def test_a_signed_lora_equals_dense_experts(family: Family) -> None:
    pipeline = tiny(family)
    plain, before = generate(pipeline, family), weights_of(pipeline, family)
    lora = lora_for(pipeline, family)
    with experts(pipeline, **with_weights(lora, RESCUE), boundary=family.boundary):
        signed = generate(pipeline, family)
    assert torch.equal(generate(pipeline, family), plain)
    assert weights_of(pipeline, family).keys() == before.keys()
    dense = {name: with_lora(before, lora, weight) for name, weight in RESCUE.items()}
    with experts(pipeline, dense, boundary=family.boundary):
        expected = generate(pipeline, family)
    torch.testing.assert_close(signed, expected, atol=2e-3, rtol=2e-3)
    assert (signed - plain).abs().max() > 20 * (signed - expected).abs().max()


@every_family
def test_a_lora_of_weight_zero_changes_no_bit(family: Family) -> None:
    pipeline = tiny(family)
    plain = generate(pipeline, family)
    with experts(pipeline, **with_weights(lora_for(pipeline, family), {"none": 0.0})):
        assert torch.equal(generate(pipeline, family), plain)


def test_two_loras_equal_set_adapters_of_diffusers() -> None:
    family = family_named("Wan 2.1")
    pipeline = tiny(family)
    loras = {name: lora_for(pipeline, family, seed=seed) for seed, name in enumerate("ab")}
    weights = {"dynamics": {"a": -0.5, "b": 1.5}, "consistency": {"b": 0.75}}
    with experts(pipeline, **with_weights(loras, weights), boundary=family.boundary):
        ours = generate(pipeline, family)

    transformer = pipeline.transformer
    for name, lora in loras.items():
        own = {key: value for key, value in lora.items() if not key.endswith("alpha")}
        scaled = {k: v * ALPHA / RANK if "lora_B" in k else v for k, v in own.items()}
        transformer.load_lora_adapter(scaled, prefix="transformer", adapter_name=name)
    steps = 0

    def choose(*_: Any) -> None:
        nonlocal steps
        noisy = steps < 2 * family.noisy_steps
        transformer.set_adapters(["a", "b"], [-0.5, 1.5] if noisy else [0.0, 0.75])
        steps += 1

    transformer.register_forward_pre_hook(choose)
    torch.testing.assert_close(ours, generate(pipeline, family), atol=1e-5, rtol=1e-5)


def test_motion_with_a_lora_is_the_lora_rescue(tmp_path: Path) -> None:
    family = family_named("LTX")
    pipeline = tiny(family)
    lora = lora_for(pipeline, family)
    save_weights(tmp_path / "style.safetensors", lora)
    videos = []
    for options in (
        {"recipe": Recipe.knob(lora=tmp_path / "style.safetensors", motion=0.25)},
        with_weights({"style": lora}, RESCUE),
        {"recipe": "lora-rescue", "inputs": {"style": tmp_path / "style.safetensors"}},
        {"recipe": "lora-rescue", "inputs": {"style": lora}},
    ):
        with experts(pipeline, **options) as bank:
            assert [part.differs for part in bank._parts] == [True]
            videos.append(generate(pipeline, family))
    assert all(torch.equal(video, videos[0]) for video in videos)


def test_a_recipe_with_the_base_as_a_file_is_dense_and_the_same(tmp_path: Path) -> None:
    family = family_named("LTX")
    pipeline = tiny(family)
    lora = lora_for(pipeline, family)
    own = weights_of(pipeline, family)
    with experts(pipeline, recipe="lora-rescue", inputs={"style": lora}):
        signed = generate(pipeline, family)
    with experts(pipeline, recipe="lora-rescue", inputs={"style": lora, "base": own}):
        dense = generate(pipeline, family)
    torch.testing.assert_close(signed, dense, atol=1e-3, rtol=1e-3)
    thinned = Recipe.parse(
        "inputs: {base: 'memory:base', style: 'memory:style'}\n"
        "experts: {one: 'base - dare(lora(style, 0.25), drop_rate=0.5, seed=0)'}\n"
    )
    with experts(pipeline, recipe=thinned, inputs={"style": lora}):
        assert not torch.equal(
            pipeline.transformer.proj_in.weight, own["transformer.proj_in.weight"]
        )


@pytest.mark.skipif(IS_OLDER, reason="its UniPC is at timestep 899, below the boundary, not 900")
def test_the_lightning_recipe_gives_each_phase_its_lora() -> None:
    family = family_named("Wan 2.2-A14B")
    pipeline = tiny(family)
    loras = {name: lora_for(pipeline, family, seed=i) for i, name in enumerate(("high", "low"))}
    seen: list[tuple[str, dict[str, float]]] = []

    def record(name: str) -> Any:
        def before(module: nn.Module, *_: Any) -> None:
            layer = next(layer for layer in module.modules() if hasattr(layer, "scaling"))
            used = {adapter: layer.scaling[adapter] for adapter in layer.active_adapters}
            seen.append((name, {k.removeprefix("motionmerge_"): v for k, v in used.items()}))

        return before

    with experts(pipeline, recipe="wan22-lightning", inputs=loras):
        for name in family.denoisers:
            getattr(pipeline, name).register_forward_pre_hook(record(name))
        generate(pipeline, family)
    strength = ALPHA / RANK
    expected = [  # noise levels 1, .95, .9, .83, .75, .64, .5, .3; two guidance passes each
        *[("transformer", {})] * 2,
        *[("transformer", {"high": strength})] * 4,
        *[("transformer_2", {"low": strength})] * 10,
    ]
    assert seen == expected


def test_a_users_own_adapters_keep_their_weight_and_stay() -> None:
    family = family_named("LTX")
    pipeline = tiny(family)
    own = {k: v for k, v in lora_for(pipeline, family, seed=5).items() if "alpha" not in k}
    lora = lora_for(pipeline, family)
    pipeline.transformer.load_lora_adapter(own, prefix="transformer", adapter_name="mine")
    pipeline.transformer.set_adapters(["mine"], [0.5])
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    plain = generate(pipeline, family)
    with experts(pipeline, **with_weights(lora, {"none": 0.0})):
        assert torch.equal(generate(pipeline, family), plain)
    with experts(pipeline, **with_motion(lora, 0.25)):
        assert not torch.equal(generate(pipeline, family), plain)
    assert torch.equal(generate(pipeline, family), plain)
    after = pipeline.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert list(pipeline.transformer.peft_config) == ["mine"]


def test_nothing_stays_behind_after_an_exception() -> None:
    family = family_named("SVD")
    pipeline = tiny(family)
    before = dict(pipeline.unet.named_modules())
    trainable = [parameter.requires_grad for parameter in pipeline.unet.parameters()]
    lora = lora_for(pipeline, family)
    with pytest.raises(KeyboardInterrupt), experts(pipeline, **with_motion(lora, 0.25)):
        raise KeyboardInterrupt
    assert dict(pipeline.unet.named_modules()) == before
    assert [parameter.requires_grad for parameter in pipeline.unet.parameters()] == trainable
    assert attached_bank(pipeline.unet) is None
    assert not pipeline.unet._forward_pre_hooks
    assert not hasattr(pipeline.unet, "peft_config")


def test_fp8_storage_is_left_alone() -> None:
    family = family_named("LTX")
    pipeline = tiny(family)
    pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    before = weights_of(pipeline, family)
    plain = generate(pipeline, family)
    with experts(pipeline, **with_motion(lora_for(pipeline, family), 0.25)):
        assert not torch.equal(generate(pipeline, family), plain)
        stored = pipeline.transformer.state_dict()
        assert any(
            tensor.dtype == torch.float8_e4m3fn
            for name, tensor in stored.items()
            if name.endswith("base_layer.weight")
        )
    assert torch.equal(generate(pipeline, family), plain)
    after = weights_of(pipeline, family)
    assert all(torch.equal(after[name].float(), before[name].float()) for name in before)


def test_settings_beside_the_file_scale_a_lora(tmp_path: Path) -> None:
    family = family_named("LTX")
    pipeline = tiny(family)
    lora = lora_for(pipeline, family)
    bare = {name: value for name, value in lora.items() if not name.endswith("alpha")}
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    save_weights(tmp_path / "lora.safetensors", bare, metadata=metadata)
    with experts(pipeline, **with_motion(lora, 0.25)):
        expected = generate(pipeline, family)
    with experts(pipeline, **with_motion(tmp_path / "lora.safetensors", 0.25)):
        assert torch.equal(generate(pipeline, family), expected)


def test_a_bias_and_a_plain_difference_of_a_bias_count() -> None:
    model = Tiny()
    lora = {
        "layer.lora_down.weight": torch.zeros(1, 2),
        "layer.lora_up.weight": torch.zeros(2, 1),
        "layer.alpha": torch.tensor(2.0),
        "layer.diff_b": torch.tensor([1.0, 2.0]),
    }
    entries = (ScheduleEntry("away", timestep=500), ScheduleEntry("whole"))
    schedule = ExpertSchedule(entries)
    with experts(model, **with_weights(lora, {"away": -0.5, "whole": 1.0}), schedule=schedule):
        noisy, clean = (model(torch.zeros(1, 2), timestep=step) for step in (900, 100))
    assert torch.equal(noisy, torch.tensor([[-0.5, -1.0]]))
    assert torch.equal(clean, torch.tensor([[1.0, 2.0]]))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        nn.init.zeros_(self.layer.bias)

    def forward(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.layer(sample)


def pair(name: str, inputs: int = 2) -> Weights:
    return {
        f"{name}.lora_A.weight": torch.ones(1, inputs),
        f"{name}.lora_B.weight": torch.ones(2, 1),
    }


def factors(down: tuple[int, ...], up: tuple[int, ...]) -> Weights:
    return {"layer.lora_A.weight": torch.ones(down), "layer.lora_B.weight": torch.ones(up)}


@pytest.mark.parametrize(
    ("lora", "options", "error", "words"),
    [
        ({}, {"motion": 0.25}, CheckpointError, "no tensors"),
        ({"layer.weight": torch.ones(2, 2)}, {"motion": 0.25}, CheckpointError, "layer.weight"),
        ({"layer.lora_A.weight": torch.ones(1, 2)}, {"motion": 0.25}, CheckpointError, "second"),
        (pair("other"), {"motion": 0.25}, CheckpointError, "`other`"),
        (pair("layer", 3), {"motion": 0.25}, ShapeError, r"\[1, 3\].*\[1, 2\]"),
        (factors((0, 2), (2, 0)), {"motion": 0.25}, ShapeError, "`layer`.*rank of 1 or more"),
        (factors((2, 2), (2, 3)), {"motion": 0.25}, ShapeError, r"\[2, 2\] and \[2, 3\]"),
        (factors((), ()), {"motion": 0.25}, ShapeError, r"\[\] and \[\]"),
        (factors((2,), (2,)), {"motion": 0.25}, ShapeError, r"\[2\] and \[2\]"),
        (
            {**pair("layer"), "layer.alpha": torch.ones(2)},
            {"motion": 0.25},
            ShapeError,
            r"alpha of `layer`.*\[2\]",
        ),
        (pair("layer"), {"weights": {"one": {"style": float("nan")}}}, RecipeError, "nan"),
        (pair("layer"), {"weights": {"one": float("inf")}}, RecipeError, "inf"),
        (pair("layer"), {"weights": {}}, RecipeError, "experts"),
        (pair("layer"), {"weights": {"one": 1.0, "two": 2.0, "three": 3.0}}, ConfigError, "no sch"),
    ],
)
def test_what_does_not_fit_is_refused(
    lora: Weights, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = Tiny()
    before = dict(model.named_modules())
    with pytest.raises(error, match=words):
        chosen = with_motion if "motion" in options else with_weights
        chosen_for = {"style": lora} if chosen is with_weights else lora
        experts(model, **chosen(chosen_for, *options.values()))
    assert dict(model.named_modules()) == before
    assert attached_bank(model) is None


@pytest.mark.parametrize("fused", [["mine"], ["mine", "other"]], ids=" and ".join)
def test_a_lora_works_beside_fused_ones_and_leaves_them_fused(fused: list[str]) -> None:
    family = family_named("LTX")
    pipeline, dense = tiny(family), tiny(family)
    lora, *others = (lora_for(pipeline, family, seed=seed) for seed in range(3))
    for adapter, other in zip(("mine", "other"), others, strict=True):
        own = {name: value for name, value in other.items() if not name.endswith("alpha")}
        for one in (pipeline, dense):
            one.transformer.load_lora_adapter(own, prefix="transformer", adapter_name=adapter)
    for one in (pipeline, dense):
        one.transformer.set_adapters(["mine", "other"], [1.0, 0.5])
        one.transformer.fuse_lora(adapter_names=fused)
    # The same weights in a model that knows of no fused LoRAs, with the others beside them.
    for layer in dense.transformer.modules():
        if hasattr(layer, "merged_adapters"):
            layer.merged_adapters = []
            layer.set_adapter([name for name in ("mine", "other") if name not in fused])
    plain, before = generate(pipeline, family), weights_of(pipeline, family)
    with experts(dense, **with_motion(lora, 0.25)):
        expected = generate(dense, family)
    with experts(pipeline, **with_motion(lora, 0.25)):
        assert torch.equal(generate(pipeline, family), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(generate(pipeline, family), plain)
    after = weights_of(pipeline, family)
    assert all(torch.equal(after[name], before[name]) for name in before)
    pipeline.transformer.unfuse_lora()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(weights_of(pipeline, family), before)


def test_group_offload_is_refused() -> None:
    family = family_named("LTX")
    pipeline = tiny(family)
    lora = lora_for(pipeline, family)
    try:
        pipeline.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    except AttributeError:
        skip_older("it offloads groups only beside an accelerator")
    with pytest.raises(ConfigError, match="inside"):
        experts(pipeline, **with_motion(lora, 0.25))


def test_names_that_are_nearly_alike_are_different_loras() -> None:
    family = family_named("Wan 2.1")
    pipeline = tiny(family)
    first, second = (lora_for(pipeline, family, seed=seed) for seed in (0, 1))
    made = []
    for names in (("a", "b"), ("style_1", "style__1"), ("_2d_", "_2D_")):
        loras = dict(zip(names, (first, second), strict=True))
        weights = {"all": dict(zip(names, (1.0, 0.0), strict=True))}
        with experts(pipeline, **with_weights(loras, weights)):
            made.append(generate(pipeline, family))
    assert all(torch.equal(one, made[0]) for one in made)
