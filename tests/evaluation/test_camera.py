"""The camera's move is found at any size, and named by VBench's rule and by a strict one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from motionmerge.evaluation.camera import (
    Move,
    Tracks,
    fit_move,
    match_move,
    named_move,
    vbench_labels,
)
from motionmerge.evaluation.flow import to_gray
from motionmerge.evaluation.similarity import ssim

SIZES = [(64, 64), (160, 256), (320, 512), (512, 320)]
MOVES = {
    "zoom_in": {"zoom": 1.05},
    "zoom_out": {"zoom": 0.9},
    "pan_left": {"shift": (7.0, 1.0)},
    "pan_right": {"shift": (-7.0, 2.0)},
    "tilt_up": {"shift": (0.0, 5.5)},
    "tilt_down": {"shift": (1.0, -5.5)},
    "roll_counterclockwise": {"angle": 0.1},
    "roll_clockwise": {"angle": -0.1},
    "static": {},
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("label", MOVES)
def test_a_fit_returns_the_move_that_made_the_flow_and_its_name(size, label):
    move = Move(height=size[0], width=size[1], **MOVES[label])
    fit = fit_move(move.flow(), where=np.ones(size, dtype=bool))
    assert fit.move.shift == pytest.approx(move.shift, abs=1e-3)
    assert fit.move.zoom == pytest.approx(move.zoom, abs=1e-5)
    assert fit.move.angle == pytest.approx(move.angle, abs=1e-5)
    assert fit.following == 1
    assert move.label == label


def test_a_zoom_about_the_centre_is_no_pan_at_160_by_256():
    fit = fit_move(
        Move(height=160, width=256, zoom=1.05).flow(), where=np.ones((160, 256), dtype=bool)
    )
    assert fit.move.label == "zoom_in"
    assert max(map(abs, fit.move.shift)) < 1e-3


def test_a_large_object_does_not_pull_the_camera():
    move = Move(height=160, width=256, shift=(3.0, 0.0))
    flow = move.flow()
    flow[20:140, 20:140] = (-9, 4)  # more than a third of the picture
    fit = fit_move(flow, where=np.ones((160, 256), dtype=bool))
    assert fit.move.shift == pytest.approx((3, 0), abs=0.05)
    assert fit.following == pytest.approx(1 - 120 * 120 / (160 * 256), abs=0.02)


def test_a_move_and_its_matrix_are_the_same():
    move = Move(height=90, width=120, shift=(3.0, -2.0), zoom=1.2, angle=0.3)
    again = Move.from_matrix(move.matrix, height=90, width=120)
    assert again.shift == pytest.approx(move.shift)
    assert (again.zoom, again.angle) == pytest.approx((1.2, 0.3))


def test_features_find_a_move_that_is_too_large_for_flow(moving):
    frames = moving(160, 256, num=2, shift=(100.0, 0.0))
    move = match_move(*to_gray(frames))
    assert move is not None
    assert move.shift == pytest.approx((100, 0), abs=1)
    assert match_move(np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)) is None


VBENCH = {  # of VBench's own code at 320 x 512
    "static": ({}, {"static"}),
    "right": ({"shift": (20, 0)}, {"pan_left"}),
    "left": ({"shift": (-20, 0)}, {"pan_right"}),
    "down": ({"shift": (0, 20)}, {"tilt_up"}),
    "up": ({"shift": (0, -20)}, {"tilt_down"}),
    "small zoom in": ({"zoom": 1.02}, {"zoom_in"}),
    "zoom in": ({"zoom": 1.2}, {"pan_left", "tilt_up", "zoom_in"}),
    "small zoom out": ({"zoom": 0.98}, {"zoom_out"}),
    "zoom out": ({"zoom": 0.8}, {"pan_right", "tilt_down", "zoom_out"}),
    "both": ({"shift": (20, 20)}, {"pan_left", "tilt_up"}),
    "below the threshold": ({"shift": (1, 0)}, {"static"}),
    "above the threshold": ({"shift": (2, 0)}, {"pan_left"}),
    "roll": ({"angle": math.radians(10)}, {"tilt_up"}),
}


@pytest.mark.parametrize(("move", "labels"), VBENCH.values(), ids=list(VBENCH))
def test_the_rule_of_vbench_gives_its_labels_with_its_quirks(move, labels):
    tracks = Tracks(320, 512)
    everywhere = np.ones((320, 512), dtype=bool)
    rest = Move(height=320, width=512)
    tracks.advance(np.zeros((320, 512, 2), np.float32), rest, own=everywhere)
    assert np.array_equal(tracks.start, tracks.now)
    matrix = Move(height=320, width=512, **move).matrix
    end = tracks.start @ matrix[:2, :2].T + matrix[:2, 2]
    assert vbench_labels(tracks.start, end, height=320, width=512) == labels


def test_points_on_the_border_of_two_pixels_do_not_move_by_one_when_a_clip_is_still():
    tracks = Tracks(320, 192)
    for _ in range(15):
        flow = np.full((320, 192, 2), -0.1, np.float32)  # what codecs make of flat ground
        flow[150:170, 90:110] = 0
        tracks.advance(flow, Move(height=320, width=192), own=np.zeros((320, 192), dtype=bool))
    assert np.array_equal(tracks.start, tracks.now)
    end = tracks.now - 1e-3
    assert vbench_labels(tracks.start, end, height=320, width=192) == {"static"}


@pytest.mark.parametrize(
    ("prompt", "move"),
    [
        ("a cat in the grass, camera pans left", "pan_left"),
        ("the red ball moves up and the camera zooms out", "zoom_out"),
        ("The camera is panning to the right", "pan_right"),
        ("a house, camera static", "static"),
        ("the camera rests", "static"),
        ("the ball moves left", None),
        ("camera pans left, then camera tilts up", None),
    ],
)
def test_a_camera_move_is_read_from_a_prompt_that_names_one(prompt, move):
    assert named_move(prompt) == move


def test_ssim_agrees_with_a_reference():
    i, j, c = np.mgrid[:32, :48, :3]
    first = ((np.sin(0.3 * i + 0.5 * j + c) + 1) * 127).astype(np.uint8)
    second = ((np.sin(0.3 * i + 0.5 * j + c + 0.3) + 1) * 120 + 7).astype(np.uint8)
    assert ssim(first, second) == pytest.approx(0.92469945882416, abs=1e-6)  # torchmetrics 1.9.0
    assert ssim(first, first) == pytest.approx(1)
