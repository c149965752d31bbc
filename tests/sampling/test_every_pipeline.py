"""Experts on every image-to-video pipeline of diffusers that docs/reference/families.md lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.schedule import ExpertSchedule, noise_level
from motionmerge.switching.expert_bank import attached_bank, experts

from ..tiny.pipelines import (
    EVERY_FAMILY,
    Family,
    generate,
    load_weights,
    other_weights,
    tiny,
    weights_of,
)

Weights = dict[str, torch.Tensor]

every_family = pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)


def family_named(name: str) -> Family:
    return next(family for family in EVERY_FAMILY if family.name == name)


def two_experts(pipeline: Any, family: Family) -> dict[str, Weights]:
    return {
        "dynamics": other_weights(pipeline, family, seed=1),
        "consistency": other_weights(pipeline, family, seed=2),
    }


def same_bits(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def denoisers_of(pipeline: Any, family: Family) -> list[nn.Module]:
    return [getattr(pipeline, name) for name in family.denoisers]


def generate_cut(
    family: Family, both: dict[str, Weights], *, batch: int, calls_a_step: int
) -> torch.Tensor:
    """Run two pipelines as one: the second's denoisers take over after the noisy steps of a piece.

    Knows neither timesteps nor noise levels; it counts calls.
    """
    first, second = tiny(family), tiny(family)
    load_weights(first, family, both["dynamics"])
    load_weights(second, family, both["consistency"])
    calls = 0

    def take_over(*_: Any) -> None:
        nonlocal calls
        calls += 1
        put_in_place(family.due[min(calls // calls_a_step, len(family.due) - 1)])

    def put_in_place(due: str) -> None:
        for name in family.denoisers:
            setattr(first, name, own[due][name])

    own = {
        due: {name: getattr(made, name) for name in family.denoisers}
        for due, made in (("d", first), ("c", second))
    }
    for denoiser in (*own["d"].values(), *own["c"].values()):
        denoiser.register_forward_hook(take_over)
    put_in_place(family.due[0])
    return generate(first, family, batch=batch)


def generate_and_watch(
    pipeline: Any, family: Family, both: dict[str, Weights], *, batch: int
) -> tuple[torch.Tensor, list[list[str]]]:
    """Generate; give for every call of a denoiser the experts whose weights were in place."""
    calls: list[list[str]] = []

    def record(name: str) -> Any:
        def before(module: nn.Module, *_: Any) -> None:
            live = {f"{name}.{key}": value for key, value in module.state_dict().items()}
            calls.append(
                [
                    expert
                    for expert, weights in both.items()
                    if all(torch.equal(value, weights[key]) for key, value in live.items())
                ]
            )

        return before

    hooks = [
        getattr(pipeline, name).register_forward_pre_hook(record(name)) for name in family.denoisers
    ]
    latents = generate(pipeline, family, batch=batch)
    for hook in hooks:
        hook.remove()
    return latents, calls


@every_family
def test_one_expert_everywhere_equals_the_plain_pipeline(family: Family) -> None:
    pipeline = tiny(family)
    plain = generate(pipeline, family)
    with experts(pipeline, {"same": weights_of(pipeline, family)}):
        assert torch.equal(generate(pipeline, family), plain)
    other = other_weights(pipeline, family, seed=1)
    with experts(pipeline, {"other": other}):
        switched = generate(pipeline, family)
    assert torch.equal(generate(pipeline, family), plain)
    load_weights(pipeline, family, other)
    assert torch.equal(generate(pipeline, family), switched)
    assert not torch.equal(switched, plain)


@every_family
@pytest.mark.parametrize("batch", [1, 2])
def test_two_experts_equal_two_pipelines_cut_at_the_boundary(family: Family, batch: int) -> None:
    if batch > 1 and not family.has_batches:
        pytest.skip("makes one video a call")
    pipeline = tiny(family)
    before = weights_of(pipeline, family)
    both = two_experts(pipeline, family)
    with experts(pipeline, both, boundary=family.boundary):
        switched, calls = generate_and_watch(pipeline, family, both, batch=batch)
        if batch == 1:  # the next video begins with the last expert in place
            assert torch.equal(generate(pipeline, family), switched)
    assert same_bits(weights_of(pipeline, family), before)

    passes, rest = divmod(len(calls), len(family.due))
    assert passes >= 1 and rest == 0
    names = {"d": "dynamics", "c": "consistency"}
    assert calls == [[names[letter]] for letter in family.due for _ in range(passes)]
    cut = generate_cut(family, both, batch=batch, calls_a_step=passes)
    assert torch.equal(switched, cut)


@every_family
def test_the_weights_come_back_after_an_exception(family: Family) -> None:
    pipeline = tiny(family)
    before = weights_of(pipeline, family)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for denoiser in denoisers_of(pipeline, family):
        denoiser.register_forward_hook(fail)
    both = two_experts(pipeline, family)
    with (
        pytest.raises(KeyboardInterrupt),
        experts(pipeline, both, boundary=family.boundary),
    ):
        generate(pipeline, family)
    assert same_bits(weights_of(pipeline, family), before)
    for denoiser in denoisers_of(pipeline, family):
        assert attached_bank(denoiser) is None
        assert not denoiser._forward_pre_hooks


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (  # noise levels 1, .95, .9, .83, .75, .64, .5, .3
            [{"expert": "a", "above": 0.92}, {"expert": "b", "above": 0.6}, {"expert": "c"}],
            "aabbbbcc",
        ),
        (  # timesteps 999, 954, 900, 833, 750, 643, 500, 301
            [{"expert": "a", "timestep": 900}, {"expert": "b", "timestep": 300}, {"expert": "c"}],
            "aabbbbbb",
        ),
        (
            [
                {"expert": "a", "step_fraction": 0.25},
                {"expert": "b", "step_fraction": 0.5},
                {"expert": "a", "step_fraction": 0.75},
                {"expert": "c"},
            ],
            "aabbaacc",
        ),
    ],
    ids=["noise level", "timestep", "step fraction"],
)
def test_three_experts_follow_any_kind_of_schedule(
    schedule: list[dict[str, Any]], expected: str
) -> None:
    family = family_named("Wan 2.2-A14B")
    pipeline = tiny(family)
    three = {
        name: other_weights(pipeline, family, seed=seed) for seed, name in enumerate("abc", start=1)
    }
    with experts(pipeline, three, schedule=ExpertSchedule.from_list(schedule)):
        _, calls = generate_and_watch(pipeline, family, three, batch=1)
    assert [name for (name,) in calls[::2]] == list(expected)
    assert calls[::2] == calls[1::2]  # both guidance passes


def test_each_of_two_denoisers_has_a_recipe_of_its_own() -> None:
    family = family_named("Wan 2.2-A14B")
    pipeline = tiny(family)
    before = weights_of(pipeline, family)
    recipes = {}
    for denoiser, seed in zip(family.denoisers, (1, 2), strict=True):
        own = {
            name.removeprefix(f"{denoiser}."): value
            for name, value in other_weights(pipeline, family, seed=seed).items()
            if name.startswith(f"{denoiser}.")
        }
        recipes[denoiser] = (
            Recipe.edg(base="memory:base", tuned="memory:tuned"),
            {
                "base": dict(getattr(pipeline, denoiser).state_dict()),
                "tuned": own,
            },
        )
    (high, high_inputs), (low, low_inputs) = recipes["transformer"], recipes["transformer_2"]
    with (
        experts(pipeline, recipe=high, inputs=high_inputs, boundary=0.96, module="transformer"),
        experts(pipeline, recipe=low, inputs=low_inputs, boundary=0.7, module="transformer_2"),
    ):
        first = generate(pipeline, family)
        assert torch.equal(generate(pipeline, family), first)
        moved = weights_of(pipeline, family)
    assert same_bits(weights_of(pipeline, family), before)
    for denoiser, (recipe, inputs) in recipes.items():
        for name, value in realise(recipe, inputs=inputs)["consistency"].items():
            assert torch.equal(moved[f"{denoiser}.{name}"], value)
    with pytest.raises(ConfigError, match="`transformer_3`"):
        experts(pipeline, recipe=high, inputs=high_inputs, module="transformer_3")


@pytest.mark.parametrize("name", ["Wan 2.1", "SVD", "Wan 2.2-5B"])
def test_a_timestep_rounded_to_bfloat16_means_the_same_step(name: str) -> None:
    family = family_named(name)
    pipeline = tiny(family)
    pipeline.scheduler.set_timesteps(8)
    both = two_experts(pipeline, family)
    for timestep in pipeline.scheduler.timesteps[:-1]:
        boundary = noise_level(pipeline.scheduler, timestep)  # strictly above is dynamics
        with experts(pipeline, both, boundary=boundary) as bank:
            assert bank.expert_for(timestep) == "consistency"
            assert bank.expert_for(timestep.bfloat16()) == "consistency"
            later = experts_later(bank, pipeline.scheduler.timesteps, timestep)
            assert later == {"consistency"}


def experts_later(bank: Any, timesteps: torch.Tensor, timestep: torch.Tensor) -> set[str]:
    return {bank.expert_for(later.bfloat16()) for later in timesteps if later < timestep}


def test_compiled_blocks_are_not_compiled_again_at_a_switch() -> None:
    family = family_named("LTX")
    pipeline = tiny(family)
    both = two_experts(pipeline, family)
    with experts(pipeline, both, boundary=family.boundary):
        eager = generate(pipeline, family)
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with experts(pipeline, both, boundary=family.boundary):
        assert torch.equal(generate(pipeline, family), eager)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(generate(pipeline, family), eager)
