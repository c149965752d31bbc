"""The paper's claims, judged from results: what holds, what does not, with the numbers.

Nothing here knows how an evaluation ended. Each verdict is computed from the same prompts under all
conditions, with paired bootstrap intervals.
Paper: Tian et al. 2025; the gate: docs/pocket.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from motionmerge.evaluation.pocket.conditions import (
    BEST,
    BEST_KNOB,
    HANDOVER,
    KNOB,
    METHOD,
    best_condition,
    paper_conditions,
)
from motionmerge.evaluation.pocket.runs import ConditionResults
from motionmerge.evaluation.statistics import Estimate, bootstrap_mean, bootstrap_statistic
from motionmerge.schedule import PAPER_BOUNDARY

MIN_OBEDIENCE_GAIN = 0.15
MAX_FIDELITY_LOSS = 2.0  # decibels
MIN_OBEDIENCE = 0.2  # below it "at equal obedience" compares noise with noise

Results = Mapping[str, ConditionResults]
Draw = npt.NDArray[np.intp]


Verdict = Literal["holds", "does not hold", "not decidable", "not measured"]
"""Not decidable: the numbers compare nothing. Not measured: conditions it needs were not run."""


@dataclass(frozen=True)
class Claim:
    """One claim and its verdict.

    Args:
        number: (i) .. (v) of the project's list, with a letter where it has parts.
        text: The claim in words.
        verdict: See `Verdict`.
        evidence: The numbers behind it, one line each.
    """

    number: str
    text: str
    verdict: Verdict
    evidence: tuple[str, ...]


def judge(results: Results) -> list[Claim]:
    """Judge every claim."""
    claims = [
        _needs(results, ("base", "tuned"), "i a", _TEXTS["i a"], _stage_one_raises_obedience),
        _needs(results, ("naive", "tuned"), "i b", _TEXTS["i b"], _adapter_beats_naive),
        _needs(results, ("base", "tuned", "naive"), "ii", _TEXTS["ii"], _tuning_calms),
        _needs(results, ("base", "knob+0.25", "knob+0.5"), "iii a", _TEXTS["iii a"], _knob_raises),
        _needs(results, ("base", "knob-0.25", "knob-0.5"), "iii b", _TEXTS["iii b"], _knob_calms),
        _knob_ends(results),
    ]
    for name in full_methods():
        for rival, words in RIVALS.items():
            claims.append(_front_claim(results, name, rival, words))
        claims.append(_fidelity(results, name))
    return claims


def full_methods() -> list[str]:
    """Return the names of the full method's conditions: the paper's, and the best found."""
    return [f"{METHOD}-{PAPER_BOUNDARY:g}", best_condition().name]


_TEXTS = {
    "i a": "Stage 1 raises obedience by at least 15 points over base",
    "i b": "Stage 1 beats naive fine-tuning on prompts with turns or several objects",
    "ii": "Fine-tuning lowers motion degree",
    "iii a": "Extrapolation raises motion degree above base, monotonically over a useful range",
    "iii b": "Negative values of the knob calm the motion",
}
RIVALS = {
    KNOB: "any plain interpolation or extrapolation",
    "{family}-reversed": "the reversed order",
    HANDOVER: "base early / tuned late",
}


def _needs(
    results: Results,
    names: Sequence[str],
    number: str,
    text: str,
    decide: Callable[[Results], tuple[bool, list[str]]],
) -> Claim:
    absent = [name for name in names if name not in results]
    if absent:
        return Claim(number, text, "not measured", (f"conditions not run: {', '.join(absent)}",))
    holds, evidence = decide(results)
    return Claim(number, text, _verdict(holds), tuple(evidence))


def _verdict(holds: bool) -> Verdict:
    return "holds" if holds else "does not hold"


def paired_difference(
    first: ConditionResults,
    second: ConditionResults,
    column: str,
    *,
    where: npt.NDArray[np.bool_] | None = None,
) -> Estimate:
    """Return the mean of first - second over prompts, with its interval."""
    difference = first.column(column) - second.column(column)
    if where is not None:
        difference = difference[where]
    return bootstrap_mean(difference)


def degree_difference(first: ConditionResults, second: ConditionResults) -> Estimate:
    """Compute the difference of motion degree in pixels, over prompts with a free camera."""
    return paired_difference(first, second, "degree", where=first.moving)


def _stage_one_raises_obedience(results: Results) -> tuple[bool, list[str]]:
    gain = paired_difference(results["tuned"], results["base"], "obeyed")
    holds = gain.value >= MIN_OBEDIENCE_GAIN and gain.low > 0
    return holds, [f"tuned - base: {_points(gain)}"]


def _adapter_beats_naive(results: Results) -> tuple[bool, list[str]]:
    tuned, naive = results["tuned"], results["naive"]
    demanding = paired_difference(tuned, naive, "obeyed", where=tuned.demanding)
    overall = paired_difference(tuned, naive, "obeyed")
    return demanding.low > 0, [
        f"tuned - naive on demanding prompts: {_points(demanding)}",
        f"tuned - naive on all prompts: {_points(overall)}",
    ]


def _tuning_calms(results: Results) -> tuple[bool, list[str]]:
    evidence, holds = [], True
    for name in ("tuned", "naive", "equal"):
        if name not in results:
            continue
        difference = degree_difference(results[name], results["base"])
        evidence.append(f"{name} - base: {difference.text(2, sign=True)} px")
        holds = holds and (name == "equal" or difference.high < 0)
    return holds, evidence


def _knob_raises(results: Results) -> tuple[bool, list[str]]:
    curve = [one for one in family(results, KNOB) if one.condition.setting >= 0]
    degrees = [one.degree for one in curve]
    rising = 1
    while rising < len(curve) and degrees[rising] > degrees[rising - 1]:
        rising += 1
    gains = [degree_difference(one, results["base"]) for one in curve[1:]]
    evidence = [
        f"alpha {one.condition.setting:g} - base: {gain.text(2, sign=True)} px"
        for one, gain in zip(curve[1:], gains, strict=True)
    ]
    evidence.append(f"monotone up to alpha {curve[rising - 1].condition.setting:g}")
    holds = rising >= 3 and all(gain.low > 0 for gain in gains[: rising - 1])
    return holds, evidence


def _knob_calms(results: Results) -> tuple[bool, list[str]]:
    evidence, holds = [], True
    for name in ("knob-0.25", "knob-0.5"):
        difference = degree_difference(results[name], results["base"])
        evidence.append(f"{name} - base: {difference.text(2, sign=True)} px")
        holds = holds and difference.high < 0
    return holds, evidence


def _knob_ends(results: Results) -> Claim:
    text = "No other value of `generate --motion` moves more than its default, 1"
    default = best_condition().name
    others = [one.name for one in paper_conditions() if one.family == BEST_KNOB]

    def decide(results: Results) -> tuple[bool, list[str]]:
        evidence, holds = [], True
        for name in others:
            difference = degree_difference(results[name], results[default])
            evidence.append(f"{name} - {default}: {difference.text(2, sign=True)} px")
            holds = holds and difference.low <= 0
        return holds, evidence

    return _needs(results, [default, *others], "iii c", text, decide)


def family(results: Results, name: str) -> list[ConditionResults]:
    """Return the results of one family, by setting. Families of two experts end at tuned and base.

    A boundary of 0 or 1 leaves one expert; those of a `-reversed` family are not in the results.
    """
    members = [one for one in results.values() if one.condition.family == name]
    members.sort(key=lambda one: one.condition.setting)
    if name == HANDOVER:
        ends = [results[end] for end in ("base", "tuned") if end in results]
        members = ends[:1] + members + ends[1:]
    return members


def degree_at_obedience(
    members: Sequence[ConditionResults], obedience: float, *, draw: Draw | None = None
) -> float:
    """Return the most motion that a family gives at no less than an obedience, in pixels.

    Between neighbours both numbers are interpolated. A family that never gets so far is taken at
    its most obedient point.

    Args:
        members: Neighbours in their setting are neighbours here.
        obedience: In [0, 1].
        draw: Prompts to use, with repetitions; all of them by default.
    """
    points = np.array([_point(member, draw) for member in members])
    mix = np.linspace(0, 1, 21)[:, None]
    segments = [a + mix * (b - a) for a, b in pairwise(points)]
    line = np.concatenate([points, *segments])
    enough = line[:, 0] >= min(obedience, float(line[:, 0].max())) - 1e-9
    return float(line[enough, 1].max())


def _point(member: ConditionResults, draw: Draw | None) -> tuple[float, float]:
    obeyed, degree, moving = member.column("obeyed"), member.column("degree"), member.moving
    if draw is not None:
        obeyed, degree, moving = obeyed[draw], degree[draw], moving[draw]
    return float(obeyed.mean()), float(degree[moving].mean())


def advantage(full: ConditionResults, members: Sequence[ConditionResults]) -> Estimate:
    """Compute the pixels of motion beyond a family's at equal obedience, with a joint interval."""

    def statistic(draw: Draw) -> float:
        obedience, degree = _point(full, draw)
        return degree - degree_at_obedience(members, obedience, draw=draw)

    return bootstrap_statistic(statistic, len(full.clips), num_resamples=1_000)


