"""Successive halving of several objectives: few clips and steps for many, all of them for the best.

Candidates are ranked by fronts. No candidate beats one of the first front; without the first
front, none beats one of the second, and so on. Inside a front the most balanced and the best of
each objective take turns, so that its middle and its ends survive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from motionmerge.evaluation.sweeps.results import front_of

Qualities = tuple[float, ...]
"""Of one candidate, one number for each objective; more is better."""

KEPT_SHARE = 1 / 3
"""Of the candidates of a rung, how many reach the next."""

_FEWEST_CLIPS = 4
_FEWEST_STEPS = 6
"""Half of fewer steps would leave experts out."""

MOVED = 0.02
"""Of what candidates span in an objective: less than this is no news on the front."""


@dataclass(frozen=True)
class Rung:
    """How thoroughly candidates are measured.

    Attributes:
        num_clips: Clips of each.
        num_steps: Denoising steps.
    """

    num_clips: int
    num_steps: int


def rungs_of(num_clips: int, num_steps: int) -> list[Rung]:
    """Return the rungs: a quarter of the clips in half the steps, half of the clips, all of them.

    Rungs that are no different are left out.
    """
    few_steps = num_steps // 2 if num_steps >= 2 * _FEWEST_STEPS else num_steps
    shares = ((4, few_steps), (2, num_steps), (1, num_steps))
    rungs: list[Rung] = []
    for parts, steps in shares:
        clips = min(num_clips, max(_FEWEST_CLIPS, math.ceil(num_clips / parts)))
        rung = Rung(clips, steps)
        if rung not in rungs:
            rungs.append(rung)
    return rungs


def num_kept(num: int, *, num_objectives: int) -> int:
    """Return how many of a rung's candidates reach the next: a third, or one for each turn."""
    return min(num, max(1 + num_objectives, math.ceil(num * KEPT_SHARE)))


def ranked(qualities: Sequence[Qualities]) -> list[int]:
    """Sort candidates, the best first, and return their numbers."""
    order: list[int] = []
    left = list(range(len(qualities)))
    while left:
        on_front = front_of([qualities[number] for number in left])
        front = [number for number, is_best in zip(left, on_front, strict=True) if is_best]
        order += _by_turns(front or left, qualities)
        left = [number for number in left if number not in order]
    return order


def _by_turns(front: Sequence[int], qualities: Sequence[Qualities]) -> list[int]:
    """Sort a front: the most balanced, the most of each objective, the next balanced, and so on."""
    own = [qualities[number] for number in front]
    lows = [min(each) for each in zip(*own, strict=True)]
    spans = [max(each) - low for each, low in zip(zip(*own, strict=True), lows, strict=True)]

    def balance(number: int) -> float:
        parts = zip(qualities[number], lows, spans, strict=True)
        return min((value - low) / span if span else 1.0 for value, low, span in parts)

    order: list[int] = []
    left = list(front)
    while left:
        turn = len(order) % (len(spans) + 1)
        worth = {
            number: qualities[number][turn - 1] if turn else balance(number) for number in left
        }
        order.append(max(left, key=worth.__getitem__))
        left.remove(order[-1])
    return order


def moves_front(new: Qualities, before: Sequence[Qualities]) -> bool:
    """Return whether a candidate is better than each before it by more than `MOVED` in something.

    The additive epsilon indicator, in parts of what the candidates span.
    """
    if not before:
        return True
    everyone = [*before, new]
    spans = [max(each) - min(each) for each in zip(*everyone, strict=True)]
    news = min(
        max((a - b) / span if span else 0.0 for a, b, span in zip(new, other, spans, strict=True))
        for other in before
    )
    return news > MOVED


def trials_without_news(qualities: Sequence[Qualities]) -> int:
    """Return how many candidates at the end did not move the front."""
    count = 0
    for number, new in enumerate(qualities):
        count = 0 if moves_front(new, qualities[:number]) else count + 1
    return count
