"""How `--help` reads: paragraphs that the terminal wraps, flags without a type, one example."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup


def unwrapped(text: str) -> str:
    """Join the lines of each paragraph, as the terminal wraps them itself; keep tables.

    A line of a table has two spaces between its cells.
    """
    return re.sub(r"(?<=\S)\n(?=\S)(?!\S+ {2,})", " ", text)


def _without_type(parameters: list[Any]) -> list[Any]:
    """Show `--json`, not `--json <bool>`, which looks as if it took a value."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters


class Verb(TyperCommand):
    """A verb whose help can be read at any width."""

    def __init__(self, *args: Any, help: str | None = None, **options: Any) -> None:
        super().__init__(*args, help=unwrapped(help or ""), **options)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with `--help`."""
        return _without_type(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words behind the verb; what is wrong with them is said with an example."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # Typer brings a copy of click along, older ones import it: its class is asked by name.
            usage_errors = [kind for kind in type(error).__mro__ if kind.__name__ == "UsageError"]
            if not usage_errors or not self.epilog:
                raise
            said = error.format_message().removesuffix(".")  # type: ignore[attr-defined]
            raise usage_errors[0](f"{said}.\n{self.epilog}", ctx=ctx) from error  # type: ignore[call-arg]


class VerbGroup(TyperGroup):
    """A verb that has verbs of its own."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with `--help`."""
        return _without_type(super().get_params(ctx))
