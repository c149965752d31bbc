"""The official script's results, exactly, when its masks are fed in.

Vectors: three runs of the official merge on small random checkpoints (fp32).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from motionmerge.errors import CheckpointError
from motionmerge.merging.algebra.computed import ByTensor
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.steps import Lowering
from motionmerge.merging.inputs.sources import OpenInputs, Source
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.recipe import Recipe, RecipeInput

FILE = Path(__file__).parents[1] / "data" / "merge_official.safetensors"
SETTINGS = ("paper", "second", "third")
BASE, TUNED = Checkpoint(Source("base")), Checkpoint(Source("tuned"))


@pytest.fixture(scope="module")
def official():
    with safe_open(FILE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        runs = {name: json.loads(text) for name, text in file.metadata().items()}

    def under(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    inputs = {"base": under("pre/"), "tuned": under("sft/")}
    return inputs, {
        name: (run, {part: under(f"{name}/{part}/") for part in PARTS})
        for name, run in runs.items()
    }


PARTS = ("adt", "deg", "adt_mask", "deg_mask", "dyn", "con")


def masked(vector, masks, run):
    """DARE with the official masks; tensors without a change have none."""

    def drop_and_rescale(value, *, name):
        if value.ndim <= 1:
            return value
        keep = masks[name].reshape(value.shape).bool() if name in masks else 1
        return value * keep * (1 / run["density"])

    return ByTensor("masked", (vector,), (), drop_and_rescale)


def carry_out(experts, inputs):
    recipe = Recipe(
        inputs={name: RecipeInput(f"memory:{name}") for name in inputs}, experts=experts
    )
    return realise(recipe, inputs=inputs, missing="keep")


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_dynamics_expert_is_exact_with_the_masks_fed_in(official, setting):
    inputs, runs = official
    run, parts = runs[setting]
    extrapolated = BASE + run["dyn_alpha"] * (BASE - TUNED)
    degree = masked(extrapolated - BASE, parts["deg_mask"], run)
    merged = carry_out({"dynamics": BASE + run["dyn_beta"] * degree}, inputs)["dynamics"]
    assert all(torch.equal(merged[name], value) for name, value in parts["dyn"].items())


@pytest.mark.parametrize("setting", ["paper", "third"])
def test_the_consistency_expert_is_exact_with_the_masks_fed_in(official, setting):
    inputs, runs = official
    run, parts = runs[setting]
    control = masked(TUNED - BASE, parts["adt_mask"], run)
    merged = carry_out({"consistency": TUNED + run["con_beta"] * control}, inputs)["consistency"]
    assert run["con_alpha"] == 1
    assert all(torch.equal(merged[name], value) for name, value in parts["con"].items())


@pytest.mark.parametrize("setting", SETTINGS)
def test_both_sparse_task_vectors_are_exact_with_the_masks_fed_in(official, setting):
    inputs, runs = official
    run, parts = runs[setting]
    base, tuned = (Checkpoint.from_tensors(inputs[name], name=name) for name in inputs)
    extrapolated = base + run["dyn_alpha"] * (base - tuned)
    vectors = {
        "adt": masked(tuned - base, parts["adt_mask"], run),
        "deg": masked(extrapolated - base, parts["deg_mask"], run),
    }
    with OpenInputs(vectors["adt"].sources()) as opened:
        for part, vector in vectors.items():
            for name, expected in parts[part].items():
                lowering = Lowering(name, expected.ndim, opened)
                value = lowering.value(vector.lower(lowering))
                assert torch.equal(value, expected)
                if part == "adt":  # con_alpha, which we do not offer, in the second setting
                    scaled = run["con_alpha"] * inputs["tuned"][name]
                    assert torch.equal(scaled + run["con_beta"] * value, parts["con"][name])


def test_our_shorter_formula_differs_from_the_official_order_by_rounding_only(official):
    inputs, runs = official
    run, parts = runs["paper"]
    degree = masked(-run["dyn_alpha"] * (TUNED - BASE), parts["deg_mask"], run)
    merged = carry_out({"dynamics": BASE + run["dyn_beta"] * degree}, inputs)["dynamics"]
    for name, value in parts["dyn"].items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


def test_adapter_tensors_that_official_drops_are_an_error_with_a_fix(official):
    inputs, _ = official
    base, tuned = (Checkpoint.from_tensors(inputs[name], name=name) for name in inputs)
    with pytest.raises(CheckpointError, match=r"cc_projection(.|\n)*Fix:.*missing='keep'"):
        (base + 0.5 * (tuned - base)).tensors()
