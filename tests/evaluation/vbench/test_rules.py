"""The rules of VBench-I2V against tables made with its own code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from motionmerge.errors import DataError
from motionmerge.evaluation.vbench import rules
from motionmerge.evaluation.vbench.total import DIMENSIONS, QUALITY, RANGES, mean_of, totals

HEIGHT, WIDTH = 320, 512

CAMERA = [
    ({}, ["static"]),
    ({"shift": (20, 0)}, ["pan_left"]),
    ({"shift": (-20, 0)}, ["pan_right"]),
    ({"shift": (0, 20)}, ["tilt_up"]),
    ({"shift": (0, -20)}, ["tilt_down"]),
    ({"scale": 1.02}, ["zoom_in"]),
    ({"scale": 1.20}, ["pan_left", "tilt_up", "zoom_in"]),
    ({"scale": 0.98}, ["zoom_out"]),
    ({"scale": 0.80}, ["pan_right", "tilt_down", "zoom_out"]),
    ({"shift": (20, 20)}, ["pan_left", "tilt_up"]),
    ({"shift": (1, 0)}, ["static"]),
    ({"shift": (2, 0)}, ["pan_left"]),
    ({"roll": 10}, ["tilt_up"]),
]


def tracks(*, scale=1.0, shift=(0, 0), roll=0):
    x = np.linspace(WIDTH / 64, WIDTH - WIDTH / 64, 10)
    y = np.linspace(WIDTH / 64, HEIGHT - WIDTH / 64, 10)
    grid = np.stack(np.meshgrid(x, y), -1).reshape(100, 2)
    centre = np.array([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])
    angle = np.deg2rad(roll)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.stack([grid, (grid - centre) @ (scale * turn).T + centre + shift]).astype(np.float32)


@pytest.mark.parametrize(("move", "expected"), CAMERA)
def test_camera_labels_are_those_of_vbench(move, expected):
    found = rules.camera_labels(tracks(**move), height=HEIGHT, width=WIDTH)
    assert list(found) == expected


def test_dynamic_degree_counts_pairs_as_vbench():
    needed = {1: 0, 2: 0, 3: 1, 6: 2, 10: 2, 11: 3, 14: 4, 16: 4, 18: 4, 19: 5, 26: 6, 27: 7}
    assert {n: rules.needed_pairs(n) for n in needed} == needed
    intervals = {1: 1, 8: 1, 11: 1, 12: 2, 12.5: 2, 20: 2, 24: 3, 28: 4, 60: 8}
    assert {fps: rules.sampling_interval(fps) for fps in intervals} == intervals
    assert rules.dynamic_threshold(320, 512) == 7.5
    assert rules.dynamic_threshold(720, 1280) == 16.875


def test_a_pair_on_the_threshold_does_not_move_and_one_frame_is_never_dynamic():
    assert rules.is_dynamic([7.6] * 4 + [0] * 11, threshold=7.5, needed=4)
    assert not rules.is_dynamic([7.5] * 15, threshold=7.5, needed=4)
    assert rules.is_dynamic([0.0], threshold=7.5, needed=0)  # two frames, as in VBench
    assert not rules.is_dynamic([], threshold=7.5, needed=0)


ROWS = {  # raw scores in %, in the order of ORDER; Quality, I2V, Total
    "Step-Video-TI2V, published 80.86 / 95.11 / 87.98": (
        [48.15, 97.44, 98.45, 95.62, 96.92, 99.08, 48.78, 61.74, 70.17],
        [80.85471283602338, 95.10370986190158, 87.97921134896247],
    ),
    "OSTopA, published 80.36 / 94.63 / 87.49": (
        [29.58, 97.73, 98.83, 94.52, 96.47, 98.09, 53.41, 61.04, 71.12],
        [80.35854418007365, 94.62619297287557, 87.4923685764746],
    ),
    "ConsistI2V, leaderboard quality 76.22": (
        [33.6, 94.69, 94.57, 95.27, 98.28, 97.38, 18.62, 59.0, 66.92],
        [76.22375551566189, 90.37523945735467, 83.29949748650829],
    ),
}
ORDER = (
    *("camera_motion", "i2v_subject", "i2v_background", "subject_consistency"),
    *("background_consistency", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality"),
)


@pytest.mark.parametrize(("raw", "expected"), ROWS.values(), ids=list(ROWS))
def test_totals_of_published_rows_are_the_published_totals(raw, expected):
    scores = dict(zip(ORDER, (value / 100 for value in raw), strict=True))
    found = totals(scores)
    assert [100 * value for value in (found.quality, found.i2v, found.total)] == pytest.approx(
        expected, abs=1e-9
    )


GUIDE = Path(__file__).parents[3] / "docs" / "how-to" / "vbench.md"


def test_the_published_rows_in_the_docs_have_the_published_quality():
    text = GUIDE.read_text(encoding="utf-8").partition("## Published rows")[2].partition("##")[0]
    rows = [line.strip("| ").split("|") for line in re.findall(r"^\| \w.*", text, re.MULTILINE)]
    names = (
        *("subject_consistency", "background_consistency", "motion_smoothness"),
        *("dynamic_degree", "aesthetic_quality", "imaging_quality"),
    )
    assert len(rows) == 6
    for method, *cells in rows:
        *raw, quality = [float(cell) for cell in cells[3:]]
        scores = {name: value / 100 for name, value in zip(names, raw, strict=True)}
        # Two rounded digits of six scores, of which those with a narrow range weigh most.
        assert 100 * mean_of(QUALITY, scores) == pytest.approx(quality, abs=0.011), method


def test_temporal_flickering_is_accepted_and_changes_no_total():
    """VBench's own script ends with a KeyError on it."""
    scores = dict.fromkeys(RANGES, 0.9)
    assert totals({**scores, "temporal_flickering": 0.1}) == totals(scores)
    assert set(scores) | {"temporal_flickering"} == set(DIMENSIONS)


def test_a_missing_dimension_is_refused_not_counted_as_zero():
    scores = dict.fromkeys(QUALITY, 0.9)
    assert mean_of(QUALITY, scores) > 0
    with pytest.raises(DataError, match="no score of camera_motion, i2v_subject, i2v_background"):
        totals(scores)
