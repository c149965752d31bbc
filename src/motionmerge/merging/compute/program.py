"""The steps of several experts as one short program over fp32 registers, for one tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.masks import MaskV1
from motionmerge.merging.algebra.steps import (
    Add,
    AddDropped,
    Apply,
    Drop,
    Given,
    Read,
    Scale,
    Step,
    Subtract,
)
from motionmerge.merging.inputs.sources import Source


@dataclass(frozen=True)
class Instruction:
    """One step with registers in place of step numbers."""

    step: Subtract | Add | Scale | Drop | AddDropped | Apply
    operands: tuple[int, ...]
    target: int


@dataclass(frozen=True, kw_only=True)
class Along:
    """anchor + f3 * (f2 * (f1 * (minuend - subtrahend))), the product zero where the mask drops it.

    Every operation is rounded to fp32. Without a mask all is kept.

    Attributes:
        factors: f1, f2 and f3. A factor that the step does not use is 1, which changes nothing.
        is_line: It is anchor + f3 * (minuend - anchor) with a product that is exact in fp32 for
            sources in bf16 or fp16, whose differences have bits to spare at the small end. Then it
            does not matter whether product and sum are fused.
    """

    anchor: Source
    minuend: Source
    subtrahend: Source
    factors: tuple[float, float, float]
    mask: MaskV1 | None
    is_line: bool


class BlockProgram:
    """The steps of one tensor, with registers assigned so that few are needed.

    Args:
        steps: The steps.
        roots: The steps whose values are wanted, one per result.
        given: The values of steps that were evaluated as a whole.
        kept: Sources whose registers still hold what was read when the program ends; those of the
            others are used again.
        along: What each root comes to, if every one is a step along a difference.
        shorter: A program with the same bits wherever nothing overflows.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        roots: Sequence[int],
        *,
        given: Mapping[int, torch.Tensor],
        kept: Collection[Source] = (),
        along: Sequence[Along] | None = None,
        shorter: BlockProgram | None = None,
    ) -> None:
        self.along, self.shorter = along, shorter
        needed = _needed(steps, roots)
        self.reads = {
            step.source: number
            for number, step in enumerate(steps)
            if isinstance(step, Read) and number in needed
        }
        self.given = {number: value for number, value in given.items() if number in needed}
        leaves = [*self.reads.values(), *self.given]
        place = {number: register for register, number in enumerate(leaves)}
        self.reads = {source: place[number] for source, number in self.reads.items()}
        self.given = {place[n]: v.contiguous().reshape(-1) for n, v in self.given.items()}
        fixed = {*self.given, *(self.reads[source] for source in kept if source in self.reads)}
        last_use = {
            operand: number
            for number, step in enumerate(steps)
            if number in needed
            for operand in _operands(step)
        }
        last_use.update(dict.fromkeys(roots, len(steps)))
        free: list[int] = []
        self.num_registers = len(leaves)
        self.instructions: list[Instruction] = []
        for number, step in enumerate(steps):
            if number not in needed or isinstance(step, (Read, Given)):
                continue
            operands = tuple(place[operand] for operand in _operands(step))
            for operand in dict.fromkeys(_operands(step)):
                if last_use[operand] == number and place[operand] not in fixed:
                    free.append(place[operand])
            if not free:
                free.append(self.num_registers)
                self.num_registers += 1
            place[number] = free.pop()
            self.instructions.append(Instruction(step, operands, place[number]))
        self.roots = [place[root] for root in roots]
        self.masks = tuple(
            dict.fromkeys(step.mask for step in steps if isinstance(step, (Drop, AddDropped)))
        )


def _operands(step: Step) -> tuple[int, ...]:
    if isinstance(step, (Subtract, Add, AddDropped)):
        return (step.first, step.second)
    if isinstance(step, Apply):
        return step.operands
    return (step.first,) if isinstance(step, (Scale, Drop)) else ()


def _needed(steps: Sequence[Step], roots: Sequence[int]) -> set[int]:
    found, waiting = set(), list(roots)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += _operands(steps[number])
    return found
