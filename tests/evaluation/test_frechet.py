"""Distances of feature sets against numbers of published codes and of another algorithm."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import ConfigError, DataError, ShapeError
from motionmerge.evaluation.frechet import (
    frechet,
    frechet_of_moments,
    fvd_infinity,
    inception_score,
    kernel_distance,
    moments,
    preset_of,
    read_features,
    warning_of,
)


def features(num, channels, a, p, q, b, r, s, m):
    i, j = np.arange(1, num + 1)[:, None], np.arange(1, channels + 1)
    return a * np.sin(p * i * j + q) + b * np.cos(r * i + s * j) + m


X = features(40, 6, 1.0, 0.37, 0.2, 0.5, 0.9, 0.3, 0.0)
Y = features(50, 6, 1.2, 0.53, 0.7, 0.4, 1.1, 0.6, 0.25)
WIDE_X = features(64, 400, 2.0, 0.0137, 0.2, 1.5, 0.9, 0.03, -1.0)
WIDE_Y = features(80, 400, 2.2, 0.0171, 0.7, 1.4, 1.1, 0.05, -0.8)


@pytest.mark.parametrize(
    ("x", "y", "divisor", "expected"),
    [
        (X, Y, "n-1", 0.6603360390282358),
        (X, Y, "n", 0.6561168583526484),
        (WIDE_X, WIDE_Y, "n-1", 1501.3120423235687),
        (WIDE_X, WIDE_Y, "n", 1480.8068665216433),
    ],
)
def test_the_distance_is_that_of_the_nuclear_norm(x, y, divisor, expected):
    assert frechet(x, y, covariance=divisor) == pytest.approx(expected, rel=1e-12)


def test_equal_sets_are_at_distance_zero_even_with_fewer_videos_than_channels():
    assert frechet(WIDE_X, WIDE_X, covariance="n-1") == pytest.approx(0, abs=1e-9)


def test_shards_add_up_to_the_whole():
    def merged(x, parts):
        one, *others = (moments(part, shift=x[0]) for part in np.array_split(x, parts))
        return sum(others, start=one)

    whole = frechet(X, Y, covariance="n")
    for parts in (1, 7):
        found = frechet_of_moments(merged(X, parts), merged(Y, parts), covariance="n")
        assert found == pytest.approx(whole, abs=1e-9)
    with pytest.raises(ShapeError, match="different shifts"):
        moments(X) + moments(X, shift=X[0])


def test_infinity_is_nearer_to_the_truth_than_the_plain_distance():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((2, 400, 60))
    y[:, 0] += 1  # the true distance is 1
    plain = frechet(x, y, covariance="n-1")
    found = fvd_infinity(x, y, covariance="n-1")
    assert plain > 4
    assert abs(found - 1) < 0.5


def test_the_kernel_distance_is_unbiased_and_names_its_gamma():
    found = kernel_distance(X, Y)
    assert found.value == pytest.approx(0.10531625271810041, rel=1e-9)
    assert found.low < found.value < found.high
    assert (found.num, found.gamma) == (40, 1 / 6)
    assert kernel_distance(X, Y, gamma=1).value == pytest.approx(6.5539510681428155, rel=1e-9)


def test_the_inception_score_is_that_of_tgan2_and_of_styleganv():
    logits = features(60, 10, 2.0, 0.37, 0.2, 1.5, 0.9, 0.3, 0.0)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert inception_score(p, num_splits=1) == pytest.approx((1.9978489167449076, 0))
    assert inception_score(p) == pytest.approx((1.8275840679470385, 0.17480864169750368))
    shuffled = inception_score(p, shuffle_seed=42)
    assert shuffled == pytest.approx((1.831846807992313, 0.21322826235176698))


def test_few_videos_are_warned_of_and_presets_have_names():
    assert "512 videos" in (warning_of(512) or "")
    assert warning_of(2048) is None
    assert preset_of("styleganv").covariance == "n"
    assert preset_of("videogpt").covariance == "n-1"
    with pytest.raises(ConfigError, match="no preset `i3d`"):
        preset_of("i3d")


def test_feature_files_are_read_and_pickles_refused(tmp_path):
    np.save(tmp_path / "x.npy", X)
    assert np.array_equal(read_features(tmp_path / "x.npy"), X)
    np.save(tmp_path / "bad.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="holds no features"):
        read_features(tmp_path / "bad.npy")


def test_the_command_prints_n_preset_and_warning(tmp_path):
    for name, value in (("x.npy", X), ("y.npy", Y)):
        np.save(tmp_path / name, value)
    words = ["evaluate", "fvd", str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    found = json.loads(CliRunner().invoke(app, [*words, "--preset", "videogpt", "--json"]).stdout)
    assert found["fvd"] == pytest.approx(0.6603360390282358)
    assert found["n"] == [40, 50]
    assert "40 videos" in found["warning"]
