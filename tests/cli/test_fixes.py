"""Every `Fix:` can be done: the flags that it names are flags of the verb that was called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer.main
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import motionmerge
from motionmerge.cli import app
from motionmerge.cli.faults import PYTHON_TO_FLAG, SETTINGS, flag_of, flags_of, in_flags
from motionmerge.models.pocket.components import weights_path
from motionmerge.models.pocket.world import load_photo

PACKAGE = Path(motionmerge.__file__).parent
COMMAND = re.compile(r"`motionmerge ((?:[a-z]+[ `])(?:[a-z-]+ )?)([^`]*)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
GROUP = typer.main.get_command(app)
OF_ALL = ("--help",)
FILES = {
    "video_flags.py": ["generate", "batch"],
    "lora_flags.py": ["generate", "batch"],
    "show_lora.py": ["show"],
    "merge.py": ["merge", "generate", "batch", "export loras"],
    "bench.py": ["sweep", "tune", "probe"],
    "data.py": ["data check"],
    "evaluate.py": ["evaluate pocket"],
    "evaluate_fvd.py": ["evaluate fvd"],
    "evaluate_vbench.py": ["evaluate vbench"],
    "evaluate_ucf101.py": ["evaluate ucf101"],
    "train.py": ["train"],
    "export.py": ["export two-experts", "export loras", "export original"],
    "outputs.py": ["generate", "compare", "convert", "demo", "evaluate pocket", "export original"],
}
"""Which verbs show the errors of a file of `cli/`; others are named as their verb."""


def flags(verb: str) -> set[str]:
    return flags_of(GROUP, verb.split()) | set(OF_ALL)


def fixes(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of all `fix=` and of variables of that name, with `{}` for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "fix":
            yield node.value.lineno, text_of(node.value)
        elif isinstance(node, (ast.Assign, ast.AugAssign)) and isinstance(node.value, ast.expr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(
                isinstance(one, ast.Name) and one.id.lower().strip("_") == "fix" for one in targets
            ):
                yield node.lineno, text_of(node.value)


def text_of(node: ast.expr) -> str:
    parts = (one.value for one in ast.walk(node) if isinstance(one, ast.Constant))
    return " ".join(part for part in parts if isinstance(part, str))


ALL_FIXES = [
    (path.relative_to(PACKAGE), line, text)
    for path in sorted(PACKAGE.rglob("*.py"))
    for line, text in fixes(path)
]


def test_below_the_command_line_no_fix_names_a_flag_but_in_a_whole_command():
    found = [
        f"{path}:{line}: {text}"
        for path, line, text in ALL_FIXES
        if path.parts[0] != "cli" and FLAG.search(re.sub("`(?:motionmerge|hf) [^`]*`", "", text))
    ]
    assert not found, (
        "write these in Python (missing='keep'); cli/faults.py names the flag:\n" + "\n".join(found)
    )


def test_whole_commands_in_fixes_have_the_flags_that_they_use():
    for path, line, text in ALL_FIXES:
        for verb, rest in COMMAND.findall(text):
            unknown = set(FLAG.findall(rest)) - flags(verb.strip("` "))
            assert not unknown, f"{path}:{line}: `motionmerge {verb}` has no {unknown}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.name)
def test_flags_in_the_fixes_of_a_verb_are_flags_of_it(path: Path):
    verbs = FILES.get(path.name, [path.stem.replace("_", "-")])
    if path.stem in ("__init__", "__main__", "faults"):
        return
    for line, text in fixes(path):
        for flag in FLAG.findall(re.sub("`motionmerge [^`]*`", "", text)):
            lacking = [verb for verb in verbs if flag not in flags(verb)]
            assert not lacking, f"{path.name}:{line}: {flag} is no flag of {lacking}"


def test_every_flag_of_the_translation_is_one_of_some_verb():
    every = {flag for verb in GROUP.commands for flag in flags(verb)} | flags("export loras")
    for flag in (*PYTHON_TO_FLAG.values(), *map(flag_of, SETTINGS)):
        assert flag.partition(" ")[0] in every


def test_a_fix_in_python_names_the_flag_of_a_verb_that_has_it():
    fix = "Choose another folder, or pass `overwrite=True`."
    assert in_flags(fix, {"--overwrite"}) == "Choose another folder, or pass `--overwrite`."
    assert in_flags(fix, set()) == "Choose another folder."
    assert (
        in_flags("Pass `missing='keep'`: go on.", {"--missing"}) == "Pass `--missing keep`: go on."
    )
    assert in_flags("Raise `guidance_scale`.", {"--guidance"}) == (
        "Raise `guidance_scale` (--guidance)."
    )
    assert in_flags("Pass `base=MODEL`.", {"--base"}) == "Pass `--base MODEL`."
    dense = "Take recipe='lora-rescue', inputs={'base': MODEL, 'style': FILE}."
    assert in_flags(dense, {"--recipe", "--input", "--base"}) == (
        "Take --recipe lora-rescue --input base=MODEL --input style=FILE."
    )
    assert in_flags("Pass its weights: `inputs={'a': FILE}`.", {"--input"}) == (
        "Pass its weights: `--input a=FILE`."
    )


# Errors as a user meets them: what each `Fix:` names is there.


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fixes")
    load_photo("coffee").save(folder / "p.png")
    whole = {"unet.conv_in.weight": torch.ones(4, 4), "unet.conv_in.bias": torch.ones(4)}
    save_file(whole, folder / "base.safetensors")
    save_file({"unet.conv_in.weight": torch.zeros(4, 4)}, folder / "fewer.safetensors")
    nan = whole | {"unet.conv_in.bias": torch.full((4,), torch.nan)}
    save_file(nan, folder / "nan.safetensors")
    lora = {f"transformer.a.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(lora, folder / "lora.safetensors")
    recipe = "inputs: {base: base.safetensors, tuned: %s.safetensors}\n"
    recipe += "experts: {e: base + 0.5 * (tuned - base)}\n"
    for name in ("fewer", "nan"):
        (folder / f"{name}.yaml").write_text(recipe % name)
    (folder / "again.yaml").write_text("inputs: {a: 'memory:a'}\nexperts: {e: a}\n")
    (folder / "taken").mkdir()
    for name in ("e.safetensors", "extrapolated.safetensors", "index.html", "recipe.yaml"):
        (folder / "taken" / name).write_text("")
    for name in ("p.svg", "taken.mp4", "t.safetensors"):
        (folder / name).write_text("")
    (folder / "m.jsonl").write_text('{"image": "p.png", "prompt": "the camera pans left"}\n')
    return folder


GENERATE = ("generate", "p.png", "--prompt", "the camera pans left", "--dry-run")
PROVOKED = [
    ("merge", "fewer.yaml", "-o", "out"),
    ("merge", "nan.yaml", "-o", "out"),
    ("merge", "again.yaml", "-o", "out"),
    ("merge", "fewer.yaml", "-o", "taken", "--missing", "keep"),
    ("merge", "fewer.yaml", "-o", "out", "--layout", "pipeline", "--missing", "keep"),
    ("merge", "pocket", "-o", "out", "--input", "base"),
    ("extrapolate", "base.safetensors", "fewer.safetensors", "-o", "out"),
    ("extrapolate", "base.safetensors", "nan.safetensors", "-o", "out"),
    ("extrapolate", "base.safetensors", "base.safetensors", "-o", "taken"),
    ("extrapolate", "base.safetensors", "base.safetensors", "-o", "x.safetensors"),
    ("extrapolate", "lora.safetensors", "base.safetensors", "-o", "out"),
    ("export", "loras", "fewer.yaml", "-o", "out"),
    ("export", "loras", "fewer.yaml", "-o", "taken"),
    ("export", "original", "fewer.yaml", "--model", "taken", "-o", "out"),
    ("export", "two-experts", "fewer.yaml", "--model", "taken", "-o", "out"),
    ("compare", "base.safetensors", "nan.safetensors"),
    ("compare", "base.safetensors", "base.safetensors", "--plot", "p.svg"),
    ("compare", "base.safetensors", "base.safetensors", "--plot", "p.gif"),
    ("convert", "base.safetensors", "-o", "taken"),
    ("convert", "taken", "--to-official", "-o", "t.safetensors"),
    ("convert", "base.safetensors"),
    ("demo", "-o", "taken"),
    ("tune", "pocket", "--boundary", "0.5", "-o", "out"),
    ("tune", "pocket", "--size", "64", "-o", "out"),
    ("tune", "knob", "--over", "motion=1", "-o", "out"),
    ("probe", "pocket", "--windows", "3", "-o", "out"),
    ("evaluate", "pocket", "--input", "tuned=base.safetensors", "-o", "out", "--num", "6"),
    ("train", "pocket-base", "--dry-run", "--set", "settings.stepz=1"),
    ("train", "dynamicrafter-512-adapter"),
    ("show", "nowhere.safetensors"),
    ("show", "base.safetensors", "--base", "base.safetensors"),
    (*GENERATE, "-o", "taken.mp4"),
    (*GENERATE, "--weights", "nosuch"),
    (*GENERATE, "--weights", "nosuch.safetensors"),
    (*GENERATE, "--weights", "base.safetensors"),
    (*GENERATE, "--weights", "lora.safetensors"),
    (*GENERATE, "--lora", "base.safetensors"),
    (*GENERATE, "--lora", "lora.safetensors=much"),
    (*GENERATE, "--lora", "lora.safetensors=1", "--motion", "1"),
    (*GENERATE, "--negative-prompt", "x"),
    (*GENERATE, "--guidance-2", "1"),
    (*GENERATE, "--loop"),
    (*GENERATE, "--recipe", "again.yaml"),
    (*GENERATE, "--recipe", "fewer.yaml"),
    (*GENERATE, "--boundary", "0.5", "--weights", "base"),
    ("batch", "m.jsonl", "-o", "out", "--dry-run", "--weights", "lora.safetensors"),
    ("batch", "m.jsonl", "-o", "out", "--dry-run", "--negative-prompt", "x"),
    ("batch", "m.jsonl", "-o", "out", "--dry-run", "--workers", "3"),
    ("batch", "m.jsonl", "-o", "out", "--dry-run", "--recipe", "fewer.yaml"),
    ("batch", "m.jsonl", "-o", "p.png", "--dry-run"),
]


@pytest.mark.parametrize("words", PROVOKED, ids=" ".join)
def test_the_fix_of_an_error_names_flags_that_the_verb_has(words, work, monkeypatch):
    monkeypatch.chdir(work)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    _, found, fix = result.stderr.partition("Fix: ")
    assert found, result.stderr
    fix = " ".join(fix.split())
    own = re.sub("`motionmerge [^`]*`", "", fix)
    assert set(FLAG.findall(own)) <= flags_of(GROUP, list(words)), fix
    assert not re.search(r"=True\b|='", own), f"this is Python, not the command line: {fix}"
    assert fix[0].upper() == fix[0] and fix.endswith((".", "!", "?")), fix


def test_what_the_fix_advises_for_one_sided_tensors_helps(work, monkeypatch, tmp_path):
    monkeypatch.chdir(work)
    for words in (
        ("merge", "fewer.yaml"),
        ("extrapolate", "base.safetensors", "fewer.safetensors"),
    ):
        out = tmp_path / words[0]
        refused = CliRunner().invoke(app, [*words, "-o", str(out)])
        (advised,) = re.findall(r"`(--missing \w+)`", refused.stderr)
        result = CliRunner().invoke(app, [*words, "-o", str(out), *advised.split()])
        assert result.exit_code == 0, result.output
        assert "unet.conv_in.bias" in " ".join(result.stdout.split())


def test_weights_of_the_pocket_model_are_looked_at_in_a_dry_run(work, monkeypatch):
    monkeypatch.chdir(work)
    for weights in ("tuned", str(weights_path("tuned"))):
        result = CliRunner().invoke(app, [*GENERATE, "--weights", weights])
        assert result.exit_code == 0, result.output


def test_weights_with_few_of_the_models_tensors_are_refused_unless_the_rest_is_to_stay(
    work, monkeypatch
):
    monkeypatch.chdir(work)
    whole = load_file(weights_path("tuned"))
    name = next(name for name in whole if name.startswith("unet."))
    save_file({name: whole[name]}, work / "one.safetensors")
    refused = CliRunner().invoke(app, [*GENERATE, "--weights", "one.safetensors"])
    assert refused.exit_code == 2, refused.output
    assert re.search(r"has 1 of the \d+ tensors of `unet`", refused.stderr)
    assert "`--missing keep`" in refused.stderr
    kept = CliRunner().invoke(app, [*GENERATE, "--weights", "one.safetensors", "--missing", "keep"])
    assert kept.exit_code == 0, kept.output
    assert "the model's own stays there" in kept.stderr
