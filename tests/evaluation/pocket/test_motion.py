"""The measures tell the truth about clips whose motion is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.evaluation.camera import Move
from motionmerge.evaluation.pocket.motion import camera_kind, measure_clip, motion_degree
from motionmerge.evaluation.pocket.prompts import DIFFICULTIES, first_frames, scenes
from motionmerge.models.pocket.language import OPPOSITE
from motionmerge.models.pocket.world import MAX_AMPLITUDE, NUM_FRAMES, render

TIMES = np.linspace(0, 1, NUM_FRAMES)
NUM = 36


@pytest.fixture(scope="module")
def real():
    """Scenes with cameras of all speeds, their clips and what is measured on them."""
    drawn, canvases = scenes("test", num=NUM)
    speeds = np.random.default_rng(0).uniform(0, MAX_AMPLITUDE, NUM)
    chosen = [
        replace(scene, amplitude=0.0 if scene.program.camera == "rests" else float(speed))
        for scene, speed in zip(drawn, speeds, strict=True)
    ]
    videos = render(chosen, canvases, TIMES).video
    measured = [measure_clip(v, s) for v, s in zip(videos, chosen, strict=True)]
    return chosen, videos, measured


def test_motion_degree_equals_the_amplitude_of_real_clips(real):
    chosen, _, measured = real
    errors = [m.degree - s.amplitude for m, s in zip(measured, chosen, strict=True)]
    assert np.abs(errors).mean() < 0.1
    assert np.abs(errors).max() < 0.6
    assert abs(np.mean(errors)) < 0.05


def test_the_kind_of_camera_move_is_seen_on_real_clips(real):
    chosen, _, measured = real
    fast = [i for i, scene in enumerate(chosen) if scene.amplitude > 2]
    seen = [measured[i].camera_kind == chosen[i].program.camera for i in fast]
    assert np.mean(seen) > 0.95


def test_real_clips_obey_their_captions_and_stay_intact(real):
    _, _, measured = real
    assert np.mean([m.obeyed for m in measured]) >= 0.97
    assert np.mean([m.intact for m in measured]) >= 0.97
    assert np.mean([m.whole for m in measured]) >= 0.97
    assert min(m.first_frame_db for m in measured) == 100


def test_a_wrong_caption_is_not_obeyed(real):
    chosen, videos, _ = real
    for scene, video in zip(chosen[:6], videos, strict=False):
        actors = tuple(
            replace(actor, moves=tuple(OPPOSITE[move] for move in actor.moves))
            for actor in scene.program.actors
        )
        wrong = replace(scene, program=replace(scene.program, actors=actors))
        measured = measure_clip(video, wrong)
        assert not measured.obeyed
        assert measured.direction_right == 0


def test_a_still_clip_moves_nothing_and_obeys_nothing(real):
    chosen, videos, _ = real
    still = videos[0][:1].expand(NUM_FRAMES, -1, -1, -1)
    measured = measure_clip(still, chosen[0])
    assert measured.camera_kind == "rests"
    assert not measured.obeyed
    assert measured.intact


def test_a_leftover_copy_is_not_intact(real):
    chosen, videos, _ = real
    index = next(i for i, scene in enumerate(chosen) if scene.program.camera == "rests")
    ghost = videos[index].clone()
    x, y = (round(value) for value in chosen[index].starts[0])
    patch = (slice(None), slice(y - 5, y + 5), slice(x - 5, x + 5))
    moved = ghost[:, :, 2:12, 2:12]
    moved[:] = videos[index][0][patch]
    assert not measure_clip(ghost, chosen[index]).intact


def test_an_object_in_two_pieces_is_not_whole(real):
    chosen, videos, _ = real
    index = next(i for i, scene in enumerate(chosen) if scene.program.camera == "rests")
    torn = videos[index].clone()
    x, y = (round(value) for value in chosen[index].starts[0])
    rows, columns = slice(y - 8, y + 8), slice(x - 16, x + 16)
    left, right = slice(x - 16, x), slice(x, x + 16)
    background = torn[0, :, y - 12, x][:, None, None]
    halves = torn[0, :, rows, left].clone(), torn[0, :, rows, right].clone()
    torn[1:, :, rows, columns] = background
    torn[1:, :, y - 16 : y, left], torn[1:, :, y : y + 16, right] = halves
    measured = measure_clip(torn, chosen[index])
    assert measured.picture_holds
    assert not measured.actors[0].whole
    assert not measured.whole


def _tear(video, pixels):
    """Let the right half of a picture slip downwards over the clip."""
    torn = video.clone()
    for time in range(NUM_FRAMES):
        slip = round(pixels * time / (NUM_FRAMES - 1))
        torn[time, :, :, 32:] = video[time, :, :, 32:].roll(slip, dims=1)
    return torn


def test_a_torn_or_faded_picture_is_not_whole(real):
    chosen, videos, measured = real
    chosen, videos = chosen[:20], videos[:20]
    gray = torch.linspace(0, 1, NUM_FRAMES)[:, None, None, None]
    other = videos.roll(1, 0)
    holds = np.array([m.picture_holds for m in measured])
    assert holds.mean() >= 0.97
    kinds = {
        "slipped": [_tear(video, 12) for video in videos],
        "gray": [video * (1 - gray) + 0.5 * gray for video in videos],
        "another": [
            video * (1 - gray) + one * gray for video, one in zip(videos, other, strict=True)
        ],
    }
    for name, clips in kinds.items():
        caught = [not measure_clip(v, s).picture_holds for v, s in zip(clips, chosen, strict=True)]
        assert np.mean(caught) >= 0.85, name


def test_a_vanished_object_is_neither_intact_nor_obedient(real):
    chosen, videos, _ = real
    gone = videos[0].clone()
    gone[3:] = 0.5
    measured = measure_clip(gone, chosen[0])
    assert not measured.intact
    assert not measured.obeyed


def test_a_changed_first_frame_costs_fidelity(real):
    chosen, videos, _ = real
    shifted = (videos[0][0] + 0.1).clamp(0, 1)
    assert measure_clip(videos[0], chosen[0], image=shifted).first_frame_db == pytest.approx(
        20, abs=1
    )


def test_a_clip_of_another_size_is_refused(real):
    with pytest.raises(ShapeError, match="Fix"):
        measure_clip(torch.zeros(16, 3, 32, 32), real[0][0])


def test_a_move_is_called_as_captions_call_it_and_a_small_one_rests():
    seen = {
        (3.0, -2.0, 1.0): ("pans left", 13**0.5),
        (0.0, -2.0, 1.02): ("tilts down", (2**2 + 0.64**2) ** 0.5),
        (0.0, 1.0, 1.25): ("zooms in", 65**0.5),
        (0.0, 1.0, 0.8): ("zooms out", 65**0.5),
        (0.6, 0.6, 1.0): ("rests", 0.72**0.5),
    }
    for (x, y, zoom), (kind, degree) in seen.items():
        move = Move(height=64, width=64, shift=(x, y), zoom=zoom, angle=0.3)
        assert (camera_kind(move), motion_degree(move)) == (kind, pytest.approx(degree))


def test_a_scene_does_not_depend_on_how_many_are_drawn():
    few, _ = scenes("validation", num=3, seed=5)
    many, canvases = scenes("validation", num=9, seed=5)
    assert few == many[:3]
    assert [scene.program.difficulty for scene in many[:3]] == list(DIFFICULTIES)
    assert first_frames(few, canvases).shape == (3, 3, 64, 64)


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="validation"):
        scenes("valid", num=1)
