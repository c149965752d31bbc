"""What a terminal cannot show does not end a command."""

from __future__ import annotations

import atexit
import io
import sys
from pathlib import Path

import pytest

from motionmerge.cli import main
from motionmerge.models.pocket.world import load_photo


def test_names_that_a_terminal_cannot_show_are_written_in_ascii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_photo("coffee").save(tmp_path / "photo.png")
    words = ["generate", "photo.png", "--prompt", "the camera pans left", "-o", "é.mp4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["motionmerge", *words, "--dry-run"])
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # as `main` sets it, and taken back
        monkeypatch.setenv(f"{library}_VERBOSITY", "error")
    monkeypatch.setattr(atexit, "register", lambda *_: None)  # this process goes on
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    sys.stdout.seek(0)
    assert sys.stdout.read().startswith("would write \\xe9.mp4: ")
