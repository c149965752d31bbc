"""Knobs of a schedule on every pipeline: they act as told, or are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from motionmerge.errors import ConfigError
from motionmerge.knobs import parse_image
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.switching.expert_bank import attached_bank, experts
from motionmerge.switching.knob_families import (
    AMPLITUDE,
    ATTENTION,
    FILTERS,
    GUIDANCE,
    START,
    KnobFamily,
    knob_family,
)

from ..switching.test_lora_bank import lora_for
from ..tiny.pipelines import EVERY_FAMILY, Family, generate, is_modular, tiny

STEPS = 2
SETTINGS = {
    GUIDANCE: "guidance: 3",
    FILTERS: "image: low_pass(0.3)",
    AMPLITUDE: "image: motion_amplitude(1.5)",
    ATTENTION: "attention: first_frame(-0.6)",
    START: "start: 0.9",
}
SCALES = {"SVD": "max_guidance_scale", "Hunyuan": "true_cfg_scale"}


def recipe_of(*entries: str) -> Recipe:
    """Write a recipe of the model itself."""
    lines = "".join(f"\n  - {{expert: model, {entry}}}" for entry in entries)
    return Recipe.parse(
        f"inputs: {{base: 'memory:base'}}\nexperts: {{model: base}}\nschedule:{lines}"
    )


def built(family: Family) -> Any:
    """Build a pipeline whose guidance and image reach its output."""
    pipeline = tiny(family)
    if family.name == "Kandinsky 5":  # made with modulations of zero
        generator = torch.Generator().manual_seed(1)
        for parameter in pipeline.transformer.parameters():
            if not parameter.any():
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def known_of(pipeline: Any) -> KnobFamily:
    """Look up which knobs a pipeline has."""
    config = {name: getattr(part, "config", {}) for name, part in pipeline.components.items()}
    return knob_family(type(pipeline).__name__, {"": pipeline.config, **config})


class Calls:
    """Counts the rows of all calls of a pipeline's denoisers."""

    def __init__(self, pipeline: Any, family: Family) -> None:
        self.rows = 0
        for name in family.denoisers:
            getattr(pipeline, name).register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.rows += len(output[0] if isinstance(output, tuple) else output.sample)

    def of(self, run: Any) -> tuple[torch.Tensor, int]:
        self.rows = 0
        return run(), self.rows


def told(pipeline: Any, family: Family, scale: float) -> torch.Tensor:
    """Make a video by a scale that the pipeline is told, not the schedule."""
    guider = getattr(pipeline, "guider", None)
    if guider is None:
        return make(pipeline, family, **{SCALES.get(family.name, "guidance_scale"): scale})
    names = [name for name in ("guider", "guider_2") if getattr(pipeline, name, None) is not None]
    own = {name: getattr(pipeline, name) for name in names}
    fails_unguided = is_modular(pipeline) and scale == 1
    try:
        for name, one in own.items():
            new = one.new(stop=0.0) if fails_unguided else one.new(guidance_scale=scale)
            setattr(pipeline, name, new)
        return make(pipeline, family)
    finally:
        for name, one in own.items():
            setattr(pipeline, name, one)


def make(pipeline: Any, family: Family, **options: Any) -> torch.Tensor:
    return generate(pipeline, family, num_inference_steps=STEPS, **options)


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_every_knob_acts_or_is_refused_and_nothing_stays(family: Family) -> None:
    pipeline = built(family)
    known = known_of(pipeline)
    for knob in (knob for knob in SETTINGS if not known.has(knob)):
        name = knob.split(", ")[0]  # low_pass, of those in one column
        with pytest.raises(ConfigError, match=f"sets {name}, which|combined in another way"):
            experts(pipeline, recipe_of(SETTINGS[knob]))
    if not any(map(known.has, SETTINGS)):
        return
    calls = Calls(pipeline, family)
    plain, rows = calls.of(lambda: make(pipeline, family))
    for knob, setting in SETTINGS.items():
        if not known.has(knob):
            continue
        with experts(pipeline, recipe_of(setting)):
            turned, own_rows = calls.of(lambda: make(pipeline, family))
        if knob == GUIDANCE:
            assert torch.equal(turned, told(pipeline, family, 3.0))
        else:
            assert not torch.equal(turned, plain), knob
        sees_no_image = known.name == "SVD"  # in its unconditional pass
        more = rows // 2 if knob == FILTERS and not sees_no_image else 0
        assert own_rows == rows + more, knob
    if known.has(GUIDANCE):
        with experts(pipeline, recipe_of("guidance: 1")):
            alone, own_rows = calls.of(lambda: make(pipeline, family))
        assert own_rows == rows // 2
        assert torch.equal(alone, told(pipeline, family, 1.0))
    nothing = [
        setting
        for knob, setting in (
            (FILTERS, "image: low_pass(1) + time_noise(0)"),
            (AMPLITUDE, "image: motion_amplitude(1)"),
            (ATTENTION, "attention: first_frame(0)"),
        )
        if known.has(knob)
    ]
    for setting in nothing:
        with experts(pipeline, recipe_of(setting)):
            assert torch.equal(make(pipeline, family), plain), setting
    assert torch.equal(make(pipeline, family), plain)
    for name in family.denoisers:
        assert attached_bank(getattr(pipeline, name)) is None


