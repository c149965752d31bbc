"""What happens to each tensor of a merge, and which blocks are read, computed and written together.

Tensors that lie side by side share a chunk, so that small ones cost little more than their bytes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from motionmerge import lazy_torch
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.results import ResultSpec
from motionmerge.merging.algebra.steps import Block, Lowering, Read, blocks_of
from motionmerge.merging.compute.compiled import Floats
from motionmerge.merging.compute.kernel import CHUNK, HALVES, torch_threads
from motionmerge.merging.compute.program import BlockProgram
from motionmerge.merging.compute.shortcuts import along_of, shortened
from motionmerge.merging.inputs.sources import OpenInputs, Place, Source
from motionmerge.merging.report import Survival
from motionmerge.tensors import DType, is_mergeable, num_bytes


class Sink(Protocol):
    """Where a result goes, in pieces, from any thread."""

    def place(self, name: str, /) -> Place | None: ...
    def write_at(self, name: str, begin: int, data: memoryview, /) -> None: ...


@dataclass(eq=False, kw_only=True)
class MergeJob:
    """One expert on its way.

    Attributes:
        checkpoint: Its expression.
        specs: Dtype and shape of its tensors.
        sink: Where they go.
        computed: Tensors that a task vector reached.
        touched: Elements that differ from the anchor before rounding, by tensor.
        survival: What is left of the change after rounding.
        as_stored: Rounds the values of a tensor further, as the sink does; None if it does not.
        lock: Guards `touched`.
    """

    checkpoint: Checkpoint
    specs: Mapping[str, ResultSpec]
    sink: Sink
    computed: int = 0
    touched: dict[str, float] = field(default_factory=dict)
    survival: Survival = field(default_factory=Survival)
    as_stored: Callable[[str, Floats], Floats] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def num_bytes(self) -> int:
        """Size of the result."""
        return sum(num_bytes(dtype, shape) for dtype, shape in self.specs.values())

    def observe(
        self,
        names: Sequence[str],
        *,
        sizes: Sequence[int],
        anchor: npt.NDArray[np.floating],
        ideal: npt.NDArray[np.floating],
        rounded: npt.NDArray[np.floating],
        kept: npt.NDArray[np.floating],
        represents: Sequence[int],
    ) -> None:
        """Count samples of some tensors, which lie one behind the other; see `Survival.add`."""
        if self.as_stored is not None:
            stops = np.cumsum(sizes)[:-1]
            rounded, kept = (
                np.concatenate(list(map(self.as_stored, names, np.split(values, stops))))
                for values in (rounded, kept)
            )
        changed = self.survival.add(
            sizes=sizes,
            anchor=anchor,
            ideal=ideal,
            rounded=rounded,
            kept=kept,
            represents=represents,
        )
        with self.lock:
            for name, count in zip(names, changed, strict=True):
                if count:
                    self.touched[name] = self.touched.get(name, 0.0) + count


@dataclass(frozen=True)
class Write:
    """One result of a chunk: computed, or a copy of what a source holds."""

    job: MergeJob
    dtype: DType
    source: Source | None


@dataclass(frozen=True)
class ChunkLayout:
    """What all blocks of a chunk have in common: which sources they need and what they give."""

    reads: tuple[tuple[Source, DType], ...]
    writes: tuple[Write, ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of an entry in each source and then in each result."""
        return [
            *(dtype.itemsize for _, dtype in self.reads),
            *(write.dtype.itemsize for write in self.writes),
        ]


@dataclass(eq=False, kw_only=True)
class TensorPlan:
    """What happens to one tensor.

    Attributes:
        name: Its name.
        num_elements: Its size.
        layout: What is read and written.
        program: What is computed; None if it is only copied.
        places: Where it begins in the sources and then in the sinks.
        may_be_equal: No entry is known that differs between the sources of the program.
    """

    name: str
    num_elements: int
    layout: ChunkLayout
    program: BlockProgram | None
    places: Sequence[Place | None]
    may_be_equal: bool


