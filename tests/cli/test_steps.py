"""`generate` shows its steps, and asks before it replaces a video, if a person is there."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.cli.steps import StepLines
from motionmerge.models.pocket.world import load_photo

GENERATE = ["generate", "p.png", "--prompt", "the camera pans left", "--steps", "1", "--size", "64"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    load_photo("coffee").save("p.png")
    return tmp_path


@pytest.mark.parametrize("total", [1, 7, 10, 12, 50, 1000])
def test_a_log_has_a_line_a_step_or_a_line_a_tenth(total, capsys):
    with StepLines(total=total, label="out.mp4") as steps:
        for _ in range(total):
            steps.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == min(total, 10)
    assert lines[-1] == f"out.mp4: step {total} of {total}, 0 s left"


def test_steps_can_be_iterated_over_as_some_pipelines_do(capsys):
    assert list(StepLines([900, 500, 100], label="out.mp4")) == [900, 500, 100]
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_each_video_names_itself_in_its_lines_and_the_result_stays_apart(work):
    result = CliRunner().invoke(app, [*GENERATE, "--num-videos", "2"])
    assert result.exit_code == 0, result.output
    for number in (1, 2):
        assert f"video {number} of 2: step 1 of 1" in result.stderr
    assert "step 1" not in result.stdout


@contextmanager
def a_terminal(monkeypatch: pytest.MonkeyPatch, answer: str) -> Iterator[list[bytes]]:
    """Make the standard streams a terminal in which somebody types an answer; collect its text."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    os.write(ours, answer.encode())
    shown: list[bytes] = []

    def collect() -> None:
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # how Linux tells that the other side is closed
                return
            if not piece:
                return
            shown.append(piece)

    reader = threading.Thread(target=collect)  # a terminal takes little text that nobody reads
    reader.start()
    with monkeypatch.context() as patched:
        streams = [os.fdopen(os.dup(theirs), mode, buffering=1) for mode in ("r", "w", "w")]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patched.setattr(sys, name, stream)
        os.close(theirs)
        try:
            yield shown
        finally:
            for stream in streams:
                stream.close()
    reader.join(timeout=60)
    os.close(ours)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("answer", "code"), [("n\n", 2), ("y\n", 0)])
def test_in_a_terminal_a_video_is_replaced_after_a_yes_alone(work, answer, code, monkeypatch):
    Path("out.mp4").write_bytes(b"mine")
    with a_terminal(monkeypatch, answer) as pieces, pytest.raises(SystemExit) as end:
        app(GENERATE)
    shown = b"".join(pieces).decode()
    assert end.value.code == code, shown
    assert "out.mp4 exists already. Replace it? [y/N]" in shown
    assert (Path("out.mp4").read_bytes() == b"mine") == (answer == "n\n")
    assert ("out.mp4: 100%" in shown) == (answer == "y\n"), "a bar of steps"
