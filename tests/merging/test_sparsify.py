"""DARE keeps the expected value, drops the asked share, and depends on seed and name alone."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionmerge.errors import RecipeError
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.sparsify import MaskV1, dare
from motionmerge.rng import MASK_BLOCK

from .conftest import same_bits

rates = st.floats(0, 0.99, allow_nan=False)
seeds = st.integers(-(2**62), 2**62)


def vector_of(tensors):
    """A checkpoint of zeros plus the given tensors as a task vector, undared."""
    zeros = {name: torch.zeros_like(value) for name, value in tensors.items()}
    base = Checkpoint.from_tensors(zeros, name="base")
    return base, Checkpoint.from_tensors(tensors, name="tuned") - base


@given(drop_rate=rates)
def test_dare_keeps_the_expected_value_exactly(drop_rate):
    mask = MaskV1(0, drop_rate)
    kept = Fraction(mask.threshold, 65536)
    assert kept * Fraction(65536, mask.threshold) == 1
    assert mask.rescale == 65536 / mask.threshold
    assert abs(kept - (1 - Fraction(drop_rate))) <= Fraction(1, 131072) + Fraction(1, 10**12)


@settings(max_examples=25, deadline=None)
@given(drop_rate=rates, seed=seeds)
def test_the_drop_rate_is_within_the_binomial_bounds(drop_rate, seed):
    mask, count = MaskV1(seed, drop_rate), 40_000
    kept, share = int(mask.keep("weight", (200, 200)).sum()), mask.threshold / 65536
    assert abs(kept - count * share) <= 6 * math.sqrt(count * share * (1 - share)) + 1


def test_the_mean_over_many_seeds_is_the_task_vector():
    base, motion = vector_of({"w": torch.full((100, 100), 3.0)})
    means = [
        float((base + dare(motion, drop_rate=0.7, seed=seed)).evaluate("w").mean())
        for seed in range(20)
    ]
    assert sum(means) / 20 == pytest.approx(3.0, abs=0.06)


def test_a_kept_entry_grows_by_the_rescale_and_a_dropped_one_is_zero():
    base, motion = vector_of({"w": torch.randn(64, 64)})
    value, full = (base + dare(motion, drop_rate=0.7, seed=5)).evaluate("w"), motion.minuend
    kept = MaskV1(5, 0.7).keep("w", (64, 64))
    expected = full.evaluate("w") * kept * MaskV1(5, 0.7).rescale
    assert same_bits(value + 0.0, expected + 0.0)


def test_one_dimensional_tensors_are_kept_whole_and_not_rescaled():
    base, motion = vector_of({"bias": torch.randn(32)})
    dared = (base + dare(motion, drop_rate=0.9, seed=0)).evaluate("bias")
    assert same_bits(dared, motion.minuend.evaluate("bias"))


def test_a_drop_rate_of_zero_changes_nothing():
    base, motion = vector_of({"w": torch.randn(32, 32)})
    dared = (base + dare(motion, drop_rate=0, seed=0)).evaluate("w")
    assert same_bits(dared, motion.minuend.evaluate("w"))


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(["a", "b", "c", "d"]), seed=seeds)
def test_masks_do_not_depend_on_the_order_or_presence_of_other_tensors(order, seed):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(6, 7, generator=generator) for name in "abcd"}
    base, motion = vector_of({name: tensors[name] for name in order})
    merged = (base + dare(motion, drop_rate=0.5, seed=seed)).tensors()
    for name in "abcd":
        alone, single = vector_of({name: tensors[name]})
        expected = (alone + dare(single, drop_rate=0.5, seed=seed)).evaluate(name)
        assert same_bits(merged[name], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_masks_do_not_depend_on_the_dtype(dtype):
    kept = {}
    for kind in (torch.float32, dtype):
        base, motion = vector_of({"w": torch.ones(50, 50, dtype=kind)})
        kept[kind] = (base + dare(motion, drop_rate=0.7, seed=1)).evaluate("w") != 0
    assert torch.equal(kept[torch.float32], kept[dtype])


def test_masks_of_equal_shapes_and_of_different_seeds_differ():
    masks = [MaskV1(seed, 0.5).keep(name, (32, 32)) for seed in (0, 1) for name in ("a", "b")]
    agreement = [float((masks[i] == masks[j]).float().mean()) for i in range(4) for j in range(i)]
    assert all(0.4 < share < 0.6 for share in agreement)


def test_a_mask_runs_on_across_its_blocks():
    long = MaskV1(0, 0.5).keep("w", (2 * MASK_BLOCK + 3,))
    assert torch.equal(long[:MASK_BLOCK], MaskV1(0, 0.5).keep("w", (MASK_BLOCK,)))
    assert not torch.equal(long[:MASK_BLOCK], long[MASK_BLOCK : 2 * MASK_BLOCK])


@pytest.mark.parametrize("drop_rate", [-0.1, 1, 1.0, 0.9999999, float("nan"), "0.5", True, None])
def test_a_drop_rate_outside_its_range_is_refused(drop_rate):
    with pytest.raises(RecipeError, match="drop_rate"):
        dare(vector_of({})[1], drop_rate=drop_rate, seed=0)


@pytest.mark.parametrize("seed", [1.5, "0", True, 2**63, None])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(RecipeError, match="seed"):
        dare(vector_of({})[1], drop_rate=0.5, seed=seed)
