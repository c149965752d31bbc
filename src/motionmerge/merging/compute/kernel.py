"""Runs a program on neighbouring blocks: buffers that are reused, one pass over registers a step.

What each pass costs, and why a block is computed in one go: docs/benchmarks/merging.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motionmerge import lazy_torch
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.masks import MaskV1
from motionmerge.merging.algebra.rounding import all_finite, fits, rounding_bits, scatter_
from motionmerge.merging.algebra.steps import (
    Add,
    AddDropped,
    Apply,
    Block,
    Drop,
    Scale,
    Subtract,
)
from motionmerge.merging.compute.compiled import STREAMS, Bytes, Floats, Kernels, compiled_kernels
from motionmerge.merging.compute.plain import plain_kernels
from motionmerge.merging.compute.program import Along, BlockProgram
from motionmerge.merging.inputs.sources import Source
from motionmerge.rng import MASK_BLOCK, mask_bits, mask_digest
from motionmerge.tensors import DType, to_numpy

BLOCK = MASK_BLOCK
"""Elements that share one draw of random numbers."""

STRETCH = 2 * BLOCK
"""Elements computed at a time, at most. Shorter passes spend more of their time on being called,
and on handing the interpreter from thread to thread."""

CHUNK = 2 * STRETCH
"""Elements read and written at a time, at most."""

HALVES = (DType.BF16, DType.FP16)


@dataclass(frozen=True)
class Values:
    """Entries as they are stored: their bytes and their dtype."""

    raw: Bytes
    dtype: DType

    def __getitem__(self, part: slice) -> Values:
        """Return the entries `part.start` to `part.stop`; memory is shared."""
        size = self.dtype.itemsize
        return Values(self.raw[part.start * size : part.stop * size], self.dtype)

    @property
    def tensor(self) -> torch.Tensor:
        """The same memory as a tensor `[entries]`."""
        return torch.from_numpy(self.raw).view(self.dtype.torch)

    @property
    def floats(self) -> Floats:
        """The entries in fp32; the same memory if they are stored so."""
        if self.dtype in (DType.FP32, *HALVES):
            return to_numpy(self.raw, self.dtype).astype(np.float32, copy=False)
        floats: Floats = self.tensor.float().numpy()
        return floats

    @property
    def are_finite(self) -> bool:
        """None is infinite or NaN; integers never are."""
        return not self.dtype.is_floating_point or all_finite(self.raw, self.dtype)


class Workspace:
    """Byte buffers of one thread, by name."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}

    def buffer(self, key: str, size: int) -> Bytes:
        """Return `size` bytes that belong to `key` until it asks again."""
        held = self._buffers.get(key)
        if held is None or held.size < size:
            held = self._buffers[key] = np.empty(size, dtype=np.uint8)
        return held[:size]

    def values(self, key: str, count: int, dtype: DType) -> Values:
        """Return memory for `count` entries that belongs to `key` until it asks again."""
        return Values(self.buffer(key, count * dtype.itemsize), dtype)


