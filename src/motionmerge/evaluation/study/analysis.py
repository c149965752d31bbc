"""What a study found: wins, ties and losses with intervals, and whether raters agree at all."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from motionmerge.errors import DataError
from motionmerge.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    holm,
    percentile_interval,
    sign_flip_p_value,
    wilson_interval,
)
from motionmerge.evaluation.study.answers import Answer, Collected
from motionmerge.evaluation.study.exclusion import Conduct, judge_raters
from motionmerge.evaluation.study.manifest import ComparedPair, Study

_STRENGTH_RESAMPLES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One answer to one question about two systems.

    Args:
        rater, question: Whose, and to what.
        scene: The number of prompt, photo and seed.
        system, other: In the order of the study's systems.
        winner: One of them, `tie` or `cannot`.
        choice: `left`, `right`, `tie` or `cannot`, as it was clicked.
        left: The system that was on the left.
        repeat: Whether the rater saw it the second time.
        task, seconds, prompt: As in the answer and the task.
        excluded: Why the rater does not count, or "".
    """

    rater: str
    question: str
    scene: int
    system: str
    other: str
    winner: str
    choice: str
    left: str
    repeat: bool
    task: str
    seconds: float
    prompt: str
    excluded: str


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """How two systems compare in one question.

    Args:
        question, system, other: What was compared.
        wins, ties, losses: Shares of judgements in which `system` won, with Wilson's intervals,
            which take judgements as independent: too narrow where raters or scenes differ.
        preference: Mean of +1 for a win, 0 for a tie and -1 for a loss; its interval draws scenes
            and raters.
        p_value: Of no preference, the larger one of two tests, over scenes and over raters;
            corrected for all pairs and questions (Holm).
        num_judgements, num_scenes, num_raters: What it rests on.
        num_cannot: Answers "cannot judge", which count nowhere else.
    """

    question: str
    system: str
    other: str
    wins: Estimate
    ties: Estimate
    losses: Estimate
    preference: Estimate
    p_value: float
    num_judgements: int
    num_scenes: int
    num_raters: int
    num_cannot: int


