"""Verdicts follow from results whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from motionmerge.errors import DataError
from motionmerge.evaluation.figures import to_png
from motionmerge.evaluation.pocket.charts import front_chart, front_figure, knob_figure
from motionmerge.evaluation.pocket.claims import advantage, degree_at_obedience, family, judge
from motionmerge.evaluation.pocket.conditions import (
    BOUNDARIES,
    KNOB_VALUES,
    handover,
    knob,
    method,
    pick_conditions,
)
from motionmerge.evaluation.pocket.prompts import DIFFICULTIES
from motionmerge.evaluation.pocket.runs import ClipResult, ConditionResults, Protocol
from motionmerge.evaluation.pocket.tables import replace_block, table_row, write_docs

NUM = 60


def made_up(condition, *, degree, obedience, intact=1.0, fidelity=40.0):
    """Results with these means, a spread over prompts, and obedience spread over difficulties."""
    rng = np.random.default_rng(len(condition.name))
    order = rng.permutation(NUM)
    clips = tuple(
        ClipResult(
            prompt=i,
            degree=max(0.0, degree + 0.3 * float(rng.normal())),
            camera="pans left",
            camera_right=i % 2 == 0 if i % 3 else None,
            obeyed=bool(order[i] < obedience * NUM),
            direction_right=1.0,
            intact=bool(order[i] < intact * NUM),
            whole=bool(order[i] < intact * NUM),
            first_frame_db=fidelity + 0.1 * float(rng.normal()),
            background_db=30.0,
            difficulty=DIFFICULTIES[i % 3],
            camera_moves=True,
        )
        for i in range(NUM)
    )
    return ConditionResults(condition, clips)


def as_the_paper_says(**changes):
    """Results under which every claim holds, unless changed: (degree, obedience, fidelity)."""
    truth = {
        "base": (4.0, 0.5, 40.0),
        "tuned": (2.0, 0.95, 40.0),
        "naive": (2.0, 0.6, 40.0),
        "knob-0.5": (2.8, 0.8, 40.0),
        "knob-0.25": (3.3, 0.65, 40.0),
        "knob+0.25": (5.0, 0.4, 39.5),
        "knob+0.5": (6.0, 0.3, 39.0),
        "knob+1": (8.0, 0.2, 39.0),
        **{f"handover-{boundary:g}": (2.8, 0.9, 40.0) for boundary in BOUNDARIES},
        "paper-0.64": (6.0, 0.95, 39.0),
        **{f"paper-reversed-{boundary:g}": (2.5, 0.7, 39.0) for boundary in BOUNDARIES},
    } | changes
    conditions = {
        one.name: one
        for one in [
            *pick_conditions(["base", "tuned", "naive"]),
            *map(knob, KNOB_VALUES),
            *map(handover, BOUNDARIES),
            method(),
            *(method(boundary=boundary).reversed() for boundary in BOUNDARIES),
        ]
    }
    return {
        name: made_up(conditions[name], degree=degree, obedience=obedience, fidelity=fidelity)
        for name, (degree, obedience, fidelity) in truth.items()
    }


def verdicts(results):
    """Verdicts that need no measurement of the shipped recipe."""
    return [
        (claim.number, claim.verdict)
        for claim in judge(results)
        if "best" not in claim.text and claim.number != "iii c"
    ]


def test_all_claims_hold_when_the_results_say_so():
    assert all(verdict == "holds" for _, verdict in verdicts(as_the_paper_says()))


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        ("i a", {"tuned": (2.0, 0.55, 40.0)}),
        ("i b", {"naive": (2.0, 0.95, 40.0)}),
        ("ii", {"naive": (4.5, 0.6, 40.0)}),
        ("iii a", {"knob+0.5": (3.0, 0.3, 39.0)}),
        ("iii b", {"knob-0.5": (4.5, 0.8, 40.0)}),
        ("iv", {"paper-0.64": (1.0, 0.95, 39.0)}),
        ("v", {"paper-0.64": (6.0, 0.95, 37.0)}),
    ],
)
def test_a_claim_falls_when_its_numbers_do(number, changes):
    assert (number, "does not hold") in verdicts(as_the_paper_says(**changes))


@pytest.mark.parametrize(("at_two", "verdict"), [(6.0, "holds"), (9.0, "does not hold")])
def test_the_knob_ends_where_no_other_value_moves_more(at_two, verdict):
    conditions = pick_conditions(["motion", "best-0.72"])
    degrees = {"best-0.72": 7.0, "motion+2": at_two}
    results = {
        one.name: made_up(one, degree=degrees.get(one.name, 5.0), obedience=0.6)
        for one in conditions
    }
    assert [one.verdict for one in judge(results) if one.number == "iii c"] == [verdict]
    assert degrees.keys() < results.keys() and len(results) == 5


def test_a_claim_without_its_conditions_is_not_judged():
    results = as_the_paper_says()
    del results["naive"]
    assert ("i b", "not measured") in verdicts(results)
    assert all(claim.evidence for claim in judge(results))


@pytest.mark.parametrize(
    ("family", "rival"),
    [("handover", "base early"), ("knob+", "any plain"), ("paper-rev", "order")],
)
def test_a_claim_is_judged_only_where_the_whole_family_of_its_rival_was_run(family, rival):
    results = as_the_paper_says()
    of_family = [name for name in results if name.startswith(family)]
    for gone in (of_family[:1], of_family):
        left = {name: one for name, one in results.items() if name not in gone}
        claims = [one for one in judge(left) if one.number == "iv" and rival in one.text]
        assert claims
        assert {claim.verdict for claim in claims} == {"not measured"}
        assert gone[0] in "".join(claims[0].evidence)


def test_equal_obedience_is_not_judged_where_hardly_anything_obeys():
    results = as_the_paper_says(**{"paper-0.64": (6.0, 0.1, 39.0)})
    assert ("iv", "not decidable") in verdicts(results)
    assert ("iv", "holds") not in verdicts(results)


def test_the_front_interpolates_between_neighbours():
    tame = made_up(knob(-0.5), degree=2.0, obedience=1.0)
    wild = made_up(knob(0.5), degree=6.0, obedience=0.5)
    ends = degree_at_obedience([tame, wild], 1.0), degree_at_obedience([tame, wild], 0.5)
    middle = degree_at_obedience([tame, wild], 0.75)
    assert ends == pytest.approx((tame.degree, wild.degree))
    assert middle == pytest.approx(sum(ends) / 2, abs=0.15)


def test_equal_results_have_no_advantage():
    members = family(as_the_paper_says(), "knob")
    gain = advantage(members[2], members)
    assert gain.low <= 0 <= gain.high + 1e-9


def test_docs_get_their_numbers_between_the_markers(tmp_path):
    from motionmerge.evaluation.pocket.decided import Alternative

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- numbers:begin -->\nold\n<!-- numbers:end -->\nafter\n")
    results = as_the_paper_says()
    alternatives = [Alternative("degree", np.array([3.0]))]
    for _ in range(2):
        written = write_docs(results, protocol=Protocol(), alternatives=alternatives, root=tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "\nold\n" not in text and text.count("| base |") == 1
    guide = (tmp_path / "docs" / "pocket.md").read_text()
    assert all(f"| {name} |" in guide for name in results)
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == 3
    assert all(path.stat().st_size < 150_000 for path in pictures)


def test_a_file_without_markers_is_left_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("mine")
    with pytest.raises(DataError, match="numbers:begin"):
        replace_block(path, "numbers")
    assert path.read_text() == "mine"


def test_charts_are_made_of_any_part_of_the_results():
    results = as_the_paper_says()
    for boundary in BOUNDARIES:
        del results[f"handover-{boundary:g}"]
    assert to_png(front_chart(results)).startswith(b"\x89PNG")
    for figure in (front_figure(results), knob_figure(results)):
        assert figure.svg.startswith("<svg")
        assert "currentColor" in figure.svg and "var(--set-" in figure.svg


def test_a_row_has_a_cell_for_every_heading():
    from motionmerge.evaluation.pocket.tables import HEADINGS

    row = table_row(as_the_paper_says()["base"])
    assert len(row.cells()) == len(HEADINGS)
    assert row.obedience.value == pytest.approx(50)
