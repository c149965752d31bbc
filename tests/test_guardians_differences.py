"""Every test that docs/explanation/differences.md names exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "explanation" / "differences.md"


def test_every_difference_is_shown_by_a_test_that_exists() -> None:
    named = set(re.findall(r"`(?:tests/\S+/)?(test_\w+)(?:\.py)?`", DOCUMENT.read_text("utf-8")))
    files = list(TESTS.rglob("test_*.py"))
    known = {path.stem for path in files}
    for path in files:
        known.update(re.findall(r"^def (test_\w+)", path.read_text("utf-8"), flags=re.MULTILINE))
    assert named - known == set()
    assert len(named) > 20


def test_every_fault_has_its_test() -> None:
    rows = [line for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    assert all("test_" in row for row in rows[1:])
