"""Wherever the experts' tensors wait, the videos are the same bits."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.merging.in_memory import realise
from motionmerge.merging.inputs.sources import OpenInputs
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.diffusers_state import computing_device
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.switching import placement, prefetch, recompute
from motionmerge.switching.expert_bank import experts
from motionmerge.switching.placement import (
    choose_placement,
    should_recompute,
)
from motionmerge.switching.recompute import recomputed_experts

from .test_expert_bank import Recorder, other_weights, same_weights, stored_paper_recipe, weights_of

Generate = Callable[..., torch.Tensor]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def recipe(pipeline: DynamiCrafterPipeline, tmp_path: Path) -> Recipe:
    """The paper's experts of a U-Net and a projector in files; some tensors are in one alone."""
    base, tuned = weights_of(pipeline, "unet", "image_projector"), other_weights("unet")
    tuned = {**base, **tuned, "unet.conv_in.bias": base["unet.conv_in.bias"]}
    return stored_paper_recipe(tmp_path, base, tuned)


def test_every_placement_makes_the_same_video_and_gives_the_model_back(
    pipeline: DynamiCrafterPipeline,
    generate: Generate,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recompute, "GROUP_BYTES", 50_000)  # several groups, also of this model
    monkeypatch.setattr(prefetch, "PIECE_BYTES", 50_000)
    before = weights_of(pipeline, "unet", "image_projector")
    videos = []
    for kind in ("auto", "prefetch", "recompute", "recompute"):
        with experts(pipeline, recipe=recipe, placement=kind) as bank:
            videos.append(generate(pipeline))
            assert "2 experts" in bank.placement
        assert same_weights(weights_of(pipeline, "unet", "image_projector"), before)
    assert all(torch.equal(video, videos[0]) for video in videos)


def test_recomputed_experts_are_rounded_to_the_modules_dtype_as_kept_ones(
    pipeline: DynamiCrafterPipeline, recipe: Recipe
) -> None:
    pipeline.unet.to(torch.bfloat16)
    held = []
    for kind in ("resident", "recompute"):
        with experts(pipeline, recipe=recipe, placement=kind) as bank:
            for name in bank.experts:
                with bank.with_expert(name):
                    held.append(weights_of(pipeline, "unet"))
    assert same_weights(held[0], held[2]) and same_weights(held[1], held[3])
    assert not same_weights(held[0], held[1])