@dataclass(slots=True, kw_only=True)
class Run:
    """A stretch of a chunk that lies in one piece in a file.

    Attributes:
        name: The tensor in which it begins.
        begin: The byte of this tensor at which it begins.
        start: Its first entry in the chunk.
        stop: The entry of the chunk behind its last.
        file: The file; None where there is none.
        end: The byte of the file behind its last.
    """

    name: str
    begin: int
    start: int
    stop: int
    file: object
    end: int


class Chunk:
    """Blocks that are read, computed and written together; at most `CHUNK` entries.

    Attributes:
        layout: What they have in common.
        blocks: The blocks in order, with their tensors.
        count: Their entries in all.
        runs: Where the entries lie in each source, and then where they go for each result.
    """

    def __init__(self, layout: ChunkLayout) -> None:
        self.layout = layout
        self.blocks: list[tuple[TensorPlan, Block]] = []
        self.count = 0
        self.runs: list[list[Run]] = [[] for _ in layout.sizes]

    def takes(self, tensor: TensorPlan, block: Block) -> bool:
        """Return whether a block fits in."""
        return tensor.layout is self.layout and self.count + block.count <= CHUNK

    def add(self, tensor: TensorPlan, block: Block) -> None:
        """Append a block."""
        start, stop = self.count, self.count + block.count
        for runs, place, size in zip(self.runs, tensor.places, self.layout.sizes, strict=True):
            begin = block.start * size
            file, offset = (None, 0) if place is None else place
            last = runs[-1] if runs else None
            end = offset + begin + block.count * size
            if last and last.file is not None and (last.file, last.end) == (file, offset + begin):
                last.stop, last.end = stop, end
            else:
                runs.append(
                    Run(name=tensor.name, begin=begin, start=start, stop=stop, file=file, end=end)
                )
        self.blocks.append((tensor, block))
        self.count = stop


@dataclass(frozen=True)
class _Kind:
    """What all tensors have in common that are treated alike."""

    layout: ChunkLayout
    program: BlockProgram | None
    computed: tuple[MergeJob, ...]
    comparable: bool


