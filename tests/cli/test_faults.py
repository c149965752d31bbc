"""Whatever goes wrong, a command ends with one message on stderr and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app

COMMAND = [sys.executable, "-m", "motionmerge.cli"]
FULL = Path("/dev/full")


def fail_in_show(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("motionmerge.cli.show._describe_weights", raise_it)


def test_a_fault_of_ours_is_one_line_that_says_how_to_report_it(monkeypatch):
    fail_in_show(monkeypatch, KeyError("tiles"))
    result = CliRunner().invoke(app, ["show", "x.safetensors"])
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Fault: KeyError: 'tiles'. ") and "--debug" in line


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_debug_shows_the_traceback_of_a_fault_and_of_an_error(monkeypatch, way):
    before = ["--debug"] if way == "flag" else []
    if way == "variable":
        monkeypatch.setenv("MOTIONMERGE_DEBUG", "1")
    for error in (KeyError("tiles"), None):
        if error is not None:
            fail_in_show(monkeypatch, error)
        result = CliRunner().invoke(app, [*before, "show", "nowhere.safetensors"])
        assert "Traceback (most recent call last)" in result.stderr
        assert result.stderr.splitlines()[-1].startswith(("Fault: ", "  Fix: "))
        monkeypatch.undo()
        if way == "variable":
            monkeypatch.setenv("MOTIONMERGE_DEBUG", "1")


def test_without_debug_no_error_shows_a_traceback():
    result = CliRunner().invoke(app, ["show", "nowhere.safetensors"])
    assert result.exit_code == 2 and "Traceback" not in result.stderr


def test_ctrl_c_ends_with_130_and_one_line(monkeypatch):
    fail_in_show(monkeypatch, KeyboardInterrupt())
    result = CliRunner().invoke(app, ["show", "x.safetensors"])
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["Stopped."]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device", "/there"), MemoryError(), PermissionError(13, "no")],
    ids=repr,
)
def test_what_the_machine_refuses_is_no_fault_of_ours(monkeypatch, error):
    fail_in_show(monkeypatch, error)
    result = CliRunner().invoke(app, ["show", "x.safetensors"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and "Fix: " in result.stderr


@pytest.mark.skipif(not FULL.exists(), reason="this machine has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["version"], ["--help"], ["show", "pocket:base", "--json"]])
def test_a_full_disk_behind_the_standard_output_is_one_message(words, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with FULL.open("w") as full:
        result = subprocess.run(
            [*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_stopped_reading_is_one_message(unbuffered):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(
            [*COMMAND, "version"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(write_end)
    assert result.returncode != 0
    assert "Broken pipe" in result.stderr and "Traceback" not in result.stderr
