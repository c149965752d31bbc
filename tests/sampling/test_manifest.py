"""Lines of a manifest: read as JSON has them, and a wrong one is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from motionmerge.errors import DataError
from motionmerge.sampling.batch.manifest import plan, read_manifest
from motionmerge.sampling.families.families import POCKET

from ..tiny.pipelines import photo

ROW = {"image": "photo.png", "prompt": "a cat"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photo(24).save(tmp_path / "photo.png")
    return tmp_path


def manifest(folder: Path, *lines: str) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("\n".join([json.dumps(ROW), *lines]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected"),
        ({"seed": True}, "seed is True"),
        ({"guidance_scale": -5}, "guidance_scale is -5"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"height": 0, "width": 0}, "height is 0"),
        ({"prompt": "\ud800"}, "prompt has a broken character"),
        ({"negative_prompt": "\ud800"}, "negative_prompt has a broken character"),
        ({"steps": 5}, r"no setting `steps`.*\n.*`num_inference_steps`"),
        ({"guidance": 5}, r"no setting `guidance`.*\n.*`guidance_scale`"),
        ({"guidance_2": 5}, r"no setting `guidance_2`.*\n.*`guidance_scale_2`"),
        ({"id": "\ud800"}, "id has a broken character"),
        ({"image": "\ud800"}, "image has a broken character"),
        ({"image": "~nobody_is_called_this.png"}, "there is no .*~nobody_is_called_this.png"),
        ({"image": "long" * 100}, "there is no .*longlong"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_named_with_its_line(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    path = manifest(folder, json.dumps({**ROW, **settings}))
    with pytest.raises(DataError, match=f"line 2.*{message}") as caught:
        read_manifest(path)
    assert caught.value.fix
    str(caught.value).encode()


def test_seeds_that_count_up_too_far_are_named_with_their_line(folder: Path) -> None:
    path = manifest(folder, json.dumps({**ROW, "seed": 2**63 - 2}))
    assert [job.settings.seed for job in read_manifest(path, num_videos=2)][2:] == [
        2**63 - 2,
        2**63 - 1,
    ]
    with pytest.raises(DataError, match="line 2: seed is 9223372036854775808"):
        read_manifest(path, num_videos=3)


def test_a_key_that_appears_twice_is_named(folder: Path) -> None:
    path = manifest(folder, '{"image": "photo.png", "prompt": "a", "prompt": "b"}')
    with pytest.raises(DataError, match="line 2: the key `prompt` appears twice"):
        read_manifest(path)


def test_a_line_that_is_no_utf_8_is_named(folder: Path) -> None:
    path = manifest(folder, "{}")
    path.write_bytes(path.read_bytes() + b'\n{"image": "caf\xe9.png"}')
    with pytest.raises(DataError, match=r"line 3: .*utf-8.*\n.*Save it as UTF-8"):
        read_manifest(path)


def test_later_settings_are_read_and_leave_the_names_of_other_videos_alone(folder: Path) -> None:
    (folder / "photo.png").write_bytes(b"photo")
    path = folder / "manifest.jsonl"
    row = {**ROW, "num_frames": 5}
    later = {"guidance_scale_2": 1.0, "start_step": 940}
    rows = [row, {**row, "guidance_scale_2": None}, *({**row, k: v} for k, v in later.items())]
    found = []
    for each in rows:
        path.write_text(json.dumps(each))
        jobs = read_manifest(path)
        found += [planned.path.name for planned in plan(jobs, folder, fingerprint={"model": "x"})]
    assert found[:2] == ["photo-seed0-1e6aa9321ecea82b.mp4"] * 2  # as before they were known
    assert len(set(found)) == 3


def test_a_line_nested_too_deep_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="line 2"):
        read_manifest(manifest(folder, "[" * 100_000))


def test_a_byte_order_mark_is_not_read_and_lines_end_at_newlines_alone(folder: Path) -> None:
    path = folder / "manifest.jsonl"
    rows = [ROW, {**ROW, "prompt": "pans\u2028left"}, {**ROW, "prompt": "a\x85b"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    jobs = read_manifest(path)
    assert [(job.line, job.settings.prompt) for job in jobs] == [
        (1, "a cat"),
        (2, "pans\u2028left"),
        (3, "a\x85b"),
    ]
    assert len(plan(jobs, folder, fingerprint={})) == 3


def test_an_image_may_begin_with_a_tilde(folder: Path) -> None:
    (folder / "photo.png").rename(folder / "~cat.png")
    path = folder / "manifest.jsonl"
    path.write_text(json.dumps({**ROW, "image": "~cat.png"}))
    (job,) = read_manifest(path)
    assert (job.image, job.id) == (folder / "~cat.png", "_cat")


def test_a_negative_prompt_that_would_do_nothing_is_named_with_its_line(folder: Path) -> None:
    path = manifest(folder, json.dumps({**ROW, "negative_prompt": "a dog"}))
    first, second = read_manifest(path)
    limits = POCKET.limits({})
    first.check(POCKET, limits)
    with pytest.raises(DataError, match=r"Line 2.*negative prompt"):
        second.check(POCKET, limits)


def test_more_videos_than_memory_is_for_are_refused_before_any_is_planned(folder: Path) -> None:
    with pytest.raises(DataError, match=r"asks for 1,000,000,000 videos; one call makes 100,000"):
        read_manifest(manifest(folder), num_videos=10**9)
    assert len(read_manifest(manifest(folder), num_videos=3)) == 3


def test_a_list_of_absurd_size_is_refused_and_not_read_to_its_end(folder: Path) -> None:
    path = folder / "large.jsonl"
    with path.open("wb") as file:
        file.truncate(10**12)  # holes take no room on the disk
    with pytest.raises(DataError, match="larger than the 64 MiB"):
        read_manifest(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_in_place_of_a_manifest_or_image_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="no plain file"):
        read_manifest(tmp_path / "pipe.jsonl")
    for image in ("pipe.jsonl", "a\0b", "x" * 5000):
        (tmp_path / "list.jsonl").write_text(json.dumps({"image": image}) + "\n")
        with pytest.raises(DataError, match="there is no"):
            read_manifest(tmp_path / "list.jsonl")