def test_a_recomputed_expert_has_the_bits_of_the_kept_one_in_any_order(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, made = realise(recipe), recomputed_experts(BoundRecipe.of(recipe))
    for name, tensors in kept.items():
        assert list(made[name]) == list(tensors)
        assert made[name].num_bytes() == sum(tensor.nbytes for tensor in tensors.values())
        for size in (10_000, 1 << 30):
            monkeypatch.setattr(recompute, "GROUP_BYTES", size)
            some = made[name].only(list(tensors)[::3])
            assert same_weights(dict(some), {key: tensors[key] for key in some})
        for key in reversed(list(tensors)[:5]):
            assert torch.equal(made[name][key], tensors[key])
    with pytest.raises(KeyError):
        made["dynamics"]["none"]


def test_a_recomputed_expert_keeps_only_a_group_in_memory(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "GROUP_BYTES", 20_000)
    made = recomputed_experts(BoundRecipe.of(recipe))["dynamics"]
    for tensor in made.values():
        held = sum(one.nbytes for one in made._group.values())
        assert held <= max(20_000, tensor.nbytes)


def test_recomputing_opens_the_inputs_once_for_all_groups_and_closes_them(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "GROUP_BYTES", 20_000)
    made = recomputed_experts(BoundRecipe.of(recipe))["dynamics"]
    entered: list[str] = []
    real = OpenInputs.__enter__, OpenInputs.__exit__
    monkeypatch.setattr(
        OpenInputs, "__enter__", lambda self: (entered.append("open"), real[0](self))[1]
    )
    monkeypatch.setattr(
        OpenInputs,
        "__exit__",
        lambda self, *error: (entered.append("close"), real[1](self, *error))[1],
    )
    for _ in range(2):
        assert len(dict(made)) > 100
    assert entered == ["open", "close"] * 2

    def fail(*_: object) -> None:
        raise CheckpointError("the disk failed", fix="none")

    monkeypatch.setattr(recompute, "stream", fail)
    with pytest.raises(CheckpointError):
        dict(made)
    assert entered == ["open", "close"] * 3


def test_only_what_differs_is_computed_again_at_a_switch(
    pipeline: DynamiCrafterPipeline, recipe: Recipe
) -> None:
    with experts(pipeline, recipe=recipe, placement="recompute") as bank:
        unet, projector = bank._parts
        assert not projector.differs and not projector.shared
        assert "conv_in.bias" not in {*unet.values["dynamics"], *unet.shared}
        assert len(unet.values["dynamics"]) > 100


@pytest.mark.parametrize(
    ("kind", "restore", "copies"),
    [
        ("recompute", True, 0),
        ("recompute", False, 0),
        ("resident", True, 2),  # the other expert, its own values
        ("resident", False, 1),
        ("prefetch", True, 3.4),  # both experts, its own values, what is sent ahead
    ],
)
def test_a_bank_holds_what_it_needs_and_nothing_once_it_is_detached(
    pipeline: DynamiCrafterPipeline, recipe: Recipe, kind: str, restore: bool, copies: float
) -> None:
    size = sum(tensor.nbytes for tensor in pipeline.unet.state_dict().values())
    gc.collect()
    before = bytes_in_tensors()
    gc.disable()
    try:
        with experts(pipeline, recipe=recipe, placement=kind, restore=restore) as bank:
            held = bytes_in_tensors() - before
        left = bytes_in_tensors() - before
    finally:
        gc.enable()
    assert held == pytest.approx(copies * size, abs=0.1 * size)
    assert left <= 0.01 * size
    with pytest.raises(ConfigError, match="not attached any more"), bank.with_expert("dynamics"):
        pass


@pytest.mark.parametrize("kind", ["resident", "recompute"])
def test_a_model_that_is_not_given_back_keeps_the_last_expert(
    pipeline: DynamiCrafterPipeline, generate: Generate, recipe: Recipe, kind: str
) -> None:
    with experts(pipeline, recipe=recipe, placement=kind) as bank:
        video = generate(pipeline)
        with bank.with_expert("consistency"):
            last = weights_of(pipeline, "unet")
    with experts(pipeline, recipe=recipe, placement=kind, restore=False):
        assert torch.equal(generate(pipeline), video)
    assert same_weights(weights_of(pipeline, "unet"), last)


def bytes_in_tensors() -> int:
    """Count the bytes of all plain tensors that are alive, each storage once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided
    }
    return sum(storages.values())


def test_a_full_disk_is_refused_before_anything_is_written(
    pipeline: DynamiCrafterPipeline, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights_of(pipeline, "unet")
    # A device that is always full stands for the folder of temporary files.
    full = partial(open, "/dev/full", "r+b", buffering=0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: full())
    with pytest.raises(ConfigError, match=r"no room in .*No space left.*(?s:.)*Set TMPDIR"):
        experts(pipeline, recipe=recipe, placement="recompute")
    assert same_weights(weights_of(pipeline, "unet"), before)


def test_weights_in_memory_are_not_recomputed(recipe: Recipe) -> None:
    inputs: Any = {"base": {"weight": torch.zeros(2)}, "tuned": {"weight": torch.ones(2)}}
    with pytest.raises(ConfigError, match="only from files"):
        experts(Recorder(), recipe=recipe, inputs=inputs, placement="recompute")
    with pytest.raises(ConfigError, match="`recompute`"):
        experts(Recorder(), recipe=recipe, inputs=inputs, placement="recomputed")


def test_experts_that_do_not_fit_into_main_memory_are_recomputed_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "free_memory", lambda device: 10**9)
    assert not should_recompute("auto", num_bytes=8 * 10**8, can_recompute=True)
    assert should_recompute("auto", num_bytes=10**9, can_recompute=True)
    with pytest.raises(ConfigError, match=r"(?s)1\.0 GB.*free.*LoRAs"):
        should_recompute("auto", num_bytes=10**9, can_recompute=False)
    with pytest.raises(ConfigError, match=r"1\.0 GB"):
        should_recompute("prefetch", num_bytes=10**9, can_recompute=True)


@pytest.mark.parametrize(
    ("asked", "device", "free", "kind", "ahead"),
    [
        ("auto", CPU, 10, "resident", 0),
        ("auto", GPU, 40, "resident", 0),  # of two experts of 20 one waits: half of what is free
        ("auto", GPU, 38, "prefetch", 8),
        ("auto", GPU, 10, "prefetch", 5),
        ("auto", GPU, 0, "prefetch", 0),
        ("auto", GPU, None, "prefetch", 0),
        ("resident", GPU, 10, "resident", 0),
        ("prefetch", GPU, 100, "prefetch", 8),
        ("prefetch", CPU, 100, "prefetch", 8),
    ],
)
def test_the_fastest_placement_that_fits_is_chosen(
    asked: str, device: torch.device, free: int | None, kind: str, ahead: int
) -> None:
    sizes = {"dynamics": 20, "consistency": 20}
    chosen = choose_placement(asked, expert_bytes=sizes, device=device, free=free)
    assert (chosen.kind, chosen.ahead_bytes, chosen.device) == (kind, ahead, device)


def test_a_module_of_a_model_that_is_offloaded_computes_elsewhere() -> None:
    module = nn.Linear(2, 2)
    assert computing_device(module) == CPU
    cpu_offload_with_hook(module, execution_device=torch.device("meta"))
    assert computing_device(module) == torch.device("meta")
    assert computing_device(nn.Identity()) == CPU
