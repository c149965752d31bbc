"""Known motion is measured right at several sizes and rates, and damage is named."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from motionmerge.errors import DataError
from motionmerge.evaluation.clips import read_clip
from motionmerge.evaluation.motion import looping_share, measure_motion
from motionmerge.io.video import write_video
from motionmerge.models.pocket.world import load_photo


def true_degree(height, width, *, num, fps, every, **move):
    """The mean way of all pixels in pixels a second of a frame 512 wide, by the moves' matrices."""
    from motionmerge.evaluation.camera import Move

    def at(index):
        part = index / (num - 1)
        shift = tuple(part * one for one in move.get("shift", (0.0, 0.0)))
        zoom, angle = move.get("zoom", 1.0) ** part, part * move.get("angle", 0.0)
        return Move(height=height, width=width, shift=shift, zoom=zoom, angle=angle).matrix

    total = 0.0
    for index in range(0, num - every, every):
        step = at(index + every) @ np.linalg.inv(at(index))
        flow = Move.from_matrix(step, height=height, width=width).flow()
        total += float(np.linalg.norm(flow, axis=-1).mean())
    return total * fps / (num - 1) * 512 / width


MOVES = {
    "pan_left": {"shift": (0.12, 0.0)},
    "tilt_down": {"shift": (0.0, -0.1)},
    "zoom_in": {"zoom": 1.12},
    "roll_clockwise": {"angle": -0.12},
}


@pytest.mark.parametrize(
    ("size", "num", "fps", "label"),
    [
        *(((64, 64), 9, 8, label) for label in MOVES),
        *(((160, 256), 5, 8, label) for label in MOVES),
        ((160, 256), 13, 24, "zoom_in"),
        ((320, 512), 3, 8, "pan_left"),
        ((320, 512), 3, 8, "zoom_in"),
        ((576, 1024), 3, 8, "tilt_down"),
        ((256, 160), 9, 16, "pan_left"),
    ],
    ids=str,
)
def test_the_degree_is_right_within_five_percent_and_the_label_right(
    size, num, fps, label, moving, tmp_path
):
    move = dict(MOVES[label])
    if "shift" in move:
        move["shift"] = tuple(size[1] * share for share in move["shift"])
    write_video(tmp_path / "x.mp4", moving(*size, num=num, **move), fps=fps)
    clip = read_clip(tmp_path / "x.mp4")
    found = measure_motion(clip)
    truth = true_degree(*size, num=num, fps=fps, every=max(1, round(fps / 8)), **move)
    assert found["motion_degree"] == pytest.approx(truth, rel=0.05)
    assert found["motion_share"] == pytest.approx(found["motion_degree"] / 512)
    assert found["camera_label"] == label
    assert found["object_motion"] < 0.05 * truth
    assert found["frozen_share"] == found["looping_share"] == 0


def with_object(frames, *, step):
    """Draw a small photo that moves to the right."""
    frames = frames.copy()
    patch = np.asarray(load_photo("coffee").resize((56, 56)))
    for index, frame in enumerate(frames):
        left = 30 + step * index
        frame[52:108, left : left + 56] = patch
    return frames


@pytest.mark.parametrize(("pan", "label"), [(0, "static"), (16, "pan_left")])
def test_objects_are_told_from_the_camera(pan, label, moving, tmp_path):
    frames = with_object(moving(160, 256, num=9, shift=(float(pan), 0.0)), step=8)
    write_video(tmp_path / "x.mp4", frames, fps=8)
    found = measure_motion(read_clip(tmp_path / "x.mp4"))
    own = (8 - pan / 8) * 8 * 2 * (56 * 56) / (160 * 256)  # px/s of the mean pixel, 512 wide
    assert found["camera_label"] == label
    # What is covered and uncovered is not seen twice, and the object's border is soft in the flow.
    assert found["object_motion"] == pytest.approx(own, rel=0.3)
    assert found["camera_degree"] == pytest.approx(2 * pan, abs=1)


def ball(size):
    """A flat red disc, and where it is."""
    where = np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2)) < size / 2
    return np.broadcast_to(np.array([220, 40, 30], np.uint8), (size, size, 3)), where


def carried(frames, patch, where, *, step):
    """Draw a patch that goes to the right by `step` pixels a frame."""
    frames, size = frames.copy(), len(patch)
    for index, frame in enumerate(frames):
        frame[60 : 60 + size, 10 + step * index : 10 + step * index + size][where] = patch[where]
    return frames


