"""The help as a person sees it in a terminal: nothing is lost, and nothing misleads."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
import typer.rich_utils
from typer.testing import CliRunner

import motionmerge
from motionmerge.cli import app
from motionmerge.cli.help import unwrapped

from .test_outputs import leaves

GROUP = typer.main.get_command(app)
LEAVES = list(leaves(GROUP))


def groups(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", {})
    if inner:
        yield path, command
    for name, one in inner.items():
        yield from groups(one, (*path, name))


COMMANDS = [*groups(GROUP), *LEAVES]
each_verb = pytest.mark.parametrize(
    ("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES]
)
each_command = pytest.mark.parametrize(
    ("path", "command"), COMMANDS, ids=[" ".join(path) or "motionmerge" for path, _ in COMMANDS]
)


def words_of(text: str) -> list[str]:
    return re.sub(r"[│╭╮╰╯─`]", " ", text).split()


def help_of(path: tuple[str, ...], *, flag: str = "--help") -> str:
    return _shown((*path, flag), typer.rich_utils.MAX_WIDTH)


@functools.cache
def _shown(words: tuple[str, ...], max_width: int | None) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 500)


def choices(parameter: Any) -> list[str]:
    described = getattr(parameter, "type_descriptor", None) or parameter.type
    return list(getattr(described, "choices", None) or ())


@each_command
@pytest.mark.usefixtures("wide")
def test_every_word_of_a_help_text_is_shown(path, command):
    shown = " ".join(words_of(help_of(path)))
    assert " ".join(words_of(command.help)) in shown
    assert " ".join(words_of(command.epilog)) in shown
    for parameter in command.params:
        if parameter.help:
            assert " ".join(words_of(parameter.help)) in shown, parameter.name


@each_command
@pytest.mark.usefixtures("wide")
def test_every_default_is_shown(path, command):
    rows = help_of(path).splitlines()
    for parameter in command.params:
        shown = parameter.show_default
        if isinstance(shown, str):
            expected = f"[default: ({shown})]"
        elif parameter.default in (None, False) or not shown:
            continue
        else:
            expected = f"[default: {parameter.default}]"
        assert any(parameter.opts[0] in row and expected in row for row in rows), parameter.name


@each_verb
@pytest.mark.usefixtures("wide")
def test_every_choice_and_every_range_is_shown(path, command):
    rows = [row for row in help_of(path).splitlines() if row.startswith("│")]
    for parameter in command.params:
        row = next((row for row in rows if parameter.opts[0] in row), "")
        if getattr(parameter, "show_choices", True) and choices(parameter):
            assert "|".join(choices(parameter)) in row, parameter.name
        for limit in (getattr(parameter, "min", None), getattr(parameter, "max", None)):
            if limit is not None:
                assert re.search(rf"\[.*{limit}.*\]", row), parameter.name


@each_verb
def test_every_value_has_a_name_that_says_what_to_write(path, command):
    for parameter in command.params:
        if getattr(parameter, "is_flag", False) or choices(parameter):
            continue
        assert parameter.metavar, f"{parameter.name} is shown as its type in Python"
        if not parameter.opts[0].startswith("-"):
            assert parameter.metavar == parameter.name.upper()


@each_command
def test_a_flag_that_takes_no_value_is_shown_without_a_type(path, command):
    assert "<bool>" not in help_of(path)


@each_command
def test_the_short_flag_shows_the_same_help(path, command):
    assert help_of(path, flag="-h") == help_of(path)


@each_command
def test_every_help_ends_with_an_example_that_can_be_typed(path, command):
    start, *words = shlex.split(command.epilog.removeprefix("Example: "))
    assert start == "motionmerge" and tuple(words[: len(path)]) == path
    verb = GROUP
    while words and words[0] in getattr(verb, "commands", {}):
        verb = verb.commands[words.pop(0)]
    verb.make_context("verb", words)  # refuses what the verb does not know
    assert command.epilog in help_of(path)[-260:], "one line of 80 columns, and the last"


@each_command
def test_the_version_is_printed_by_the_command_and_behind_every_verb(path, command):
    assert help_of(path, flag="--version") == f"motionmerge {motionmerge.__version__}\n"


def test_defaults_that_a_model_decides_are_named_in_the_help():
    lines = help_of(("generate",)).splitlines()
    assert sum("model's own" in line for line in lines) == 6


@pytest.mark.parametrize("verb", ["generate", "batch"])
def test_the_options_of_videos_are_in_panels(verb):
    panels = re.findall(r"╭─ (\w+) ─", help_of((verb,)))
    assert {"Model", "Experts", "Video", "Output"} <= set(panels)


def test_paragraphs_are_joined_and_tables_are_kept():
    text = "One\nsentence.\n\nname   what it is\nother  what that is\n\nA second\none."
    joined = "One sentence.\n\nname   what it is\nother  what that is\n\nA second one."
    assert unwrapped(text) == joined


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("motionmerge gener", "generate"), ("motionmerge show edg", "edg-official")],
)
def test_the_shell_completes_verbs_and_the_names_of_recipes(typed, offered):
    words = typed.split()
    env = {
        "_MOTIONMERGE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    result = CliRunner().invoke(app, [], env=env, prog_name="motionmerge")
    assert result.stdout.split() == [offered]


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["generte"], "generate"), (["export", "lora"], "loras"), (["train", "pocket-bas"], None)],
)
def test_a_mistyped_verb_or_run_is_answered_with_the_right_one(words, meant):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    said = " ".join(words_of(result.stderr))
    assert (f"Did you mean '{meant}'" if meant else "Write pocket-base") in said


@each_verb
def test_wrong_words_are_answered_with_an_example(path, command):
    result = CliRunner().invoke(app, [*path, "--no-such-flag"])
    assert result.exit_code == 2
    assert " ".join(words_of(command.epilog)) in " ".join(words_of(result.output))