class Planner:
    """Plans tensor after tensor; what needs one as a whole is computed here and now.

    Args:
        jobs: What to compute.
        inputs: Their open sources.
    """

    def __init__(self, jobs: Sequence[MergeJob], inputs: OpenInputs) -> None:
        self._jobs, self._inputs = jobs, inputs
        self._anchors = tuple(dict.fromkeys(job.checkpoint.anchor for job in jobs))
        self._dtypes = {
            source: {name: inputs.dtype(source, name) for name in inputs.names(source)}
            for source in inputs.sources
        }
        vectors = dict.fromkeys(v for job in jobs for v in job.checkpoint.vectors_inside())
        self._vectors = tuple(vectors)
        self._blockwise = all(vector.is_blockwise for vector in vectors)
        self._threads = torch.get_num_threads() if lazy_torch.is_imported() else 1
        self._kinds: dict[object, _Kind] = {}
        self._layouts: dict[ChunkLayout, ChunkLayout] = {}
        self._programs: dict[object, BlockProgram] = {}
        self._compared: list[TensorPlan] = []

    @property
    def num_equal(self) -> int:
        """How many of the tensors compared are equal in all sources they need."""
        return sum(tensor.may_be_equal for tensor in self._compared)

    def chunks(
        self, compute_whole: Callable[[MergeJob, str], None]
    ) -> Generator[Chunk, None, None]:
        """Return all work, in the order of the first expert's tensors.

        Args:
            compute_whole: Computes and writes one tensor whose entries do not fit fp32 registers.
        """
        chunk: Chunk | None = None
        for name in dict.fromkeys(
            name for anchor in self._anchors for name in self._dtypes[anchor]
        ):
            tensor = self._plan(name, compute_whole)
            if tensor is None:
                continue
            for block in blocks_of(name, tensor.num_elements):
                if chunk is None or not chunk.takes(tensor, block):
                    if chunk is not None:
                        yield chunk
                    chunk = Chunk(tensor.layout)
                chunk.add(tensor, block)
        if chunk is not None:
            yield chunk

    def _plan(self, name: str, compute_whole: Callable[[MergeJob, str], None]) -> TensorPlan | None:
        """Decide what happens to a tensor; None if nothing is left to do."""
        jobs = [job for job in self._jobs if name in job.specs]
        if not jobs:  # a live module may want only some of a checkpoint's tensors
            return None
        _, shape = jobs[0].specs[name]
        dtypes = tuple(held.get(name) for held in self._dtypes.values())
        if any(dtype is DType.FP64 or (dtype is not None and dtype.bits < 8) for dtype in dtypes):
            with torch_threads(self._threads):
                for job in jobs:
                    compute_whole(job, name)
            return None
        kind = self._kind(name, jobs, shape, dtypes)
        num_elements = math.prod(shape)
        places = [self._inputs.place(source, name) for source, _ in kind.layout.reads]
        places += [write.job.sink.place(name) for write in kind.layout.writes]
        for job in kind.computed:
            job.computed += 1
        for source, _ in kind.layout.reads:
            self._inputs.count_read(source, name)
        tensor = TensorPlan(
            name=name,
            num_elements=num_elements,
            layout=kind.layout,
            program=kind.program,
            places=places,
            may_be_equal=kind.comparable,
        )
        if kind.comparable:
            self._compared.append(tensor)
        return tensor

    def _kind(
        self,
        name: str,
        jobs: Sequence[MergeJob],
        shape: Sequence[int],
        dtypes: tuple[DType | None, ...],
    ) -> _Kind:
        """Return the tensor's plan; tensors that no expression can tell apart share one."""
        if not self._blockwise:
            with torch_threads(self._threads):
                return self._new_kind(name, jobs, shape)
        reached = tuple(vector.reaches(name) for vector in self._vectors)
        results = tuple((job, job.specs[name][0]) for job in jobs)
        key = (min(len(shape), 2), dtypes, reached, results)
        if key not in self._kinds:
            self._kinds[key] = self._new_kind(name, jobs, shape)
        return self._kinds[key]

    def _new_kind(self, name: str, jobs: Sequence[MergeJob], shape: Sequence[int]) -> _Kind:
        lowering = Lowering(name, len(shape), self._inputs)
        writes, roots, computed = [], [], []
        for job in jobs:
            anchor, (dtype, _) = job.checkpoint.anchor, job.specs[name]
            stored = self._dtypes[anchor][name]
            root = job.checkpoint.lower(lowering) if is_mergeable(stored, shape) else None
            if root is None and dtype == stored:
                writes.append(Write(job, dtype, anchor))
                continue
            if root is not None:
                computed.append(job)
            roots.append(lowering.add(Read(anchor)) if root is None else root)
            writes.append(Write(job, dtype, None))
        program = self._program(name, lowering, roots) if roots else None
        copied = (write.source for write in writes if write.source is not None)
        sources = dict.fromkeys((*(program.reads if program else ()), *copied))
        layout = ChunkLayout(
            tuple((source, self._dtypes[source][name]) for source in sources), tuple(writes)
        )
        comparable = program is not None and len(program.reads) > 1 and not program.given
        return _Kind(self._layouts.setdefault(layout, layout), program, tuple(computed), comparable)

    def _program(self, name: str, lowering: Lowering, roots: Sequence[int]) -> BlockProgram:
        """Return the program of some steps; equal steps without given tensors share one."""
        steps = lowering.steps
        sources = {step.source for step in steps if isinstance(step, Read)}
        halves = frozenset(s for s in sources if self._dtypes[s][name] in HALVES)
        key = (tuple(steps), tuple(roots), halves)
        if lowering.given or key not in self._programs:
            shorter = None if lowering.given else shortened(steps, roots, halves=halves)
            self._programs[key] = BlockProgram(
                steps,
                roots,
                given=lowering.given,
                kept=self._anchors,
                along=None if lowering.given else along_of(*(shorter or (steps, roots))),
                shorter=None
                if shorter is None
                # if it overflows, the sources are needed again; registers share the memory of fp32
                else BlockProgram(*shorter, given={}, kept={*self._anchors, *sources - halves}),
            )
        return self._programs[key]
