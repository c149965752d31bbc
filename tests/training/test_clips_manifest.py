"""A manifest is read as it was written, and one from a stranger reaches nothing outside."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from motionmerge.errors import DataError
from motionmerge.io.clips import FrameTimes
from motionmerge.io.decoding import ClipPlace
from motionmerge.training.clips_manifest import (
    ClipShot,
    TrainingClip,
    read_clips_manifest,
    write_clips_manifest,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.mp4").write_bytes(b"12345")
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    times = FrameTimes(30, Fraction(1, 90_000), tuple(range(0, 90_000, 3000)))
    common = {"caption": "a cät\n", "size": (48, 64), "times": times}
    clips = [
        TrainingClip(
            name="sub/a.mp4",
            place=ClipPlace(tmp_path / "sub" / "a.mp4"),
            clip="a" * 64,
            num_bytes=5,
            shots=(ClipShot(0, 20, 3.5), ClipShot(20, 30, None)),
            **common,
        ),
        TrainingClip(
            name="x.tar/b.mp4",
            place=ClipPlace(tmp_path / "x.tar", 2, 4),
            clip="b" * 64,
            num_bytes=4,
            shots=(ClipShot(0, 30, 0.0),),
            **common,
        ),
    ]
    write_clips_manifest(tmp_path / "clips.jsonl", clips, folder=tmp_path)
    return tmp_path, clips


def test_a_manifest_is_read_as_it_was_written(folder):
    path, clips = folder
    assert read_clips_manifest(path / "clips.jsonl", folder=path) == clips


def test_a_file_that_was_changed_or_is_gone_is_named(folder):
    path, _ = folder
    (path / "sub" / "a.mp4").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"line 1: .*a\.mp4 has 4 bytes by now"):
        read_clips_manifest(path / "clips.jsonl", folder=path)
    (path / "sub" / "a.mp4").unlink()
    with pytest.raises(DataError, match="is not there"):
        read_clips_manifest(path / "clips.jsonl", folder=path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"file": "../a.mp4"},
        {"file": "/etc/passwd"},
        {"clip": "../../x"},
        {"num_bytes": True},
        {"offset": -1},
        {"size": [48, 64, 3]},
        {"size": [48, 10**12]},
        {"shots": []},
        {"shots": [[0, 31, 1.0]]},
        {"shots": [[0, 5, float("nan")]]},
        {"caption": 3},
        {"times": {"num_frames": 10**9, "base": [1, 25]}},
    ],
)
def test_lines_of_strangers_are_refused(wrong, folder):
    path, _ = folder
    line = json.loads((path / "clips.jsonl").read_text().splitlines()[0])
    (path / "clips.jsonl").write_text(json.dumps(line | wrong) + "\n")
    with pytest.raises(DataError, match="line 1 is no clip of a manifest"):
        read_clips_manifest(path / "clips.jsonl", folder=path)


def test_an_empty_or_torn_manifest_is_refused(folder):
    path, _ = folder
    text = (path / "clips.jsonl").read_text()
    (path / "clips.jsonl").write_text(text[:-20])
    with pytest.raises(DataError, match="line 2"):
        read_clips_manifest(path / "clips.jsonl", folder=path)
    (path / "clips.jsonl").write_text("")
    with pytest.raises(DataError, match="lists no clip"):
        read_clips_manifest(path / "clips.jsonl", folder=path)
