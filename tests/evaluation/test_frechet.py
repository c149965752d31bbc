"""Frechet and kernel distances against published arithmetic and against themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import linalg

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.frechet import (
    Moments,
    doubts,
    frechet_distance,
    frechet_distance_at_infinity,
    frechet_distance_of_moments,
    read_features,
)
from motionmerge.evaluation.kernel_and_inception import inception_score, kernel_distance


def waves(num, dim, a, p, q, b, r, s, m):
    """The closed form that the reference numbers below were computed from."""
    i, j = np.arange(1, num + 1)[:, None], np.arange(1, dim + 1)[None]
    return a * np.sin(p * i * j + q) + b * np.cos(r * i + s * j) + m


SMALL = (
    waves(40, 6, 1.0, 0.37, 0.2, 0.5, 0.9, 0.3, 0.0),
    waves(50, 6, 1.2, 0.53, 0.7, 0.4, 1.1, 0.6, 0.25),
)
FEW_CLIPS = (
    waves(64, 400, 2.0, 0.0137, 0.2, 1.5, 0.9, 0.03, -1.0),
    waves(80, 400, 2.2, 0.0171, 0.7, 1.4, 1.1, 0.05, -0.8),
)


@pytest.mark.parametrize(
    ("pair", "covariance", "expected"),
    [
        (SMALL, "sample", 0.6603360390282358),
        (SMALL, "population", 0.6561168583526484),
        (FEW_CLIPS, "sample", 1501.3120423235687),
        (FEW_CLIPS, "population", 1480.8068665216433),
    ],
)
def test_the_distance_is_that_of_independent_arithmetic(pair, covariance, expected):
    assert frechet_distance(*pair, covariance=covariance) == pytest.approx(expected, rel=1e-9)


def test_the_distance_is_that_of_the_matrix_square_root():
    one, two = SMALL
    first, second = np.cov(one.T), np.cov(two.T)
    root = linalg.sqrtm(first @ second).real
    moved = ((one.mean(0) - two.mean(0)) ** 2).sum()
    expected = moved + np.trace(first) + np.trace(second) - 2 * np.trace(root)
    assert frechet_distance(one, two, covariance="sample") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("pair", [SMALL, FEW_CLIPS])
def test_a_set_has_no_distance_from_itself(pair):
    assert frechet_distance(pair[0], pair[0], covariance="sample") < 1e-9


def test_scaling_a_set_about_its_mean_moves_it_by_the_trace():
    one = SMALL[0]
    two = one.mean(0) + 2 * (one - one.mean(0))
    expected = np.trace(np.cov(one.T))
    assert frechet_distance(one, two, covariance="sample") == pytest.approx(expected, rel=1e-9)


def test_seven_shards_are_one_run():
    one, two = SMALL
    shift = one.mean(0)
    whole = Moments.of(one, shift=shift)
    parts = [Moments.of(part, shift=shift) for part in np.array_split(one, 7)]
    joined = sum(parts[1:], parts[0])
    other = Moments.of(two, shift=shift)
    distances = [
        frechet_distance_of_moments(of, other, covariance="sample") for of in (whole, joined)
    ]
    assert distances[0] == pytest.approx(distances[1], abs=1e-9)
    assert distances[0] == pytest.approx(frechet_distance(one, two, covariance="sample"), rel=1e-6)


def test_shards_about_other_vectors_do_not_add_up():
    with pytest.raises(DataError, match="about other vectors"):
        Moments.of(SMALL[0], shift=0.0) + Moments.of(SMALL[0], shift=1.0)


def test_extrapolating_takes_the_bias_away():
    random = np.random.default_rng(0)
    scale = np.sqrt(30 / np.arange(1, 65))
    one, two = (random.standard_normal((600, 64)) * scale for _ in range(2))
    biased = frechet_distance(one, two, covariance="sample")
    found = frechet_distance_at_infinity(one, two, covariance="sample")
    assert abs(found.value) < biased / 5
    assert found.low <= found.value <= found.high


def test_the_interval_at_infinity_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(2)
    held = {"equal": 0, "apart": 0}
    for _ in range(40):
        for law, mean in (("equal", 0.0), ("apart", 1.0)):
            one, two = random.standard_normal((2, 60, 8)) + np.array([[[0.0]], [[mean]]])
            found = frechet_distance_at_infinity(one, two, covariance="sample")
            held[law] += found.low <= 8 * mean**2 <= found.high
    # 38 are expected; an interval of the line alone holds 32 or fewer.
    assert min(held.values()) >= 35, held


def test_with_few_clips_a_dimension_the_value_at_infinity_has_no_interval():
    found = frechet_distance_at_infinity(*FEW_CLIPS, covariance="sample")
    assert np.isnan([found.low, found.high]).all()
    assert "no interval" in found.text()
    assert "needs 1000 clips" in doubts(64, 64, dim=400)


@pytest.mark.parametrize("largest", [1e160, 1e300])
def test_an_overflow_is_no_distance_of_zero(largest):
    one, two = (largest * rows for rows in SMALL)
    with pytest.raises(DataError, match="too large"):
        frechet_distance(one, two, covariance="sample")
    with pytest.raises(DataError, match="too large"):
        kernel_distance(one, two)
    with pytest.raises(DataError, match="too large"):
        moments = (Moments.of(rows) for rows in (one, two))
        frechet_distance_of_moments(*moments, covariance="sample")


def test_moments_that_are_not_finite_have_no_distance():
    good = Moments.of(SMALL[0])
    bad = replace(good, sums=np.full(6, np.nan))
    for pair in ((good, bad), (bad, good), (bad, bad)):
        with pytest.raises(DataError, match="no finite number"):
            frechet_distance_of_moments(*pair, covariance="sample")


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_a_kernel_that_is_none_is_refused(gamma):
    with pytest.raises(ConfigError, match="`gamma`"):
        kernel_distance(*SMALL, gamma=gamma)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="0 splits"):
        inception_score(np.full((4, 2), 0.5), num_splits=0)
    with pytest.raises(ConfigError, match="`num_sizes`"):
        frechet_distance_at_infinity(*SMALL, covariance="sample", num_sizes=2)
    for distance in (kernel_distance, partial(frechet_distance_at_infinity, covariance="sample")):
        with pytest.raises(ConfigError, match="level"):
            distance(*SMALL, level=1.0)


def test_the_kernel_distance_is_that_of_independent_arithmetic():
    assert kernel_distance(*SMALL).value == pytest.approx(0.10531625271810041, rel=1e-9)
    assert kernel_distance(*SMALL, gamma=1).value == pytest.approx(6.5539510681428155, rel=1e-9)


def test_the_interval_of_the_kernel_distance_is_a_jackknife():
    one, two = (rows[:12] for rows in SMALL)
    found = kernel_distance(one, two)

    def without_each(rows, distance):
        values = np.array([distance(np.delete(rows, i, 0)) for i in range(len(rows))])
        return (len(rows) - 1) / len(rows) * ((values - values.mean()) ** 2).sum()

    variance = without_each(one, lambda rows: kernel_distance(rows, two).value)
    variance += without_each(two, lambda rows: kernel_distance(one, rows).value)
    assert found.high - found.value == pytest.approx(1.959963984540054 * variance**0.5, rel=1e-9)


def test_equal_laws_have_a_kernel_distance_near_zero_at_any_number_of_clips():
    random = np.random.default_rng(1)
    for num in (20, 200):
        covered = 0
        for _ in range(40):
            one, two = random.standard_normal((2, num, 8))
            found = kernel_distance(one, two)
            covered += found.low <= 0 <= found.high
        assert covered >= 34, num  # 38 of 40 are expected


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_splits": 1}, (1.9978489167449076, 0.0)),
        ({"num_splits": 10}, (1.8275840679470385, 0.17480864169750368)),
        ({"num_splits": 10, "shuffle_seed": 42}, (1.831846807992313, 0.21322826235176698)),
    ],
)
def test_the_inception_score_is_that_of_independent_arithmetic(options, expected):
    probabilities = softmax(waves(60, 10, 2.0, 0.37, 0.2, 1.5, 0.9, 0.3, 0.0))
    assert inception_score(probabilities, **options) == pytest.approx(expected, rel=1e-9)


def test_logits_are_no_probabilities():
    with pytest.raises(DataError, match="no inception score"):
        inception_score(SMALL[0])


@pytest.mark.parametrize("name", ["features.npy", "features.safetensors"])
def test_features_are_read_from_files(tmp_path, name):
    rows = SMALL[0].astype(np.float32)
    if name.endswith(".npy"):
        np.save(tmp_path / name, rows)
    else:
        save_file({"features": rows}, tmp_path / name)
    assert np.array_equal(read_features(tmp_path / name), rows.astype(np.float64))


def test_a_pickled_feature_file_runs_no_code(tmp_path):
    np.save(tmp_path / "features.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_features(tmp_path / "features.npy")


@pytest.mark.parametrize(
    "rows", [np.ones(4), np.full((3, 2), np.nan), np.empty((0, 4)), np.array([["a", "b"]])]
)
def test_what_is_no_finite_matrix_is_refused(rows):
    with pytest.raises(DataError, match="one row a clip"):
        frechet_distance(rows, rows, covariance="sample")


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(DataError, match="same network"):
        frechet_distance(np.ones((3, 2)), np.ones((3, 4)), covariance="sample")
    with pytest.raises(DataError, match="at least 2"):
        frechet_distance(np.ones((1, 2)), np.ones((3, 2)), covariance="sample")
    with pytest.raises(ConfigError, match="no covariance"):
        frechet_distance(*SMALL, covariance="biased")
    with pytest.raises(ConfigError, match="no feature file"):
        read_features(Path("features.pkl"))


def test_few_clips_are_warned_of():
    assert "fewer than 2048" in doubts(512, 512, dim=8)
    assert "512 and 2048 clips" in doubts(512, 2048, dim=8)
    assert doubts(2048, 2048, dim=400) is None
