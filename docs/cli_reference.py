"""Write the reference of the command line from the commands themselves, when the site is built."""

from __future__ import annotations

import re
from typing import Any

import typer

PAGE, PLACE = "reference/cli.md", "<!-- commands -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace the place in the page by a section for each verb; called by mkdocs."""
    if page.file.src_uri != PAGE:
        return markdown
    from motionmerge.cli import app

    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="motionmerge")
    sections = [
        _section(name, root.commands[name], context) for name in root.list_commands(context)
    ]
    return markdown.replace(PLACE, "\n\n".join(sections))


def _section(name: str, command: Any, parent: Any, *, level: int = 2) -> str:
    """Return a heading, the help, a table of options, and the same of each command inside."""
    if command.hidden:
        return ""
    context = typer.Context(command, info_name=name, parent=parent)
    usage = f"{context.command_path} {_arguments(command)}"
    text = [f"{'#' * level} `{name}`", _prose(command.help or ""), f"```text\n{usage}\n```"]
    rows = [_row(one) for one in command.params if not getattr(one, "hidden", False)]
    if any(rows):
        text.append("\n".join(["| | what it does |", "|---|---|", *filter(None, rows)]))
    for inner in getattr(command, "commands", {}):
        text.append(_section(inner, command.commands[inner], context, level=level + 1))
    return "\n\n".join(text)


def _arguments(command: Any) -> str:
    """Return what stands behind a command's name: its arguments, or a command inside it."""
    if getattr(command, "commands", None):
        return "COMMAND"
    names = [one.name.upper() for one in command.params if not one.opts[0].startswith("-")]
    return " ".join([*names, "[OPTIONS]"])


def _row(parameter: Any) -> str:
    """Return a line of the table: what to type, and what it does."""
    if parameter.name == "help":
        return ""
    if parameter.opts[0].startswith("-"):
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    else:
        names = f"`{parameter.name.upper()}`"
    if parameter.metavar:
        names += f" `{parameter.metavar}`"
    return f"| {_cell(names)} | {_cell(_prose(parameter.help or '') + _default(parameter))} |"


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return f" Default: {parameter.show_default}."
    value = getattr(parameter.default, "value", parameter.default)
    if parameter.show_default is False or value in (None, False, True, "", (), []):
        return ""
    return f" Default: `{value}`."


def _prose(text: str) -> str:
    """Join lines, and keep what looks like HTML as it was written."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\f", "\n").strip())
    joined = "\n\n".join(" ".join(one.split()) for one in paragraphs)
    return joined.replace("<", "&lt;").replace("*", "\\*")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
