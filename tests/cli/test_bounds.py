"""What would take all memory is refused with a limit that is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.models.pocket.world import load_photo


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    load_photo("coffee").save("p.png")
    Path("m.jsonl").write_text('{"image": "p.png", "prompt": "the camera pans left"}\n')
    with Path("prompts.txt").open("w") as file:
        file.write("the camera pans left\n" * 5_000_000)
    return tmp_path


GENERATE = ("generate", "p.png", "--dry-run")


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (("batch", "m.jsonl", "-o", "out", "--num-videos", "1000000000", "--dry-run"), "100,000"),
        (("batch", "prompts.txt", "-o", "out", "--dry-run"), "64 MiB"),
        ((*GENERATE, "--prompt", "the camera pans left", "--num-videos", "1000000000"), "100,000"),
        ((*GENERATE, "--prompts", "prompts.txt"), "64 MiB"),
        (("evaluate", "pocket", "--num", "1000000000"), "100000"),
    ],
    ids=str,
)
def test_a_limit_is_named_before_memory_is_taken(words: tuple[str, ...], limit: str) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert limit in " ".join(result.stderr.split())
