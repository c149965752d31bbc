"""The expressions of several experts as one short program over fp32 registers, for one tensor.

Every step is one IEEE operation of an expression's own tree, in its order, so that the program
gives the bits of `Checkpoint.value`. Nodes that need a whole tensor (a low-rank part, the largest
entries) are evaluated by themselves and enter as given tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.groups import Only, selects
from motionmerge.merging.algebra.nodes import Checkpoint, Difference, Scaled, Sum, TaskVector
from motionmerge.merging.algebra.sparsify import Dare, MaskV1
from motionmerge.merging.inputs.sources import OpenInputs, Source


@dataclass(frozen=True)
class Read:
    """The stored tensor of a source."""

    source: Source


@dataclass(frozen=True)
class Given:
    """A task vector that was evaluated as a whole; `masks` tells apart masks drawn elsewhere."""

    vector: TaskVector
    masks: tuple[int, ...]


@dataclass(frozen=True)
class Subtract:
    """first - second."""

    first: int
    second: int


@dataclass(frozen=True)
class Add:
    """first + second."""

    first: int
    second: int


@dataclass(frozen=True)
class Scale:
    """factor * first."""

    first: int
    factor: float


@dataclass(frozen=True)
class Drop:
    """first where the mask keeps it, else zero; not rescaled."""

    first: int
    mask: MaskV1


@dataclass(frozen=True)
class AddDropped:
    """first + (factor * second where the mask keeps it, else zero)."""

    first: int
    second: int
    factor: float
    mask: MaskV1


Step = Read | Given | Subtract | Add | Scale | Drop | AddDropped


class Lowering:
    """Turns the expressions of several experts into one list of steps for one tensor.

    Equal steps are taken once: experts share what they have in common.
    """

    def __init__(self, name: str, ndim: int, inputs: OpenInputs) -> None:
        self.steps: dict[Step, int] = {}
        self.given: dict[int, torch.Tensor] = {}
        self._name, self._ndim, self._inputs = name, ndim, inputs

    def add(self, step: Step) -> int:
        """Give the number of a step, which is new unless an equal one exists."""
        return self.steps.setdefault(step, len(self.steps))

    def checkpoint(self, checkpoint: Checkpoint) -> int | None:
        """Lower a checkpoint; None if no task vector changes this tensor."""
        total: int | None = None
        for vector in checkpoint.vectors:
            term = self.vector(vector)
            if term is not None:
                anchor = self.add(Read(checkpoint.anchor)) if total is None else total
                total = self.add(Add(anchor, term))
        return total

    def vector(self, vector: TaskVector) -> int | None:
        """Lower a task vector; None if it is zero by construction."""
        if type(vector) is Difference:
            return self._difference(vector)
        if type(vector) is Sum:
            left, right = self.vector(vector.left), self.vector(vector.right)
            if left is None or right is None:
                return right if left is None else left
            return self.add(Add(left, right))
        if type(vector) is Scaled:
            value = self.vector(vector.vector)
            return None if value is None else self._scaled(value, vector.factor.real)
        if type(vector) is Only:
            return self.vector(vector.vector) if selects(vector.group)(self._name) else None
        if type(vector) is Dare and type(vector.masks) is MaskV1:
            value = self.vector(vector.vector)
            if value is None or self._ndim <= 1:
                return value
            return self.add(Scale(self.add(Drop(value, vector.masks)), vector.masks.rescale))
        return self._given(vector)

    def _difference(self, vector: Difference) -> int | None:
        if not all(self._inputs.has(source, self._name) for source in vector.sources(self._name)):
            return None
        first, second = (
            self.add(Read(side.anchor)) if (moved := self.checkpoint(side)) is None else moved
            for side in (vector.minuend, vector.subtrahend)
        )
        return self.add(Subtract(first, second))

    def _scaled(self, value: int, factor: float) -> int:
        """Scale a step; a bare minus is exact, so it joins the factor before it."""
        if factor == -1:
            last = next(step for step, number in self.steps.items() if number == value)
            if isinstance(last, Scale):
                return self.add(Scale(last.first, -last.factor))
        return self.add(Scale(value, factor))

    def _given(self, vector: TaskVector) -> int | None:
        elsewhere = (
            id(inner.masks)
            for inner in vector.vectors_inside()
            if isinstance(inner, Dare) and type(inner.masks) is not MaskV1
        )
        step = Given(vector, tuple(elsewhere))
        if step not in self.steps:
            value = vector.value(self._name, self._inputs)
            if value is None:
                return None
            self.given[self.add(step)] = value.contiguous().reshape(-1)
        return self.steps[step]


@dataclass(frozen=True)
class Instruction:
    """One step with registers in place of step numbers."""

    step: Subtract | Add | Scale | Drop | AddDropped
    first: int
    second: int
    target: int


@dataclass(frozen=True)
class Along:
    """anchor + f3 * (f2 * (f1 * (minuend - subtrahend))), the product zero where the mask drops it.

    Every operation is rounded to fp32. Without a mask all is kept.

    Attributes:
        factors: f1, f2 and f3; those that are not needed are 1, which changes nothing.
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


class Program:
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
        shorter: Program | None = None,
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
        self.given = {place[number]: value for number, value in self.given.items()}
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
            operands = [place[operand] for operand in _operands(step)]
            for operand in dict.fromkeys(_operands(step)):
                if last_use[operand] == number and place[operand] not in fixed:
                    free.append(place[operand])
            if not free:
                free.append(self.num_registers)
                self.num_registers += 1
            place[number] = free.pop()
            self.instructions.append(Instruction(step, operands[0], operands[-1], place[number]))
        self.roots = [place[root] for root in roots]
        self.masks = tuple(
            dict.fromkeys(step.mask for step in steps if isinstance(step, (Drop, AddDropped)))
        )


def is_blockwise(vector: TaskVector) -> bool:
    """Tell whether a task vector, apart from those inside it, can be computed block by block."""
    if type(vector) is Dare:
        return type(vector.masks) is MaskV1
    return type(vector) in (Difference, Sum, Scaled, Only)


def _operands(step: Step) -> tuple[int, ...]:
    if isinstance(step, (Subtract, Add, AddDropped)):
        return (step.first, step.second)
    return (step.first,) if isinstance(step, (Scale, Drop)) else ()


def _needed(steps: Sequence[Step], roots: Sequence[int]) -> set[int]:
    found, waiting = set(), list(roots)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += _operands(steps[number])
    return found
