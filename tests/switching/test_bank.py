"""Which expert is due, and what users do to a model while experts are attached to it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.schedule import ExpertSchedule, ScheduleEntry, noise_level
from motionmerge.switching import switched_module
from motionmerge.switching.expert_bank import ExpertBank, attached_bank, experts

from ..tiny import builders as build
from ..tiny.dynamicrafter import tiny_pipeline
from ..tiny.folders import family_named
from ..tiny.library import IS_OLDER, hooks
from ..tiny.loras import with_motion
from ..tiny.pipelines import Family, generate, other_weights, tiny, weights_of
from .test_expert_bank import (
    Recorder,
    exact_experts,
    recorder_experts,
    same_weights,
    tiny_transformer,
)
from .test_lora_bank import lora_for

Weights = dict[str, torch.Tensor]
TWO = ExpertSchedule((ScheduleEntry("dynamics", timestep=500), ScheduleEntry("consistency")))
HALVES = ExpertSchedule.from_list(
    [{"expert": "dynamics", "step_fraction": 0.5}, {"expert": "consistency"}]
)


def two(pipeline: Any, family: Family) -> dict[str, Weights]:
    names = ("dynamics", "consistency")
    return {name: other_weights(pipeline, family, seed=seed) for seed, name in enumerate(names, 1)}


class NoGuardrail:
    """In place of the classifiers that Cosmos insists on, which are a package of their own."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def to(self, *_: Any) -> NoGuardrail:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return bool(prompt)

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos() -> Any:
    """Cosmos 2, whose denoiser is told sigma / (1 + sigma) and no timestep of its scheduler."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = diffusers.Cosmos2VideoToWorldPipeline(
            **build.text_parts(),
            transformer=diffusers.CosmosTransformer3DModel(
                in_channels=17,
                out_channels=16,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=2,
                mlp_ratio=2,
                text_embed_dim=build.TEXT_DIM,
                adaln_lora_dim=4,
                max_size=(4, 32, 32),
                patch_size=(1, 2, 2),
                rope_scale=(2.0, 1.0, 1.0),
                concat_padding_mask=False,
                extra_pos_embed_type="learnable",
            ),
            vae=build.wan_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
            safety_checker=NoGuardrail(),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "schedule", [HALVES, ExpertSchedule.two("dynamics", "consistency", boundary=0.64)]
)
def test_a_denoiser_that_is_told_no_timestep_gets_the_expert_of_the_schedulers_step(
    schedule: ExpertSchedule,
) -> None:
    pipeline = cosmos()
    own = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    both = {
        "dynamics": {"proj_out.weight": own["proj_out.weight"] + 1},
        "consistency": {"proj_out.weight": own["proj_out.weight"] - 1},
    }
    seen: list[tuple[float, str]] = []

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        (expert,) = (
            name
            for name, weights in both.items()
            if torch.equal(module.state_dict()["proj_out.weight"], weights["proj_out.weight"])
        )
        seen.append((float(kwargs["timestep"].max()), expert))

    with experts(pipeline, both, schedule=schedule):
        pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
        for _ in range(2):
            pipeline(
                image=Image.new("RGB", (32, 32)),
                prompt="a cat",
                height=32,
                width=32,
                num_frames=9,
                num_inference_steps=4,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                max_sequence_length=8,
            )
    levels = [noise_level(pipeline.scheduler, t) for t in pipeline.scheduler.timesteps]
    assert levels == pytest.approx([0.988, 0.907, 0.320, 0.002], abs=1e-3)
    told, used = zip(*seen, strict=True)
    assert told == pytest.approx([level for level in levels for _ in range(2)] * 2, abs=1e-3)
    assert used == ("dynamics",) * 4 + ("consistency",) * 4 + used[:8]


def test_a_timestep_outside_those_of_the_scheduler_means_the_nearest() -> None:
    ddim = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    euler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    for scheduler in (ddim, euler, flow):
        scheduler.set_timesteps(10)
        sample = torch.zeros(1)
        for is_over in (False, True):
            for target in (Recorder(), SimpleNamespace(transformer=Recorder())):
                with ExpertBank(
                    target, recorder_experts(), schedule=HALVES, scheduler=scheduler
                ) as bank:
                    early = [bank.expert_for(value) for value in (1500, 999, 905)]
                    late = [bank.expert_for(value) for value in (2, 0.5, 0, -5)]
                assert early == ["dynamics"] * 3 and late == ["consistency"] * 4
            for timestep in () if is_over else scheduler.timesteps:
                scheduler.step(sample, timestep, sample)


def test_of_two_steps_that_bfloat16_makes_one_the_one_that_the_scheduler_is_at_counts() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(50)
    first, second = scheduler.timesteps[1:3].bfloat16()
    assert first == second
    schedule = ExpertSchedule.from_list(
        [{"expert": "dynamics", "step_fraction": 0.04}, {"expert": "consistency"}]
    )
    sample = torch.zeros(1)
    with ExpertBank(Recorder(), recorder_experts(), schedule=schedule, scheduler=scheduler) as bank:
        found = []
        for timestep in scheduler.timesteps:
            found.append(bank.expert_for(timestep.bfloat16()))
            scheduler.step(sample, timestep, sample)
    assert found == ["dynamics"] * 2 + ["consistency"] * 48


def test_calls_at_one_timestep_are_one_step() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    assert len(scheduler.timesteps) == 7
    with ExpertBank(Recorder(), recorder_experts(), schedule=HALVES, scheduler=scheduler) as bank:
        found = [bank.expert_for(timestep) for timestep in scheduler.timesteps]
    assert found == ["dynamics"] * 3 + ["consistency"] * 4


def test_steps_whose_timesteps_are_rounded_to_one_number_are_several() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=12.0
    )
    scheduler.set_timesteps(100)
    assert len(scheduler.timesteps.unique()) < 100
    with ExpertBank(Recorder(), recorder_experts(), schedule=HALVES, scheduler=scheduler) as bank:
        found = [bank.expert_for(timestep) for timestep in scheduler.timesteps]
    assert found == ["dynamics"] * 50 + ["consistency"] * 50


@pytest.mark.parametrize("name", ["CogVideoX", "Wan 2.1"])
def test_fused_projections_are_refused_as_no_switch_reaches_them(name: str) -> None:
    family = family_named(name)
    pipeline = tiny(family)
    both, lora = two(pipeline, family), lora_for(pipeline, family)
    pipeline.transformer.fuse_qkv_projections()
    for options in ({"recipe": both, "boundary": 0.5}, with_motion(lora, 0.25)):
        with pytest.raises(ConfigError, match=r"fused projections(.|\n)*unfuse_qkv_projections"):
            experts(pipeline, **options)
    pipeline.transformer.unfuse_qkv_projections()
    with experts(pipeline, both, boundary=0.5):
        generate(pipeline, family)


@pytest.mark.parametrize("name", ["CogVideoX", "Wan 2.1"])
def test_projections_fused_inside_the_block_are_named_and_fused_anew_from_the_own_weights(
    name: str,
) -> None:
    family = family_named(name)
    pipeline = tiny(family)
    plain, before = generate(pipeline, family), weights_of(pipeline, family)
    with (
        pytest.raises(ConfigError, match="fused projections"),
        experts(pipeline, two(pipeline, family), boundary=family.boundary),
    ):
        pipeline.transformer.fuse_qkv_projections()
        generate(pipeline, family)
    fused = generate(pipeline, family)
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    after = weights_of(pipeline, family)  # the older kind of attention keeps what it fused
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_projector_alone_is_refused_as_it_would_never_be_switched() -> None:
    pipeline = tiny_pipeline()
    own = pipeline.image_projector.state_dict()
    both = {"one": own, "two": {name: tensor + 1 for name, tensor in own.items()}}
    with pytest.raises(ConfigError, match=r"no timestep(.|\n)*image_projector\.<name>"):
        experts(pipeline, both, boundary=0.5, module="image_projector")
    assert attached_bank(pipeline.image_projector) is None


@pytest.mark.skipif(IS_OLDER, reason="its UniPC is at timestep 899, below the boundary, not 900")
def test_a_lora_loaded_inside_the_block_is_named_and_all_weights_come_back() -> None:
    family = family_named("Wan 2.2-A14B")
    pipeline = tiny(family)
    before, both = weights_of(pipeline, family), two(pipeline, family)
    lora = {k: v for k, v in lora_for(pipeline, family).items() if "alpha" not in k}
    with (
        pytest.raises(CheckpointError, match="lost its tensor"),
        experts(pipeline, both, boundary=0.93),  # while the first transformer denoises
    ):
        generate(pipeline, family)
        pipeline.load_lora_weights(lora)
        generate(pipeline, family)
    pipeline.unload_lora_weights()
    assert same_weights(weights_of(pipeline, family), before)
    with experts(pipeline, both, boundary=family.boundary):
        generate(pipeline, family)
    assert same_weights(weights_of(pipeline, family), before)


def test_a_tensor_taken_out_inside_the_block_is_named_and_all_others_come_back() -> None:
    family = family_named("Wan 2.2-A14B")
    pipeline = tiny(family)
    before = weights_of(pipeline, family)
    with (
        pytest.raises(CheckpointError, match=r"`transformer` lost its tensor `proj_out.bias`"),
        experts(pipeline, two(pipeline, family), boundary=family.boundary),
    ):
        pipeline.transformer.proj_out.bias = None
    after = weights_of(pipeline, family)
    assert before.keys() - after.keys() == {"transformer.proj_out.bias"}
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert attached_bank(pipeline.transformer_2) is None


def test_ctrl_c_while_the_weights_are_given_back_waits_until_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = family_named("Wan 2.2-A14B")
    pipeline = tiny(family)
    before = weights_of(pipeline, family)
    copy_all, left = switched_module._copy_all, -1

    def interrupted(*tensors: list[torch.Tensor]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        copy_all(*tensors)

    monkeypatch.setattr(switched_module, "_copy_all", interrupted)
    monkeypatch.setattr(switched_module, "_GROUP_BYTES", {})  # one tensor at a time
    with (
        pytest.raises(KeyboardInterrupt),
        experts(pipeline, two(pipeline, family), boundary=family.boundary),
    ):
        left = 30
    assert left < 0
    assert same_weights(weights_of(pipeline, family), before)
    assert not any(attached_bank(getattr(pipeline, name)) for name in family.denoisers)


@pytest.mark.parametrize("fault", [OSError("the disk is gone"), KeyboardInterrupt()])
def test_what_could_not_be_given_back_is_given_back_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    family = family_named("Wan 2.2-A14B")
    pipeline = tiny(family)
    before = weights_of(pipeline, family)
    bank = experts(pipeline, two(pipeline, family), boundary=family.boundary)

    def fail(*_: Any) -> None:
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(switched_module, "_copy_all", fail)
        with pytest.raises(type(fault)):
            bank.detach()
    assert attached_bank(pipeline.transformer) is bank
    bank.detach()
    assert same_weights(weights_of(pipeline, family), before)
    assert not any(attached_bank(getattr(pipeline, name)) for name in family.denoisers)


def test_a_lora_works_beside_one_that_is_switched_off_and_leaves_it_off() -> None:
    family = family_named("Wan 2.1")
    pipeline = tiny(family)
    lora, own = (lora_for(pipeline, family, seed=seed) for seed in (0, 5))
    plain = generate(pipeline, family)
    with experts(pipeline, **with_motion(lora, 0.5), boundary=family.boundary):
        expected = generate(pipeline, family)
    assert not torch.equal(expected, plain)
    own = {name: value for name, value in own.items() if "alpha" not in name}
    pipeline.load_lora_weights(own, adapter_name="mine")
    used = generate(pipeline, family)
    pipeline.disable_lora()
    with experts(pipeline, **with_motion(lora, 0.5), boundary=family.boundary):
        assert torch.equal(generate(pipeline, family), expected)
    assert torch.equal(generate(pipeline, family), plain)
    pipeline.enable_lora()
    assert torch.equal(generate(pipeline, family), used)


def test_loras_unloaded_inside_the_block_are_named() -> None:
    family = family_named("Wan 2.1")
    pipeline = tiny(family)
    before = weights_of(pipeline, family)
    lora = lora_for(pipeline, family)
    with (
        pytest.raises(CheckpointError, match="lost its LoRA"),
        experts(pipeline, **with_motion(lora, 0.5), boundary=family.boundary),
    ):
        pipeline.unload_lora_weights()
        generate(pipeline, family)
    assert same_weights(weights_of(pipeline, family), before)


@torch.no_grad()
def test_a_cache_that_counts_steps_goes_on_counting_after_a_switch() -> None:
    transformer, inputs = tiny_transformer()
    both = exact_experts(transformer)
    transformer.enable_cache(
        hooks.MagCacheConfig(threshold=0.0, num_inference_steps=10, mag_ratios=torch.ones(10))
    )
    counted = []
    with ExpertBank(transformer, both, schedule=TWO):
        for timestep in (900, 700, 300, 100):
            for guidance in ("cond", "uncond"):
                with transformer.cache_context(guidance):
                    transformer(timestep=torch.tensor([timestep]), **inputs)
            counted.append(steps_of_caches(transformer))
    assert counted == [{"cond": step, "uncond": step} for step in (1, 2, 3, 4)]


def steps_of_caches(module: nn.Module) -> dict[str, int]:
    managers = [
        hook.state_manager
        for child in module.modules()
        for hook in getattr(getattr(child, "_diffusers_hook", None), "hooks", {}).values()
        if hasattr(hook, "state_manager")
    ]
    return {name: state.step_index for name, state in managers[0]._state_cache.items()}


def test_a_copy_of_a_model_with_experts_is_a_model_of_its_own() -> None:
    model = Recorder()
    with ExpertBank(model, recorder_experts(), schedule=TWO):
        model(torch.zeros(1), 900)
        twin = copy.deepcopy(model)
        twin(torch.zeros(1), 100)
        assert model.weight[0] == twin.weight[0] == 1
    twin(torch.zeros(1), 900)
    assert [weight for _, weight in twin.calls] == [1, 1, 1]


def test_one_tensor_with_two_names_is_refused() -> None:
    model = Recorder()
    model.other = model.weight
    both = {
        name: {**own, "other": own["weight"].clone()} for name, own in recorder_experts().items()
    }
    with pytest.raises(CheckpointError, match=r"`denoiser\.other` and `denoiser\.weight` are one"):
        ExpertBank(model, both, schedule=TWO)
    with ExpertBank(model, recorder_experts(), schedule=TWO):
        model(torch.zeros(1), 900)
    assert model.weight[0] == 0 and model.calls[-1][1] == 1
