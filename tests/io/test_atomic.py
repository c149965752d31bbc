"""Files appear whole, whoever else writes to them; what cannot be written is known before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from motionmerge.errors import ConfigError
from motionmerge.io import atomic
from motionmerge.io.atomic import (
    _machine,
    atomic_folder,
    atomic_path,
    check_file,
    check_folder,
    folder_of_results,
    prepare_folder,
)


def test_two_writers_with_one_process_id_do_not_share_a_temporary_file(tmp_path):
    target = tmp_path / "video.mp4"
    with atomic_path(target) as first, atomic_path(target) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert target.read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_what_another_machine_writes_is_left_alone_for_a_day(tmp_path, monkeypatch):
    target = tmp_path / "video.mp4"
    dead = 2**30
    file = tmp_path / f".video.mp4.0123456789ab.{dead}.00ff00ff.tmp"
    folder = file.with_suffix(".old")
    file.write_bytes(b"half")
    folder.mkdir()
    (folder / "part").write_bytes(b"half")
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"whole")
    assert file.exists() and (folder / "part").exists()
    monkeypatch.setattr(atomic, "_STALE_SECONDS", -60)
    with atomic_folder(tmp_path / "video"), atomic_path(target) as temporary:
        temporary.write_bytes(b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"video", target.name}


def test_what_dead_processes_left_is_removed_by_the_first_write_into_a_folder(
    tmp_path, monkeypatch
):
    left = subprocess.run(
        [sys.executable, "-c", DYING.format(folder=str(tmp_path))], check=False
    ).returncode
    assert left == -signal.SIGKILL
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and all(name.endswith(".tmp") for name in names)
    (tmp_path / ".mine.tmp").touch()
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    for name in ("c.mp4", "d.mp4", "e.mp4"):
        with atomic_path(tmp_path / name) as temporary:
            temporary.write_bytes(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".mine.tmp",
        "c.mp4",
        "d.mp4",
        "e.mp4",
    ]
    assert listed.count(tmp_path) == 1  # a folder of 100,000 videos takes half a second


DYING = """
import os, signal
from pathlib import Path
from motionmerge.io.atomic import atomic_path
with atomic_path(Path("{folder}") / "a.mp4") as a, atomic_path(Path("{folder}") / "b\\n.mp4") as b:
    a.write_bytes(b"half")
    b.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_whose_writer_died_before_it_was_replaced_is_put_back(tmp_path):
    dying = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from motionmerge.io.atomic import atomic_folder\n"
        "replace = Path.replace\n"
        "def once(self, target):\n"
        "    replace(self, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'part').write_bytes(b'new')\n"
        "    Path.replace = once\n"
    )
    model = tmp_path / "model"
    model.mkdir()
    (model / "part").write_bytes(b"old")
    subprocess.run([sys.executable, "-c", dying, str(model)], check=False)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name[-4:] for name in left] == [".old", ".tmp"]
    with atomic_path(tmp_path / "notes.json") as temporary:
        temporary.write_bytes(b"{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes.json"]
    assert (model / "part").read_bytes() == b"old"


def test_the_longest_names_can_be_written(tmp_path):
    target = tmp_path / ("x" * 251 + ".mp4")
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"


def test_a_prepared_folder_is_empty(tmp_path):
    prepare_folder(tmp_path / "new" / "videos")
    check_file(tmp_path / "new" / "videos" / "out.mp4")
    assert not list((tmp_path / "new" / "videos").iterdir())


@pytest.mark.parametrize("name", ["a file", "a file/below", "/dev/null/below", "x" * 256])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, name):
    (tmp_path / "a file").touch()
    with pytest.raises(ConfigError, match=r"Cannot write to the folder(.|\n)*Fix:"):
        prepare_folder(tmp_path / name)


@pytest.mark.parametrize("name", ["a file", "a file/below", "/dev/null/below", "x" * 256])
def test_a_folder_that_could_not_be_made_is_refused_and_another_one_is_not_made(tmp_path, name):
    (tmp_path / "a file").touch()
    with pytest.raises(ConfigError, match=r"Cannot write to the folder(.|\n)*Fix:"):
        check_folder(tmp_path / name)
    check_folder(tmp_path / "new" / "videos")
    check_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


@pytest.mark.parametrize(
    "name", ["", ".", "/", "a folder", "a folder/..", "a file/below", "/dev/null", "x" * 256]
)
def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    with pytest.raises(ConfigError, match=r"Cannot write(.|\n)*Fix:"):
        check_file(Path(name))
    assert not list((tmp_path / "a folder").iterdir())


def test_of_folders_made_for_results_that_failed_only_empty_ones_are_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    for name in ("kept", "new", "new/deep"):
        fails = pytest.raises(ZeroDivisionError)
        with fails, folder_of_results(tmp_path / name), atomic_path(tmp_path / name / "result"):
            _ = 1 / 0
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(ZeroDivisionError), folder_of_results(tmp_path / "full" / "deep"):
        with atomic_path(tmp_path / "full" / "other") as path:
            path.touch()
        with atomic_path(tmp_path / "full" / "deep" / "result"):
            _ = 1 / 0
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["other"]


def test_a_folder_with_the_inode_of_a_removed_one_is_cleared_like_any_other(tmp_path):
    """File systems give the inode of a removed folder to the next."""
    for number in range(5):
        folder = tmp_path / str(number)
        fails = pytest.raises(ZeroDivisionError)
        with fails, folder_of_results(folder), atomic_path(folder / "result"):
            _ = 1 / 0
        folder.mkdir()
        left = folder / f".result.{_machine()}.{2**22 + 1}.01234567.tmp"
        left.touch()
        with atomic_path(folder / "result") as path:
            path.touch()
        assert not left.exists()
