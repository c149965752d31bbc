"""Videos are measured once, in any number of parts, and what is known of them is found."""

from __future__ import annotations

import fcntl
import json
import os
import threading

import pytest

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.row_files import Shard, append_rows, joined, read_row_files
from motionmerge.evaluation.runs import ROWS, Kept, Row, measure_videos
from motionmerge.evaluation.sources import Photos, VideoSource, find_videos, source_of
from motionmerge.evaluation.summary import FailWhen, summarise, worst_first
from motionmerge.io.video import write_video
from motionmerge.models.pocket.world import load_photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory, moving):
    """Four small videos of one photo, one of them still, and one that is damaged."""
    folder = tmp_path_factory.mktemp("videos")
    for number, pixels in enumerate((0.0, 8.0, -12.0, 20.0)):
        frames = moving(64, 64, num=4, shift=(pixels, 0.0))
        about = {"prompt": "a cat and the camera pans left", "seed": number}
        write_video(folder / f"cat-seed{number}.mp4", frames, fps=8, metadata=about)
    (folder / "bad.mp4").write_bytes(b"nothing")
    return folder


def sources(folder, photos=None):
    return [source_of(path, Photos.at(photos)) for path in find_videos([folder])]


def rows_of(folder):
    return sorted(joined(read_row_files(folder, ROWS, Row.of)).values(), key=lambda row: row.key)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """All of them measured in one run: the folder of its rows, and the videos."""
    output = tmp_path_factory.mktemp("rows")
    return output, measure_videos(sources(folder), kept=Kept.in_folder(output, Shard()))


