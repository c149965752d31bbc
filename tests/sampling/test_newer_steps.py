"""Newer families take the steps that are announced, and heed sigmas or refuse them by name."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch

from motionmerge.errors import ConfigError
from motionmerge.sampling.families.families import VIDEO_FAMILIES, configs_of, family_of
from motionmerge.sampling.request.step_plan import (
    _ARGUMENTS,
    _set_timesteps,
    plan_steps,
    sigmas_argument,
)
from motionmerge.sampling.videos.make_video import make_video
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.denoising_steps import describe_steps

from ..tiny.pipelines import EVERY_FAMILY, NEWER, PROMPT, Family, generate, photo, tiny

SIGMAS = (1.0, 0.9, 0.4)

newer = pytest.mark.parametrize("family", NEWER, ids=lambda family: family.name)


SHIFTED_BY_SIZE = ("Helios", "FramePack", "Motif", "LTX")


def variants(family: Family, scheduler: Any) -> list[dict[str, Any]]:
    """Configurations of a scheduler that change its timesteps."""
    known = inspect.signature(type(scheduler).__init__).parameters
    if family.name.startswith(SHIFTED_BY_SIZE):
        sizes = {"base_shift": 0.95, "max_shift": 2.05, "max_image_seq_len": 64}
        return [{}, {"use_dynamic_shifting": True, "shift": 1.0, **sizes}]
    name = "flow_shift" if "flow_shift" in known else "shift"
    return [{}, {name: 4.0}]


def asked(family: Family, number: int, **more: Any) -> VideoSettings:
    inputs = family.inputs(1)
    size = {key: inputs.get(key) for key in ("num_frames", "height", "width")}
    return VideoSettings(num_inference_steps=number, **size, **more)


def assert_planned(family: Family, pipeline: Any, steps: VideoSettings, **run: Any) -> None:
    """Check that a plan is what the pipeline's own scheduler holds after a run."""
    called = family_of(type(pipeline).__name__).name
    planned = copy.deepcopy(pipeline.scheduler)
    assert _set_timesteps(called, planned, steps, configs_of(pipeline)) is None
    if family.name == "ChronoEdit":  # it reasons in every step
        run["num_temporal_reasoning_steps"] = steps.num_inference_steps
    generate(pipeline, family, num_inference_steps=steps.num_inference_steps, **run)
    own = pipeline.scheduler
    assert len(own.timesteps) == len(planned.timesteps) > 0
    for name in ("timesteps", "sigmas"):
        found, used = (torch.as_tensor(getattr(one, name)).double() for one in (planned, own))
        if family.name == "Cosmos 2":  # it replaces the last by the one before
            found, used = found[:-1], used[:-1]
        torch.testing.assert_close(found, used, rtol=1e-6, atol=1e-6)


@newer
def test_the_timesteps_that_are_announced_are_those_of_the_scheduler_after_a_run(
    family: Family,
) -> None:
    pipeline = tiny(family)
    own = pipeline.scheduler
    for config in variants(family, own):
        pipeline.scheduler = type(own).from_config(own.config, **config)
        assert_planned(family, pipeline, asked(family, family.steps + 1))


@newer
def test_the_experts_of_a_newer_family_are_known_before(family: Family) -> None:
    pipeline = tiny(family)
    called = family_of(type(pipeline).__name__).name
    # MiniMax-H3 counts the level 0 among its steps, and denoises once less.
    is_h3 = family.name == "MiniMax-H3"
    number, noisy = (2, 1) if is_h3 else (family.steps, family.noisy_steps)
    plan = plan_steps(
        called,
        pipeline.scheduler,
        asked(family, family.steps),
        schedule=ExpertSchedule.two(
            "dynamics", "consistency", boundary=0.95 if is_h3 else family.boundary
        ),
        configs=configs_of(pipeline),
    )
    assert plan is not None
    assert plan.line == describe_steps(["dynamics"] * noisy + ["consistency"] * (number - noisy))


def test_the_steps_of_no_family_are_unknown() -> None:
    tried = {family_of(type(tiny(one)).__name__).name for one in EVERY_FAMILY}
    assert {family.name for family in VIDEO_FAMILIES} - tried == {"dynamicrafter", "pocket"}
    assert {family.name for family in VIDEO_FAMILIES} <= set(_ARGUMENTS)


TAKING = [one for one in EVERY_FAMILY if family_of(type(tiny(one)).__name__).takes_sigmas]
OTHERS = [one for one in EVERY_FAMILY if one not in TAKING]


@pytest.mark.parametrize("family", TAKING, ids=lambda family: family.name)
def test_sigmas_are_heeded_by_every_family_whose_pipeline_takes_them(family: Family) -> None:
    pipeline = tiny(family)
    if family.name == "SVD":  # its scheduler makes others of them
        with pytest.raises(ConfigError, match=r"EulerDiscreteScheduler.*use_karras_sigmas"):
            sigmas_argument(pipeline.scheduler, SIGMAS)
        return
    written = sigmas_argument(pipeline.scheduler, SIGMAS)
    assert_planned(family, pipeline, asked(family, 3, sigmas=SIGMAS), sigmas=written)
    config = pipeline.scheduler.config
    if config.get("shift", config.get("flow_shift", 1.0)) == 1 and not config.get(
        "use_dynamic_shifting"
    ):
        used = np.asarray(pipeline.scheduler.sigmas)[:3]
        assert used == pytest.approx(SIGMAS, abs=1e-4)


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_every_other_family_refuses_sigmas_by_name(family: Family) -> None:
    pipeline = tiny(family)
    prompt = None if family.name == "SVD" else PROMPT
    settings = VideoSettings(sigmas=SIGMAS, prompt=prompt)
    called = family_of(type(pipeline).__name__).name
    with pytest.raises(ConfigError, match=f"{called} takes no sigmas") as refused:
        make_video(pipeline, photo(32), settings)
    assert "Fix:" in str(refused.value)
