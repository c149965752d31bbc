"""Looks at samples of a merge while it runs: what survives rounding, which tensors are equal.

The first 2048 entries of every 16th block are counted; small tensors are counted whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from motionmerge.merging.algebra.masks import MaskV1
from motionmerge.merging.algebra.steps import Block
from motionmerge.merging.compute.compiled import Bytes, Floats
from motionmerge.merging.compute.kernel import BLOCK, STRETCH, Values, rounded_to
from motionmerge.merging.compute.plan import TensorPlan, Write
from motionmerge.merging.compute.program import BlockProgram
from motionmerge.merging.inputs.sources import Source

SAMPLE_EVERY, SAMPLE = 16, 2048
_POOLED = 65_536

_GLANCE = 64

Blocks = Sequence[tuple[TensorPlan, Block]]
"""Neighbouring blocks, each with its tensor."""


@dataclass(frozen=True)
class SamplePlan:
    """Which entries of some neighbouring blocks are looked at.

    Attributes:
        blocks: The blocks that are, each cut off behind its last such entry.
        pieces: Where these lie among all entries; neighbours are one piece.
        represents: For how many entries of its tensor each block stands.
    """

    blocks: Sequence[Block]
    pieces: Sequence[slice]
    represents: Sequence[int]

    def of(self, entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Copy the sampled ones of all entries, one block after the other."""
        return np.concatenate([entries[piece] for piece in self.pieces])

    def of_values(self, values: Values) -> Values:
        """Do the same with entries as they are stored."""
        size = values.dtype.itemsize
        raw = self.of(values.raw.reshape(-1, size))
        return Values(raw.reshape(-1), values.dtype)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What was found at the sampled entries of blocks that have the same program.

    Attributes:
        program: What was computed.
        blocks: The blocks, as far as they are sampled.
        represents: For how many entries of its tensor each block stands.
        held: What the sources hold there.
        masks: What the masks are there.
        results: What was computed there, as it is stored.
    """

    program: BlockProgram
    blocks: Sequence[Block]
    represents: Sequence[int]
    held: Mapping[Source, Values]
    masks: Mapping[MaskV1, Bytes]
    results: Sequence[tuple[Write, Values]]

    @property
    def count(self) -> int:
        """How many entries."""
        return sum(block.count for block in self.blocks)

    def observe(self, registers: Sequence[Floats]) -> None:
        """Show the experts the results of the entries, whose registers are given."""
        for (write, result), root in zip(self.results, self.program.roots, strict=True):
            anchor = self.program.reads[write.job.checkpoint.anchor]
            if root != anchor:
                write.job.observe(
                    [block.name for block in self.blocks],
                    sizes=[block.count for block in self.blocks],
                    anchor=registers[anchor],
                    ideal=registers[root],
                    rounded=result.floats,
                    kept=rounded_to(result.dtype, registers[anchor]),
                    represents=self.represents,
                )


class SamplePool:
    """Gathers samples until there are many, as counting a few takes as long.

    Args:
        look: Counts those of one program.
    """

    def __init__(self, look: Callable[[Sampled], None]) -> None:
        self._look = look
        self._waiting: dict[tuple[int, ...], list[Sampled]] = {}
        self._counts: Counter[tuple[int, ...]] = Counter()

    def add(self, found: Sampled) -> None:
        """Count these entries, now or later; their memory is not looked at again."""
        key = (id(found.program), *(id(write) for write, _ in found.results))
        if self._counts[key] + found.count > STRETCH:
            self._look_at(key)
        self._waiting.setdefault(key, []).append(found)
        self._counts[key] += found.count
        if self._counts[key] >= _POOLED:
            self._look_at(key)

    def flush(self) -> None:
        """Count what was gathered."""
        for key in list(self._waiting):
            self._look_at(key)

    def _look_at(self, key: tuple[int, ...]) -> None:
        del self._counts[key]
        self._look(_joined(self._waiting.pop(key)))


def _joined(found: Sequence[Sampled]) -> Sampled:
    """Concatenate samples of the same program."""
    first = found[0]

    def entries(parts: Iterable[Values]) -> Values:
        values = list(parts)
        return Values(np.concatenate([part.raw for part in values]), values[0].dtype)

    return Sampled(
        program=first.program,
        blocks=[block for one in found for block in one.blocks],
        represents=[number for one in found for number in one.represents],
        held={source: entries(one.held[source] for one in found) for source in first.held},
        masks={mask: np.concatenate([one.masks[mask] for one in found]) for mask in first.masks},
        results=[
            (write, entries(one.results[number][1] for one in found))
            for number, (write, _) in enumerate(first.results)
        ],
    )


def samples_of(planned: Blocks) -> SamplePlan | None:
    """Choose what to look at; None if it is nothing."""
    blocks: list[Block] = []
    pieces: list[slice] = []
    represents = []
    start = 0
    for tensor, block in planned:
        if block.index % SAMPLE_EVERY == 0:
            count = min(SAMPLE, block.count)
            blocks.append(Block(block.name, block.index, count))
            represents.append(min(tensor.num_elements - block.start, SAMPLE_EVERY * BLOCK))
            if pieces and pieces[-1].stop == start:
                pieces[-1] = slice(pieces[-1].start, start + count)
            else:
                pieces.append(slice(start, start + count))
        start += block.count
    return SamplePlan(blocks, pieces, represents) if blocks else None


def compare(planned: Blocks, held: Mapping[Source, Values]) -> None:
    """Note which tensors differ between sources; the first few entries tell most apart."""
    start = 0
    for tensor, block in planned:
        stop = start + block.count
        if tensor.may_be_equal:
            glance = slice(start, min(start + _GLANCE, stop))
            tensor.may_be_equal = all(
                _are_equal([values[part] for values in held.values()])
                for part in (glance, slice(start, stop))
            )
        start = stop


def _are_equal(values: Sequence[Values]) -> bool:
    first, *others = values
    return all(
        np.array_equal(first.raw, other.raw)
        if first.dtype == other.dtype
        else np.array_equal(first.floats, other.floats)
        for other in others
    )