def test_what_is_there_is_not_measured_again_and_a_torn_line_is(whole, folder, tmp_path):
    output, first = whole
    lines = (output / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    seen = []
    again = measure_videos(
        sources(folder), kept=Kept.in_folder(tmp_path, Shard()), progress=seen.append
    )
    assert [one.values for one in again] == [one.values for one in first]
    assert len(seen) == 5
    added = (tmp_path / "rows.jsonl").read_text().splitlines()[len(lines) :]
    assert 0 < len({json.loads(line)["clip"] for line in added}) == 1
    untouched = (output / "rows.jsonl").read_text()
    measure_videos(sources(folder), kept=Kept.in_folder(output, Shard()))
    assert (output / "rows.jsonl").read_text() == untouched


def test_seven_shards_are_one_run(whole, folder, tmp_path):
    counts = []
    for number in range(7, 0, -1):
        shard = Shard(number, 7)
        part = measure_videos(
            reversed(sources(folder)), kept=Kept.in_folder(tmp_path, shard), shard=shard
        )
        counts.append(len(part))
    assert sum(counts) == 5
    together, one = rows_of(tmp_path), rows_of(whole[0])
    assert [row.key for row in together] == [row.key for row in one]
    for row, other in zip(together, one, strict=True):
        expected = other.value
        assert row.value == (
            pytest.approx(expected, abs=1e-9) if isinstance(expected, float) else expected
        )


def test_rows_merge_to_the_same_in_any_order_and_contradictions_are_named():
    rows = [Row("a", "x", 1.0, "c"), Row("b", "x", None, "c"), Row("a", "y", "static", "c")]
    assert joined(rows) == joined([*reversed(rows), *rows])
    with pytest.raises(DataError, match="x of the clip a as 1"):
        joined([*rows, Row("a", "x", 1.1, "c")])


def test_what_cannot_be_measured_is_counted_and_in_no_mean(whole):
    measured = worst_first(whole[1])
    assert measured[0].source.path.name == "bad.mp4" and measured[0].failure
    assert "FROZEN" in measured[1].warnings[0]
    summary = summarise(measured)
    assert (summary.num_measured, summary.num_failed, summary.num_warned) == (4, 1, 1)
    assert summary.nums["motion_degree"] == 4
    # The four are seeds of one prompt: there is no interval of prompts.
    assert summary.num_clusters == summary.means["motion_degree"].num == 1
    assert summary.to_dict()["metrics"]["motion_degree"]["low"] is None
    agreement = {one.source.seed: one.values.get("camera_agreement") for one in measured[1:]}
    assert agreement == {0: 0, 1: 1, 2: 0, 3: 1}
    shares = list(summary.dynamic_curve.values())
    assert shares == sorted(shares, reverse=True) and shares[0] > 0


def test_the_first_frame_is_compared_to_a_photo_that_comes_later(whole, folder, tmp_path):
    photo = tmp_path / "cat.png"
    load_photo("chelsea").save(photo)
    kept = Kept.in_folder(whole[0], Shard())
    measured = measure_videos(sources(folder, photo), kept=kept)
    ends = [one.values["first_frame_psnr"] for one in measured if one.failure is None]
    assert all(5 < one < 40 for one in ends)
    (tmp_path / "broken.png").write_bytes(b"x")
    named = measure_videos(sources(folder, tmp_path / "broken.png")[1:2], kept=kept)
    assert named[0].values["first_frame_psnr"] is None
    assert "photo cannot be used" in named[0].notes[0]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/", "-1/2"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="shard"):
        Shard.parse(text)


def test_prompts_and_photos_are_found_where_people_keep_them(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a dog.jpg", "fox.png", "cow.png"):
        (photos / name).touch()
    videos = tmp_path / "videos"
    videos.mkdir()
    names = {
        "a dog, camera zooms in-3.mp4": ("a dog, camera zooms in", "a dog.jpg"),
        "fox-seed7-0123456789abcdef.mp4": ("the fox runs", "fox.png"),
        "cow.mp4": ("a cow", "cow.png"),
        "pig.webm": ("a pig", None),
        "take-2.mp4": (None, None),
    }
    for name in names:
        (videos / name).write_bytes(b"x")
    (videos / ".hidden.mp4").touch()
    (videos / "cow.txt").write_text("a cow\n")
    (videos / "pig.json").write_text('{"prompt": "a pig", "seed": 4}')
    row = {"image": "../photos/fox.png", "prompt": "the fox runs", "id": "fox"}
    (videos / "manifest.jsonl").write_text(json.dumps(row) + "\nno json\n")
    found = find_videos([videos, str(videos / "*.webm")])
    assert sorted(path.name for path in found) == sorted(names)
    for path in found:
        source = source_of(path, Photos.at(photos))
        prompt, photo = names[path.name]
        assert (source.prompt, source.photo and source.photo.name) == (prompt, photo)
    assert source_of(videos / "fox-seed7-0123456789abcdef.mp4", Photos()) == VideoSource(
        videos / "fox-seed7-0123456789abcdef.mp4",
        "the fox runs",
        videos / "../photos/fox.png",
        7,
    )
    with pytest.raises(DataError, match="no video"):
        find_videos([photos])


@pytest.mark.parametrize(
    ("text", "num"),
    [
        ("motion_degree < 2", 1),
        ("motion_degree < 2 or camera_label == pan_right", 2),
        ("motion_degree >= 2 and camera_label != pan_left", 1),
        ("mean motion_degree < 1e4", 4),
        ("mean motion_degree > 1e4", 0),
        ("first_frame_psnr < 20", 4),  # nobody can say that they are good
    ],
)
def test_a_condition_finds_the_videos_that_meet_it(text, num, whole):
    condition = FailWhen.parse(text)
    assert len(condition.failing(whole[1], summarise(whole[1]))) == num
    assert bool(condition.missing(whole[1])) == ("first_frame" in text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("motion_degre < 2", "motion_degree"),
        ("motion_degree < two", "no number"),
        ("motion_degree < nan", "no number"),
        ("motion_degree < 1e999", "no number"),
        ("camera_label == pan", "no camera label"),
        ("camera_labels_dis == roll_clockwise", "no camera label"),
        ("motion_degree <", "not complete"),
        ("motion_degree < 2 xor jerk > 1", "xor"),
        ("__import__('os')", "Cannot read"),
        ("camera_label < static", "word"),
        ("mean camera_label == static", "word"),
        ("", "not complete"),
    ],
)
def test_a_condition_that_is_none_is_refused(text, reason):
    with pytest.raises(ConfigError, match=reason):
        FailWhen.parse(text)


@pytest.mark.parametrize("error", [MemoryError(), DataError("It cannot be read: [Errno 5].")])
def test_a_failure_is_tried_again_and_good_rows_win(error, folder, tmp_path, monkeypatch):
    def fail(_):
        raise error

    output = tmp_path / "rows"
    output.mkdir()
    video = [VideoSource(folder / "cat-seed1.mp4")]
    with monkeypatch.context() as patched:
        patched.setattr("motionmerge.evaluation.clips.read_clip", fail)
        (failed,) = measure_videos(video, kept=Kept.in_folder(output, Shard()))
    assert failed.failure in ("MemoryError: ", "It cannot be read: [Errno 5].")
    (again,) = measure_videos(video, kept=Kept.in_folder(output, Shard()))
    assert again.failure is None
    rows = output / "rows.jsonl"
    last = json.loads(rows.read_text().splitlines()[-1])
    with rows.open("a") as file:
        for text in ("of an older version", "of another one"):
            file.write(json.dumps({**last, "metric": "failure", "value": text}) + "\n")
    (whole,) = measure_videos(video, kept=Kept.in_folder(output, Shard()))
    assert whole.failure is None and whole.values == again.values


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        *(("motion_degree", value) for value in (True, "12", [1], -1, 1e300, float("nan"))),
        *(("frozen_share", value) for value in (-0.1, 1.5)),
        *(("camera_label", value) for value in (1, False, "\x1b[2J")),
        ("failure", 0),
    ],
)
def test_a_value_that_no_metric_can_have_is_refused_with_its_line(metric, value, tmp_path):
    good = {"clip": "a", "metric": "motion_degree", "value": 3.5, "config": "c"}
    lines = [good, {**good, "metric": metric, "value": value}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="line 2 is no result"):
        Kept.in_folder(tmp_path, Shard())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_in_a_folder_are_not_waited_for(folder, tmp_path):
    for name in ("other.jsonl", "a-seed1-0123456789abcdef.json", "photo.jpg", "pipe.mp4"):
        os.mkfifo(tmp_path / name)
    video = tmp_path / "a-seed1-0123456789abcdef.mp4"
    video.write_bytes((folder / "cat-seed1.mp4").read_bytes())
    photos = tmp_path / "photos"
    photos.mkdir()
    os.mkfifo(photos / "x.png")
    with pytest.raises(DataError, match="no photo"):
        Photos.at(photos)
    assert source_of(video, Photos()).prompt == "a cat and the camera pans left"
    assert source_of(tmp_path / "pipe.mp4", Photos()).prompt is None
    (piped,) = measure_videos([VideoSource(tmp_path / "pipe.mp4")])
    assert piped.failure == "It is no file."
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no plain file"):
        Kept.in_folder(tmp_path, Shard())


