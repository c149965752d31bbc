"""Intervals agree with known answers and cover what they promise."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest

from motionmerge.errors import DataError
from motionmerge.evaluation.statistics import (
    LEVEL,
    bootstrap_mean,
    bootstrap_statistic,
    fewest_to_be_sure,
    holm,
    paired_difference,
    sign_flip_p_value,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "num", "low", "high"),
    [(37, 50, 0.6044684273515117, 0.8412847250644762), (0, 20, 0.0, 0.16112515805281938)],
)
def test_wilson_intervals_agree_with_reference(successes, num, low, high):
    interval = wilson_interval(successes, num)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-12)


FIRST = [0.62, 0.55, 0.71, 0.66, 0.48, 0.59, 0.73, 0.52, 0.68, 0.61]
SECOND = [0.58, 0.57, 0.60, 0.61, 0.47, 0.50, 0.66, 0.54, 0.60, 0.55]


def test_percentiles_agree_with_a_reference_up_to_its_random_draws():
    gains = np.subtract(FIRST, SECOND)
    interval = bootstrap_statistic(lambda draw: float(gains[draw].mean()), 10)
    assert interval.value == pytest.approx(0.047)
    assert (interval.low, interval.high) == pytest.approx((0.021, 0.072), abs=2e-3)


def test_paired_intervals_agree_with_the_formula_of_bca():
    gains = np.subtract(FIRST, SECOND)
    rng = np.random.default_rng(5)
    draws = np.sort(gains[rng.integers(10, size=(40_000, 10))].mean(axis=1))
    normal = NormalDist()
    bias = normal.inv_cdf(float((draws < gains.mean()).mean() + (draws == gains.mean()).mean() / 2))
    left_out = (gains.sum() - gains) / 9
    away = left_out.mean() - left_out
    skew = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    ends = []
    for tail in (0.025, 0.975):
        z = bias + normal.inv_cdf(tail)
        ends.append(float(np.quantile(draws, normal.cdf(bias + z / (1 - skew * z)))))
    interval = paired_difference(FIRST, SECOND)
    assert (interval.low, interval.high) == pytest.approx(ends, abs=1.5e-3)


def test_several_seeds_of_a_prompt_are_one_cluster():
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=40)
    values, names = np.repeat(prompts, 5), [number // 5 for number in range(200)]
    alone = bootstrap_mean(prompts)
    clustered = bootstrap_mean(values, clusters=names)
    assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high), abs=1e-9)
    assert clustered.num == 40
    assert bootstrap_mean(values).high - bootstrap_mean(values).low < 0.6 * (alone.high - alone.low)


def test_prompts_with_several_numbers_of_videos_weigh_by_their_videos():
    interval = bootstrap_mean([1.0, 1.0, 1.0, 5.0, 2.0], clusters=["a", "a", "a", "b", "c"])
    assert interval.value == pytest.approx(2.0)
    assert interval.low <= 2 <= interval.high and interval.num == 3


def test_a_training_seed_is_a_cluster_of_its_own():
    rng = np.random.default_rng(1)
    runs, prompts = np.meshgrid([0.0, 1.0, 2.0], rng.normal(0, 0.1, size=60), indexing="ij")
    values = (runs + prompts).ravel()
    names = [number % 60 for number in range(180)]
    seeds = [number // 60 for number in range(180)]
    one = bootstrap_mean(values, clusters=names)
    several = bootstrap_mean(values, clusters=names, training_seeds=seeds)
    assert one.high - one.low < 0.1
    assert several.high - several.low > 1
    assert several.value == one.value
    same = bootstrap_mean(values, clusters=names, training_seeds=[0] * 180)
    assert same == one


def test_one_prompt_alone_has_no_interval():
    interval = bootstrap_mean([3.0, 4.0], clusters=["a", "a"])
    assert interval.value == 3.5 and math.isnan(interval.low) and math.isnan(interval.high)
    assert interval.text() == "3.5 [no interval]"


def test_what_is_hardly_ever_different_still_has_an_interval():
    interval = bootstrap_mean([0] * 9 + [1])
    assert 0 <= interval.low < 0.1 < interval.high <= 1
    assert bootstrap_mean([2.0, 2.0]).low == 2


def test_memory_does_not_grow_with_the_number_of_videos():
    values = np.random.default_rng(0).normal(size=5_590)
    tracemalloc.start()
    bootstrap_mean(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # an index of all draws would have 447 MB


def test_a_sign_flip_test_knows_a_difference_from_none():
    gains = np.subtract(FIRST, SECOND)
    flips = np.array(list(itertools.product([-1, 1], repeat=10)))
    as_large = np.abs(flips @ gains) >= gains.sum() - 1e-12
    assert sign_flip_p_value(gains) == as_large.mean()  # of all 1,024
    assert sign_flip_p_value([1.0, -1.0, 2.0, -2.0]) == 1
    assert sign_flip_p_value([1.0, 1.0], clusters=["a", "a"]) == 1


def test_holm_corrects_as_published():
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})  # Holm 1979's step-down
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    with pytest.raises(DataError):
        holm({"a": 1.5})


@pytest.mark.parametrize("num_tests", [1, 2, 7, 12, 60, 1000])
def test_fewer_prompts_than_are_needed_can_make_no_difference_sure(num_tests):
    needed = fewest_to_be_sure(num_tests)
    for num, is_sure in ((needed, True), (needed - 1, False)):
        others = dict.fromkeys(range(1, num_tests), 1.0)
        p_values = {0: sign_flip_p_value(np.arange(1.0, num + 1), num_tests=num_tests), **others}
        assert (holm({str(name): p for name, p in p_values.items()})["0"] < LEVEL) == is_sure


def test_the_bootstrap_is_the_same_every_time():
    values = np.arange(12.0)
    assert bootstrap_mean(values) == bootstrap_mean(values)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        interval = bootstrap_mean(rng.normal(size=40), seed=seed, num_resamples=400)
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.98


@pytest.mark.parametrize("values", [[], [float("nan")], [[1.0]]])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(DataError):
        bootstrap_mean(values)


def test_more_successes_than_trials_are_refused():
    with pytest.raises(DataError):
        wilson_interval(3, 2)
