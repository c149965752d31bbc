"""Clips are found by VBench's names; what is named or made wrongly is listed before measuring."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from motionmerge.errors import DataError
from motionmerge.evaluation.vbench.check import check
from motionmerge.evaluation.vbench.suite import (
    Entry,
    clips_of_folder,
    clips_of_suite,
    prompt_of,
    read_suite,
)
from motionmerge.io.video import write_video
from motionmerge.sampling.batch.manifest import VideoJob, vbench_name
from motionmerge.sampling.videos.settings import VideoSettings

BEAR = "a brown bear in the water"
ENTRY = Entry(BEAR, ("i2v_subject",), f"{BEAR}.jpg")


@pytest.fixture(scope="module")
def one_clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, np.zeros((8, 32, 32, 3), np.uint8), fps=8)
    return path.read_bytes()


@pytest.fixture
def folder_of(tmp_path, one_clip):
    def make(*names):
        for name in names:
            (tmp_path / name).write_bytes(one_clip)
        return tmp_path

    return make


def kinds(checked):
    return sorted({fault.kind for fault in checked.faults})


def test_a_whole_set_has_no_fault(folder_of):
    checked = check(folder_of(*(f"{BEAR}-{n}.mp4" for n in range(5))), entries=[ENTRY])
    assert not checked.faults
    assert len(checked.clips) == 5
    assert (checked.num_frames, checked.height, checked.width) == (8, 32, 32)


def test_a_set_numbered_from_one_is_renamed_and_not_cut(folder_of):
    """VBench reads four of these five and warns of one among 1,226."""
    folder = folder_of(*(f"{BEAR}-{n}.mp4" for n in range(1, 6)))
    renames = check(folder, entries=[ENTRY]).renames
    for old, new in renames.items():
        assert not (folder / new).exists()  # in this order none is overwritten
        (folder / old).rename(folder / new)
    assert not check(folder, entries=[ENTRY]).faults


def test_near_misses_get_their_right_name(folder_of):
    folder = folder_of(f"{BEAR.upper()}-0.mp4", f"{BEAR} -1.mp4", f"{BEAR}_sample2.mp4")
    checked = check(folder, entries=[ENTRY])
    assert sorted(checked.renames.values()) == [f"{BEAR}-{n}.mp4" for n in (0, 1, 2)]
    assert "missing" in kinds(checked)


def test_strangers_extras_and_stray_files_are_named(folder_of):
    folder = folder_of(*(f"{BEAR}-{n}.mp4" for n in range(6)), "another-0.mp4")
    (folder / ".DS_Store").write_bytes(b"")
    assert kinds(check(folder, entries=[ENTRY])) == ["extra", "stray", "unknown"]
    assert len(clips_of_suite([ENTRY], folder, images=None)) == 5  # VBench finds none at all


def test_clips_that_are_too_long_too_short_damaged_or_unequal_are_named(folder_of):
    folder = folder_of("a-0.mp4", "b-0.mp4")
    write_video(folder / "long-0.mp4", np.zeros((81, 32, 32, 3), np.uint8), fps=16)  # 5.06 s
    write_video(folder / "one-0.mp4", np.zeros((1, 32, 32, 3), np.uint8), fps=8)
    write_video(folder / "two-0.mp4", np.zeros((2, 64, 32, 3), np.uint8), fps=8)
    (folder / "zero-0.mp4").write_bytes(b"")
    found = {(fault.kind, fault.name) for fault in check(folder).faults}
    assert {
        *{("long", "long-0.mp4"), ("rate", "long-0.mp4"), ("one-frame", "one-0.mp4")},
        *{("two-frames", "two-0.mp4"), ("size", "two-0.mp4"), ("unreadable", "zero-0.mp4")},
    } <= found


def test_a_prompt_that_cannot_be_a_name_is_a_fault(folder_of):
    entry = Entry("black/white", ("i2v_subject",), "x.jpg")
    assert "prompt" in kinds(check(folder_of(), entries=[entry]))


def test_without_a_suite_names_say_prompt_image_and_camera(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a cat.JPG", "a-b.png", "route 66.jpg"):
        Image.new("RGB", (32, 32)).save(images / name)
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a cat-12.mp4", "a cat.mp4", "a-b-3.GIF", "route 66-7.mp4", "a dog-0.mp4"):
        (videos / name).write_bytes(b"")
    found = {clip.path.name: clip for clip in clips_of_folder(videos, images=images)}
    assert found["a cat-12.mp4"].image == found["a cat.mp4"].image == images / "a cat.JPG"
    assert found["a-b-3.GIF"].image == images / "a-b.png"
    assert found["route 66-7.mp4"].prompt == "route 66"
    assert found["a dog-0.mp4"].image is None  # VBench: KeyError
    assert "i2v_subject" not in found["a dog-0.mp4"].dimensions
    assert "camera_motion" not in found["a dog-0.mp4"].dimensions  # VBench: ValueError


def test_what_a_batch_names_for_vbench_is_found(folder_of, tmp_path):
    job = VideoJob(
        line=1, id="bear", number=3, image=tmp_path / "x.jpg", settings=VideoSettings(prompt=BEAR)
    )
    folder = folder_of(vbench_name(job, "0" * 16))
    (clip,) = clips_of_suite([ENTRY], folder, images=None)
    assert prompt_of(clip.path) == BEAR


def test_a_suite_is_read_and_another_file_is_refused(tmp_path):
    path = tmp_path / "suite.json"
    value = {"prompt_en": BEAR, "dimension": ["i2v_subject"], "image_name": f"{BEAR}.jpg"}
    path.write_text(json.dumps([value]))
    assert read_suite(path) == [ENTRY]
    path.write_text(json.dumps([{**value, "dimension": ["beauty"]}]))
    with pytest.raises(DataError, match="no list of VBench-I2V's prompts"):
        read_suite(path)