class RegisterFile:
    """fp32 registers for one stretch at a time."""

    def __init__(self) -> None:
        self._registers: list[Floats] = []

    def first(self, count: int, size: int) -> list[Floats]:
        """Return the first `count` registers, cut to `size` entries."""
        while len(self._registers) < count:
            self._registers.append(np.empty(STRETCH, dtype=np.float32))
        return [register[:size] for register in self._registers[:count]]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Limit torch to so many threads in each operation; afterwards it has as many as before.

    Does nothing while torch is not imported.
    """
    if not lazy_torch.is_imported():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load(
    program: BlockProgram,
    blocks: Sequence[Block],
    stored: Mapping[Source, Values],
    file: RegisterFile,
    *,
    kernels: Kernels | None,
) -> list[Floats]:
    """Fill the registers of a program.

    Args:
        program: Its reads and given tensors say what goes where.
        blocks: Neighbours; of one tensor if the program has given tensors.
        stored: What the sources hold there. fp32 is not copied: the program may overwrite it.
        file: Where the registers are; they are used again.
        kernels: To do it with; torch does it without.

    Returns:
        The program's registers, and a spare one at the end.
    """
    count = sum(block.count for block in blocks)
    registers = file.first(program.num_registers + 1, count)
    for source, place in program.reads.items():
        entries = stored[source]
        if entries.dtype == DType.FP32:
            registers[place] = entries.raw.view(np.float32)
        elif kernels is not None and kernels.takes(entries.dtype):
            kernels.widen(entries.dtype, entries.raw, registers[place])
        else:
            torch.from_numpy(registers[place]).copy_(entries.tensor)
    for place, value in program.given.items():
        start = blocks[0].start
        registers[place] = value[start : start + count].numpy()
    return registers


def execute(
    program: BlockProgram,
    blocks: Sequence[Block],
    registers: Sequence[Floats],
    *,
    masks: Mapping[MaskV1, Bytes],
    kernels: Kernels | None,
) -> None:
    """Carry out the steps of a program on its registers.

    Args:
        program: The steps.
        blocks: The blocks that the registers hold, one behind the other.
        registers: After `load`.
        masks: Those that the program needs.
        kernels: To do it with; torch does it without.
    """
    scratch = registers[-1]
    for instruction in program.instructions:
        step, operands = instruction.step, [registers[place] for place in instruction.operands]
        first, second, target = operands[0], operands[-1], registers[instruction.target]
        if isinstance(step, Subtract):
            np.subtract(first, second, out=target)
        elif isinstance(step, Add):
            np.add(first, second, out=target)
        elif isinstance(step, Scale):
            np.multiply(first, np.float32(step.factor), out=target)
        elif isinstance(step, Drop):
            np.multiply(first, masks[step.mask], out=target)
        elif isinstance(step, AddDropped) and kernels is not None:
            kernels.add_dropped(first, second, step.factor, masks[step.mask], target)
        elif isinstance(step, AddDropped):
            keep = torch.from_numpy(scratch)
            keep.copy_(torch.from_numpy(masks[step.mask]))
            # (factor * second) * keep: the second product is exact, so it may be fused with the sum
            torch.addcmul(
                torch.from_numpy(first),
                torch.from_numpy(second),
                keep,
                value=step.factor,
                out=torch.from_numpy(target),
            )
        elif isinstance(step, Apply):
            for block, part in parts_of(blocks):
                target[part] = step.function([entries[part] for entries in operands], block)


def parts_of(blocks: Sequence[Block]) -> Iterator[tuple[Block, slice]]:
    """Yield neighbouring blocks, each with its slice of their joint entries."""
    start = 0
    for block in blocks:
        yield block, slice(start, start + block.count)
        start += block.count


def follow(
    along: Sequence[Along], stored: Mapping[Source, Values], results: Sequence[Values]
) -> bool:
    """Try the one-pass path; return False if any result needs the general one.

    If it returns True, the bits equal those of `execute` and `round_into`.

    torch.lerp computes start + weight * (end - start) in fp32 for weights below a half, and rounds
    once. What is not finite is left to the long way, which says why.
    """
    for step, result in zip(along, results, strict=True):
        start, end = stored[step.anchor], stored[step.minuend]
        if not step.is_line or not start.dtype == end.dtype == result.dtype:
            return False
        if result.dtype not in HALVES:
            return False
        torch.lerp(start.tensor, end.tensor, step.factors[-1], out=result.tensor)
        if not result.are_finite:
            return False
    return True


def follow_compiled(
    kernels: Kernels,
    along: Sequence[Along],
    stored: Mapping[Source, Values],
    masks: Mapping[MaskV1, Bytes],
    results: Sequence[Values],
) -> bool:
    """Compute steps along differences in one pass each, as `follow` does; False if it cannot."""
    dtype = next(iter(stored.values())).dtype
    if any(held.dtype != dtype for held in stored.values()):
        return False
    if not all(kernels.steps(dtype, result.dtype) for result in results):
        return False
    return all(
        kernels.step_along(
            dtype,
            stored[step.anchor].raw,
            stored[step.minuend].raw,
            stored[step.subtrahend].raw,
            step.factors,
            None if step.mask is None else masks[step.mask],
            result.raw,
            target=result.dtype,
        )
        for step, result in zip(along, results, strict=True)
    )


def round_into(
    results: Sequence[Values],
    program: BlockProgram,
    blocks: Sequence[Block],
    registers: Sequence[Floats],
    *,
    seed: int | None = None,
    kernels: Kernels | None,
) -> bool:
    """Round the program's results once.

    Args:
        results: Where they go, of the dtypes they are stored in.
        program: Its roots say where the results are.
        blocks: The blocks.
        registers: After `execute`.
        seed: Of stochastic rounding; None rounds to the nearest.
        kernels: To do it with; torch does it without.

    Returns:
        No entry is infinite or NaN.
    """
    finite, scratch = True, registers[-1]
    bits = None if seed is None else _rounding_bits(seed, blocks)
    for place, result in zip(program.roots, results, strict=True):
        ideal = registers[place]
        if bits is not None:
            np.copyto(scratch, ideal)
            scatter_(scratch, bits, result.dtype)
            ideal = scratch
        if result.dtype == DType.FP32:
            np.copyto(result.raw.view(np.float32), ideal)
        elif kernels is not None and kernels.takes(result.dtype):
            kernels.round(result.dtype, ideal, result.raw)
        else:
            result.tensor.copy_(torch.from_numpy(ideal))
        finite = finite and result.are_finite and fits(ideal, result.dtype)
    return finite


def rounded_to(dtype: DType, values: Floats) -> Floats:
    """Round fp32 to a dtype, to the nearest value; the same memory if it is fp32."""
    if dtype == DType.FP32:
        return values
    kernels = compiled_kernels() or plain_kernels()
    if kernels is not None and kernels.takes(dtype) and values.size:
        stored = Values(np.empty(values.size * dtype.itemsize, np.uint8), dtype)
        kernels.round(dtype, values, stored.raw)
        return stored.floats
    floats: Floats = torch.from_numpy(values).to(dtype.torch).float().numpy()
    return floats


def draw_mask(
    mask: MaskV1, blocks: Sequence[Block], keep: Bytes, *, kernels: Kernels | None
) -> None:
    """Draw a mask at neighbouring blocks into a buffer: 1 where an entry is kept, else 0.

    Args:
        mask: Which.
        blocks: Where.
        keep: The buffer, with room for the entries of all blocks.
        kernels: To do it with; NumPy does it without.
    """
    start = 0
    for group in _groups(blocks, STREAMS if kernels else 1):
        part = keep[start : start + sum(block.count for block in group)]
        start += part.size
        if kernels is None:
            bits = mask_bits(mask.seed, group[0].name, group[0].index, group[0].count)
            np.less(bits, mask.threshold, out=part.view(np.bool_))
        else:
            digests = [mask_digest(mask.seed, block.name, block.index) for block in group]
            kernels.draw_keep(digests, mask.threshold, part)


def _groups(blocks: Sequence[Block], size: int) -> Iterator[Sequence[Block]]:
    """Take so many blocks at a time where they have the same number of entries, else one."""
    start = 0
    while start < len(blocks):
        group = blocks[start : start + size]
        if len(group) < size or any(block.count != group[0].count for block in group):
            group = group[:1]
        yield group
        start += len(group)


def _rounding_bits(seed: int, blocks: Sequence[Block]) -> npt.NDArray[np.uint16]:
    return np.concatenate(
        [rounding_bits(seed, block.name, block.index, block.count) for block in blocks]
    )
