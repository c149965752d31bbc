"""diffusers, where a test that uses what an older one lacks is skipped.

`make test-oldest` runs with the oldest diffusers that is supported, which knows fewer families.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import diffusers
import pytest
from diffusers import hooks as diffusers_hooks
from diffusers.loaders import lora_conversion_utils, single_file_utils
from packaging.version import Version

IS_OLDER = Version(diffusers.__version__) < Version("0.42")
"""From this version on, a name that is not found is a fault."""


def skip_older(reason: str) -> NoReturn:
    """Skip a test for what an older diffusers cannot do; raises again what the newest raised."""
    if not IS_OLDER:
        raise
    pytest.skip(f"diffusers {diffusers.__version__}: {reason}")


class _Missing:
    """Stands for a class or function that is not there, until it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        pytest.skip(f"diffusers {diffusers.__version__} has no {self._name}")

    def __getattr__(self, name: str) -> Any:
        self()


class _Library:
    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._module, name) or not IS_OLDER:
            return getattr(self._module, name)
        return _Missing(name)


def of_its_time(build: Callable[[], Any]) -> Callable[[], Any]:
    """Skip the test where the class is there and does not know an argument yet."""

    def build_or_skip() -> Any:
        try:
            return build()
        except TypeError as error:
            if not IS_OLDER:
                raise
            pytest.skip(f"diffusers {diffusers.__version__}: {error}")

    return build_or_skip


d = _Library(diffusers)
hooks = _Library(diffusers_hooks)
lora_converters = _Library(lora_conversion_utils)
file_converters = _Library(single_file_utils)
ltx2 = _Library(getattr(diffusers.pipelines, "ltx2", diffusers.pipelines))
