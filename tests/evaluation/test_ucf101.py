"""Clips of UCF101: which are taken, what is written, and that a run goes on."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.ucf101 import ClipProtocol, select_clips, write_lossless
from motionmerge.evaluation.ucf101_layout import PromptRule, find_candidates
from motionmerge.io.video import read_frames
from motionmerge.sampling.batch.manifest import read_manifest

CLASSES = ("ApplyEyeMakeup", "YoYo", "TaiChi")
SHORT = "v_YoYo_g01_c02"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine videos of 12 frames in class folders; one of them has 3, one is no video."""
    folder = tmp_path_factory.mktemp("UCF-101")
    random = np.random.default_rng(0)
    for name in CLASSES:
        for clip in (1, 2, 3):
            stem = f"v_{name}_g01_c0{clip}"
            frames = random.integers(0, 256, (3 if stem == SHORT else 12, 24, 32, 3), np.uint8)
            path = folder / name / f"{stem}.avi"
            path.parent.mkdir(exist_ok=True)
            write_lossless(path, frames, fps=25)
    (folder / "TaiChi" / "v_TaiChi_g01_c03.avi").write_bytes(b"no video")
    return folder


def protocol(**changes):
    return ClipProtocol(**({"prompt": "class-name", "stride": 2, "num": 7, "frames": 4} | changes))


def test_every_pixel_of_a_real_clip_is_that_of_the_video(data, tmp_path):
    found = select_clips(data, protocol(), folder=tmp_path)
    assert len(found.clips) == 7
    for one in found.clips:
        video, _ = read_frames(next(data.rglob(f"{one.id}.avi")))
        clip, rate = read_frames(tmp_path / "real" / f"{one.id}.mkv")
        assert np.array_equal(clip, video[one.start : one.start + 7 : 2])
        assert rate == 12.5
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"photos/{one.id}.png")), clip[0])


def test_dropped_videos_are_named_with_their_reason(data):
    with pytest.raises(DataError, match=r"gives 7 clips .* not 9; 2 videos were dropped"):
        select_clips(data, protocol(num=9), folder=None)
    dropped = {one.id: one.dropped for seed in range(9) for one in
               select_clips(data, protocol(seed=seed), folder=None).dropped}  # fmt: skip
    assert dropped[SHORT] == "too short"
    assert "v_TaiChi_g01_c03.avi" in dropped["v_TaiChi_g01_c03"]


def test_fewer_clips_are_the_first_of_more_and_the_place_of_the_data_does_not_matter(
    data, tmp_path
):
    many = select_clips(data, protocol(), folder=None).clips
    for path in data.rglob("*.avi"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert select_clips(tmp_path, protocol(num=3), folder=None).clips == many[:3]
    assert select_clips(data, protocol(seed=1), folder=None).clips != many


def test_the_choice_is_made_of_hashes_alone(data):
    def drawn(*key):
        text = json.dumps([5, *key]).encode()
        digest = hashlib.blake2b(text, digest_size=8, person=b"motionmerge int").digest()
        return int.from_bytes(digest, "little") // 2

    names = [f"v_{name}_g01_c0{clip}" for name in CLASSES for clip in (1, 2, 3)]
    usable = [name for name in names if name not in (SHORT, "v_TaiChi_g01_c03")]
    expected = sorted(usable, key=lambda name: drawn("ucf101", name))[:3]
    found = select_clips(data, protocol(num=3, seed=5), folder=None).clips
    assert [one.id for one in found] == expected
    assert [one.start for one in found] == [drawn("ucf101 start", name) % 6 for name in expected]


def test_batch_reads_the_manifest_as_it_is(data, tmp_path):
    found = select_clips(data, protocol(prompt="a {class}", size=(16, 16)), folder=tmp_path)
    jobs = read_manifest(tmp_path / "manifest.jsonl")
    assert [job.id for job in jobs] == [one.id for one in found.clips]
    assert {job.settings.prompt for job in jobs} == {"a Apply Eye Makeup", "a Yo Yo", "a Tai Chi"}
    assert len({job.settings.seed for job in jobs}) == len(jobs)
    assert {(job.settings.height, job.settings.width) for job in jobs} == {(16, 16)}
    assert Image.open(jobs[0].image).size == (16, 16)


def test_a_run_goes_on_after_a_kill_and_never_mixes_protocols(data, tmp_path):
    whole = select_clips(data, protocol(), folder=tmp_path).as_json()
    log = tmp_path / "selection.log"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:20])  # a kill in the middle of a line
    kept = [json.loads(line) for line in lines[1:4]]
    taken = next(one["id"] for one in kept if one["start"] is not None)
    (tmp_path / "real" / f"{taken}.mkv").unlink()
    assert select_clips(data, protocol(), folder=tmp_path).as_json() == whole
    assert len(list((tmp_path / "real").iterdir())) == 7
    with pytest.raises(DataError, match="another protocol"):
        select_clips(data, protocol(stride=1), folder=tmp_path)
    with pytest.raises(DataError, match="holds 7 clips already"):
        select_clips(data, protocol(num=2), folder=tmp_path)


def test_a_split_takes_its_videos_and_refuses_those_that_are_not_there(data, tmp_path):
    split = tmp_path / "testlist01.txt"
    split.write_text("YoYo/v_YoYo_g01_c01.avi 3\nTaiChi/v_TaiChi_g01_c01.avi\n")
    assert [one.class_name for one in find_candidates(data, split=split)] == ["TaiChi", "YoYo"]
    split.write_text("YoYo/v_YoYo_g09_c01.avi\n")
    with pytest.raises(DataError, match=r"1 videos of .* are not in"):
        find_candidates(data, split=split)
    split.write_text("../../etc/passwd\n")
    with pytest.raises(DataError, match="line 1"):
        find_candidates(data, split=split)


def test_a_prompt_rule_without_the_class_is_refused():
    with pytest.raises(ConfigError, match="same prompt"):
        PromptRule("a video")
    assert PromptRule("class-name").of("HandStandPushups") == "Hand Stand Pushups"


def test_the_verb_writes_all_it_records_and_a_dry_run_nothing(data, tmp_path):
    out = tmp_path / "ucf"
    words = ["evaluate", "ucf101", str(data), "-o", str(out), "--prompt", "class-name"]
    words += ["--stride", "2", "--frames", "4", "--num", "7", "--json"]
    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not out.exists()
    done = CliRunner().invoke(app, words)
    written = json.loads((out / "protocol.json").read_text())
    assert json.loads(dry.stdout) == json.loads(done.stdout) == written
    assert written["stride"] == 2
    assert written["split"] == "all videos"
    assert written["num_clips"] == 7
