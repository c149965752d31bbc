"""The help says what its texts say: nothing in brackets is lost on the way to the terminal."""

from __future__ import annotations

import re

import pytest
import typer.main
from typer.testing import CliRunner

from motionmerge.cli import app

from .test_outputs import leaves

LEAVES = list(leaves(typer.main.get_command(app)))


def words_of(text: str) -> list[str]:
    return re.sub(r"[│╭╮╰╯─`]", " ", text).split()


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_every_word_of_a_help_text_is_shown(path, command, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    shown = " ".join(words_of(CliRunner().invoke(app, [*path, "--help"]).stdout))
    for parameter in command.params:
        if parameter.help:
            assert " ".join(words_of(parameter.help)) in shown, parameter.name
        if isinstance(parameter.show_default, str):
            assert f"[default: ({parameter.show_default})]" in shown, parameter.name


def test_defaults_that_a_model_decides_are_named_in_the_help():
    lines = CliRunner().invoke(app, ["generate", "--help"]).stdout.splitlines()
    assert sum("model's own" in line for line in lines) == 5
