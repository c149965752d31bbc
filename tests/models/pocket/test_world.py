"""The procedural world: what scenes look like and what is true of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motionmerge.models.pocket.autoencoder import warp
from motionmerge.models.pocket.language import CAMERA_MOVES, Actor, Program
from motionmerge.models.pocket.world import (
    COLOR_VALUES,
    HELD_OUT_PHOTOS,
    MAX_AMPLITUDE,
    SIZE,
    TRAINING_PHOTOS,
    Canvases,
    Scene,
    camera_path,
    load_photo,
    object_displacement,
    render,
    sample_scene,
)


@pytest.fixture(scope="module")
def canvases() -> Canvases:
    return Canvases(12, photos=TRAINING_PHOTOS, rng=np.random.default_rng(0))


def test_the_same_seed_renders_the_same_clip(canvases: Canvases):
    clips = [
        render([sample_scene(np.random.default_rng(3), num_canvases=12)], canvases, np.ones(1))
        for _ in range(2)
    ]
    assert clips[0].video.equal(clips[1].video)


def test_the_flow_leads_back_to_the_first_frame(canvases: Canvases):
    rng = np.random.default_rng(4)
    scenes = [sample_scene(rng, num_canvases=12) for _ in range(8)]
    clips = render(scenes, canvases, np.array([0.0, 0.4, 1.0]))
    first = clips.video[:, :1].expand(-1, 3, -1, -1, -1).flatten(0, 1)
    warped, _ = warp(first, clips.flow.flatten(0, 1), unit=SIZE)
    error = (warped - clips.video.flatten(0, 1)).abs() * clips.source_is_visible.flatten(0, 1)
    assert error.mean() < 0.003


@pytest.mark.parametrize("camera", CAMERA_MOVES)
def test_the_amplitude_is_how_far_the_border_moves(camera: str):
    shift, zoom = camera_path(camera, 10.0, np.array([0.0, 1.0]))
    assert np.allclose(shift[0], 0) and zoom[0] == 1
    border = max(abs(shift[1]).max(), (max(zoom[1], 1 / zoom[1]) - 1) * SIZE / 2)
    assert border == pytest.approx(0 if camera == "rests" else 10)


def test_a_camera_that_pans_left_shifts_the_picture_right():
    assert camera_path("pans left", 5.0, np.ones(1))[0][0].tolist() == [5, 0]
    assert camera_path("tilts up", 5.0, np.ones(1))[0][0].tolist() == [0, 5]


def test_a_move_that_turns_goes_its_first_way_in_the_first_half():
    path = object_displacement(("up", "left"), np.array([0, 0.5, 1.0]))
    assert path[1, 0] == 0 and path[1, 1] < 0
    assert path[2, 0] < 0 and path[2, 1] == path[1, 1]


def test_an_object_is_where_its_caption_says(canvases: Canvases):
    program = Program((Actor("red", "ball", ("right",)),), "rests")
    scene = Scene(program, 0.0, ((30.0, 30.0),), 0)
    last = render([scene], canvases, np.ones(1)).video[0, 0]
    red = torch.tensor(COLOR_VALUES["red"])
    assert torch.allclose(last[:, 30, 41], red)
    assert not torch.allclose(last[:, 30, 24], red)


def test_slow_data_is_slow_but_has_a_tail_of_fast_clips():
    rng = np.random.default_rng(5)
    slow = [sample_scene(rng, num_canvases=1, slow_power=4.0).amplitude for _ in range(2000)]
    assert np.median(slow) < 0.1 * MAX_AMPLITUDE
    assert max(slow) > 0.9 * MAX_AMPLITUDE


def test_held_out_photographs_are_not_trained_on():
    assert not set(HELD_OUT_PHOTOS) & set(TRAINING_PHOTOS)
    for name in HELD_OUT_PHOTOS + TRAINING_PHOTOS:
        assert min(load_photo(name).size) == 256


def test_scenes_may_be_rendered_each_at_times_of_its_own(canvases: Canvases):
    scenes = [sample_scene(np.random.default_rng(i), num_canvases=12) for i in range(2)]
    times = np.array([[0.0, 0.3], [0.0, 0.8]])
    together = render(scenes, canvases, times)
    for index, scene in enumerate(scenes):
        alone = render([scene], canvases, times[index])
        assert torch.allclose(together.flow[index], alone.flow[0])
        assert torch.allclose(together.video[index], alone.video[0], atol=1e-6)
