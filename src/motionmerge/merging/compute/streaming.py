"""Carries out several checkpoints in one pass over their inputs, chunk by chunk, in some threads.

Each thread reads a chunk of every input that it needs, computes all results of it and writes them.
Memory does not grow with the model, except for nodes that need a whole tensor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from queue import SimpleQueue

import numpy as np

from motionmerge import lazy_torch
from motionmerge.errors import CheckpointError
from motionmerge.merging.algebra.masks import MaskV1
from motionmerge.merging.algebra.results import whole_value
from motionmerge.merging.algebra.rounding import (
    refuse_lost,
    round_once,
    round_stochastically,
)
from motionmerge.merging.algebra.steps import Block
from motionmerge.merging.compute.compiled import Bytes, Floats, compiled_kernels
from motionmerge.merging.compute.kernel import (
    STRETCH,
    RegisterFile,
    Values,
    Workspace,
    draw_mask,
    execute,
    follow,
    follow_compiled,
    load,
    parts_of,
    round_into,
    torch_threads,
)
from motionmerge.merging.compute.plain import plain_kernels
from motionmerge.merging.compute.plan import Chunk, MergeJob, Planner, Run, TensorPlan, Write
from motionmerge.merging.compute.program import BlockProgram
from motionmerge.merging.compute.survey import (
    Blocks,
    Sampled,
    SamplePlan,
    SamplePool,
    compare,
    samples_of,
)
from motionmerge.merging.inputs.sources import OpenInputs, Source
from motionmerge.tensors import bytes_of, is_mergeable, num_bytes

ReportProgress = Callable[[int, int], None]
"""Called with bytes written so far and in all."""

_MAX_THREADS = 8
_BYTES_PER_THREAD = 8 << 20


def stream(
    jobs: Sequence[MergeJob],
    inputs: OpenInputs,
    *,
    seed: int | None = None,
    threads: int | None = None,
    progress: ReportProgress | None = None,
) -> int:
    """Compute every tensor of every job.

    Args:
        jobs: What to compute.
        inputs: Their open sources.
        seed: Of stochastic rounding; None rounds to the nearest.
        threads: How many; by default one per core, fewer for small models. Never changes a bit.
        progress: Called after each chunk.

    Returns:
        How many of the tensors that a task vector reaches are equal in all inputs they need.

    Raises:
        CheckpointError: An input holds NaN, cannot be read, a value does not fit into its dtype,
            or the disk refuses.
    """
    return _Pass(jobs, inputs, seed, progress).run(threads)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Neighbouring blocks with the same program: what they hold, their masks and results."""

    program: BlockProgram
    planned: Blocks
    held: Mapping[Source, Values]
    masks: Mapping[MaskV1, Bytes]
    results: Sequence[tuple[Write, Values]]

    def cut(self) -> Iterator[Stretch]:
        """Cut it where registers are full."""
        start = 0
        for planned in _pieces(self.planned):
            part = slice(start, start + _count(planned))
            start = part.stop
            yield Stretch(
                program=self.program,
                planned=planned,
                held={source: values[part] for source, values in self.held.items()},
                masks={mask: keep[part] for mask, keep in self.masks.items()},
                results=[(write, result[part]) for write, result in self.results],
            )

    def sampled(self, samples: SamplePlan) -> Sampled:
        """Copy what is looked at."""
        return Sampled(
            program=self.program,
            blocks=samples.blocks,
            represents=samples.represents,
            held={source: samples.of_values(values) for source, values in self.held.items()},
            masks={mask: samples.of(keep) for mask, keep in self.masks.items()},
            results=[(write, samples.of_values(result)) for write, result in self.results],
        )


