"""Videos and captions are found in every usual layout, and whatever is left out has a reason."""

from __future__ import annotations

import io
import json
import os
import tarfile

import pytest

from motionmerge.errors import DataError
from motionmerge.training.clips_folder import find_clips


@pytest.fixture
def folder(tmp_path):
    """A folder with four files named as videos; nothing here looks into them."""
    for name in ("a.mp4", "sub/b.mp4", "sub/c.MOV", "d.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def captions(found):
    return {clip.name: clip.caption for clip in found.clips}


def reasons(found):
    return {one.name: one.reason for one in found.left_out}


@pytest.mark.parametrize("file_column", ["file_name", "video", "media_path"])
@pytest.mark.parametrize("caption_column", ["text", "caption", "prompt"])
def test_tables_name_files_and_captions_in_the_usual_words(file_column, caption_column, folder):
    rows = [("a.mp4", "a cat, and a dog"), ("sub/b.mp4", 'it says "hi"'), ("d.webm", " x\ny ")]
    lines = [json.dumps({file_column: name, caption_column: text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = find_clips(folder)
    assert captions(found) == {
        "a.mp4": "a cat, and a dog",
        "sub/b.mp4": 'it says "hi"',
        "d.webm": "x y",
    }
    assert reasons(found) == {"sub/c.MOV": "It has no caption."}
    quoted = ['"' + text.replace('"', '""') + '"' for _, text in rows]
    cells = [f"{name},{text}" for (name, _), text in zip(rows, quoted, strict=True)]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(
        "\ufeff" + "\n".join([f"{file_column},{caption_column}", *cells])
    )
    assert captions(find_clips(folder)) == captions(found)


def test_a_table_is_relative_to_its_folder_and_datasets_write_a_mapping(folder):
    rows = [{"video": {"path": "b.mp4", "bytes": None}, "text": "x"}]
    (folder / "sub" / "metadata.jsonl").write_text(json.dumps(rows[0]))
    assert captions(find_clips(folder)) == {"sub/b.mp4": "x"}


def test_texts_beside_videos_and_a_caption_for_the_rest(folder):
    (folder / "a.txt").write_text("a cat\n")
    (folder / "sub" / "b.txt").write_text("\n")
    (folder / "d.txt").write_bytes(b"\xff\xfe")
    found = find_clips(folder, caption="")
    assert captions(found) == {"a.mp4": "a cat", "sub/b.mp4": "", "sub/c.MOV": ""}
    assert "cannot be read" in reasons(found)["d.webm"]


def test_webvid_and_ucf101_are_known(tmp_path):
    (tmp_path / "videos" / "000_1").mkdir(parents=True)
    (tmp_path / "videos" / "000_1" / "77.mp4").write_bytes(b"x")
    (tmp_path / "results.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        "77,https://x/77.mp4,PT00H00M05S,000_1,A lake\n"
        "78,https://x/78.mp4,PT00H00M05S,000_1,Gone\n"
    )
    (tmp_path / "HandStandPushups").mkdir()
    (tmp_path / "HandStandPushups" / "v_HandStandPushups_g01_c02.avi").write_bytes(b"x")
    found = find_clips(tmp_path)
    assert captions(found) == {
        "videos/000_1/77.mp4": "A lake",
        "HandStandPushups/v_HandStandPushups_g01_c02.avi": "Hand Stand Pushups",
    }
    assert reasons(found) == {"results.csv, line 3": "There is no video 000_1/78.mp4."}


def pack(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_members_of_tars_are_read_where_they_lie(tmp_path):
    files = {
        "one.mp4": b"first",
        "one.txt": b"a cat",
        "x/two.webm": b"second",
        "x/two.json": b'{"text": "a dog", "fps": 8}',
        "three.mp4": b"third",
        "four.mp4": b"fourth",
        "four.txt": b"a",
        "four.json": b'{"caption": "b"}',
    }
    pack(tmp_path / "00.tar", files)
    (tmp_path / "01.tar").write_bytes(b"nothing")
    (tmp_path / "02.tar.gz").write_bytes(b"nothing")
    found = find_clips(tmp_path)
    assert captions(found) == {"00.tar/one.mp4": "a cat", "00.tar/x/two.webm": "a dog"}
    for clip in found.clips:
        with clip.place.opened() as file:
            assert file.read() == files[clip.name.removeprefix("00.tar/")]
    assert reasons(found)["00.tar/three.mp4"] == "It has no caption."
    assert reasons(found)["00.tar/four.mp4"] == "It has 2 captions."
    assert "Cannot read" in reasons(found)["01.tar"]
    assert "unpack" in reasons(found)["02.tar.gz"]


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    found = find_clips(tmp_path, caption="x")
    assert captions(found) == {"a.mp4": "x"}
    assert {name: "no file" in reason for name, reason in reasons(found).items()} == {
        "pipe.mp4": True,
        "loop.mp4": True,
    }
    with pytest.raises(DataError, match="10,000 characters"):
        find_clips(tmp_path, caption="x" * 10_001)


def test_a_header_that_says_it_is_large_fills_no_memory(tmp_path):
    pack(tmp_path / "x.tar", {"a.mp4": b"x"})
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "y.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    found = find_clips(tmp_path, caption="x")
    assert captions(found) == {"x.tar/a.mp4": "x"}
    assert "header of" in reasons(found)["y.tar"]


def test_captions_that_differ_are_named_and_equal_ones_are_one(folder):
    (folder / "a.txt").write_text("a cat")
    (folder / "d.txt").write_text("a dog")
    lines = ["file_name,text", "a.mp4,a cat", "d.webm,a hog", "d.webm,a dog", "sub/b.mp4,"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    found = find_clips(folder)
    assert captions(found) == {"a.mp4": "a cat"}
    assert "'a dog' (d.txt) and 'a hog' (metadata.csv, line 3)" in reasons(found)["d.webm"]
    assert reasons(found)["sub/b.mp4"] == "It has no caption."


@pytest.mark.parametrize(
    "name", ["../x.mp4", "/etc/x.mp4", "sub/../../x.mp4", "C:/x.mp4", "a\\b.mp4", "a\x00.mp4"]
)
def test_names_that_lead_out_of_the_folder_are_refused(name, folder):
    (folder.parent / "x.mp4").write_bytes(b"x")
    (folder / "metadata.jsonl").write_text(json.dumps({"file": name, "text": "x"}))
    found = find_clips(folder)
    assert found.clips == ()
    assert "leads out" in reasons(found)["metadata.jsonl, line 1"]


def test_links_out_of_the_folder_are_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.mp4"
    outside.write_bytes(b"x")
    (folder / "link.mp4").symlink_to(outside)
    (folder / "near.mp4").symlink_to(folder / "a.mp4")
    found = find_clips(folder, caption="x")
    assert "leads out" in reasons(found)["link.mp4"] and "near.mp4" in captions(found)


def test_rows_without_sense_are_named(folder):
    rows = ["[1]", "{", '{"file": 3, "text": "x"}', '{"file": "a.mp4", "text": ["x", "y"]}']
    rows += ['{"file": "d.webm", "text": 7}', '{"file": "none.mp4", "text": "x"}']
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    found = reasons(find_clips(folder))
    assert found["metadata.jsonl, line 2"] == "It is no JSON mapping."
    assert found["metadata.jsonl, line 3"] == "It names no file."
    assert "2 captions" in found["a.mp4"] and "no text" in found["d.webm"]
    assert found["metadata.jsonl, line 6"] == "There is no video none.mp4."


def test_tables_that_cannot_be_read_stop_with_their_names(folder, tmp_path):
    (folder / "other.csv").write_text("a,b\n1,2\n")  # a table of something else
    find_clips(folder)
    for content, reason in ((b"a,b\n1,2\n", "has the columns a, b"), (b"\xff\xfea", "Cannot read")):
        (folder / "metadata.csv").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            find_clips(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no video"):
        find_clips(tmp_path / "empty")
    with pytest.raises(DataError, match="no folder"):
        find_clips(folder / "a.mp4")
