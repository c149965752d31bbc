"""The steps that are announced are those that the denoiser takes; sigmas and shifts are heeded."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import ConfigError, DataError
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.pocket.world import load_photo
from motionmerge.noise_levels import level_of_step
from motionmerge.sampling.batch.manifest import read_manifest
from motionmerge.sampling.families.families import POCKET, VIDEO_FAMILIES, configs_of, family_of
from motionmerge.sampling.request.folder import pipeline_class
from motionmerge.sampling.request.modular_folder import empty_pipeline
from motionmerge.sampling.request.step_plan import plan_steps, shift_setting
from motionmerge.sampling.videos.make_video import make_video, pipeline_arguments
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.schedule import ExpertSchedule, ScheduleEntry, noise_level
from motionmerge.switching.bank import Bank
from motionmerge.switching.denoising_steps import (
    Moment,
    UnusedExpertWarning,
    describe_steps,
    labels_of_steps,
    place_of_step,
    unused_entries,
)
from motionmerge.switching.expert_bank import ExpertBank

from ..switching.test_expert_bank import Recorder, recorder_experts
from ..tiny.folders import family_named, save_lora, save_tiny
from ..tiny.pipelines import FAMILIES, PROMPT, Family, photo, tiny

HALF = ExpertSchedule.two("dynamics", "consistency", boundary=0.5)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def two_tensors(pipeline: Any, family: Family) -> dict[str, dict[str, torch.Tensor]]:
    """Make experts that differ in one tensor of each denoiser, which tells them apart."""
    found: dict[str, dict[str, torch.Tensor]] = {expert: {} for expert in HALF.experts}
    for denoiser in family.denoisers:
        name, tensor = next(iter(getattr(pipeline, denoiser).state_dict().items()))
        for number, weights in enumerate(found.values()):
            weights[f"{denoiser}.{name}"] = tensor + number
    return found


def used_experts(pipeline: Any, family: Family, run: Callable[[], Any]) -> list[str]:
    """Run a pipeline with experts; name the expert of every step that was taken."""
    used: dict[float, str] = {}
    with ExpertBank(pipeline, two_tensors(pipeline, family), schedule=HALF) as bank:
        decide = bank.moment_for

        def remember(timestep: Any) -> Moment:
            moment = decide(timestep)
            used[float(torch.as_tensor(timestep).max())] = moment.entry.expert
            return moment

        bank.moment_for = remember  # type: ignore[method-assign]
        run()
    return list(used.values())


def variants(family: Family) -> list[dict[str, Any]]:
    """Configurations of the scheduler that change the timesteps."""
    known = inspect.signature(type(tiny(family).scheduler).__init__).parameters
    found: list[dict[str, Any]] = [{}]
    if "flow_shift" in known:
        found.append({"flow_shift": 8.0})
    elif "shift" in known:
        found.append({"shift": 4.0})
    if family.name.startswith("LTX"):
        dynamic = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05}
        found += [dynamic, {**dynamic, "shift_terminal": 0.1, "max_image_seq_len": 64}]
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_steps_that_are_announced_are_those_that_are_taken(family: Family) -> None:
    for config in variants(family):
        for number in (3, 6):
            pipeline = tiny(family)
            scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **config)
            pipeline.scheduler = scheduler
            inputs = family.inputs(1)
            size = {key: inputs.get(key) for key in ("num_frames", "height", "width")}
            plan = plan_steps(
                family_of(type(pipeline).__name__).name,
                type(scheduler).from_config(scheduler.config),
                VideoSettings(num_inference_steps=number, **size),
                schedule=HALF,
                configs=configs_of(pipeline),
            )

            def run(pipeline: Any = pipeline, number: int = number) -> None:
                pipeline(
                    num_inference_steps=number,
                    generator=torch.Generator().manual_seed(7),
                    output_type="latent",
                    **family.inputs(1),
                )

            used = used_experts(pipeline, family, run)
            assert len(used) == number
            assert plan is not None
            assert plan.line == describe_steps(used), config
            assert labels_of_steps(HALF, pipeline.scheduler) == used


def test_steps_are_one_line() -> None:
    eight = ["dynamics"] * 3 + ["consistency"] * 5
    assert describe_steps(eight) == "steps 1-3 of 8: dynamics, 4-8: consistency"
    assert describe_steps(["a", "b", "a"]) == "steps 1 of 3: a, 2: b, 3: a"
    assert describe_steps(["a"]) == "step 1 of 1: a"


def test_what_is_not_known_before_is_said_and_not_guessed() -> None:
    scheduler = FLOW(use_dynamic_shifting=True)
    plan = plan_steps(
        "wan", scheduler, VideoSettings(num_inference_steps=4), schedule=HALF, configs={}
    )
    assert plan is not None and "not known before" in plan.line
    plan = plan_steps(
        "a-new-family", FLOW(), VideoSettings(num_inference_steps=4), schedule=HALF, configs={}
    )
    assert plan is not None
    assert "not known before" in plan.line and "a-new-family" in plan.line


def test_what_a_shift_makes_of_given_sigmas_is_said() -> None:
    steps = VideoSettings(num_inference_steps=2, sigmas=(1.0, 0.5))
    for schedule in (HALF, None):
        plan = plan_steps("hunyuan-video", FLOW(shift=3.0), steps, schedule=schedule, configs={})
        assert plan is not None and plan.sigmas is not None and "1, 0.75" in plan.sigmas
    kept = plan_steps("hunyuan-video", FLOW(), steps, schedule=HALF, configs={})
    assert kept is not None and kept.sigmas is None
    assert plan_steps("hunyuan-video", FLOW(), steps, schedule=None, configs={}) is None


def test_every_family_but_ours_that_takes_sigmas_says_so() -> None:
    for family in VIDEO_FAMILIES:
        if family is not POCKET:
            made_by = pipeline_class(family)
            known: Any = inspect.signature(made_by.__call__).parameters
            if family.modular is not None:
                known = {known.name for known in empty_pipeline(family).blocks.inputs}
            assert family.takes_sigmas == ("sigmas" in known), family.name


def told_timesteps(pipeline: Any, family: Family, settings: VideoSettings) -> list[float]:
    """Make a video; return the timesteps that the denoiser is told."""
    told: dict[float, None] = {}
    denoiser = getattr(pipeline, family.denoisers[0])

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
        told[float(torch.as_tensor(bound.arguments["timestep"]).max())] = None

    hook = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    inputs = family.inputs(1)
    taken = {"image", "prompt", "negative_prompt", "height", "width", "num_frames"}
    options = {key: value for key, value in inputs.items() if key not in taken}
    try:
        make_video(pipeline, photo(32), settings, **options)
    finally:
        hook.remove()
    return list(told)


def settings_for(family: Family, **more: Any) -> VideoSettings:
    inputs = family.inputs(1)
    size = {key: inputs[key] for key in ("num_frames", "height", "width") if key in inputs}
    prompt = {} if family.name == "SVD" or "prompt_embeds" in inputs else {"prompt": PROMPT}
    return VideoSettings(seed=1, **size, **prompt, **more)


@pytest.mark.parametrize("name", ["LTX-2", "Hunyuan"])
def test_the_denoiser_is_told_the_sigmas_that_were_asked_for(name: str) -> None:
    family = family_named(name)
    pipeline = tiny(family)
    own = pipeline.scheduler
    sigmas, shift = (1.0, 0.9, 0.4), own.config.shift
    asked = [shift * s / (1 + (shift - 1) * s) for s in sigmas]
    told = told_timesteps(pipeline, family, settings_for(family, sigmas=sigmas))
    assert [t / 1000 for t in told] == pytest.approx(asked, abs=1e-3)
    told = told_timesteps(pipeline, family, settings_for(family, sigmas=sigmas, shift=1.0))
    assert [t / 1000 for t in told] == pytest.approx(sigmas, abs=1e-3)
    assert pipeline.scheduler is own and own.config.shift == shift


@pytest.mark.parametrize("name", ["Wan 2.1", "SkyReels-V2", "Kandinsky 5"])
def test_another_shift_holds_for_one_video(name: str) -> None:
    family = family_named(name)
    pipeline = tiny(family)
    own, setting = pipeline.scheduler, shift_setting(pipeline.scheduler)
    other = type(own).from_config(own.config, **{setting: 12.0})
    other.set_timesteps(3)
    with_shift = settings_for(family, num_inference_steps=3, shift=12.0)
    told = told_timesteps(pipeline, family, with_shift)
    assert told == pytest.approx(other.timesteps.tolist(), rel=1e-3)
    assert pipeline.scheduler is own
    own.set_timesteps(3)
    plain = told_timesteps(pipeline, family, settings_for(family, num_inference_steps=3))
    assert plain == pytest.approx(own.timesteps.tolist(), rel=1e-3)
    assert plain[1] != pytest.approx(told[1], rel=1e-3)


def test_the_shift_is_given_back_after_a_fault_too() -> None:
    family = family_named("Wan 2.1")
    pipeline = tiny(family)
    own = pipeline.scheduler
    broken = settings_for(family, num_inference_steps=2, shift=12.0)
    with pytest.raises(TypeError):
        make_video(pipeline, photo(32), broken, no_such_argument=1)
    assert pipeline.scheduler is own


@pytest.mark.parametrize(
    ("name", "asked", "complaint"),
    [
        ("Wan 2.1", {"sigmas": (1.0, 0.5)}, "takes no sigmas"),
        ("LTX", {"sigmas": (1.0, 0.5)}, "takes no sigmas"),
        ("LTX-2", {"sigmas": (1.0, 0.5), "num_inference_steps": 4}, "4 steps and 2 sigmas"),
        ("LTX-2", {"sigmas": (80.0, 0.5)}, "noise levels from 1"),
        ("SVD", {"sigmas": (80.0, 0.5)}, "use_karras_sigmas"),
        ("SVD", {"shift": 3.0}, "has no shift"),
        ("CogVideoX", {"shift": 3.0}, "has no shift"),
    ],
)
def test_what_a_pipeline_would_not_heed_is_refused_by_name(
    name: str, asked: dict[str, Any], complaint: str
) -> None:
    family = family_named(name)
    prompt = None if name == "SVD" else PROMPT
    with pytest.raises(ConfigError, match=complaint) as refused:
        make_video(tiny(family), photo(32), settings_for(family, **asked).changed(prompt=prompt))
    assert "Fix:" in str(refused.value)


def test_a_shift_that_follows_from_the_size_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match="size of the video"):
        shift_setting(FLOW(use_dynamic_shifting=True))
    with pytest.raises(ConfigError, match="flow models alone"):
        shift_setting(diffusers.UniPCMultistepScheduler())
    for scheduler in (FLOW(), diffusers.MiniMaxH3Scheduler(), diffusers.PiflowScheduler()):
        assert shift_setting(scheduler) == "shift"


@pytest.mark.parametrize(
    "sigmas",
    [(), (1.0, 1.0), (0.5, 0.8), (1.0, 0.5, 0.0), (1.0, -0.5), (float("nan"),), (0.0,)],
)
def test_sigmas_fall_and_stay_above_zero(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="Fix:"):
        VideoSettings(sigmas=sigmas)


@pytest.mark.parametrize("shift", [0, -1, float("nan"), 1e6, True])
def test_a_shift_is_a_number_above_zero(shift: Any) -> None:
    with pytest.raises(ConfigError, match=r"shift"):
        VideoSettings(shift=shift)


def test_videos_without_these_settings_keep_their_names(tmp_path: Path) -> None:
    assert not {"sigmas", "shift"} & VideoSettings(prompt="a").model_dump().keys()
    photo(32).save(tmp_path / "photo.png")
    manifest = tmp_path / "manifest.jsonl"
    line = {"image": "photo.png", "prompt": "a", "sigmas": [1, 0.9], "shift": 3}
    manifest.write_text(json.dumps(line))
    (job,) = read_manifest(manifest)
    assert job.settings.sigmas == (1.0, 0.9) and job.settings.shift == 3.0
    assert job.settings.changed(seed=2).sigmas == (1.0, 0.9)
    manifest.write_text(json.dumps({**line, "sigmas": [0.9, 1]}))
    with pytest.raises(DataError, match=r"line 1(.|\n)*fall"):
        read_manifest(manifest)


def test_sigmas_are_the_number_of_steps() -> None:
    pipeline = tiny(family_named("LTX-2"))
    settings = settings_for(family_named("LTX-2"), sigmas=(1.0, 0.8, 0.3))
    arguments = pipeline_arguments(pipeline, photo(32), settings)
    assert arguments["num_inference_steps"] == 3 and arguments["sigmas"] == [1.0, 0.8, 0.3]


# Experts without a step.


def lightning_steps(shift: float, number: int) -> tuple[list[str], str | None]:
    schedule = Recipe.load("wan22-lightning").schedule
    assert schedule is not None
    scheduler = FLOW(shift=shift)
    scheduler.set_timesteps(number)
    steps = labels_of_steps(schedule, scheduler)
    return steps, unused_entries(schedule, scheduler, steps)


def test_wan_lightning_uses_both_of_its_loras() -> None:
    for shift in (5.0, 8.0):
        for number in (4, 6, 8):
            steps, unused = lightning_steps(shift, number)
            assert unused is None
            assert steps == sorted(steps, key=["opening", "high", "low"].index)
            assert steps.count("opening") == 1
    steps, unused = lightning_steps(1.0, 4)
    assert unused is not None and "`high` never denoises" in unused


def test_calls_at_one_timestep_are_at_one_place_of_a_fade():
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(3)
    places = [place_of_step(scheduler, index, 0.0) for index in range(5)]
    assert places == [0, 0.5, 0.5, 1, 1]
    assert place_of_step(scheduler, None, float(scheduler.timesteps[1]) + 1) == 0.5


def test_an_expert_that_denoises_with_knobs_alone_is_not_said_to_be_idle() -> None:
    entries = [
        {"expert": "a", "step_fraction": 0.5, "guidance": 5},
        {"expert": "a", "above": 0.999},
        {"expert": "b"},
    ]
    scheduler = FLOW()
    scheduler.set_timesteps(2)
    schedule = ExpertSchedule.from_list(entries)
    unused = unused_entries(schedule, scheduler, labels_of_steps(schedule, scheduler))
    assert unused is not None and "`a` without knobs never denoises" in unused


def test_an_expert_without_a_step_is_named_before_denoising() -> None:
    scheduler = FLOW(shift=8.0)
    scheduler.set_timesteps(4)
    model = SimpleNamespace(transformer=Recorder(), scheduler=scheduler)
    schedule = ExpertSchedule.two("dynamics", "consistency", boundary=0.001)
    with (
        ExpertBank(model, recorder_experts(), schedule=schedule) as bank,
        pytest.warns(UnusedExpertWarning, match="`consistency` never denoises"),
    ):
        bank.expert_for(scheduler.timesteps[0])
    with (
        warnings.catch_warnings(),
        ExpertBank(model, recorder_experts(), schedule=HALF) as bank,
    ):
        warnings.simplefilter("error")
        bank.expert_for(scheduler.timesteps[0])


def test_the_pocket_model_announces_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    load_photo("coffee").save(path)
    options = ["generate", str(path), "--prompt", "the camera pans left", "--dry-run"]
    result = CliRunner().invoke(app, [*options, "--steps", "8"])
    assert result.exit_code == 0
    assert "of 8: dynamics" in result.output and "8: consistency" in result.output
    result = CliRunner().invoke(app, [*options, "--boundary", "1"])
    assert "warning: " in result.output and "`dynamics` never denoises" in result.output
    result = CliRunner().invoke(app, [*options, "--weights", "base"])
    assert "steps 1" not in result.output
    for flag in (("--shift", "3"), ("--sigmas", "1,0.5"), ("--sigmas", "1,x")):
        result = CliRunner().invoke(app, [*options, *flag])
        assert result.exit_code != 0 and flag[0] in result.output


def test_a_dry_run_of_a_folder_announces_the_steps_with_the_shift(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pipeline = save_tiny("Wan 2.1", folder)
    layer = next(
        name for name, one in pipeline.transformer.named_modules() if isinstance(one, nn.Linear)
    )
    save_lora(tmp_path / "lora.safetensors", pipeline.transformer, layer)
    photo(32).save(tmp_path / "photo.png")
    common = ["--model", str(folder), "--lora", f"{tmp_path / 'lora.safetensors'}", "--motion"]
    common += ["0.25", "--height", "16", "--width", "16", "--num-frames", "9", "--steps", "8"]
    common += ["--dry-run", "--device", "cpu"]
    expected = {}
    for shift in (1.0, 8.0):
        scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, **{shift_setting(pipeline.scheduler): shift}
        )
        scheduler.set_timesteps(8)
        noisy = sum(level_of_step(scheduler, index) > 0.64 for index in range(8))
        expected[shift] = f"steps 1-{noisy} of 8: dynamics, {noisy + 1}"
    assert expected[1.0] != expected[8.0]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(
        "\n".join(
            json.dumps({"image": "photo.png", "prompt": "a cat", "shift": shift})
            for shift in expected
        )
    )
    for shift, line in expected.items():
        command = ["generate", str(tmp_path / "photo.png"), "--prompt", "a cat"]
        result = CliRunner().invoke(app, [*command, *common, "--shift", str(shift)])
        assert result.exit_code == 0, result.output
        assert line in result.output
    result = CliRunner().invoke(app, ["batch", str(manifest), "-o", str(tmp_path), *common])
    assert result.exit_code == 0, result.output
    assert all(line in result.output for line in expected.values())


# What denoisers are told.


class Omni(nn.Module):
    """Takes its timesteps as Cosmos 3's denoiser does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.bias = nn.Parameter(torch.ones(1))
        self.calls: list[float] = []

    def forward(
        self, vision_timesteps: torch.Tensor, sound_timesteps: torch.Tensor | None = None
    ) -> None:
        self.calls.append(self.weight[0].item())