class _Pass:
    def __init__(
        self,
        jobs: Sequence[MergeJob],
        inputs: OpenInputs,
        seed: int | None,
        progress: ReportProgress | None,
    ) -> None:
        self._inputs, self._seed, self._progress = inputs, seed, progress
        self._total = sum(job.num_bytes for job in jobs)
        self._done = 0
        self._kernels = compiled_kernels() or plain_kernels()
        if not lazy_torch.is_imported() and not self._does_without_torch(jobs):
            lazy_torch.load()  # before its threads are counted
        self._planner = Planner(jobs, inputs)
        self._chunks = self._planner.chunks(self._compute_whole)
        self._lock = threading.Lock()
        self._files: SimpleQueue[RegisterFile] = SimpleQueue()
        self._error: BaseException | None = None

    def _does_without_torch(self, jobs: Sequence[MergeJob]) -> bool:
        """Return whether the kernels know all dtypes, and no tensor is computed as a whole."""
        vectors = (vector for job in jobs for vector in job.checkpoint.vectors_inside())
        if self._kernels is None or not all(v.is_blockwise for v in vectors):
            return False
        dtypes = {
            self._inputs.dtype(source, name)
            for source in self._inputs.sources
            for name in self._inputs.names(source)
        }
        dtypes |= {dtype for job in jobs for dtype, _ in job.specs.values()}
        computable = [dtype for dtype in dtypes if dtype.is_floating_point]
        return all(map(self._kernels.takes, computable))

    def run(self, threads: int | None) -> int:
        threads = num_threads(self._total) if threads is None else threads
        # Computing step by step is many short calls: threads that do it side by side wait for the
        # interpreter more than they work. Half of them may; the others read, draw masks, compute
        # what is one pass, and write, which are few long calls.
        for _ in range(max(1, threads // 2)):
            self._files.put(RegisterFile())
        # Our threads share the work out; were torch to do it too, they would wait for each other.
        with torch_threads(1):
            others = [threading.Thread(target=self._work) for _ in range(threads - 1)]
            for thread in others:
                thread.start()
            self._work()
            for thread in others:
                thread.join()
        self._chunks.close()
        if self._error is not None:
            # No name may keep the error, whose traceback keeps all tensors of this pass.
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error
        return self._planner.num_equal

    def _work(self) -> None:
        """Take chunks until there are none, or until any thread failed."""
        workspace, pool = Workspace(), SamplePool(self._look_at)
        try:
            with np.errstate(all="ignore"):
                while (chunk := self._next()) is not None:
                    self._carry_out(chunk, workspace, pool)
                pool.flush()
        except BaseException as error:  # noqa: BLE001  (raised again by `run`)
            with self._lock:
                self._error = self._error or error

    def _next(self) -> Chunk | None:
        with self._lock:
            return None if self._error is not None else next(self._chunks, None)

    def _compute_whole(self, job: MergeJob, name: str) -> None:
        """Compute a tensor that is stored in fp64, which registers do not hold.

        Or copy one whose entries are less than a byte.
        """
        dtype, shape = job.specs[name]
        if dtype.bits < 8:
            data = bytearray(num_bytes(dtype, shape))
            self._inputs.read_into(job.checkpoint.anchor, name, 0, memoryview(data))
            job.sink.write_at(name, 0, memoryview(data))
            self._advance(len(data))
            return
        stored, value = self._inputs.stored(job.checkpoint.anchor, name), None
        if is_mergeable(stored.dtype, shape):
            value = whole_value(job.checkpoint, name, self._inputs)
        if value is None:
            rounded = round_once(stored, dtype, name)
        else:
            rounded = (
                round_once(value, dtype, name)
                if self._seed is None
                else round_stochastically(value, dtype, name, seed=self._seed)
            )
            job.computed += 1
            kept = stored.to(dtype.torch)
            anchor, ideal, result, unmoved = (
                tensor.double().flatten().numpy() for tensor in (stored, value, rounded, kept)
            )
            if ideal.size:
                job.observe(
                    [name],
                    sizes=[ideal.size],
                    anchor=anchor,
                    ideal=ideal,
                    rounded=result,
                    kept=unmoved,
                    represents=[ideal.size],
                )
        job.sink.write_at(name, 0, bytes_of(rounded).data)
        self._advance(num_bytes(dtype, shape))

    def _carry_out(self, chunk: Chunk, workspace: Workspace, pool: SamplePool) -> None:
        layout, stored = chunk.layout, {}
        for number, (source, dtype) in enumerate(layout.reads):
            stored[source] = workspace.values(f"read {number}", chunk.count, dtype)
            data, size = stored[source].raw.data, dtype.itemsize
            for run in chunk.runs[number]:
                part = data[run.start * size : run.stop * size]
                self._inputs.read_into(source, run.name, run.begin, part)
        results, written = [], 0
        sinks = chunk.runs[len(layout.reads) :]
        for number, (write, runs) in enumerate(zip(layout.writes, sinks, strict=True)):
            if write.source is None:
                values = workspace.values(f"result {number}", chunk.count, write.dtype)
                results.append((write, runs, values))
            else:  # at once: what was read is in memory that computing may use
                written += self._write(write, runs, self._checked(write.source, chunk, stored))
        if results:
            wanted = [(write, values) for write, _, values in results]
            self._compute(chunk, stored, wanted, workspace, pool)
        for write, runs, values in results:
            written += self._write(write, runs, values)
        with self._lock:
            self._advance(written)

    def _compute(
        self,
        chunk: Chunk,
        stored: Mapping[Source, Values],
        results: Sequence[tuple[Write, Values]],
        workspace: Workspace,
        pool: SamplePool,
    ) -> None:
        """Compute all results of a chunk, one stretch of blocks with the same program at a time."""
        masks = self._draw_masks(chunk, workspace)
        long_way, start = [], 0
        for program, planned in _by_program(chunk.blocks):
            part = slice(start, start + _count(planned))
            start = part.stop
            if program is None:
                continue
            stretch = Stretch(
                program=program,
                planned=planned,
                held={source: stored[source][part] for source in program.reads},
                masks={mask: masks[mask][part] for mask in program.masks},
                results=[(write, result[part]) for write, result in results],
            )
            compare(planned, stretch.held)
            if not self._follow(stretch):
                long_way.append(stretch)
            elif samples_of(planned) is not None:
                for short in stretch.cut():
                    if samples := samples_of(short.planned):
                        pool.add(short.sampled(samples))
        if long_way:
            with self._registers() as file:
                for stretch in long_way:
                    for short in stretch.cut():
                        self._execute(short, file)

    @contextmanager
    def _registers(self) -> Iterator[RegisterFile]:
        """Wait for a register file, as only some threads may compute step by step."""
        file = self._files.get()
        try:
            yield file
        finally:
            self._files.put(file)

    def _follow(self, stretch: Stretch) -> bool:
        """Compute a stretch in one pass; False if it must be computed step by step."""
        if self._seed is not None:
            return False
        along, values = stretch.program.along, [result for _, result in stretch.results]
        if along is None:
            return False
        if self._kernels is None:
            return follow(along, stretch.held, values)
        return follow_compiled(self._kernels, along, stretch.held, stretch.masks, values)

    def _look_at(self, found: Sampled) -> None:
        """Compute samples step by step, to count them."""
        with self._registers() as file:
            registers = load(found.program, found.blocks, found.held, file, kernels=self._kernels)
            execute(
                found.program,
                found.blocks,
                registers,
                masks=found.masks,
                kernels=self._kernels,
            )
            found.observe(registers)

    def _draw_masks(self, chunk: Chunk, workspace: Workspace) -> dict[MaskV1, Bytes]:
        """Draw all masks of a chunk; each holds the chunk's entries."""
        masks: dict[MaskV1, Bytes] = {}
        start = 0
        for program, planned in _by_program(chunk.blocks):
            blocks = [block for _, block in planned]
            part = slice(start, start + _count(planned))
            for mask in program.masks if program else ():
                if mask not in masks:
                    masks[mask] = workspace.buffer(f"mask {len(masks)}", chunk.count)
                draw_mask(mask, blocks, masks[mask][part], kernels=self._kernels)
            start = part.stop
        return masks

    def _execute(self, stretch: Stretch, file: RegisterFile) -> None:
        """Compute a stretch step by step, in fewer steps if nothing overflows."""
        program, held, kernels = stretch.program, stretch.held, self._kernels
        blocks = [block for _, block in stretch.planned]
        values = [result for _, result in stretch.results]
        for way in (program,) if program.shorter is None else (program.shorter, program):
            registers = load(way, blocks, held, file, kernels=kernels)
            execute(way, blocks, registers, masks=stretch.masks, kernels=kernels)
            if round_into(values, way, blocks, registers, seed=self._seed, kernels=kernels):
                break
        else:
            self._find_fault(program, blocks, registers, values)
        if samples := samples_of(stretch.planned):
            seen = [(write, samples.of_values(result)) for write, result in stretch.results]
            found = Sampled(
                program=way,
                blocks=samples.blocks,
                represents=samples.represents,
                held={},
                masks={},
                results=seen,
            )
            found.observe([samples.of(register) for register in registers])

    def _find_fault(
        self,
        program: BlockProgram,
        blocks: Sequence[Block],
        registers: Sequence[Floats],
        results: Sequence[Values],
    ) -> None:
        """Raise an error that says why a result is infinite or NaN, unless that is allowed."""
        for block, part in parts_of(blocks):
            faulty = [result[part] for result in results]
            for place, result in zip(program.roots, faulty, strict=True):
                refuse_lost(registers[place][part], result.floats, result.dtype, block.name)
            if self._inputs.allow_nonfinite or all(result.are_finite for result in faulty):
                continue
            for source in program.reads:
                dtype = self._inputs.dtype(source, block.name)
                values = Values(np.empty(block.count * dtype.itemsize, np.uint8), dtype)
                begin = block.start * dtype.itemsize
                self._inputs.read_into(source, block.name, begin, values.raw.data)
                self._inputs.refuse_nonfinite(source, block.name, values.floats)
            raise CheckpointError(
                f"`{block.name}` overflows fp32 in the merge: it becomes infinite or NaN.",
                fix="Look for huge factors in the recipe, or for a function that gives such "
                "numbers; or pass allow_nonfinite=True.",
            )

    def _checked(self, source: Source, chunk: Chunk, stored: Mapping[Source, Values]) -> Values:
        """Return what a source holds; refuse NaN and infinity in it, unless they are allowed."""
        values = stored[source]
        if not self._inputs.allow_nonfinite and not values.are_finite:
            for block, part in parts_of([block for _, block in chunk.blocks]):
                self._inputs.refuse_nonfinite(source, block.name, values[part].floats)
        return values

    def _write(self, write: Write, runs: Sequence[Run], values: Values) -> int:
        data, size = values.raw.data, values.dtype.itemsize
        for run in runs:
            part = data[run.start * size : run.stop * size]
            write.job.sink.write_at(run.name, run.begin, part)
        return len(data)

    def _advance(self, written: int) -> None:
        self._done += written
        if self._progress is not None:
            self._progress(self._done, self._total)


def _by_program(planned: Blocks) -> Iterator[tuple[BlockProgram | None, Blocks]]:
    """Cut a chunk where the program changes."""
    for program, group in groupby(planned, key=lambda planned: planned[0].program):
        yield program, list(group)


def _pieces(planned: Blocks) -> Iterator[Blocks]:
    """Cut blocks where registers are full."""
    piece: list[tuple[TensorPlan, Block]] = []
    count = 0
    for tensor, block in planned:
        if count + block.count > STRETCH:
            yield piece
            piece, count = [], 0
        piece.append((tensor, block))
        count += block.count
    yield piece


def _count(planned: Blocks) -> int:
    return sum(block.count for _, block in planned)


def num_threads(total_bytes: int) -> int:
    """Return how many threads write so much: one per core, at most eight; fewer if it is little."""
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(cores, _MAX_THREADS, 1 + total_bytes // _BYTES_PER_THREAD)
