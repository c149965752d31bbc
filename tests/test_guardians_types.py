"""What the types promise: wide dataclasses are built by keyword, and names mean one thing."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_no_two_public_classes_share_a_name() -> None:
    files = defaultdict(list)
    for file, node in classes():
        if not node.name.startswith("_"):
            files[node.name].append(file)
    assert not {name: where for name, where in files.items() if len(where) > 1}


@pytest.mark.parametrize("room", ["sampling", "switching"])
def test_few_things_are_of_any_type(room: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (SOURCES / room).rglob("*.py")]
    names = [node for text in texts for node in ast.walk(ast.parse(text))]
    found = sum(isinstance(node, ast.Name) and node.id == "Any" for node in names)
    lines = sum(len(text.splitlines()) for text in texts)
    assert found < 6 * lines / 1000, f"{found} times Any in {lines} lines"


@pytest.mark.parametrize("room", ["sampling", "switching", "models/video_pipeline.py"])
def test_what_mypy_ignores_has_a_code_and_a_reason(room: str) -> None:
    place = SOURCES / room
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "type: ignore" in line:
                assert re.search(r"# type: ignore\[[a-z-]+\]  # \w", line), f"{path}: {line}"