@pytest.mark.parametrize("image", ["x" * 5000, "a\0b", "\ud800.jpg"], ids=["long", "NUL", "half"])
def test_a_sidecar_that_names_what_no_file_can_be_called_names_no_photo(image, tmp_path):
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"nothing")
    video.with_suffix(".json").write_text(json.dumps({"image": image, "prompt": "half \ud800"}))
    found = source_of(video, Photos())
    assert found.photo is None
    assert found.prompt == "half ?"


def test_a_line_that_another_process_is_writing_is_not_taken_for_a_torn_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as `append_rows` does
        other.write(b'{"number": ')
        thread = threading.Thread(target=append_rows, args=(path, [{"number": 2}]))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive(), "it does not wait for its turn"
        other.write(b"1}\n")
    thread.join()
    assert path.read_text() == '{"number": 1}\n{"number": 2}\n'


def test_a_torn_line_is_removed_and_one_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second = ({"clip": "a", "metric": name, "value": 1, "config": "c"} for name in "xy")
    for torn, num in ((json.dumps(first), 2), (json.dumps(first)[:-9], 1), ("x" * 200_000, 1)):
        path.write_text(torn)
        append_rows(path, [second])
        rows = read_row_files(tmp_path, ROWS, Row.of)
        assert rows[-1] == Row(**second) and len(rows) == num