def _front_claim(results: Results, name: str, rival: str, words: str) -> Claim:
    method_family = BEST if name.startswith(BEST) else METHOD
    rival = rival.format(family=method_family)
    text = f"At equal obedience, {name} moves more than {words}"
    # A part of a family may miss its best member, and base and tuned alone are no hand-over.
    needed = [name, *(one.name for one in paper_conditions() if one.family == rival)]
    absent = [one for one in needed if one not in results]
    if absent or len(needed) == 1:
        missing = ", ".join(absent) or f"the family {rival}"
        return Claim("iv", text, "not measured", (f"conditions not run: {missing}",))
    members = family(results, rival)
    full = results[name]
    gain = advantage(full, members)
    most_obedient = max(member.obedience for member in members)
    evidence = [
        f"{name}: obedience {100 * full.obedience:.1f} %, motion degree {full.degree:.2f} px",
        f"more than the front of {rival}: {gain.text(2, sign=True)} px",
    ]
    if most_obedient < full.obedience:
        evidence.append(f"{rival} never gets beyond {100 * most_obedient:.1f} % obedience")
    if full.obedience < MIN_OBEDIENCE:
        evidence.append(f"{name} obeys in fewer than {100 * MIN_OBEDIENCE:.0f} % of clips")
        return Claim("iv", text, "not decidable", tuple(evidence))
    return Claim("iv", text, _verdict(gain.low > 0), tuple(evidence))


def _fidelity(results: Results, name: str) -> Claim:
    text = f"First-frame fidelity of {name} falls by less than 2 dB"

    def decide(results: Results) -> tuple[bool, list[str]]:
        loss = paired_difference(results["base"], results[name], "first_frame_db")
        return loss.high < MAX_FIDELITY_LOSS, [f"base - {name}: {loss.text(2, sign=True)} dB"]

    return _needs(results, ("base", name), "v", text, decide)


def _points(share: Estimate) -> str:
    return f"{share.scaled(100).text(1, sign=True)} points"
