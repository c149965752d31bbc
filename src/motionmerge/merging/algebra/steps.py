"""The steps in which an expression is computed, for one tensor: each node writes its own.

Every step is one IEEE operation of the expression's tree, in its order. The engine carries the
steps out block by block in fp32; `Lowering.value` does it on whole tensors, for what blocks cannot
hold: fp64, and the arguments of functions that look at a whole tensor. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy.typing as npt

from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.masks import MaskV1
from motionmerge.merging.inputs.sources import OpenInputs, Source
from motionmerge.rng import MASK_BLOCK

BlockFunction: TypeAlias = "Callable[[Sequence[npt.NDArray[Any]], Block], npt.NDArray[Any]]"
"""Computes the entries of one block from those of other steps there. Equal ones are one step."""


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block lies in its tensor: entries `start` to `start + count`, at most 65536.

    Attributes:
        name: The tensor.
        index: Which of its blocks.
        count: Number of entries.
    """

    name: str
    index: int
    count: int

    @property
    def start(self) -> int:
        """Its first entry in the flattened tensor."""
        return self.index * MASK_BLOCK


@dataclass(frozen=True)
class Read:
    """The stored tensor of a source."""

    source: Source


@dataclass(frozen=True)
class Given:
    """A tensor that was computed as a whole; equal keys stand for the same one."""

    key: Hashable


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


@dataclass(frozen=True)
class Apply:
    """function(operands...), entry by entry."""

    function: BlockFunction
    operands: tuple[int, ...]


Step = Read | Given | Subtract | Add | Scale | Drop | AddDropped | Apply


class Lowering:
    """The steps of several expressions for one tensor.

    Equal steps are taken once: experts share what they have in common.

    Attributes:
        name: The tensor.
        ndim: Its number of dimensions.
        inputs: The open sources.
        steps: The steps in order; an expression is known by the number of its last one.
        given: The tensors of steps that were computed as a whole, by their numbers.
    """

    def __init__(self, name: str, ndim: int, inputs: OpenInputs) -> None:
        self.name, self.ndim, self.inputs = name, ndim, inputs
        self.steps: list[Step] = []
        self.given: dict[int, torch.Tensor] = {}
        self._numbers: dict[Step, int] = {}

    def add(self, step: Step) -> int:
        """Return the number of a step, which is new unless an equal one exists."""
        number = self._numbers.setdefault(step, len(self.steps))
        if number == len(self.steps):
            self.steps.append(step)
        return number

    def scale(self, number: int, factor: float) -> int:
        """Scale a step; a bare minus is exact, so it joins the factor before it."""
        last = self.steps[number]
        if factor == -1 and isinstance(last, Scale):
            return self.add(Scale(last.first, -last.factor))
        return self.add(Scale(number, factor))

    def give(self, key: Hashable, compute: Callable[[], torch.Tensor]) -> int:
        """Add a tensor that is computed as a whole, now, unless an equal key was given.

        Args:
            key: Tells it from others of the same name.
            compute: Computes it, in fp32 or fp64.
        """
        number = self.add(Given(key))
        if number not in self.given:
            self.given[number] = compute()
        return number

    def value(self, number: int) -> torch.Tensor:
        """Compute a step on the whole tensor: in fp32, or fp64 where it is stored as such."""
        step = self.steps[number]
        if isinstance(step, Read):
            return self.inputs.value(step.source, self.name)
        if isinstance(step, Given):
            return self.given[number]
        if isinstance(step, Apply):
            return self._applied(step)
        first = self.value(step.first)
        if isinstance(step, Subtract):
            return first - self.value(step.second)
        if isinstance(step, Add):
            return first + self.value(step.second)
        if isinstance(step, Scale):
            return first * step.factor
        if isinstance(step, Drop):
            return first * step.mask.keep(self.name, first.shape)
        raise TypeError(f"{step} comes from shortening steps, which are not computed here.")

    def _applied(self, step: Apply) -> torch.Tensor:
        values = [self.value(number) for number in step.operands]
        result = torch.empty(values[0].shape, dtype=promoted(values))
        entries = [value.to(result.dtype).contiguous().view(-1).numpy() for value in values]
        target = result.view(-1).numpy()
        for block in blocks_of(self.name, target.size):
            part = slice(block.start, block.start + block.count)
            target[part] = step.function([one[part] for one in entries], block)
        return result


def blocks_of(name: str, num_elements: int) -> Iterator[Block]:
    """Cut a tensor into blocks."""
    for index, start in enumerate(range(0, num_elements, MASK_BLOCK)):
        yield Block(name, index, min(MASK_BLOCK, num_elements - start))


def promoted(values: Sequence[torch.Tensor]) -> torch.dtype:
    """Return the dtype to compute with several tensors in: fp64 if one of them is."""
    return torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
