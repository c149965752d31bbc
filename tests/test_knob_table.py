"""The table of knobs in docs/how-to/knobs.md is that of the code, and so are recipes' families.

After the table in `knob_families.py` was changed: `python tests/test_knob_table.py` redraws it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.switching.knob_families import KNOB_FAMILIES, KNOBS, KnobFamily, wanted_knobs

PAGE = Path(__file__).parents[1] / "docs/how-to/knobs.md"
TABLE = re.compile(r"(<!-- families -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def draw() -> str:
    """Draw a row for each family: yes, or why a knob is missing as a number, and the reasons."""
    columns = ["`" + knob.replace(", ", "`, `") + "`" for knob in KNOBS]
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(KNOBS) + 1) + "|"]
    reasons: list[str] = []
    for one in KNOB_FAMILIES:
        cells = []
        for knob in KNOBS:
            if not one.has(knob) and one.reason(knob) not in reasons:
                reasons.append(one.reason(knob))
            missing = "" if one.has(knob) else f"no ({reasons.index(one.reason(knob)) + 1})"
            cells.append(missing or "yes")
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes, "", ""])


def test_the_table_of_knobs_is_that_of_the_code() -> None:
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found and found[2] == draw(), f"Run: python {__file__}"


def words_of(one: KnobFamily) -> set[str]:
    """List what a family is called, without its variants."""
    parts = [part.split()[0] for part in one.name.split(", ")]
    return {part for part in parts if not re.match(r"[\d.]+|modular|token_replace", part)}


@pytest.mark.parametrize("recipe", ["alg", "first-frame-bias", "motion-amplitude"])
def test_a_recipe_names_the_families_of_its_knobs(recipe: str) -> None:
    own = Recipe.load(recipe)
    assert own.schedule is not None and own.description is not None
    knobs = wanted_knobs(own.schedule)
    have, lack = set[str](), set[str]()
    for one in KNOB_FAMILIES:
        (have if all(map(one.has, knobs)) else lack).update(words_of(one))
    told = own.description.replace("HunyuanVideo", "Hunyuan").replace("-5B", "")
    named = set(re.findall(r"\w[\w.-]*\w", told))
    assert have <= named
    assert not named & (lack - have)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda match: match[1] + draw() + match[3], text), encoding="utf-8")
