"""Experts switched in place: exact, restored, and refused where they cannot work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError, RecipeError, ShapeError
from motionmerge.io.weights import save_weights
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.functions import FUNCTIONS, register_function
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.switching import switched_module
from motionmerge.switching.expert_bank import ExpertBank, attached_bank, experts

from ..tiny.dynamicrafter import NUM_TOKENS, tiny_pipeline
from ..tiny.library import IS_OLDER, hooks, skip_older

Generate = Callable[..., torch.Tensor]
Weights = dict[str, torch.Tensor]
BOUNDARY = 0.64
TWO = ExpertSchedule.two("dynamics", "consistency", boundary=BOUNDARY)


def weights_of(pipeline: Any, *modules: str) -> Weights:
    return {
        f"{module}.{name}": tensor.clone()
        for module in modules
        for name, tensor in getattr(pipeline, module).state_dict().items()
    }


def other_weights(*modules: str, seed: int = 1) -> Weights:
    return weights_of(tiny_pipeline(seed), *modules)


def two_experts(*modules: str) -> dict[str, Weights]:
    modules = modules or ("unet",)
    return {
        "dynamics": other_weights(*modules, seed=1),
        "consistency": other_weights(*modules, seed=2),
    }


def stored_paper_recipe(folder: Path, base: Weights, tuned: Weights) -> Recipe:
    """Write two sets of weights to files, and the paper's experts of them as a recipe."""
    text = Recipe.edg(base="memory:base", tuned="memory:tuned").print()
    for name, weights in (("base", base), ("tuned", tuned)):
        save_weights(folder / f"{name}.safetensors", weights)
        text = text.replace(f"memory:{name}", f"{name}.safetensors")
    (folder / "recipe.yaml").write_text(text)
    return Recipe.load(folder / "recipe.yaml")


