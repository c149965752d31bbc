"""The sections of a recipe's file: read, and refused by name where they make no sense."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motionmerge.errors import ConfigError, RecipeError
from motionmerge.merging.algebra.named import NamedFloat, NamedInt, named, number_text
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.terms import is_number
from motionmerge.merging.recipes.functions import FUNCTIONS
from motionmerge.text import fix_unknown_name, parse_yaml

MAX_BYTES = 64 * 1024
"""Longest recipe."""

_SECTIONS = ("description", "parameters", "inputs", "experts", "schedule")
_INPUT_FIELDS = ("path", "sha256")


@dataclass(frozen=True)
class RecipeInput:
    """Where an input's weights are.

    Attributes:
        path: A path, relative to the recipe's folder, or `prefix:name` (see `register_resolver`).
        sha256: Hex digest that the weights must have; None accepts any.
    """

    path: str
    sha256: str | None = None


def read_sections(text: str) -> dict[Any, Any]:
    """Read the sections of a recipe's text.

    Raises:
        RecipeError: It is too long, no YAML, or has an unknown section.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(
            f"The recipe is longer than {MAX_BYTES // 1024} KiB.", fix="Write a shorter recipe."
        )
    try:
        sections = parse_yaml(text, source="The recipe")
    except ConfigError as error:
        raise RecipeError(error.message, fix=error.fix) from error
    if not isinstance(sections, dict):
        raise RecipeError(
            f"The recipe is a {type(sections).__name__}, not a mapping.",
            fix="Write the sections `inputs:`, `experts:` and `schedule:`.",
        )
    for key in sections:
        if key not in _SECTIONS:
            raise RecipeError(
                f"Unknown section `{key}`.", fix=fix_unknown_name(str(key), _SECTIONS)
            )
    return sections


def mapping_of(sections: Mapping[Any, Any], key: str) -> dict[Any, Any]:
    """Return a section that is a mapping with at least one entry."""
    value = sections.get(key)
    if not isinstance(value, dict) or not value:
        raise RecipeError(
            f"The recipe has no `{key}:`, or it is not a mapping.",
            fix=f"Write `name: ...` lines under `{key}:`.",
        )
    for name in value:
        _check_name(name, key)
    return value


def read_parameters(sections: Mapping[Any, Any]) -> dict[str, float]:
    """Read the section `parameters:`: numbers by name; none without it."""
    if "parameters" not in sections:
        return {}
    found = {}
    for name, value in mapping_of(sections, "parameters").items():
        if not is_number(value) or not math.isfinite(value) or abs(value) >= 1 << 63:
            raise RecipeError(
                f"`parameters.{name}` is {value!r}, not a number.",
                fix=f"Write e.g. `{name}: 0.25`.",
            )
        found[name] = value
    return found


def with_values(schedule: Any, parameters: Mapping[str, float]) -> Any:
    """Put parameters in place of their names in a schedule as it was read."""
    if not parameters or not isinstance(schedule, list):
        return schedule
    return [
        {
            key: named(parameters[value], value)
            if key != "expert" and isinstance(value, str) and value in parameters
            else value
            for key, value in entry.items()
        }
        if isinstance(entry, dict)
        else entry
        for entry in schedule
    ]


def check_use(
    parameters: Mapping[str, float], experts: Mapping[str, Checkpoint], schedule: Any
) -> None:
    """Refuse a parameter that changes nothing, as a mistyped one does."""
    text = " ".join([*map(str, experts.values()), *map(_named_values, schedule or ())])
    used = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text))
    for name in parameters:
        if name not in used:
            raise RecipeError(
                f"The parameter `{name}` is used nowhere.",
                fix="Use it in an expression or in the schedule, or remove it.",
            )


def _named_values(entry: Any) -> str:
    values = entry.values() if isinstance(entry, dict) else ()
    return " ".join(number_text(one) for one in values if isinstance(one, (NamedFloat, NamedInt)))


def _check_name(name: Any, section: str) -> None:
    """Refuse what cannot be the name of an input, a parameter or an expert."""
    fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name)
    if not fits or keyword.iskeyword(name) or (section != "experts" and name in FUNCTIONS):
        raise RecipeError(
            f"`{str(name)[:80]}` is not a name for one of the {section}.",
            fix="Use letters, digits and underscores, and no function's name.",
        )


def text_of(value: Any, where: str) -> str:
    """Refuse a value that is no text."""
    if not isinstance(value, str):
        raise RecipeError(
            f"{where} is a {type(value).__name__}, not text.", fix="Write text; quote it if needed."
        )
    return value


def read_input(name: str, value: Any) -> RecipeInput:
    """Read one entry of the section `inputs:`."""
    where = f"inputs.{name}"
    if not isinstance(value, dict):
        return RecipeInput(text_of(value, where))
    for key in value:
        if key not in _INPUT_FIELDS:
            raise RecipeError(
                f"{where} has an unknown field `{key}`.",
                fix=fix_unknown_name(str(key), _INPUT_FIELDS),
            )
    digest = value.get("sha256")
    if digest is not None:
        digest = text_of(digest, f"{where}.sha256").removeprefix("sha256:").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise RecipeError(
                f"{where}.sha256 is not 64 hexadecimal digits.",
                fix="Copy it from `sha256sum FILE`, in quotes.",
            )
    return RecipeInput(text_of(value.get("path"), f"{where}.path"), digest)
