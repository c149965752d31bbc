"""A recipe's sections as text, with its parameters by name or as numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from motionmerge.named import NamedFloat, NamedInt
from motionmerge.text import write_yaml


def sections_text(sections: Mapping[str, Any]) -> str:
    """Write sections as YAML: names and numbers as they are, one line for each schedule entry."""
    sections = dict(sections)
    schedule = sections.pop("schedule", None)
    text = "".join(write_yaml({name: value}) for name, value in sections.items())
    if schedule is None:
        return text
    lines = (write_yaml(_by_name(entry), is_one_line=True) for entry in schedule)
    return text + "schedule:\n" + "".join(f"  - {line}" for line in lines)


def with_numbers(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections with numbers in place of parameters, which they then have no more."""
    parameters = sections["parameters"]
    plain = {name: value for name, value in sections.items() if name != "parameters"}
    plain["experts"] = {
        name: _without_names(expression, parameters)
        for name, expression in sections["experts"].items()
    }
    if "schedule" in sections:
        plain["schedule"] = [
            {
                key: _without_names(value, parameters)
                if key in ("image", "attention") and isinstance(value, str)
                else value
                for key, value in entry.items()
            }
            for entry in sections["schedule"]
        ]
    return plain


def _by_name(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of a schedule with its parameters' names where it has them."""
    return {
        key: value.text if isinstance(value, (NamedFloat, NamedInt)) else value
        for key, value in entry.items()
    }


def _without_names(expression: str, parameters: Mapping[str, float]) -> str:
    """Replace parameters' names by numbers, and two minus signs that then meet by a plus."""
    numbers = {name: repr(value) for name, value in parameters.items()}
    name = r"\b[A-Za-z_]\w*\b(?!\s*[=(])"  # of no setting, and of no function
    plain = _replaced(name, numbers, expression)
    return _replaced("- -", {"- -": "+ "}, plain)


def _replaced(pattern: str, texts: Mapping[str, str], expression: str) -> str:
    """Replace what a pattern finds outside quotes by what `texts` has for it."""
    return re.sub(
        rf'"(?:[^"\\]|\\.)*"|{pattern}', lambda found: texts.get(found[0], found[0]), expression
    )
