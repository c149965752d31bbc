"""Every dimension gives what VBench's own code gives for the same clip and the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motionmerge.evaluation.backbones.raft import build_raft
from motionmerge.evaluation.vbench import dimensions as d
from motionmerge.evaluation.vbench import rules
from motionmerge.evaluation.vbench.dimensions import decode, measure_of
from motionmerge.evaluation.vbench.frames import ERAS
from motionmerge.evaluation.vbench.suite import SuiteClip

HILLS, WALL = "a valley of blue hills", "a patterned wall with a moving light"

OF_HILLS = {
    "i2v_background": 0.9611476361751556,
    "subject_consistency": 0.9973581612110138,
    "i2v_subject": 0.9970054650306701,
    "background_consistency": 0.9684705793857574,
    "aesthetic_quality": -0.06966239959001541,
    "temporal_flickering": 0.9064201354980469,
}


def clip_of(vbench, name, number):
    image = vbench.images / f"{HILLS}.jpg"
    return SuiteClip(
        path=vbench.videos / f"{name}-{number}.mp4",
        prompt=name,
        dimensions=tuple(OF_HILLS),
        image=image,
        camera=None,
    )


@pytest.fixture(scope="module")
def hills(vbench):
    return decode(clip_of(vbench, HILLS, 0))


@pytest.mark.parametrize(("dimension", "expected"), OF_HILLS.items())
def test_a_dimension_agrees_with_vbench(vbench, hills, dimension, expected):
    found = measure_of(dimension, vbench.networks, era=ERAS[0])(hills)
    assert found.value == pytest.approx(expected, abs=2e-6)


def test_old_resize_agrees_with_vbench_on_torchvision_before_0_17(vbench, hills):
    found = measure_of("i2v_subject", vbench.networks, era=ERAS[1])(hills)
    assert found.value == pytest.approx(0.9969012129306793, abs=2e-6)


def test_raft_finds_the_flow_that_princetons_network_finds(vbench):
    wall = decode(clip_of(vbench, WALL, 0))
    raft = build_raft(vbench.states["raft"], source="raft")
    (flow,) = raft.flows(wall.pixels()[:2])
    assert flow[::4, ::4].permute(2, 0, 1).sub(vbench.flow[0]).abs().max() < 1e-3
    assert rules.flow_score(flow) == pytest.approx(7.724913120269775, abs=1e-3)


def test_dynamic_degree_samples_pads_and_decides_as_vbench(vbench):
    class EvenFlow:
        def flows(self, frames):
            assert frames.shape[-2:] == (128, 192)
            for _ in range(len(frames) - 1):
                yield torch.tensor([8.02, 0.0]).expand(*frames.shape[-2:], 2)

    wall = decode(clip_of(vbench, WALL, 3))  # 8 frames at 16 frames a second
    found = d._dynamic_degree(EvenFlow(), wall)
    assert found.value == 1.0
    assert len(found.details["pair_scores"]) == 3
    assert (found.details["threshold"], found.details["needed_pairs"]) == (3.0, 1)


def test_motion_smoothness_compares_odd_frames_with_the_interpolated_ones(vbench):
    wall = decode(clip_of(vbench, WALL, 3))
    between = iter(vbench.between)
    found = d._smoothness(lambda first, second: next(between), wall)
    assert found.value == pytest.approx(0.5442515963995552, abs=1e-6)


def test_imaging_quality_averages_frames_of_at_most_512_pixels(vbench):
    usual, darker = -0.19026243686676025, -0.26670899987220764
    each = [usual, darker, usual, darker, usual, -0.2557908892631531, usual, -0.2553882896900177]
    wall = decode(clip_of(vbench, WALL, 3))
    assert d._imaging(lambda frames: each, wall).value == pytest.approx(np.mean(each), abs=1e-12)


SHORT = [
    (2, "subject_consistency", 0.9992651343345642),
    (3, "background_consistency", 0.998535692691803),
    (1, "aesthetic_quality", -0.10351374000310898),
    (2, "temporal_flickering", 0.9649298387415269),
]


@pytest.mark.parametrize(("number", "dimension", "expected"), SHORT)
def test_short_clips_are_measured_where_vbench_measures_them(vbench, number, dimension, expected):
    clip = SuiteClip(
        path=vbench.folder / "short" / f"short-{number}.mp4",
        prompt="short",
        dimensions=(),
        image=None,
        camera=None,
    )
    found = measure_of(dimension, vbench.networks, era=ERAS[0])(decode(clip))
    assert found.value == pytest.approx(expected, abs=2e-6)
