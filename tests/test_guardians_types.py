"""What the types promise: wide dataclasses are built by keyword, and names mean one thing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src" / "motionmerge"
WIDE = 5
"""From how many fields on positional arguments are easily mixed up."""


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield every class of the package with its file."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield str(path.relative_to(SOURCES)), node


def test_dataclasses_with_many_fields_are_built_by_keyword() -> None:
    for file, node in classes():
        decorators = [ast.unparse(one) for one in node.decorator_list]
        decorator = next((one for one in decorators if one.startswith("dataclass")), "")
        fields = [
            one
            for one in node.body
            if isinstance(one, ast.AnnAssign) and "ClassVar" not in ast.unparse(one.annotation)
        ]
        if decorator and len(fields) >= WIDE:
            assert "kw_only=True" in decorator, f"{file}: {node.name} has {len(fields)} fields"