@pytest.mark.parametrize(("size", "step"), [(64, 80), (100, 60), (100, 140)])
def test_objects_that_are_too_fast_for_flow_are_followed(size, step, moving, tmp_path):
    patch = np.asarray(load_photo("coffee").resize((size, size)))
    where = np.ones((size, size), dtype=bool)
    frames = carried(moving(320, 512, num=3), patch, where, step=step)
    write_video(tmp_path / "x.mp4", frames, fps=8)
    found = measure_motion(read_clip(tmp_path / "x.mp4"))
    truth = step * 8 * size**2 / (320 * 512)
    assert found["motion_degree"] == pytest.approx(truth, rel=0.2)
    assert found["object_motion"] == pytest.approx(truth, rel=0.2)
    assert found["camera_label"] == "static"


def test_what_could_not_be_followed_is_said(moving, tmp_path):
    frames = carried(moving(320, 512, num=3), *ball(160), step=80)
    write_video(tmp_path / "x.mp4", frames, fps=8)
    found = measure_motion(read_clip(tmp_path / "x.mp4"))
    assert found["motion_degree"] < 0.8 * 80 * 8 * np.pi * 80**2 / (320 * 512)
    assert found["unfollowed_share"] > 0.02
    write_video(tmp_path / "y.mp4", moving(160, 256, num=3, shift=(20.0, 0.0)), fps=8)
    assert measure_motion(read_clip(tmp_path / "y.mp4"))["unfollowed_share"] == 0


def test_an_object_over_flat_ground_is_no_move_of_the_camera(tmp_path):
    ground, where = np.full((4, 320, 512, 3), 128, np.uint8), np.ones((100, 100), dtype=bool)
    patch = np.asarray(load_photo("coffee").resize((100, 100)))
    write_video(tmp_path / "x.mp4", carried(ground, patch, where, step=20), fps=8)
    found = measure_motion(read_clip(tmp_path / "x.mp4"))
    assert found["camera_label"] == "unclear" and found["camera_labels_dis"] == "none"
    assert found["camera_pan"] is found["camera_degree"] is found["object_motion"] is None
    assert found["motion_degree"] == pytest.approx(20 * 8 * 100**2 / (320 * 512), rel=0.1)


def test_nothing_moves_in_a_picture_without_texture(tmp_path):
    write_video(tmp_path / "x.mp4", np.full((3, 64, 96, 3), 128, np.uint8), fps=8)
    found = measure_motion(read_clip(tmp_path / "x.mp4"))
    assert found["camera_label"] == "static"
    assert found["motion_degree"] == found["object_motion"] == found["camera_degree"] == 0


def test_cuts_and_noise_are_named_and_left_out(moving, tmp_path):
    scenes = [moving(160, 256, num=4, shift=(6.0, 0.0)), moving(160, 256, num=4)[:, :, ::-1]]
    write_video(tmp_path / "cut.mp4", np.concatenate(scenes), fps=8)
    found = measure_motion(read_clip(tmp_path / "cut.mp4"))
    assert found["cut_share"] == pytest.approx(1 / 7)
    assert found["camera_label"] == "unclear" and found["camera_pan"] is None
    assert found["motion_degree"] == pytest.approx(6 * 2 / (6 / 8), rel=0.05)
    noise = np.random.default_rng(0).integers(0, 256, (4, 160, 256, 3), dtype=np.uint8)
    write_video(tmp_path / "noise.mp4", noise, fps=8)
    found = measure_motion(read_clip(tmp_path / "noise.mp4"))
    assert found["cut_share"] == 1 and found["camera_label"] == "unclear"
    assert found["motion_degree"] is found["dynamic_degree_dis"] is None


def test_a_roll_of_more_than_half_a_turn_keeps_its_direction(moving, tmp_path):
    write_video(tmp_path / "x.mp4", moving(96, 96, num=17, angle=-np.radians(200)), fps=8)
    found = measure_motion(read_clip(tmp_path / "x.mp4"))
    assert found["camera_label"] == "roll_clockwise"
    assert found["camera_roll"] == pytest.approx(200, abs=2)


def test_still_and_looping_clips_are_known(moving, tmp_path):
    still = moving(96, 96, num=9)
    write_video(tmp_path / "still.mp4", still, fps=8)
    found = measure_motion(read_clip(tmp_path / "still.mp4"))
    assert found["frozen_share"] == 1
    assert found["camera_label"] == "static"
    assert found["jerk"] is None
    assert found["dynamic_degree_dis"] == 0
    there = moving(96, 96, num=8, shift=(40.0, 0.0))
    frames = np.concatenate([there, there[::-1]])
    grays = frames.mean(-1).astype(np.uint8)
    assert looping_share(grays) == pytest.approx(7 / 16, abs=0.1)
    assert looping_share(grays[:8]) == 0
    assert looping_share(still.mean(-1).astype(np.uint8)) == 0


def test_a_move_too_large_for_flow_is_found_by_features(moving, tmp_path):
    write_video(tmp_path / "x.mp4", moving(160, 256, num=4, shift=(240.0, 0.0)), fps=8)
    found = measure_motion(read_clip(tmp_path / "x.mp4"))
    assert found["camera_label"] == "pan_left"
    assert found["motion_degree"] == pytest.approx(80 * 8 * 2, rel=0.05)


