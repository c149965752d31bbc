"""Text of strangers in a terminal: names of files, prompts, metadata."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FEW = 20
"""Lines of one kind that are printed."""


def harmless(text: str) -> str:
    """Return a text on one line, without what a terminal would obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def harmless_lines(text: str) -> str:
    """Return a text of several lines without what a terminal would obey."""
    return "\n".join(map(harmless, text.split("\n")))


def print_first(lines: Sequence[str]) -> None:
    """Print the first lines, indented, and how many more `--json` lists."""
    for line in lines[:FEW]:
        print(f"    {harmless(line)}")
    if len(lines) > FEW:
        print(f"    and {len(lines) - FEW} more (--json lists all)")


def print_json(value: Any) -> None:
    """Print a result for programs, indented so that people can read it too."""
    print(json.dumps(value, indent=2))


def aligned(rows: Sequence[Sequence[str]], *, numbers: bool) -> list[str]:
    """Return rows as lines of columns; `numbers` are flush right in all columns but the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        align = str.rjust if numbers else str.ljust
        cells = (align(cell, width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def quoted(path: Path) -> str:
    """Return a path as bash and zsh read it, in printable signs alone."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    plain = set(range(32, 127)) - set(b"'\\")
    signs = (chr(one) if one in plain else f"\\x{one:02x}" for one in os.fsencode(text))
    return f"$'{''.join(signs)}'"
