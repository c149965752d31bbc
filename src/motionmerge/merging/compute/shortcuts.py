"""Shorter programs with the same bits, wherever nothing overflows.

Each shortcut leaves out roundings that change nothing: products with a power of two, and with the
0 and 1 of a mask, are exact. Where a result is not finite, the program itself is carried out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from motionmerge.merging.algebra.steps import (
    Add,
    AddDropped,
    Apply,
    Drop,
    Read,
    Scale,
    Step,
    Subtract,
)
from motionmerge.merging.compute.program import Along
from motionmerge.merging.inputs.sources import Source

_SMALLEST = 2.0**-16


def along_of(steps: Sequence[Step], roots: Sequence[int]) -> tuple[Along, ...] | None:
    """Recognise results that each add one scaled difference of two sources to a source.

    Args:
        steps: Of a program, after `shortened` if that gives any.
        roots: Those whose values are wanted.
    """
    found = []
    for root in roots:
        step = _along(steps, steps[root])
        if step is None:
            return None
        found.append(step)
    return tuple(found)


def _along(steps: Sequence[Step], last: Step) -> Along | None:
    if not isinstance(last, (Add, AddDropped)):
        return None
    factors = [last.factor] if isinstance(last, AddDropped) else []
    anchor, term = steps[last.first], steps[last.second]
    while isinstance(term, Scale):
        factors.insert(0, term.factor)
        term = steps[term.first]
    if not isinstance(anchor, Read) or not isinstance(term, Subtract) or len(factors) > 3:
        return None
    minuend, subtrahend = steps[term.first], steps[term.second]
    if not isinstance(minuend, Read) or not isinstance(subtrahend, Read):
        return None
    first, second, third = [1.0, 1.0, 1.0, *factors][-3:]  # a product with 1 is exact
    mask, size = last.mask if isinstance(last, AddDropped) else None, abs(third)
    is_line = anchor == subtrahend and mask is None and first == second == 1
    is_line = is_line and _is_power_of_two(size) and _SMALLEST <= size < 0.5
    return Along(
        anchor=anchor.source,
        minuend=minuend.source,
        subtrahend=subtrahend.source,
        factors=(first, second, third),
        mask=mask,
        is_line=is_line,
    )


def shortened(
    steps: Sequence[Step], roots: Sequence[int], *, halves: Collection[Source]
) -> tuple[list[Step], list[int]] | None:
    """Return fewer steps with the same bits, and the new numbers of the roots.

    What is dropped from a task vector is left out where it is added, instead of before it is
    rescaled; a factor that is exact joins the next.

    Args:
        steps: Of a program; none is given.
        roots: Those whose values are wanted.
        halves: The sources that are stored in bf16 or fp16.

    Returns:
        None if nothing can be left out.
    """
    shorter = _Shorter(steps, halves)
    places = [shorter.step(root) for root in roots]
    return (list(shorter.steps), places) if shorter.num_shortened else None


class _Shorter:
    def __init__(self, steps: Sequence[Step], halves: Collection[Source]) -> None:
        self.steps: dict[Step, int] = {}
        self.num_shortened = 0
        self._old, self._halves = steps, halves

    def step(self, number: int) -> int:
        """Repeat a step, and those it needs, among the new ones; give its new number."""
        old = self._old[number]
        if isinstance(old, Add):
            dropped = self._add_dropped(old)
            return self._repeat(Add(*self._both(old))) if dropped is None else dropped
        if isinstance(old, Subtract):
            return self._repeat(Subtract(*self._both(old)))
        if isinstance(old, Scale):
            return self._repeat(Scale(self.step(old.first), old.factor))
        if isinstance(old, Drop):
            return self._repeat(Drop(self.step(old.first), old.mask))
        if isinstance(old, Apply):
            return self._repeat(Apply(old.function, tuple(map(self.step, old.operands))))
        return self._repeat(old)

    def _repeat(self, step: Step) -> int:
        return self.steps.setdefault(step, len(self.steps))

    def _both(self, step: Add | Subtract) -> tuple[int, int]:
        return self.step(step.first), self.step(step.second)

    def _add_dropped(self, add: Add) -> int | None:
        """Shorten first + f3 * (f2 * drop(f1 * value)), with any number of factors anywhere."""
        factors: list[float] = []
        masks = []
        number = add.second
        while isinstance(step := self._old[number], (Scale, Drop)):
            if isinstance(step, Scale):
                factors.insert(0, step.factor)
            else:
                masks.append(step.mask)
            number = step.first
        if len(masks) != 1:
            return None
        if len(factors) > 1 and self._is_exact(number, factors[0]):
            factors[:2] = [factors[0] * factors[1]]
        last = factors.pop() if factors else 1.0
        first, value = self.step(add.first), self.step(number)
        for factor in factors:
            value = self._repeat(Scale(value, factor))
        self.num_shortened += 1
        return self._repeat(AddDropped(first, value, last, masks[0]))

    def _is_exact(self, number: int, factor: float) -> bool:
        """Return whether factor * step needs no rounding: bf16 and fp16 leave room for it."""
        step = self._old[number]
        return (
            isinstance(step, Subtract)
            and all(
                isinstance(side, Read) and side.source in self._halves
                for side in (self._old[step.first], self._old[step.second])
            )
            and _is_power_of_two(abs(factor))
            and _SMALLEST <= abs(factor) <= 1
        )


def _is_power_of_two(size: float) -> bool:
    return math.frexp(size)[0] == 0.5
