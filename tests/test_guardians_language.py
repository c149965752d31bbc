"""Docstrings begin as STYLE asks: with what the function does, in a verb of the field."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import motionmerge

PACKAGE = Path(motionmerge.__file__).parent

VAGUE = {
    "Give",
    "Gives",
    "Say",
    "Says",
    "Tell",
    "Tells",
    "Put",
    "Puts",
    "Let",
    "Lets",
    "Work",
    "Go",
}
"""Verbs for which there is an exact one: Return, Describe, Check, Write, Move, Compute."""

NO_VERB = {
    *("A", "All", "An", "As", "At", "Both", "By", "Every", "From", "How", "If", "In", "Inside"),
    *("It", "Its", "None", "Nothing", "Number", "Of", "On", "One", "Same", "Shape", "Such"),
    *("That", "The", "These", "This", "Those", "Weights", "What", "When", "Where", "Whether"),
    *("Which", "Who", "With"),
}


def functions_with_docstrings() -> Iterator[tuple[str, str]]:
    """Yield where each documented function of the package is, and its docstring."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_property = any("property" in ast.unparse(name) for name in node.decorator_list)
            if (docstring := ast.get_docstring(node)) and not is_property:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", docstring


def test_docstrings_of_functions_begin_with_an_exact_verb():
    faults = [
        f"{where}: {docstring.splitlines()[0]}"
        for where, docstring in functions_with_docstrings()
        if docstring.split()[0].strip("`.,:;'") in VAGUE | NO_VERB or not docstring[0].isupper()
    ]
    assert not faults, "\n".join(faults)
