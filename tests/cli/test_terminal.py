"""What a terminal cannot show does not end a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from motionmerge.models.pocket.world import load_photo


def test_names_that_a_terminal_cannot_show_are_written_in_ascii(tmp_path: Path) -> None:
    load_photo("coffee").save(tmp_path / "photo.png")
    command = ["generate", "photo.png", "--prompt", "the camera pans left", "-o", "é.mp4"]
    result = subprocess.run(
        [sys.executable, "-m", "motionmerge.cli", *command, "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("would write \\xe9.mp4: ")
