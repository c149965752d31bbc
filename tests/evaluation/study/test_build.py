"""A study hides who made what, shows all alike, and balances sides."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.clips import read_comment
from motionmerge.evaluation.sources import Photos
from motionmerge.evaluation.statistics import sign_flip_p_value
from motionmerge.evaluation.study.build import StudyPlan, build_study
from motionmerge.evaluation.study.encoding import Shape, common_size
from motionmerge.evaluation.study.manifest import ComparedPair, read_study
from motionmerge.evaluation.study.pairs import find_systems, plan_pairs
from motionmerge.evaluation.study.power import study_size

from .conftest import PLAN, write_systems


def test_nothing_in_the_site_says_which_system_made_a_video(built):
    _, folder = built
    texts = [path.read_text() for path in (folder / "site").iterdir() if path.is_file()]
    shown = (folder / "site" / "manifest.js").read_text()
    assert not any(word in shown for word in ("base", "full", "check", "expected", "SECRET"))
    assert len(texts) == 4
    for path in (folder / "site" / "files").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem)
        assert read_comment(path) == "", "a video says how it was made"


def test_both_sides_have_one_size_rate_and_length(built):
    _, folder = built
    shapes = {Shape.of(path) for path in (folder / "site" / "files").iterdir()}
    assert shapes == {Shape(342, 512, 0.5)}


def test_the_same_seed_builds_the_same_study_and_another_one_another(systems, built, tmp_path):
    found = find_systems(systems, Photos())
    again = build_study(found, to=tmp_path / "again", plan=PLAN)
    assert again.to_json() == built[0].to_json()
    other = StudyPlan(**{**vars(PLAN), "seed": 1})
    assert build_study(found, to=tmp_path / "other", plan=other).manifest.id != again.manifest.id


def test_any_stretch_of_pairs_is_balanced_over_systems_and_sides(tmp_path):
    import random

    from motionmerge.evaluation.sources import VideoSource
    from motionmerge.evaluation.study.pairs import System

    keys = [("prompt", "", str(number)) for number in range(20)]
    systems = [
        System(name, {key: VideoSource(tmp_path / f"{name}{key[2]}") for key in keys})
        for name in "abc"
    ]
    pairs = plan_pairs(systems, baseline=None, draw=random.Random(0))
    assert len(set(pairs)) == len(pairs) == 60
    for at in range(0, 60, 12):
        stretch = pairs[at : at + 12]
        assert set(Counter(frozenset((one.first, one.second)) for one in stretch).values()) == {4}
        assert set(Counter((one.first, one.second) for one in stretch).values()) == {2}
    many = [System(str(number), systems[0].by_key) for number in range(15)]
    with pytest.raises(ConfigError, match="105 pairs"):
        plan_pairs(many, baseline=None, draw=random.Random(0))
    assert plan_pairs(many, baseline="7", draw=random.Random(0))
    only = plan_pairs(systems, baseline="b", draw=random.Random(0))
    assert len(only) == 40 and all("b" in (one.first, one.second) for one in only)


def test_videos_that_their_shape_or_length_would_give_away_are_refused(tmp_path):
    one, names = Shape(64, 64, 2.0), [tmp_path / "a", tmp_path / "b"]
    for other, word in ((Shape(64, 96, 2.0), "shape"), (Shape(64, 64, 3.0), "length")):
        with pytest.raises(DataError, match=word):
            common_size(names, [one, other])
    assert common_size(names, [one, Shape(128, 128, 2.0)]) == (512, 512)


def test_questions_that_cannot_be_asked_and_bad_systems_are_refused(systems, tmp_path):
    found = find_systems(systems, Photos())
    for plan, kind in (
        (StudyPlan(questions=["image"]), DataError),  # no photo is known
        (StudyPlan(questions=["beauty"]), ConfigError),
        (StudyPlan(baseline="nobody"), ConfigError),
        (StudyPlan(per_rater=0), ConfigError),
        (StudyPlan(num_repeats=21), ConfigError),
    ):
        with pytest.raises(kind) as error:
            build_study(found, to=tmp_path / "none", plan=plan)
        assert error.value.fix
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError):
        find_systems(systems[:1], Photos())
    other = write_systems(tmp_path / "more", num_scenes=1, names=("other",))
    with pytest.raises(DataError, match="are the same, frame for frame"):
        build_study(
            find_systems([systems[0], *other], Photos()), to=tmp_path / "x", plan=StudyPlan()
        )
    lonely = find_systems([systems[1], *other], Photos())
    assert build_study(lonely, to=tmp_path / "few", plan=StudyPlan()).manifest.num_forms == 1


def test_a_study_is_not_built_over_or_into_the_videos_it_is_of(tmp_path):
    sets = write_systems(tmp_path / "runs", num_scenes=1)
    (tmp_path / "runs" / "study.json").write_text("{}")  # as if it were an earlier study
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="must not lie in each other"):
        build_study(find_systems(sets, Photos()), to=tmp_path / "runs", plan=PLAN)
    for folder in ("runs", "runs/base/study"):
        words = ["study", "build", *sets, "-o", str(tmp_path / folder), "--overwrite"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2 and "must not lie in each other" in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_forms_are_of_one_length(tmp_path):
    found = find_systems(write_systems(tmp_path, num_scenes=4), Photos())
    plan = StudyPlan(per_rater=3, num_checks=0)
    tasks = build_study(found, to=tmp_path / "study", plan=plan).manifest.tasks
    assert Counter(task.form for task in tasks) == {0: 2, 1: 2}, "not 3 and 1"


def test_a_study_with_answers_is_never_replaced(systems, study):
    _, folder = study
    (folder / "answers.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds answers"):
        build_study(find_systems(systems, Photos()), to=folder, plan=PLAN)


@pytest.mark.parametrize("damage", ["", "{}", '{"manifest": 1}', "[" * 100_000])
def test_a_damaged_study_is_named(study, damage):
    _, folder = study
    (folder / "study.json").write_text(damage)
    with pytest.raises(DataError, match="no study"):
        read_study(folder)


def test_a_study_that_was_edited_by_hand_is_refused_where_it_contradicts_itself(study):
    whole, folder = study

    def check(word, **changes):
        value = json.loads(whole.to_json())
        value["manifest"] |= changes.pop("manifest", {})
        (folder / "study.json").write_text(json.dumps(value | changes))
        with pytest.raises(DataError, match=word):
            read_study(folder)

    tasks = whole.manifest.model_dump(mode="json")["tasks"]
    check("no study", manifest={"tasks": []})
    check("no study", manifest={"questions": {}})
    check("no study", manifest={"tasks": [{**tasks[0], "first": tasks[0]["id"]}, *tasks[1:]]})
    check("form without tasks", manifest={"tasks": [{**tasks[0], "form": 7}, *tasks[1:]]})
    check("of one name", manifest={"tasks": [tasks[0], *tasks]})
    check("other tasks", manifest={"tasks": tasks[1:]})
    check("than it names", systems=["base", "other"])
    check("two systems of one name", systems=["base", "full", "full"])
    check("no study", rule={"least_seconds": -1})


def test_the_key_knows_every_pair_and_what_checks_expect(built):
    study, folder = built
    assert read_study(folder) == study
    kinds = Counter(one.kind for one in study.key.values())
    assert kinds == {"pair": 3, "check": 1}
    pairs = [one for one in study.key.values() if isinstance(one, ComparedPair)]
    assert {one.scene for one in pairs} == {0, 1, 2}
    sides = Counter(one.first for one in pairs)
    assert abs(sides["base"] - sides["full"]) == 1
    assert json.loads((folder / "study.json").read_text())["rule"]["most_failed_checks"] == 0


WANTED = {
    "num_systems": 2, "num_scenes": 1000, "preference": 0.6, "ties": 0.0, "power": 0.8,
    "level": 0.05, "num_questions": 1, "per_rater": 20, "scene_correlation": 0.0,
}  # fmt: skip


def power_of(num, *, share=0.6):
    """The power of a two-sided binomial test at 5 %, counted out."""
    found = [stats.binomtest(wins, num).pvalue <= 0.05 for wins in range(num + 1)]
    return sum(
        stats.binom.pmf(wins, num, share) for wins in range(num // 2, num + 1) if found[wins]
    )


def test_the_size_of_a_study_is_that_of_the_exact_binomial_test():
    size = study_size(**WANTED)
    powers = [power_of(num) for num in range(size.num_decisive - 1, size.num_decisive + 5)]
    assert powers[0] < 0.8 <= min(powers[1:]) and size.per_pair == size.num_decisive
    assert study_size(**{**WANTED, "ties": 0.5}).per_pair == 2 * size.num_decisive
    assert study_size(**{**WANTED, "num_systems": 3}).num_pairs == 3
    assert study_size(**{**WANTED, "num_questions": 5}).per_pair > size.per_pair
    alike = {**WANTED, "scene_correlation": 0.1, "num_scenes": 40}
    per_pair = study_size(**alike).per_pair
    effective = per_pair / (1 + (per_pair / 40 - 1) * 0.1)
    assert effective >= size.num_decisive and per_pair > size.per_pair
    with pytest.raises(ConfigError, match="too few"):
        study_size(**{**alike, "num_scenes": 10})
    with pytest.raises(ConfigError, match="too few"):  # by a hair: else there were 10^18 of them
        hair = {"preference": 0.9999, "ties": 0.99, "scene_correlation": 0.05}
        study_size(**{**alike, **hair, "num_questions": 5})
    for name, value in (
        *(("preference", 0.5), ("power", 1.0), ("ties", 1.0), ("num_systems", 1)),
        ("level", 1e-300),  # of which no computer knows the test
    ):
        with pytest.raises(ConfigError, match=name):
            study_size(**{**WANTED, name: value})


def test_few_raters_are_so_many_that_the_analysis_finds_the_preference():
    wanted = {**WANTED, "preference": 0.65, "num_scenes": 40, "ties": 0.2}
    size = study_size(**wanted)
    by_judgements = math.ceil(size.total / 20)
    assert by_judgements < size.num_raters < 2 * by_judgements
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        scores = np.where(rng.random((size.num_raters, 20)) < 0.65, 1.0, -1.0)
        scores[rng.random(scores.shape) < 0.2] = 0
        raters = np.repeat(np.arange(size.num_raters), 20)
        scenes = np.arange(scores.size) % 40
        p_values = [sign_flip_p_value(scores.ravel(), clusters=list(c)) for c in (raters, scenes)]
        found += max(p_values) < 0.05
    assert found > 140, "of 200 with a power of 80 %"
    with pytest.raises(ConfigError, match="Take more scenes"):
        study_size(**{**wanted, "num_scenes": 9, "num_questions": 12, "scene_correlation": 0.02})


def test_a_study_has_as_many_scenes_and_raters_as_its_tests_need():
    easy = {**WANTED, "preference": 0.95, "per_rater": 1000}
    assert study_size(**easy).num_raters == 6, "2 / 2^6 is below 5 %, 2 / 2^5 is not"
    with pytest.raises(ConfigError, match="Take 6 scenes"):
        study_size(**{**easy, "num_scenes": 5})