def test_cosmos_3_calls_its_timesteps_otherwise() -> None:
    assert (
        "vision_timesteps" in inspect.signature(diffusers.Cosmos3OmniTransformer.forward).parameters
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )
    scheduler.set_timesteps(8)
    model = SimpleNamespace(transformer=Omni(), scheduler=scheduler)
    with ExpertBank(model, recorder_experts(), schedule=HALF):
        for timestep in scheduler.timesteps:
            model.transformer(vision_timesteps=timestep.expand(6), sound_timesteps=None)
    assert model.transformer.calls == [1 if s > 0.5 else 2 for s in scheduler.sigmas[:-1]]


@pytest.mark.parametrize("audio_shift", [3.0, 30.0])
def test_of_minimax_h3_the_timesteps_of_the_video_count(audio_shift: float) -> None:
    scheduler, audio = (diffusers.MiniMaxH3Scheduler(shift) for shift in (12.0, audio_shift))
    for one in (scheduler, audio):
        one.set_timesteps(9)
    pipeline = SimpleNamespace(transformer=Recorder(), scheduler=scheduler)
    schedule = ExpertSchedule.two("dynamics", "consistency", boundary=0.9)
    sample, used = torch.zeros(1), []
    with ExpertBank(pipeline, recorder_experts(), schedule=schedule) as bank:
        for timestep, other in zip(scheduler.timesteps, audio.timesteps, strict=True):
            told = torch.stack([timestep, other, timestep.clamp(min=0.98)]).unique()
            used.append(bank.expert_for(told))
            scheduler.step(sample, timestep, sample)
    sigmas = scheduler.sigmas[:-1].tolist()
    assert used == ["dynamics" if s > 0.9 else "consistency" for s in sigmas]
    assert "dynamics" in used and "consistency" in used


