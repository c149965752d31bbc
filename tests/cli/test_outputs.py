"""Outputs are checked before any work, by every verb, in the same words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer.main
from safetensors.torch import save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.models.pocket.world import load_photo

GROUP = typer.main.get_command(app)


def leaves(command, path=()):
    inner = getattr(command, "commands", {})
    for name, one in inner.items():
        yield from leaves(one, (*path, name))
    if not inner:
        yield path, command


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    load_photo("coffee").save("p.png")
    save_file({"unet.a.weight": torch.ones(2, 2)}, "w.safetensors")
    Path("r.yaml").write_text("inputs: {w: w.safetensors}\nexperts: {e: w}\n")
    Path("m.jsonl").write_text('{"image": "p.png", "prompt": "the camera pans left"}\n')
    Path("file").write_text("")
    Path("folder/unet").mkdir(parents=True)
    return tmp_path


GENERATE = ("generate", "p.png", "--prompt", "the camera pans left")
VERBS = {
    "generate": (*GENERATE, "-o", "{}/out.mp4"),
    "generate, dry run": (*GENERATE, "--dry-run", "-o", "{}/out.mp4"),
    "generate, sheet": (*GENERATE, "--sheet", "{}/sheet.png"),
    "batch": ("batch", "m.jsonl", "-o", "{}"),
    "batch, dry run": ("batch", "m.jsonl", "-o", "{}", "--dry-run"),
    "demo": ("demo", "-o", "{}"),
    "train": ("train", "pocket-base", "-o", "{}"),
    "train, dry run": ("train", "pocket-base", "-o", "{}", "--dry-run"),
    "evaluate": ("evaluate", "pocket", "-o", "{}"),
    "merge": ("merge", "r.yaml", "-o", "{}"),
    "merge, dry run": ("merge", "r.yaml", "-o", "{}", "--dry-run"),
    "extrapolate": ("extrapolate", "w.safetensors", "w.safetensors", "-o", "{}"),
    "compare": ("compare", "w.safetensors", "w.safetensors", "--plot", "{}/p.svg"),
    "export loras": ("export", "loras", "r.yaml", "-o", "{}"),
    "export original": ("export", "original", "r.yaml", "--model", "folder", "-o", "{}"),
    "export two-experts": ("export", "two-experts", "r.yaml", "--model", "folder", "-o", "{}/o"),
    "convert": ("convert", "w.safetensors", "-o", "{}"),
    "convert, back": ("convert", "folder", "--to-official", "-o", "{}/o.ckpt"),
}
PLACES = ["file", "file/below", "/dev/null/below", "/proc/below"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("words", VERBS.values(), ids=list(VERBS))
def test_a_place_that_cannot_be_written_is_refused_before_any_work(work, words, place):
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("this machine has no /proc")
    before = sorted(work.rglob("*"))
    result = CliRunner().invoke(app, [word.format(place) for word in words])
    assert result.exit_code == 2, result.output
    assert "Cannot write" in result.stderr and "Fix:" in result.stderr
    assert sorted(work.rglob("*")) == before


GO_ON = [
    *(("measure",), ("train",), ("sweep",), ("tune",), ("probe",), ("data", "check"), ("studio",)),
    ("compare-knobs",),
    *(("evaluate", "pocket"), ("evaluate", "vbench"), ("evaluate", "ucf101")),
]
"""Verbs that keep the results that are there, and add the missing ones."""


def test_every_verb_that_replaces_files_has_overwrite_in_the_same_words():
    said = set()
    for path, command in leaves(GROUP):
        if path in GO_ON:
            continue
        options = {spelled: one for one in command.params for spelled in one.opts}
        if {"--output", "--plot", "--sheet"} & set(options):
            assert "--overwrite" in options, path
            said.add(options["--overwrite"].help)
    assert said == {"Replace existing files."}


def test_a_video_that_is_there_is_replaced_only_if_that_is_wanted(work):
    Path("out.mp4").write_bytes(b"mine")
    for more in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, [*GENERATE, *more])
        assert result.exit_code == 2 and "out.mp4 exists already" in result.stderr
    assert Path("out.mp4").read_bytes() == b"mine"
    short = ["--steps", "1", "--size", "64", "--overwrite"]
    result = CliRunner().invoke(app, [*GENERATE, *short])
    assert result.exit_code == 0, result.output
    assert Path("out.mp4").read_bytes() != b"mine"


def test_a_batch_replaces_other_videos_of_the_same_name_only_if_that_is_wanted(work):
    words = ["batch", "m.jsonl", "-o", "out", "--names", "vbench", "--size", "64", "--steps", "1"]
    assert CliRunner().invoke(app, words).exit_code == 0
    other = [*words, "--seed", "1"]
    refused = CliRunner().invoke(app, other)
    assert refused.exit_code == 2 and "made with other settings" in refused.stderr
    assert "`--overwrite`" in refused.stderr
    result = CliRunner().invoke(app, [*other, "--overwrite", "--json"])
    assert result.exit_code == 0, result.output
    assert re.search(r'"skipped": 0', result.stdout)
    again = CliRunner().invoke(app, [*other, "--overwrite", "--json"])
    assert re.search(r'"skipped": 1', again.stdout)