@dataclass(frozen=True, kw_only=True)
class QuestionResult:
    """What holds for a question as a whole.

    Args:
        agreement: Krippendorff's alpha, nominal; NaN where no pair was judged by two raters.
        left_share: Of answers that name a side, those that name the left one.
        left_p_value: Of neither side being preferred (exact binomial test).
        repeat_agreement: Share of repeated judgements that name the same video twice; None where
            none was repeated.
        strengths: Bradley-Terry strengths by system, which sum to 1; intervals draw scenes.
    """

    question: str
    agreement: float
    left_share: Estimate
    left_p_value: float
    repeat_agreement: Estimate | None
    strengths: Mapping[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """All that a study found.

    Args:
        pairs: In the order of questions, then systems.
        questions: By name.
        raters: How each answered, also those who do not count.
        judgements: All of them, also those that do not count.
    """

    study: Study
    pairs: Sequence[PairResult]
    questions: Mapping[str, QuestionResult]
    raters: Mapping[str, Conduct]
    judgements: Sequence[Judgement]
    num_same: int
    num_changed: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        counted = [one for one in self.raters.values() if one.reason is None]
        return {
            "study": self.study.manifest.id,
            "title": self.study.manifest.title,
            "systems": list(self.study.systems),
            "num_raters": len(counted),
            "excluded": {
                one.rater: one.reason for one in self.raters.values() if one.reason is not None
            },
            "rule": self.study.rule.model_dump(),
            "answers_again": self.num_same,
            "answers_changed": self.num_changed,
            "pairs": [_plain(asdict(one)) for one in self.pairs],
            "questions": {name: _plain(asdict(one)) for name, one in self.questions.items()},
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def analyse(collected: Collected, study: Study) -> StudyResult:
    """Compute what the answers say, without raters whom the study's rule excludes.

    Raises:
        DataError: No rater is left, or none of them could judge a pair.
    """
    raters = judge_raters(collected.answers, study)
    judgements = list(_judgements(collected.answers, study, raters))
    counted = [one for one in judgements if not one.excluded]
    if not counted:
        reasons = Counter(one.reason for one in raters.values() if one.reason)
        why = "; ".join(f"{num} x {reason}" for reason, num in reasons.most_common(3))
        raise DataError(
            f"Of {len(raters)} raters none counts: {why or 'they judged no pair'}.",
            fix="Ask more people; the rule that was written down before stays as it is.",
        )
    pairs = _pairs([one for one in counted if not one.repeat], study)
    if not pairs:
        raise DataError(
            "No pair was judged: every answer of those who count is `cannot`, or to a repeat.",
            fix="Ask more people, and look at the page yourself.",
        )
    questions = {
        name: _question(name, [one for one in counted if one.question == name], study)
        for name in study.manifest.questions
    }
    return StudyResult(
        study=study,
        pairs=pairs,
        questions=questions,
        raters=raters,
        judgements=judgements,
        num_same=collected.num_same,
        num_changed=collected.num_changed,
    )


def _judgements(
    answers: Sequence[Answer], study: Study, raters: Mapping[str, Conduct]
) -> Iterator[Judgement]:
    for answer in answers:
        pair = study.key[answer.task]
        if not isinstance(pair, ComparedPair):
            continue
        names = {"first": pair.first, "second": pair.second}
        system, other = sorted(names.values(), key=study.systems.index)
        for question, choice in answer.choices.items():
            winner = answer.winner(question)
            yield Judgement(
                rater=answer.rater,
                question=question,
                scene=pair.scene,
                system=system,
                other=other,
                winner=names.get(winner, winner),
                choice=choice,
                left=pair.second if answer.swapped else pair.first,
                repeat=answer.repeat,
                task=answer.task,
                seconds=answer.seconds,
                prompt=study.manifest.by_id[answer.task].prompt or "",
                excluded=raters[answer.rater].reason or "",
            )


def _pairs(judgements: Sequence[Judgement], study: Study) -> list[PairResult]:
    """Compare each pair of systems in each question; p-values are corrected over all of them."""
    by_pair: dict[tuple[str, str, str], list[Judgement]] = {}
    for one in judgements:
        by_pair.setdefault((one.question, one.system, one.other), []).append(one)
    pairs = itertools.combinations(study.systems, 2)
    asked = itertools.product(study.manifest.questions, pairs)
    own = [by_pair.get((question, *pair), []) for question, pair in asked]
    judged = [each for each in own if any(one.winner != "cannot" for one in each)]
    found = {str(at): _pair(own, num_tests=len(judged)) for at, own in enumerate(judged)}
    corrected = holm({name: one.p_value for name, one in found.items()})
    return [replace(one, p_value=corrected[name]) for name, one in found.items()]


def _pair(judgements: Sequence[Judgement], *, num_tests: int) -> PairResult:
    question, system, other = (about := judgements[0]).question, about.system, about.other
    judged = [one for one in judgements if one.winner != "cannot"]
    counts = Counter(one.winner for one in judged)
    scores = [(one.winner == system) - (one.winner == other) for one in judged]
    scenes = [one.scene for one in judged]
    raters = [one.rater for one in judged]
    return PairResult(
        question=question,
        system=system,
        other=other,
        wins=wilson_interval(counts[system], len(judged)),
        ties=wilson_interval(counts["tie"], len(judged)),
        losses=wilson_interval(counts[other], len(judged)),
        # Raters are drawn as training runs are: another group of people would differ as these do.
        preference=bootstrap_mean(
            scores, clusters=scenes, training_seeds=raters, num_resamples=2_000
        ),
        # Other scenes and other people: what only one of both tests shows may be theirs alone.
        p_value=max(
            sign_flip_p_value(scores, clusters=clusters, num_tests=num_tests)
            for clusters in (scenes, raters)
        ),
        num_judgements=len(judged),
        num_scenes=len(set(scenes)),
        num_raters=len(set(raters)),
        num_cannot=len(judgements) - len(judged),
    )


def _question(name: str, judgements: Sequence[Judgement], study: Study) -> QuestionResult:
    from scipy import stats

    fresh = [one for one in judgements if not one.repeat and one.winner != "cannot"]
    sides = Counter(one.choice for one in fresh)
    named = sides["left"] + sides["right"]
    none = Estimate(math.nan, math.nan, math.nan, 0)
    return QuestionResult(
        question=name,
        agreement=_krippendorff(fresh),
        left_share=wilson_interval(sides["left"], named) if named else none,
        left_p_value=float(stats.binomtest(sides["left"], named).pvalue) if named else 1.0,
        repeat_agreement=_repeats(judgements),
        strengths=_strengths(fresh, study.systems),
    )


def _repeats(judgements: Sequence[Judgement]) -> Estimate | None:
    first = {(one.rater, one.task): one.winner for one in judgements if not one.repeat}
    pairs = [
        (first[one.rater, one.task], one.winner)
        for one in judgements
        if one.repeat and (one.rater, one.task) in first
    ]
    named = [pair for pair in pairs if not {"tie", "cannot"} & set(pair)]
    return wilson_interval(sum(a == b for a, b in named), len(named)) if named else None


def _krippendorff(judgements: Sequence[Judgement]) -> float:
    """Compute alpha of who won, over pairs that several raters judged."""
    import evalica
    import pandas as pd

    codes = {
        (one.rater, (one.scene, one.system, one.other)): 0.0
        if one.winner == "tie"
        else 1.0
        if one.winner == one.system
        else 2.0
        for one in judgements
    }
    units = Counter(unit for _, unit in codes)
    shared: dict[tuple[int, str, str], list[float]] = {}
    for (_, unit), code in codes.items():
        if units[unit] > 1:
            shared.setdefault(unit, []).append(code)
    if len({code for found in shared.values() for code in found}) < 2:
        return math.nan  # nothing to agree on
    # Alpha does not ask who said what, and a row for each of 10,000 raters would be nearly empty.
    table = pd.DataFrame.from_dict({at: pd.Series(one) for at, one in enumerate(shared.values())})
    return float(evalica.alpha(table).alpha)


def _strengths(judgements: Sequence[Judgement], systems: Sequence[str]) -> dict[str, Estimate]:
    """Fit Bradley and Terry's model; a tie is half a win for each."""
    judged = {name for one in judgements for name in (one.system, one.other)}
    names = [name for name in systems if name in judged]
    scenes = list(dict.fromkeys(one.scene for one in judgements))
    by_scene: dict[int, Counter[tuple[str, str, str]]] = {scene: Counter() for scene in scenes}
    for one in judgements:
        by_scene[one.scene][one.system, one.other, one.winner] += 1

    def fitted(drawn: Sequence[int]) -> dict[str, float]:
        counts: Counter[tuple[str, str, str]] = Counter()
        for at in drawn:
            counts.update(by_scene[scenes[at]])
        return _bradley_terry(counts, names)

    if not scenes:
        return {}
    best, draw = fitted(range(len(scenes))), np.random.default_rng(0)
    drawn = [
        fitted(draw.integers(len(scenes), size=len(scenes)).tolist())
        for _ in range(_STRENGTH_RESAMPLES)
    ]
    return {
        name: percentile_interval(
            best[name], np.array([one[name] for one in drawn]), num=len(scenes)
        )
        for name in names
    }


def _bradley_terry(
    counts: Mapping[tuple[str, str, str], int], names: Sequence[str]
) -> dict[str, float]:
    """Return strengths that sum to 1. Half a tie against each other system keeps them finite."""
    import evalica

    rows = [(a, b, winner, float(num)) for (a, b, winner), num in counts.items()]
    rows += [(a, b, "tie", 0.5) for a, b in itertools.combinations(names, 2)]
    xs, ys, winners, weights = map(list, zip(*rows, strict=True))
    result = evalica.bradley_terry(
        xs,
        ys,
        [
            evalica.Winner.Draw
            if won == "tie"
            else evalica.Winner.X
            if won == x
            else evalica.Winner.Y
            for x, won in zip(xs, winners, strict=True)
        ],
        weights=weights,
    )
    total = float(result.scores.sum())
    return {name: float(result.scores[name]) / total for name in names}
