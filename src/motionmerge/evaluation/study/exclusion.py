"""Which raters count: the rule that was written down when the study was built, applied as it is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motionmerge.evaluation.study.answers import Answer
from motionmerge.evaluation.study.manifest import AttentionCheck, Study

FEWEST_REPEATED = 5
"""Questions that name a video twice: of fewer, a share says nothing."""


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How a rater answered, whatever the answers were.

    Args:
        rater: The random number.
        num_answers: Pairs judged, without checks and repeats.
        num_failed_checks: Attention checks with any wrong answer.
        num_checks: Attention checks answered.
        repeat_agreement: Share of questions that named the same video twice; None where fewer than
            `FEWEST_REPEATED` named one.
        median_seconds: Of all tasks.
        reason: Why the rater does not count; None who counts.
    """

    rater: str
    num_answers: int
    num_failed_checks: int
    num_checks: int
    repeat_agreement: float | None
    median_seconds: float
    reason: str | None


def judge_raters(answers: Sequence[Answer], study: Study) -> dict[str, Conduct]:
    """Apply the study's rule to every rater."""
    by_rater: dict[str, list[Answer]] = {}
    for answer in answers:
        by_rater.setdefault(answer.rater, []).append(answer)
    return {rater: _conduct(rater, own, study) for rater, own in by_rater.items()}


def _conduct(rater: str, answers: Sequence[Answer], study: Study) -> Conduct:
    checks = [one for one in answers if isinstance(study.key[one.task], AttentionCheck)]
    failed = sum(not _is_passed(one, study) for one in checks)
    agreement = _repeat_agreement({one.key[1:]: one for one in answers}, study)
    seconds = statistics.median(one.seconds for one in answers)
    rule = study.rule
    reason = None
    if failed > rule.most_failed_checks:
        reason = f"{failed} of {len(checks)} attention checks failed"
    elif agreement is not None and agreement < rule.least_repeat_agreement:
        reason = f"{agreement:.0%} of repeated judgements agree"
    elif seconds < rule.least_seconds:
        reason = f"{seconds:.1f} s per pair"
    return Conduct(
        rater=rater,
        num_answers=sum(not one.repeat and one not in checks for one in answers),
        num_failed_checks=failed,
        num_checks=len(checks),
        repeat_agreement=agreement,
        median_seconds=seconds,
        reason=reason,
    )


def _is_passed(answer: Answer, study: Study) -> bool:
    check = study.key[answer.task]
    return isinstance(check, AttentionCheck) and set(answer.choices.values()) == {check.expected}


def _repeat_agreement(by_place: Mapping[tuple[str, bool], Answer], study: Study) -> float | None:
    """Compare both answers to repeated pairs, where both name a video."""
    same = []
    for (task, repeat), second in by_place.items():
        first = by_place.get((task, False))
        if not repeat or first is None or isinstance(study.key[task], AttentionCheck):
            continue
        for question in study.manifest.questions:
            pair = first.winner(question), second.winner(question)
            if set(pair) <= {"first", "second"}:
                same.append(pair[0] == pair[1])
    return sum(same) / len(same) if len(same) >= FEWEST_REPEATED else None
