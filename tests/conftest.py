"""Long tests come first, so that no process is left alone with one at the end."""

from __future__ import annotations

import functools
import gc

import pytest
import typer.testing

# Building the commands of all verbs takes longer than many of them, and they do not change.
typer.testing._get_command = functools.cache(typer.testing._get_command)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Let no search for garbage go over what the imports left, which stays to the end.

    Models of many small modules start such a search again and again: a fifth of the time.
    """
    gc.collect()
    gc.freeze()
