"""The analysis finds what simulated raters prefer, and counts nobody whom the rule excludes."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import DataError
from motionmerge.evaluation.sources import Photos
from motionmerge.evaluation.study.analysis import analyse
from motionmerge.evaluation.study.answers import checked_answer, collect, read_answers
from motionmerge.evaluation.study.build import StudyPlan, build_study
from motionmerge.evaluation.study.chart import study_chart
from motionmerge.evaluation.study.pairs import find_systems
from motionmerge.io.hashing import hash_file

from .conftest import write_systems

STRENGTHS = {"weak": 0.0, "middle": 0.5, "strong": 1.2}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    sets = write_systems(folder, num_scenes=8, names=tuple(STRENGTHS))
    plan = StudyPlan(per_rater=12, questions=["overall"])
    return build_study(find_systems(sets, Photos()), to=folder / "study", plan=plan)


def answers_of(study, values):
    return [checked_answer(value, study.manifest) for value in values]


def test_known_preferences_are_recovered(three, simulated_answers):
    answers = simulated_answers(three, STRENGTHS, num_raters=30, careless=0.2)
    result = analyse(collect(answers_of(three, answers)), three)
    excluded = [one for one in result.raters.values() if one.reason]
    assert 2 <= len(excluded) <= 10
    assert all(one.num_failed_checks or one.median_seconds < 2 for one in excluded)
    for pair in result.pairs:  # the systems are in rising order
        assert pair.preference.value < 0 and pair.losses.value > pair.wins.value
        assert pair.wins.value + pair.ties.value + pair.losses.value == pytest.approx(1)
        assert pair.preference.low < pair.preference.value < pair.preference.high
    strongest = next(one for one in result.pairs if (one.system, one.other) == ("weak", "strong"))
    assert strongest.p_value < 0.05 and strongest.preference.high < 0
    question = result.questions["overall"]
    shares = {name: one.value for name, one in question.strengths.items()}
    assert shares["weak"] < shares["middle"] < shares["strong"]
    assert sum(shares.values()) == pytest.approx(1)
    assert question.agreement > 0.02 and question.left_p_value > 0.05
    assert question.repeat_agreement.value > 0.6
    assert len(study_chart(result, note="simulated").axes) == 3
    json.dumps(result.to_dict(), allow_nan=False)


def test_equal_systems_and_raters_who_click_left_are_told_from_a_preference(
    three, simulated_answers
):
    equal = dict.fromkeys(STRENGTHS, 0.0)
    answers = simulated_answers(three, equal, num_raters=30, left_bias=0.8, seed=3)
    result = analyse(collect(answers_of(three, answers)), three)
    assert result.questions["overall"].left_p_value < 0.001
    assert result.questions["overall"].left_share.low > 0.5
    assert all(pair.p_value > 0.05 for pair in result.pairs)


def test_krippendorff_is_one_where_all_agree_and_zero_by_chance(three, simulated_answers):
    sure = {"weak": 0.0, "middle": 24.0, "strong": 12.0}  # another order, or nothing varies
    agreed = analyse(
        collect(answers_of(three, simulated_answers(three, sure, num_raters=6))), three
    )
    assert agreed.questions["overall"].agreement == pytest.approx(1.0, abs=0.02)
    # By chance: answers are dealt anew among the tasks.
    values = list(simulated_answers(three, STRENGTHS, num_raters=40))
    draw = np.random.default_rng(0)
    real = [one for one in values if three.key[one["task"]].kind == "pair"]
    for one in real:
        one["choices"] = {"overall": str(draw.choice(["left", "right"]))}
        one["repeat"] = False
    chance = analyse(collect(answers_of(three, real)), three)
    assert abs(chance.questions["overall"].agreement) < 0.1


def test_an_answer_counts_once_and_the_first_one_counts(three, simulated_answers, tmp_path):
    values = list(simulated_answers(three, STRENGTHS, num_raters=2))
    changed = {**values[0], "choices": {"overall": "cannot"}}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*values, values[1], changed]))
    (tmp_path / "b.jsonl").write_text(json.dumps(values[2]) + "\n" + '{"cut off')
    collected = read_answers([tmp_path], three.manifest)
    assert (len(collected.answers), collected.num_same, collected.num_changed) == (
        len(values),
        2,
        1,
    )
    assert collected.answers[0].choices == values[0]["choices"]


def test_nobody_left_and_foreign_answers_are_named(three, simulated_answers, tmp_path):
    values = list(simulated_answers(three, STRENGTHS, num_raters=3, careless=1.0))
    with pytest.raises(DataError, match="none counts"):
        analyse(collect(answers_of(three, values)), three)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**values[0], "task": "0" * 20}) + "\n")
    with pytest.raises(DataError, match=r"line 1.*no task"):
        read_answers([path], three.manifest)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no answer in"):
        read_answers([tmp_path / "none"], three.manifest)


def test_without_two_raters_there_is_no_agreement_to_speak_of(three, simulated_answers):
    values = list(simulated_answers(three, STRENGTHS, num_raters=1))
    result = analyse(collect(answers_of(three, values)), three)
    assert math.isnan(result.questions["overall"].agreement)
    assert result.to_dict()["questions"]["overall"]["agreement"] is None


@pytest.mark.parametrize("choice", ["tie", "cannot"])
def test_answers_that_name_no_video_are_counted_or_refused_by_name(
    three, simulated_answers, choice, tmp_path
):
    values = list(simulated_answers(three, STRENGTHS, num_raters=4))
    for one in values:
        if three.key[one["task"]].kind == "pair":
            one["choices"] = {"overall": choice}
    if choice == "cannot":
        with pytest.raises(DataError, match="No pair was judged"):
            analyse(collect(answers_of(three, values)), three)
        return
    result = analyse(collect(answers_of(three, values)), three)
    assert {(one.ties.value, one.preference.value, one.p_value) for one in result.pairs} == {
        (1, 0, 1)
    }
    assert result.questions["overall"].left_share.num == 0
    study_chart(result)
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_command_names_what_was_not_judged_and_the_rule(simulated_answers, tmp_path):
    names = ("$\\frac$", "new\nline", "-1")
    sets = write_systems(tmp_path, num_scenes=2, names=names)
    study = build_study(find_systems(sets, Photos()), to=tmp_path / "study", plan=StudyPlan())
    values = [
        one
        for one in simulated_answers(study, dict.fromkeys(names, 0.0), num_raters=2)
        if getattr(study.key[one["task"]], "expected", None)
        or "-1" not in (study.key[one["task"]].first, study.key[one["task"]].second)
    ]
    path, output = tmp_path / "answers.jsonl", tmp_path / "results"
    path.write_text("".join(json.dumps(one) + "\n" for one in values))
    words = ["study", "analyse", str(tmp_path / "study"), str(path), "-o", str(output)]
    result = CliRunner().invoke(app, [*words, "--note", "$x^2$ \x07"])
    assert result.exit_code == 0, result.output
    assert "Nobody judged $\\frac$ : -1, new?line : -1." in result.output
    assert "No p can get below 0.05" in result.output
    key = hash_file(tmp_path / "study" / "study.json")
    assert key in result.output
    assert json.loads((output / "results.json").read_text())["key"] == key
    ElementTree.fromstring((output / "chart.svg").read_text())


def test_few_raters_who_all_agree_show_nothing_of_other_people(three, simulated_answers):
    sure = {"weak": 0.0, "middle": 24.0, "strong": 12.0}
    for num_raters, can_show in ((4, False), (20, True)):
        values = list(simulated_answers(three, sure, num_raters=num_raters))
        found = [one.p_value for one in analyse(collect(answers_of(three, values)), three).pairs]
        assert (max(found) < 0.05) == can_show, (num_raters, found)
