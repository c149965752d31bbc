"""Looks at samples of a merge while it runs: what survives rounding, which tensors are equal.

The first 2048 entries of every 16th block are counted; small tensors are counted whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from motionmerge.merge.kernel import BLOCK, Block, Floats, Values
from motionmerge.merge.plan import Job, TensorPlan
from motionmerge.merge.sources import Source

SAMPLE_EVERY, SAMPLE = 16, 2048

_GLANCE = 64

Blocks = Sequence[tuple[TensorPlan, Block]]
"""Neighbouring blocks, each with its tensor."""


@dataclass(frozen=True)
class Samples:
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
        """Give the sampled ones of all entries, one block after the other."""
        if len(self.pieces) == 1:
            return entries[self.pieces[0]]
        return np.concatenate([entries[piece] for piece in self.pieces])

    def of_values(self, values: Values) -> Values:
        """Do the same with entries as they are stored."""
        size = values.dtype.itemsize
        raw = self.of(values.raw.reshape(-1, size))
        return Values(raw.reshape(-1), values.dtype)

    def count(self, job: Job, *, anchor: Floats, ideal: Floats, rounded: Floats) -> None:
        """Tell an expert what became of the sampled entries; see `Survival.add`."""
        job.observe(
            [block.name for block in self.blocks],
            sizes=[block.count for block in self.blocks],
            anchor=anchor,
            ideal=ideal,
            rounded=rounded,
            represents=self.represents,
        )


def samples_of(planned: Blocks) -> Samples | None:
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
    return Samples(blocks, pieces, represents) if blocks else None


def compare(planned: Blocks, held: Mapping[Source, Values]) -> None:
    """Note which tensors differ between sources; the first few entries tell most apart."""
    start = 0
    for tensor, block in planned:
        stop = start + block.count
        if tensor.may_be_equal:
            glance = slice(start, min(start + _GLANCE, stop))
            tensor.may_be_equal = all(
                _are_equal(values[part].tensor for values in held.values())
                for part in (glance, slice(start, stop))
            )
        start = stop


def _are_equal(tensors: Iterable[torch.Tensor]) -> bool:
    first, *others = (tensor.float() for tensor in tensors)
    return all(torch.equal(first, other) for other in others)
