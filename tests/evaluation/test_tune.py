"""A search finds what is best, goes on after a kill as if nothing happened, and says what it knows.

The bench here computes its values from the recipe's numbers, so that the best is known.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motionmerge.errors import ConfigError, DataError, RecipeError
from motionmerge.evaluation.sweeps.fronts import front_files, tuning_to_dict
from motionmerge.evaluation.sweeps.halving import (
    Rung,
    moves_front,
    num_kept,
    ranked,
    rungs_of,
    trials_without_news,
)
from motionmerge.evaluation.sweeps.observed import Goal, Observed
from motionmerge.evaluation.sweeps.pace import Pace
from motionmerge.evaluation.sweeps.probe import probe, windows_of, with_window
from motionmerge.evaluation.sweeps.space import Range, candidate, own_values, space_of
from motionmerge.evaluation.sweeps.tune import Tuner, pick_objectives
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.batch.variants import Variant
from motionmerge.sampling.request.experts import ExpertChoice

KNOB = Recipe.load("knob")


def build(name, recipe):
    return Variant(name, ExpertChoice(recipe))


class KnownBench:
    """Motion grows with the knob; the picture holds until it is at 0.6. Few steps show less."""

    objectives = {  # noqa: RUF012
        "motion": Goal(metric="degree", unit="px"),
        "first_frame": Goal(metric="ssim"),
        "camera": Goal(metric="agreement"),
    }
    num_clips, num_steps, about = 16, 12, "16 sums"

    def __init__(self, ends_after=10**6, fails_at=None):
        self.asked, self._ends_after, self._fails_at = [], ends_after, fails_at

    def observe(self, variant, *, num_clips, num_steps):
        if len(self.asked) == self._ends_after:
            raise KeyboardInterrupt
        self.asked.append((variant.name, num_clips, num_steps))
        motion = variant.experts.recipe.parameters["motion"]
        if self._fails_at is not None and motion > self._fails_at:
            raise DataError("Nothing could be made.", fix="Try less.")
        share = num_steps / self.num_steps
        degree = {clip: share * (5 + 4 * motion) + clip for clip in range(num_clips)}
        ssim = {clip: 0.9 - max(0.0, motion - 0.6) + 0.01 * clip for clip in range(num_clips)}
        clusters = {clip: clip for clip in range(num_clips)}
        return Observed(values={"degree": degree, "ssim": ssim}, clusters=clusters)

    def seconds(self, *, num_clips, num_steps):
        return num_clips * num_steps * 0.5

    def key(self, variant, *, num_clips, num_steps):
        return f"{num_clips}/{num_steps}"


def tuner(folder, bench, *, over=("motion=-0.5:1.5",), objective="motion,first_frame", **options):
    return Tuner(
        bench,
        KNOB,
        space_of(KNOB, over),
        build=build,
        objectives=pick_objectives(bench, objective),
        folder=Path(folder),
        **options,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("motion=-0.5:1.5", Range("motion", -0.5, 1.5)),
        ("motion=0:1:3", Range("motion", 0.0, 1.0, (0.0, 0.5, 1.0))),
        ("motion=0.7,0.2", Range("motion", 0.2, 0.7, (0.2, 0.7))),
    ],
)
def test_a_range_is_written_as_for_a_sweep_or_without_a_count(text, expected):
    assert Range.parse(text) == expected


@pytest.mark.parametrize("text", ["motion", "motion=1", "motion=1:1", "motion=0:nan", "motion=a:b"])
def test_a_range_with_nothing_to_search_is_refused(text):
    with pytest.raises(ConfigError):
        Range.parse(text)


def test_numbers_known_by_name_are_searched_and_others_need_a_range():
    assert [one.name for one in space_of(KNOB)] == ["motion", "boundary"]
    pocket = [one.name for one in space_of(Recipe.load("pocket"))]
    assert pocket == ["motion", "drop_rate", "gamma", "boundary"]  # alpha is what motion multiplies
    with pytest.raises(ConfigError, match="no number `gamma`"):
        space_of(KNOB, ["gamma=0:1"])
    with pytest.raises(ConfigError, match="twice"):
        space_of(KNOB, ["motion=0:1", "motion=0:2"])
    with pytest.raises(RecipeError):
        space_of(Recipe.load("pocket"), ["drop_rate=0:1.5"])
    plain = Recipe.parse("inputs: {base: memory:base}\nexperts: {merged: base}\n")
    with pytest.raises(ConfigError, match="usual range"):
        space_of(plain)


@pytest.mark.parametrize(("motion", "boundary"), [(-0.5, 0.3), (1 / 3, 0.94999), (1e-9, 0.64)])
def test_a_candidate_is_a_recipe_that_reads_back_with_its_numbers(motion, boundary):
    space = space_of(KNOB)
    values = {
        "motion": space[0].rounded(motion),
        "boundary": space[1].rounded(boundary),
    }
    again = Recipe.parse(candidate(KNOB, values).print())
    assert own_values(again, space) == values
    assert again.experts.keys() == KNOB.experts.keys()


def test_the_pocket_recipe_has_the_weights_that_it_had_before_its_numbers_had_names():
    assert {
        name: str(one) for name, one in Recipe.load("pocket").written_out().experts.items()
    } == {
        "dynamics": "base + 0.75 * dare(-1.33 * (tuned - base), drop_rate=0.4, seed=0)",
        "consistency": "tuned + 0.25 * dare(tuned - base, drop_rate=0.4, seed=1)",
    }


def test_rungs_rise_to_all_clips_and_steps_and_are_each_once():
    assert rungs_of(48, 12) == [Rung(12, 6), Rung(24, 12), Rung(48, 12)]
    assert rungs_of(48, 4) == [Rung(12, 4), Rung(24, 4), Rung(48, 4)]  # half would be no video
    assert rungs_of(2, 4) == [Rung(2, 4)]


several = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9)


@given(several)
@settings(deadline=None, max_examples=30)
def test_no_candidate_is_ranked_before_one_that_beats_it(qualities):
    order = ranked(qualities)
    assert sorted(order) == list(range(len(qualities)))
    place = {number: rank for rank, number in enumerate(order)}
    for a, one in enumerate(qualities):
        for b, other in enumerate(qualities):
            if one != other and all(x >= y for x, y in zip(one, other, strict=True)):
                assert place[a] < place[b]
    assert 1 <= num_kept(len(qualities), num_objectives=2) <= len(qualities)


@given(several)
@settings(deadline=None, max_examples=30)
def test_what_is_beaten_moves_no_front_and_what_beats_all_moves_it(qualities):
    first, *others = qualities
    assert not moves_front(first, qualities)
    best = tuple(max(each) + 1 for each in zip(*qualities, strict=True))
    assert moves_front(best, qualities)
    assert trials_without_news([best, *others]) == len(others)


def test_a_search_finds_the_ends_of_the_front_and_takes_what_loses_nothing(tmp_path):
    bench = KnownBench()
    tuning = tuner(tmp_path, bench, seed=3).run(16)
    best = tuning.chosen.candidate.values["motion"]
    assert 0.45 < best <= 0.61, "more motion loses the picture"
    assert tuning.chosen.gains["motion"].value == pytest.approx(4 * (best - 0.25))
    assert "motion +" in tuning.why and "first_frame +0.00" in tuning.why
    assert "chance" not in tuning.why and "best of 16 candidates on these 16 clips" in tuning.why
    assert tuning.front and all(one.rung == tuning.rungs[-1] for one in tuning.front)
    full = [name for name, num_clips, _ in bench.asked if num_clips == 16]
    assert len(full) < 16 / 2, "few candidates are measured on everything"

    files = front_files(tuning, tmp_path, name="knob", about=bench.about, seed=3)
    for one, text in zip(tuning.front, files.values(), strict=True):
        again = Recipe.parse(text)
        assert again.parameters["motion"] == one.candidate.values["motion"]
        assert "n 16 of 16 sums, 12 steps, seed 3" in (again.description or "")
        assert "95 % interval" in (again.description or "")
    found = tuning_to_dict(tuning, list(files))
    assert found["take"] in files and len(found["candidates"]) == len(tuning.tried)


def test_a_search_goes_on_after_a_kill_as_if_it_had_not_been_killed(tmp_path):
    def values(tuning):
        return [one.candidate.values for one in tuning.tried]

    whole = tuner(tmp_path / "whole", KnownBench()).run(8)
    for ends_after in (1, 9):
        with pytest.raises(KeyboardInterrupt):
            tuner(tmp_path / "killed", KnownBench(ends_after)).run(8)
    assert values(tuner(tmp_path / "killed", KnownBench()).run(8)) == values(whole)
    assert values(tuner(tmp_path / "whole", KnownBench(), seed=1).run(8)) != values(whole)


def test_a_journal_whose_last_line_was_cut_off_goes_on(tmp_path):
    whole = tuner(tmp_path, KnownBench()).run(4)
    journal = tmp_path / "trials.journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    again = tuner(tmp_path, KnownBench()).run(6)
    values = [one.candidate.values for one in again.tried]
    assert all(one.candidate.values in values for one in whole.tried)
    assert len(tuner(tmp_path, KnownBench()).run(6).tried) == 6


def test_few_clips_are_too_few_to_be_sure(tmp_path):
    class FewClips(KnownBench):
        num_clips = 5

    tuning = tuner(tmp_path, FewClips(), seed=3).run(8)
    assert tuning.chosen.gains["motion"].low > 0
    assert "which may be chance" in tuning.why


def test_a_journal_of_something_else_is_named(tmp_path):
    (tmp_path / "trials.journal").write_text('{"op_code": "none"}\n[1]\n')
    with pytest.raises(DataError, match=r"trials\.journal is no journal"):
        tuner(tmp_path, KnownBench()).run(2)


def test_a_search_stops_when_the_front_rests(tmp_path):
    bench = KnownBench()
    tuning = tuner(tmp_path, bench, over=["motion=0.2,0.4"]).run(200)
    assert tuning.stopped_early and len(tuning.tried) < 40


def test_what_cannot_be_measured_is_counted_and_what_never_can_ends_the_search(tmp_path):
    tuning = tuner(tmp_path, KnownBench(fails_at=1.2), seed=1).run(12)
    assert tuning.num_failed and len(tuning.tried) + tuning.num_failed == 12
    again = tuner(tmp_path, KnownBench(fails_at=1.2), seed=1).run(12)
    assert again.num_failed == tuning.num_failed
    with pytest.raises(DataError, match="no clip has `agreement`"):
        tuner(tmp_path, KnownBench(), objective="motion,camera").run(2)
    with pytest.raises(ConfigError, match="no objective `moton`"):
        tuner(tmp_path, KnownBench(), objective="moton")


@pytest.mark.parametrize(("num_runs", "num_left"), [(1, 0), (2, 0), (3, 3)])
def test_what_failed_is_tried_again_in_later_runs_but_not_for_ever(tmp_path, num_runs, num_left):
    for _ in range(num_runs):  # say, the disk is full
        with pytest.raises(DataError, match="Nothing could be made"):
            tuner(tmp_path, KnownBench(fails_at=0.28), over=["motion=0.3:1"]).run(6)
    bench = KnownBench()
    mended = tuner(tmp_path, bench, over=["motion=0.3:1"]).run(6)
    assert (mended.num_failed, len(mended.tried)) == (num_left, 6 - num_left)


def test_nothing_better_means_the_recipe_as_it_was(tmp_path):
    tuning = tuner(tmp_path, KnownBench(), over=["motion=-0.5:0.2"]).run(6)
    assert tuning.chosen is tuning.reference and "as it was" in tuning.why


def test_times_are_of_their_kind_alone_and_survive_a_cut_line(tmp_path):
    assert Pace(tmp_path, "a").seconds(10) is None
    Pace(tmp_path, "a").add(20, 5)
    Pace(tmp_path, "b").add(1, 100)
    path = tmp_path / "timings.jsonl"
    path.write_text(path.read_text() + '{"kind": "a", "wo')
    assert Pace(tmp_path, "a").seconds(10) == 2.5
    assert Pace(tmp_path, "a").seconds(0) == 0


def test_loading_is_no_part_of_the_pace_and_counts_for_every_set_of_weights(tmp_path):
    Pace(tmp_path, "a").add(20, 5)
    Pace(tmp_path, "a").add(20, 5, loads=2, loading=60)
    pace = Pace(tmp_path, "a")
    assert pace.seconds(10) == 2.5
    assert pace.seconds(10, loads=3) == 92.5


@given(st.integers(2, 20), st.floats(0.02, 0.99))
@settings(deadline=None, max_examples=30)
def test_windows_slide_over_all_noise_levels(windows, window):
    if windows * window < 1:
        with pytest.raises(ConfigError, match="leave noise levels out"):
            windows_of(windows, window)
        return
    found = windows_of(windows, window)
    assert len(found) == windows and found[0].high == 1 and found[-1].low == 0
    for before, after in itertools.pairwise(found):
        assert after.low < before.low and after.high >= before.low - 1e-3


def test_inside_a_window_an_expert_denoises_and_outside_it_the_other():
    for window in windows_of(5, 0.3):
        recipe = with_window(KNOB, window, expert="dynamics")
        assert Recipe.parse(recipe.print()) == recipe
        for level in (0.05, 0.2, 0.5, 0.8, 0.99):
            expert = recipe.schedule.expert_at(noise_level=level, timestep=0, step_fraction=0)
            assert expert == ("dynamics" if window.low < level <= window.high else "consistency")
    with pytest.raises(ConfigError, match="no expert `dynamcs`"):
        with_window(KNOB, window, expert="dynamcs")


def test_a_probe_names_the_window_in_which_the_expert_acts():
    class WindowBench(KnownBench):
        """The expert acts at the noise level 0.7 alone."""

        def observe(self, variant, *, num_clips, num_steps):
            schedule = variant.experts.recipe.schedule
            inside = schedule.expert_at(noise_level=0.7, timestep=0, step_fraction=0) == "dynamics"
            degree = {clip: clip + (3.0 + 0.1 * clip) * inside for clip in range(num_clips)}
            return Observed(values={"degree": degree}, clusters={clip: clip for clip in degree})

    bench = WindowBench()
    windows = windows_of(5, 0.2)
    found = probe(bench, KNOB, windows, expert="dynamics", build=build, objectives=bench.objectives)
    assert list(found.objectives) == ["motion"], "what no clip has is not drawn"
    assert found.strongest("motion").window == windows[1]
    assert [one.more["motion"].value > 0 for one in found.windows] == [False, True] + [False] * 3
    assert found.everywhere.more["motion"].value == pytest.approx(3.75)
    bench.num_clips = 5
    found = probe(bench, KNOB, windows, expert="dynamics", build=build, objectives=bench.objectives)
    assert found.windows[1].more["motion"].low > 0
    assert found.strongest("motion") is None, "five clips go one way by chance too often"
