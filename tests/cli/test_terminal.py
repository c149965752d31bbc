"""What a terminal cannot show does not end a command."""

from __future__ import annotations

import atexit
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from motionmerge.cli import app, main
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


def test_names_in_a_strangers_weights_do_not_command_the_terminal(tmp_path):
    card = json.dumps({"\x1b[2J": ["\x9b2J"], "x": {"\x1b]0;": "\x1b"}})
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    one = torch.ones(2, 2)
    save_file(
        {"\x1b[2J.weight": one.clone(), "b.weight": one}, first, metadata={"model_card": card}
    )
    save_file({"b.weight": one}, second, metadata={"model_card": "[" * 100_000})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"inputs: {{base: {first}, tuned: {second}}}\nexperts: {{m: base + 0.5 * (tuned - base)}}\n"
    )
    output = tmp_path / "out.safetensors"
    for words, code in (
        (("show", first), 0),
        (("show", second), 0),
        (("compare", first, second), 0),
        (("merge", recipe, "-o", output), 2),
        (("merge", recipe, "-o", output, "--missing", "keep"), 0),
    ):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == code, result.output
        assert not {"\x1b", "\x9b"} & set(result.output)
