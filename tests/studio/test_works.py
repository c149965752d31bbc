"""The studio keeps what it made through kills and full disks, and whoever waits has a place."""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import threading

import pytest

pytest.importorskip("gradio")

from motionmerge.errors import ConfigError, DataError
from motionmerge.io import atomic
from motionmerge.studio import fragments
from motionmerge.studio import works as works_module
from motionmerge.studio.fragments import fault
from motionmerge.studio.turns import MOST_WAITING, Stopped, Turns
from motionmerge.studio.works import History, Works, work_of

HOSTILE = '<img src=x onerror="alert(1)">'
GOOD = {
    "id": "f" * 16, "kind": "motion", "prompt": HOSTILE, "seed": 3, "model": "pocket",
    "seconds": 1, "videos": [{"name": HOSTILE, "file": "1.mp4", "numbers": {"motion_degree": 2}}],
}  # fmt: skip
VIDEO = {**GOOD["videos"][0]}


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"id": "', "[" * 100_000, " " * (5 << 20), '"' + "x" * 100 + '"'),
        *(
            json.dumps({**GOOD, **wrong})
            for wrong in (
                *({"id": "e" * 16}, {"id": 1}, {"prompt": 5}, {"seconds": "x"}, {"videos": []}),
                *({"seed": [1]}, {"seed": None}, {"seconds": float("nan")}, {"version": 9}),
                *({"videos": {}}, {"videos": [[]]}, {"videos": [VIDEO] * 101}),
                *(
                    {"videos": [{**VIDEO, **wrong}]}
                    for wrong in (
                        *({"file": "../../etc/passwd"}, {"file": "a/1.mp4"}, {"file": 1}),
                        *({"numbers": {"motion_degree": "x"}}, {"numbers": []}, {"name": None}),
                        {"sound": "1.wav"},
                    )
                ),
            )
        ),
    ],
)
def test_what_is_no_work_is_counted_and_not_shown(tmp_path, content):
    for name, text in {"f" * 16: content, "a" * 16: json.dumps({**GOOD, "id": "a" * 16})}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "work.json").write_text(text)
    found = Works(tmp_path).history()
    assert [one.id for one in found.works] == ["a" * 16] and found.num_damaged == 1
    assert found.works[0].videos[0].seed == 3, "it was written before videos had seeds"
    page = fragments.history(found)
    assert "1 more cannot be read" in page and "<img src=x" not in page


def test_a_kill_while_a_work_is_kept_leaves_all_or_nothing(tmp_path):
    works, work = Works(tmp_path / "works"), work_of(GOOD, GOOD["id"])
    works.folder.mkdir()

    def scratch(name):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.mp4").write_bytes(b"x")
        return tmp_path / name

    child = os.fork()
    if not child:
        moved = []

        def die_at_the_second(*names):
            moved.append(names) if not moved else os.kill(os.getpid(), signal.SIGKILL)

        works_module.shutil.move = die_at_the_second
        works.save(work, scratch("first"))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(works.folder.iterdir())) == 1 and works.history() == History([])
    atomic._others.clear()  # another process comes, which has not looked into the folder
    works.save(work, scratch("second"))
    assert works.history() == History([work])
    assert [path.name for path in works.folder.iterdir()] == [work.id], "the rest was removed"


def test_a_full_disk_is_named_and_keeps_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "works").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(DataError, match="Cannot write works") as error:
            Works(tmp_path / "works").save(work_of(GOOD, GOOD["id"]), tmp_path / "scratch")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "free space" in fault(error.value) and not list((tmp_path / "works").iterdir())


def test_whoever_comes_first_is_served_first_and_may_leave():
    """Five ask at once: each is told its place, one gives up, one comes when the line is full."""
    turns, stops, told = Turns(), [threading.Event() for _ in range(5)], queue.Queue()
    served, go_on = queue.Queue(), threading.Event()

    def ask(number):
        try:
            with turns.turn(tell=lambda before: told.put((number, before)), stop=stops[number]):
                served.put(number)
                go_on.wait(20)
        except Stopped:
            served.put(-number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        assert (served.get(timeout=20) if number == 0 else told.get(timeout=20)) in (
            *(0, (number, number)),
        )
    stops[2].set()
    assert served.get(timeout=20) == -2
    assert sorted(told.get(timeout=20) for _ in range(2)) == [(3, 2), (4, 3)], "they move up"
    full = Turns([threading.Event() for _ in range(MOST_WAITING + 1)])
    with pytest.raises(ConfigError, match="others are waiting"):
        full.turn(tell=print, stop=threading.Event()).__enter__()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert [served.get_nowait() for _ in range(3)] == [1, 3, 4]