@pytest.mark.parametrize("name", ["Wan 2.1", "CogVideoX"])
def test_guidance_is_bit_equal_in_bf16_as_well(name: str) -> None:
    family = named(name)
    pipeline = built(family)
    pipeline.to(torch.bfloat16)
    expected = told(pipeline, family, 3.0)
    with experts(pipeline, recipe_of("guidance: 3")):
        assert torch.equal(make(pipeline, family), expected)


def named(name: str) -> Family:
    return next(family for family in EVERY_FAMILY if family.name == name)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_batch_of_two_videos_is_two_videos() -> None:
    for name in ("Wan 2.1", "CogVideoX"):
        family = named(name)
        pipeline = built(family)
        recipe = recipe_of("step_fraction: 0.5, guidance: 4, image: low_pass(0.4)", "guidance: 1")
        with experts(pipeline, recipe):
            both = generate(pipeline, family, batch=2, generator=[seeded(1), seeded(2)])
            last = generate(pipeline, family, generator=[seeded(2)])
        torch.testing.assert_close(last, both[1:], atol=1e-5, rtol=1e-5)


def test_knobs_go_with_experts_and_with_what_is_done_to_a_model_meanwhile() -> None:
    family = named("Wan 2.2-A14B")
    pipeline = built(family)
    schedule = ExpertSchedule(
        (
            ScheduleEntry("first", above=0.8, guidance=8, image=parse_image("low_pass(0.4)")),
            ScheduleEntry("second", guidance=1),
        )
    )
    plain = generate(pipeline, family)
    own = {
        expert: {
            f"transformer.{name}": value * factor
            for name, value in pipeline.transformer.state_dict().items()
        }
        for expert, factor in (("first", 1.1), ("second", 0.9))
    }
    with experts(pipeline, own, schedule=schedule) as bank:
        assert [attached_bank(getattr(pipeline, name)) for name in family.denoisers] == [bank] * 2
        made = generate(pipeline, family)
        # Offloading wraps `forward`, and puts the old one back after every video.
        add_hook_to_module(pipeline.transformer, ModelHook())
        assert torch.equal(generate(pipeline, family), made)
        remove_hook_from_module(pipeline.transformer)
        assert torch.equal(generate(pipeline, family), made)
        with bank.with_expert("first"):
            pinned = generate(pipeline, family)
    alone = ExpertSchedule(tuple(replace(entry, expert="first") for entry in schedule.entries))
    with experts(pipeline, own, schedule=alone):
        assert torch.equal(generate(pipeline, family), pinned)
    add_hook_to_module(pipeline.transformer, ModelHook())
    with experts(pipeline, own, schedule=schedule):
        assert torch.equal(generate(pipeline, family), made)
    remove_hook_from_module(pipeline.transformer)
    assert not torch.equal(made, plain)
    assert torch.equal(generate(pipeline, family), plain)


def test_guidance_is_handed_over_to_a_distilled_lora() -> None:
    family = named("Wan 2.1")
    pipeline = built(family)
    calls, lora = Calls(pipeline, family), lora_for(pipeline, family)
    plain = generate(pipeline, family)
    recipe = Recipe.load("guidance-handover")
    with experts(pipeline, recipe, inputs={"turbo": lora}):
        made, rows = calls.of(lambda: generate(pipeline, family))
    assert rows == 2 * family.noisy_steps + (family.steps - family.noisy_steps)
    bare = ExpertSchedule.from_list([{"expert": "full", "above": 0.9}, {"expert": "distilled"}])
    scheduler, scales = pipeline.scheduler, {"full": 3.5, "distilled": 1.0}
    with experts(pipeline, recipe, inputs={"turbo": lora}, schedule=bare) as bank:
        step = scheduler.step

        def guided(prediction: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            c, u = passes[-2:]
            scale = scales[bank.expert_for(t)]
            return step(u + scale * (c - u), t, *args, **kwargs)

        passes: list[torch.Tensor] = []
        hook = pipeline.transformer.register_forward_hook(
            lambda module, args, output: passes.append(output[0].clone())
        )
        scheduler.step = guided
        expected = generate(pipeline, family)
        scheduler.step = step
        hook.remove()
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(generate(pipeline, family), plain)


def test_an_error_in_a_call_leaves_nothing_behind() -> None:
    family = named("Wan 2.1")
    pipeline = built(family)
    plain = make(pipeline, family)
    before = [dict(vars(module)) for module in pipeline.transformer.modules()]

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    hook = pipeline.transformer.blocks[-1].register_forward_hook(fail)
    recipe = recipe_of("guidance: 3, image: low_pass(0.4), attention: first_frame(-1)")
    with pytest.raises(ZeroDivisionError), experts(pipeline, recipe):
        make(pipeline, family)
    hook.remove()
    after = [vars(module) for module in pipeline.transformer.modules()]
    assert all(old.keys() == new.keys() for old, new in zip(before, after, strict=True))
    assert not any(module._forward_pre_hooks for module in pipeline.transformer.modules())
    assert torch.equal(make(pipeline, family), plain)