@pytest.mark.parametrize("unit", ["share of training", "noise level"])
def test_a_denoiser_that_is_told_a_number_below_one_gets_the_expert_of_the_step(unit: str) -> None:
    for scheduler in (FLOW(shift=3.0), FLOW()):
        scheduler.set_timesteps(8)
        model, sample, used = Recorder(), torch.zeros(1), []
        with ExpertBank(model, recorder_experts(), schedule=HALF, scheduler=scheduler) as bank:
            for index, timestep in enumerate(scheduler.timesteps):
                level = level_of_step(scheduler, index)
                told = timestep / 1000 if unit == "share of training" else torch.tensor(level)
                used.append(bank.expert_for(told.bfloat16()))
                scheduler.step(sample, timestep, sample)
        assert used == labels_of_steps(HALF, scheduler)


def test_a_number_below_one_that_is_no_step_is_refused() -> None:
    scheduler = FLOW(shift=3.0)
    scheduler.set_timesteps(8)
    with (
        ExpertBank(Recorder(), recorder_experts(), schedule=HALF, scheduler=scheduler) as bank,
        pytest.raises(ConfigError, match=r"told 0.37(.|\n)*Fix"),
    ):
        bank.expert_for(torch.tensor(0.37))


def test_conditions_that_a_scheduler_would_turn_round_are_refused() -> None:
    by_timestep = ExpertSchedule(
        (ScheduleEntry("dynamics", timestep=500), ScheduleEntry("consistency"))
    )
    scheduler = diffusers.MiniMaxH3Scheduler()
    scheduler.set_timesteps(5)
    bank: Bank
    with (
        ExpertBank(
            SimpleNamespace(transformer=Recorder(), scheduler=scheduler),
            recorder_experts(),
            schedule=by_timestep,
        ) as bank,
        pytest.raises(ConfigError, match=r"rise from noise(.|\n)*above"),
    ):
        bank.expert_for(scheduler.timesteps[0])


def test_a_scheduler_without_levels_is_still_good_for_shares_of_the_steps() -> None:
    class Stranger:
        order = 1
        timesteps, sigmas = torch.tensor([4.0, 3.0, 2.0, 1.5]), torch.ones(5)

    model = SimpleNamespace(transformer=Recorder(), scheduler=Stranger())
    halves = ExpertSchedule(
        (ScheduleEntry("dynamics", step_fraction=0.5), ScheduleEntry("consistency"))
    )
    with ExpertBank(model, recorder_experts(), schedule=halves) as bank:
        used = [bank.expert_for(timestep) for timestep in Stranger.timesteps]
    assert used == ["dynamics"] * 2 + ["consistency"] * 2
    with pytest.raises(ConfigError, match="step_fraction"):
        noise_level(Stranger(), 3.0)