def same_weights(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


class Recorder(nn.Module):
    """A denoiser that remembers with which weight it ran at which timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.bias = nn.Parameter(torch.ones(1))
        self.calls: list[tuple[float, float]] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.calls.append((float(torch.as_tensor(timestep).max()), self.weight[0].item()))
        return sample


def recorder_experts() -> dict[str, Weights]:
    return {
        "dynamics": {"weight": torch.full((2,), 1.0)},
        "consistency": {"weight": torch.full((2,), 2.0)},
    }


def test_one_expert_everywhere_equals_the_plain_pipeline(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    plain = generate(pipeline)
    with experts(pipeline, {"same": weights_of(pipeline, "unet", "image_projector")}):
        assert torch.equal(generate(pipeline), plain)
    with experts(pipeline, {"other": other_weights("unet", "image_projector")}):
        switched = generate(pipeline)
    assert torch.equal(generate(pipeline), plain)
    other = tiny_pipeline(1)
    pipeline.unet, pipeline.image_projector = other.unet, other.image_projector
    assert torch.equal(generate(pipeline), switched)


def test_two_experts_equal_two_models_cut_at_the_boundary(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    with experts(pipeline, two_experts(), boundary=BOUNDARY):
        switched = generate(pipeline, num_inference_steps=6)

    models = {"dynamics": tiny_pipeline(1).unet, "consistency": tiny_pipeline(2).unet}
    used: list[str] = []

    def choose_model(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        following = pipeline.scheduler.timesteps[step + 1 :][:1]
        if len(following):
            used.append("dynamics" if following[0] > 500 else "consistency")
            pipeline.unet = models[used[-1]]
        return tensors

    pipeline.unet = models["dynamics"]
    cut = generate(pipeline, num_inference_steps=6, callback_on_step_end=choose_model)
    assert used == ["dynamics"] * 2 + ["consistency"] * 3
    assert torch.equal(switched, cut)


def test_ten_videos_do_not_drift(pipeline: DynamiCrafterPipeline, generate: Generate) -> None:
    before = weights_of(pipeline, "unet", "image_projector")
    both = two_experts("unet", "image_projector")
    with experts(pipeline, both, boundary=BOUNDARY):
        first = generate(pipeline, num_inference_steps=2)
        for _ in range(9):
            assert torch.equal(generate(pipeline, num_inference_steps=2), first)
        assert same_weights(weights_of(pipeline, "unet"), other_weights("unet", seed=2))
    assert same_weights(weights_of(pipeline, "unet", "image_projector"), before)


def test_the_model_is_restored_after_an_exception(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    before = weights_of(pipeline, "unet", "image_projector")

    def fail(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    both = two_experts("unet", "image_projector")
    with pytest.raises(KeyboardInterrupt), experts(pipeline, both, boundary=BOUNDARY):
        generate(pipeline, callback_on_step_end=fail)
    assert same_weights(weights_of(pipeline, "unet", "image_projector"), before)
    assert attached_bank(pipeline.unet) is None
    assert not pipeline.unet._forward_pre_hooks


def test_each_expert_sees_image_tokens_of_its_own_projector(
    pipeline: DynamiCrafterPipeline,
    generate: Generate,
) -> None:
    unet = weights_of(pipeline, "unet")
    both = {
        name: {**unet, **other_weights("image_projector", seed=seed)}
        for name, seed in (("dynamics", 1), ("consistency", 2))
    }
    looks = []
    hook = pipeline.image_encoder.register_forward_pre_hook(lambda *_: looks.append(1))
    with experts(pipeline, both, boundary=BOUNDARY):
        seen = what_the_unet_sees(pipeline, generate)
    hook.remove()
    assert len(looks) == 2  # the image and a grey one, for both experts
    tokens = {}
    for name, seed in (("dynamics", 1), ("consistency", 2)):
        pipeline.image_projector = tiny_pipeline(seed).image_projector
        ((_, tokens[name]), *_) = what_the_unet_sees(pipeline, generate)
    for timestep, image_tokens in seen:
        assert torch.equal(image_tokens, tokens["dynamics" if timestep > 500 else "consistency"])
    assert not torch.equal(tokens["dynamics"], tokens["consistency"])


def what_the_unet_sees(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> list[tuple[float, torch.Tensor]]:
    """Run a pipeline; give timestep and image tokens (of the conditional half) of every step."""
    pipeline.batches_guidance = True
    seen: list[tuple[float, torch.Tensor]] = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda _, args: seen.append((float(args[1]), args[2][1, NUM_TOKENS:]))
    )
    generate(pipeline)
    hook.remove()
    return seen


def test_an_expert_can_be_a_projector_alone(
    pipeline: DynamiCrafterPipeline, generate: Generate
) -> None:
    plain = generate(pipeline)
    both = two_experts("image_projector")
    with experts(pipeline, both, boundary=BOUNDARY) as bank:
        assert bank.switches("image_projector")
        assert not bank.switches("unet")
        assert not torch.equal(generate(pipeline), plain)


def test_only_what_differs_between_experts_is_kept(pipeline: DynamiCrafterPipeline) -> None:
    base = weights_of(pipeline, "unet")
    changed = {**base, "unet.conv_in.bias": base["unet.conv_in.bias"] + 1}
    common = {"unet.conv_out.bias": base["unet.conv_out.bias"] + 1}
    both = {"dynamics": {**changed, **common}, "consistency": {**base, **common}}
    with experts(pipeline, both, boundary=BOUNDARY) as bank:
        (part,) = (part for part in bank._parts if part.name == "unet")
        for expert, other in (bank.experts, bank.experts[::-1]):
            part.activate(expert)
            assert {name: list(values) for name, values in part.values.items()} == {
                expert: [],  # in place, so not held
                other: ["conv_in.bias"],
            }
        assert list(part.shared) == ["conv_out.bias"]
        assert torch.equal(pipeline.unet.conv_out.bias, common["unet.conv_out.bias"])
    assert same_weights(weights_of(pipeline, "unet"), base)


@pytest.mark.parametrize("group_bytes", [0, 1 << 20])
def test_a_switch_that_is_interrupted_anywhere_loses_no_expert(
    monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    names = ("one", "two", "three")
    both = {
        name: {"weight": torch.full((2,), float(n)), "bias": torch.full((1,), float(n))}
        for n, name in enumerate(names, 1)
    }
    left = 0

    def interrupted(targets: list[torch.Tensor], sources: list[torch.Tensor], **_: bool) -> None:
        nonlocal left
        for target, source in zip(targets, sources, strict=True):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            target.copy_(source)

    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    monkeypatch.setattr(switched_module, "_GROUP_BYTES", {"cpu": group_bytes})
    for stop in range(1, 5):  # each expert has two tensors: one copy to hold it, one to put it
        for after in names:
            model = Recorder()
            with ExpertBank(model, both, schedule=ExpertSchedule((ScheduleEntry("one"),))) as bank:
                (part,) = bank._parts
                left = stop
                with pytest.raises(KeyboardInterrupt):
                    part.activate("two")
                for name in (after, *names):
                    part.activate(name)
                    assert torch.equal(model.weight, both[name]["weight"])
                    assert torch.equal(model.bias, both[name]["bias"])
            assert model.weight.tolist() == [0, 0] and model.bias.tolist() == [1]


def test_what_was_given_as_an_expert_is_never_written_to() -> None:
    model, given = Recorder(), recorder_experts()
    with ExpertBank(model, given, schedule=ExpertSchedule.two(*given, boundary=0.5)) as bank:
        for name in (*given, *given):
            with bank.with_expert(name):
                model.weight.data += 7  # what nobody should do
    assert same_weights(given["dynamics"], recorder_experts()["dynamics"])
    assert same_weights(given["consistency"], recorder_experts()["consistency"])


def test_an_expert_that_lacks_a_tensor_uses_the_models_own() -> None:
    model = Recorder()
    model.weight.data.fill_(5)
    both = {"dynamics": {"bias": torch.zeros(1)}, "consistency": {"weight": torch.zeros(2)}}
    entries = (ScheduleEntry("dynamics", timestep=500), ScheduleEntry("consistency"))
    for restore in (True, False):
        with ExpertBank(model, both, schedule=ExpertSchedule(entries), restore=restore):
            for timestep in (900, 100, 900):
                model(torch.zeros(1), timestep)
    assert [weight for _, weight in model.calls] == [5, 0, 5] * 2


def test_a_bank_that_is_detached_while_an_expert_is_held_leaves_the_model_as_it_was() -> None:
    model, given = Recorder(), recorder_experts()
    bank = ExpertBank(model, given, schedule=ExpertSchedule.two(*given, boundary=0.5))
    with bank.with_expert("dynamics"):
        bank.detach()
        assert model.weight.tolist() == [0, 0]
    assert model.weight.tolist() == [0, 0]


def test_live_weights_of_the_model_can_be_an_expert(pipeline: DynamiCrafterPipeline) -> None:
    before = weights_of(pipeline, "unet")
    live = {f"unet.{name}": tensor for name, tensor in pipeline.unet.state_dict().items()}
    both = {"dynamics": other_weights("unet"), "consistency": live}
    with experts(pipeline, both, boundary=BOUNDARY) as bank:
        with bank.with_expert("dynamics"):
            assert same_weights(weights_of(pipeline, "unet"), both["dynamics"])
        assert same_weights(weights_of(pipeline, "unet"), before)


def test_weights_are_rounded_once_to_the_models_dtype_and_restored_exactly() -> None:
    model = Recorder().to(torch.bfloat16)
    model.weight.data = torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16)
    before = model.weight.detach().view(torch.int16).clone()
    value = torch.tensor([1.001953125, 3.0])
    with ExpertBank(model, {"one": {"weight": value}}, schedule=only_one()):
        assert torch.equal(model.weight, value.bfloat16())
    assert torch.equal(model.weight.detach().view(torch.int16), before)


def only_one() -> ExpertSchedule:
    return ExpertSchedule((ScheduleEntry("one"),))


def test_of_timesteps_per_token_the_largest_counts() -> None:
    model = Recorder()
    entries = (ScheduleEntry("dynamics", timestep=500), ScheduleEntry("consistency"))
    with ExpertBank(model, recorder_experts(), schedule=ExpertSchedule(entries)):
        model(torch.zeros(1), torch.tensor([[0.0, 900.0, 900.0]]))
        model(sample=torch.zeros(1), timestep=torch.tensor([0.0, 500.0]))
    assert [weight for _, weight in model.calls] == [1, 2]


def test_any_diffusers_pipeline_is_switched_by_noise_level() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    model = SimpleNamespace(transformer=Recorder(), scheduler=scheduler)
    with experts(model, recorder_experts(), boundary=0.75):
        for timestep in scheduler.timesteps:
            model.transformer(torch.zeros(1), timestep=timestep.expand(2))
    levels = scheduler.sigmas[:-1].tolist()
    assert [weight for _, weight in model.transformer.calls] == [
        1 if s > 0.75 else 2 for s in levels
    ]


def test_two_denoisers_can_each_have_experts() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    model = SimpleNamespace(transformer=Recorder(), transformer_2=Recorder(), scheduler=scheduler)
    weights = {
        "one": {"weight": torch.ones(2), "transformer_2.weight": torch.full((2,), 3.0)},
    }
    with experts(model, weights):
        assert model.transformer.weight[0] == 1
        assert model.transformer_2.weight[0] == 3
    assert model.transformer_2.weight[0] == 0


def test_an_expert_can_be_held_for_every_timestep() -> None:
    model = Recorder()
    entries = (ScheduleEntry("dynamics", timestep=500), ScheduleEntry("consistency"))
    with ExpertBank(model, recorder_experts(), schedule=ExpertSchedule(entries)) as bank:
        with bank.with_expert("dynamics"):
            model(torch.zeros(1), 100)
        model(torch.zeros(1), 100)
        with pytest.raises(RecipeError, match="`dynamics`"), bank.with_expert("dynamic"):
            pass
    assert [weight for _, weight in model.calls] == [1, 2]


def tiny_transformer() -> tuple[LTXVideoTransformer3DModel, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=8,
        ).eval()
        inputs = {
            "hidden_states": torch.randn(1, 8, 4),
            "encoder_hidden_states": torch.randn(1, 3, 8),
            "encoder_attention_mask": torch.ones(1, 3, dtype=torch.long),
            "num_frames": 2,
            "height": 2,
            "width": 2,
        }
    return transformer, inputs


@torch.no_grad()
def run_both_experts(
    transformer: LTXVideoTransformer3DModel, inputs: dict[str, Any], both: dict[str, Weights]
) -> list[torch.Tensor]:
    entries = (ScheduleEntry("dynamics", timestep=500), ScheduleEntry("consistency"))
    outputs = []
    with ExpertBank(transformer, both, schedule=ExpertSchedule(entries)):
        for step, timestep in enumerate((900, 100)):
            NOW.timestep = timestep
            place = {"step_index": step, "sigma": timestep / 1000, "num_inference_steps": 9}
            if IS_OLDER:  # whose caches need none of it
                place = {}
            with transformer.cache_context("cond", **place):
                outputs.append(transformer(timestep=torch.tensor([timestep]), **inputs)[0])
    return outputs


def exact_experts(transformer: nn.Module) -> dict[str, Weights]:
    own = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    return {"dynamics": own, "consistency": {name: own[name] + 0.1 for name in own}}


NOW = SimpleNamespace(timestep=0)  # where denoising is, for caches that ask

CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=1e9),  # reuses whatever it holds
    "MagCache": lambda: hooks.MagCacheConfig(
        threshold=1e9,
        max_skip_steps=9,
        retention_ratio=0.0,
        num_inference_steps=10,
        mag_ratios=torch.ones(10),
    ),
    "pyramid attention": lambda: hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=9,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
    "FasterCache": lambda: hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=9,
        spatial_attention_timestep_skip_range=(-1, 681),
        attention_weight_callback=lambda _: 1.0,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: NOW.timestep,
    ),
    "SeaCache": lambda: hooks.SeaCacheConfig(
        threshold=1e9,
        retention_steps=0,
        raw_vision_callback=lambda module, args, kwargs: [
            kwargs["hidden_states"].reshape(4, 2, 2, 2)
        ],
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_would_be_wrong_without_being_emptied(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer, inputs = tiny_transformer()
    both = exact_experts(transformer)
    plain = run_both_experts(transformer, inputs, both)
    monkeypatch.setattr(switched_module, "reset_caches", lambda module: None)
    transformer.enable_cache(CACHES[cache]())
    early, late = run_both_experts(transformer, inputs, both)
    assert torch.equal(early, plain[0]) and not torch.equal(late, plain[1])


@pytest.mark.parametrize("cache", CACHES)
def test_caches_are_emptied_at_a_switch_and_their_context_kept(cache: str) -> None:
    transformer, inputs = tiny_transformer()
    both = exact_experts(transformer)
    plain = run_both_experts(transformer, inputs, both)
    transformer.enable_cache(CACHES[cache]())
    for cached, expected in zip(run_both_experts(transformer, inputs, both), plain, strict=True):
        assert torch.equal(cached, expected)


def test_model_offload_changes_nothing() -> None:
    transformer, inputs = tiny_transformer()
    both = exact_experts(transformer)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    plain = run_both_experts(transformer, inputs, both)
    _, hook = cpu_offload_with_hook(transformer, execution_device=torch.device("cpu"))
    for offloaded, expected in zip(run_both_experts(transformer, inputs, both), plain, strict=True):
        assert torch.equal(offloaded, expected)
    hook.offload()
    assert same_weights(dict(transformer.state_dict()), before)


def test_group_offload_changes_nothing_and_with_streams_is_refused() -> None:
    transformer, inputs = tiny_transformer()
    both = exact_experts(transformer)
    plain = run_both_experts(transformer, inputs, both)
    try:
        transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    except AttributeError:
        skip_older("it offloads groups only beside an accelerator")
    for offloaded, expected in zip(run_both_experts(transformer, inputs, both), plain, strict=True):
        assert torch.equal(offloaded, expected)
    hook = transformer.proj_in._diffusers_hook.get_hook("group_offloading")
    hook.group.stream = object()  # what use_stream=True sets on an accelerator
    with pytest.raises(ConfigError, match="use_stream=False"):
        run_both_experts(transformer, inputs, both)


def test_weights_that_wait_in_files_are_not_switched(tmp_path: Path) -> None:
    transformer, inputs = tiny_transformer()
    both = exact_experts(transformer)
    own = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    transformer.enable_group_offload(torch.device("cpu"), **own)
    with pytest.raises(ConfigError, match="wait in files"):
        run_both_experts(transformer, inputs, both)


def test_layerwise_casting_rounds_experts_to_its_storage() -> None:
    transformer, inputs = tiny_transformer()
    both = exact_experts(transformer)
    plain = run_both_experts(transformer, inputs, both)
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    for cast, expected in zip(run_both_experts(transformer, inputs, both), plain, strict=True):
        torch.testing.assert_close(cast, expected, atol=0.1, rtol=0.1)
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(tensor.float(), before[name].float())


def test_a_recipe_and_paths_and_checkpoints_give_the_same_experts(
    pipeline: DynamiCrafterPipeline, generate: Generate, tmp_path: Path
) -> None:
    base, tuned = weights_of(pipeline, "unet"), other_weights("unet")
    stored_paper_recipe(tmp_path, base, tuned)
    videos = []
    in_memory = Recipe.edg(base="memory:base", tuned="memory:tuned")
    checkpoint = Checkpoint.load(tmp_path / "base.safetensors")
    for recipe, inputs in (
        (tmp_path / "recipe.yaml", None),
        (in_memory, {"base": base, "tuned": tuned}),
        (in_memory, {"base": checkpoint, "tuned": tuned}),
        (BoundRecipe.of(in_memory, {"base": base, "tuned": tuned}), None),
    ):
        with experts(pipeline, recipe, inputs=inputs):
            videos.append(generate(pipeline))
    assert all(torch.equal(video, videos[0]) for video in videos)
    other = Recipe.edg(base="memory:base", tuned="memory:tuned", alpha=-0.25)
    with experts(pipeline, other, inputs={"base": base, "tuned": tuned}):
        assert not torch.equal(generate(pipeline), videos[0])
    with experts(pipeline, {"tuned": tmp_path / "tuned.safetensors"}):
        assert same_weights(weights_of(pipeline, "unet"), tuned)


def test_a_second_bank_on_the_same_model_is_refused(pipeline: DynamiCrafterPipeline) -> None:
    before = weights_of(pipeline, "unet")
    both = two_experts()
    with experts(pipeline, both, boundary=BOUNDARY):
        with pytest.raises(ConfigError, match="already has experts"):
            experts(pipeline, both, boundary=BOUNDARY)
        assert attached_bank(pipeline.unet) is not None
    assert same_weights(weights_of(pipeline, "unet"), before)


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ({}, CheckpointError, "no tensors"),
        ({"unet.conv_inn.bias": torch.zeros(8)}, CheckpointError, "motionmerge convert"),
        (
            {"unet.conv_out.bias": torch.zeros(4), "unet.conv_inn.bias": torch.zeros(8)},
            CheckpointError,
            "`unet.conv_in.bias`",
        ),
        (
            {"unet.temporal_adapter.queries": torch.zeros(3, 16)},
            CheckpointError,
            "add_temporal_adapter",
        ),
        ({"unet.conv_in.bias": torch.zeros(9)}, ShapeError, r"\[9\].*\[8\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    pipeline: DynamiCrafterPipeline, weights: Weights, error: type[Exception], words: str
) -> None:
    before = weights_of(pipeline, "unet")
    good = other_weights("unet")
    with pytest.raises(error, match=words):
        experts(pipeline, {"good": good, "bad": weights}, boundary=BOUNDARY)
    assert same_weights(weights_of(pipeline, "unet"), before)
    assert attached_bank(pipeline.unet) is None


def test_packed_and_absent_weights_are_refused() -> None:
    packed = Recorder()
    packed.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(CheckpointError, match="quantised"):
        ExpertBank(packed, {"one": {"weight": torch.ones(4)}}, schedule=only_one())
    with pytest.raises(ConfigError, match="model_cpu_offload"):
        ExpertBank(Recorder().to("meta"), {"one": {"weight": torch.ones(2)}}, schedule=only_one())


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ({"one": {"x": torch.ones(1)}}, {"inputs": {}}, "those of a recipe"),
        ({"conv.weight": torch.ones(1)}, {}, "`conv.weight` is a Tensor"),
        ("pocket", {"placement": "bogus"}, "no placement `bogus`"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(
    pipeline: DynamiCrafterPipeline, recipe: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        experts(pipeline, recipe, **options)


def test_an_input_that_a_recipe_of_loras_has_not_is_refused(
    pipeline: DynamiCrafterPipeline,
) -> None:
    text = "inputs: {base: 'memory:base', style: style.safetensors}\n"
    recipe = Recipe.parse(text + "experts: {one: 'base + lora(style, 1.0)'}\n")
    with pytest.raises(RecipeError, match="no input `stlye`"):
        experts(pipeline, recipe=recipe, inputs={"stlye": "other.safetensors"})


def test_arguments_that_do_not_fit_together_are_refused(pipeline: DynamiCrafterPipeline) -> None:
    both = two_experts()
    one = {"one": both["dynamics"]}
    for weights, options in (
        ({}, {}),
        (both, {}),
        (one, {"boundary": 0.5}),
        (both, {"boundary": 0.5, "schedule": TWO}),
    ):
        with pytest.raises(ConfigError, match="Fix:"):
            experts(pipeline, weights, **options)
    with pytest.raises(RecipeError, match="`dynamics`"):
        experts(pipeline, {"dynamic": both["dynamics"]}, schedule=TWO)
    with pytest.raises(ConfigError, match="no `unet`"):
        experts(SimpleNamespace(), {"one": both["dynamics"]})
    with pytest.raises(ConfigError, match="takes no `timestep`"):
        experts(nn.Linear(2, 2), {"one": {"bias": torch.ones(2)}})
    model = Recorder()
    with (
        experts(model, recorder_experts(), boundary=0.5),
        pytest.raises(ConfigError, match="needs a scheduler"),
    ):
        model(torch.zeros(1), 900)


def test_an_expert_may_call_a_registered_function(pipeline: DynamiCrafterPipeline) -> None:
    base, tuned = other_weights("unet", seed=1), other_weights("unet", seed=2)
    before = dict(FUNCTIONS)
    try:
        halved = lambda vector, *, block, share: share * vector  # noqa: E731
        register_function("halved", settings={"share": float}, blocks=halved)
        recipe = Recipe.parse(
            "inputs: {base: 'memory:base', tuned: 'memory:tuned'}\n"
            "experts: {merged: 'base + halved(tuned - base, share=0.5)'}\n"
        )
        with experts(pipeline, recipe, inputs={"base": base, "tuned": tuned}):
            attached = weights_of(pipeline, "unet")
    finally:
        FUNCTIONS.clear()
        FUNCTIONS.update(before)
    wanted = {name: base[name] + 0.5 * (tuned[name] - base[name]) for name in base}
    assert same_weights(attached, wanted)