def test_a_fade_is_drift_of_colors_and_a_pan_is_none(moving, tmp_path):
    pan = moving(96, 160, num=9, shift=(40.0, 0.0))
    fade = (pan * np.linspace(1, 0.3, 9)[:, None, None, None]).astype(np.uint8)
    found = {}
    for name, frames in (("pan", pan), ("fade", fade)):
        write_video(tmp_path / f"{name}.mp4", frames, fps=8)
        found[name] = measure_motion(read_clip(tmp_path / f"{name}.mp4"))
    assert found["pan"]["drift_ssim_8"] > 0.9 and found["pan"]["drift_color_8"] > 0.85
    assert found["fade"]["drift_color_8"] < 0.6
    assert found["pan"]["drift_ssim_16"] is None


def test_flickering_is_the_formula_of_vbench(moving, tmp_path):
    write_video(tmp_path / "x.mp4", moving(64, 96, num=25, shift=(20.0, 0.0)), fps=24)
    import cv2

    video, frames = cv2.VideoCapture(str(tmp_path / "x.mp4")), []
    while (read := video.read())[0]:
        frames.append(read[1])
    pairs = [np.mean(cv2.absdiff(a, b)) for a, b in pairwise(frames)]
    expected = (255.0 - np.mean(pairs).item()) / 255.0
    assert read_clip(tmp_path / "x.mp4").flicker == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_moving_pictures_are_videos(suffix, moving, tmp_path):
    frames = [Image.fromarray(one) for one in moving(64, 96, num=5, shift=(8.0, 0.0))]
    path = tmp_path / f"x{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    clip = read_clip(path)
    assert clip.num_frames == 5 and clip.frame_rate == pytest.approx(10)
    assert clip.notes == ()


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_moving_pictures_are_sampled_by_their_rate(suffix, moving, tmp_path):
    frames = [Image.fromarray(one) for one in moving(64, 96, num=13, shift=(8.0, 0.0))]
    path = tmp_path / f"x{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40)
    clip = read_clip(path)
    assert clip.frame_rate == pytest.approx(25)
    assert clip.times == pytest.approx([0, 0.12, 0.24, 0.36, 0.48])


def test_a_rate_that_varies_is_named_and_times_are_the_files(moving, tmp_path):
    frames = [Image.fromarray(one) for one in moving(64, 96, num=5, shift=(8.0, 0.0))]
    times = [100, 300, 100, 300, 100]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=times)
    clip = read_clip(tmp_path / "x.gif")
    assert "varies" in clip.notes[0]
    assert clip.seconds == pytest.approx(0.8)


def test_odd_sizes_and_long_videos_are_measured_as_far_as_said(moving, tmp_path):
    few = moving(65, 97, num=5, shift=(8.0, 0.0))
    frames = few[np.arange(260) % 5]
    images = [Image.fromarray(one) for one in frames]
    images[0].save(tmp_path / "x.webp", save_all=True, append_images=images[1:], duration=125)
    clip = read_clip(tmp_path / "x.webp")
    assert clip.size == (65, 97)
    assert clip.seconds == 30
    assert clip.flicker is None
    assert clip.notes == ("only its first 30.0 s were measured",)


def damaged(name, path, moving):
    whole = path.with_name("whole.mp4")
    write_video(whole, moving(64, 96, num=16, shift=(30.0, 0.0)), fps=8)
    data = whole.read_bytes()
    if name == "one frame":
        write_video(path, moving(64, 96, num=1), fps=8)
        return
    content = {
        "no bytes": b"",
        "garbage": b"x" * 5000,
        "cut": data[: 2 * len(data) // 3],
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nwhole.mp4\n#EXT-X-ENDLIST\n",
        "text": b"ffconcat version 1.0\nfile whole.mp4\n",
    }
    if name in content:
        path.write_bytes(content[name])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "no such file"),
        ("no bytes", "no bytes"),
        ("garbage", "cannot be decoded"),
        ("cut", "ends early"),
        ("one frame", "one frame"),
        ("playlist", "cannot be"),
        ("text", "cannot be"),
    ],
)
def test_what_cannot_be_measured_is_named(name, reason, moving, tmp_path):
    damaged(name, tmp_path / "x.mp4", moving)
    with pytest.raises(DataError, match=reason):
        read_clip(tmp_path / "x.mp4")


def test_strips_and_tiny_pictures_are_refused(tmp_path):
    for name, size, reason in (
        ("strip", (8000, 20), "strip"),
        ("tiny", (12, 12), "the least"),
    ):
        images = [Image.new("RGB", size)] * 3
        images[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=images[1:])
        with pytest.raises(DataError, match=reason):
            read_clip(tmp_path / f"{name}.gif")
