"""What a merge will take: seconds, disk and memory; the seconds by how long earlier merges took.

The cost of each kind of work is that of docs/benchmarks/merging.md. How much longer merges take on
this machine and its disk is remembered from one to the next.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from motionmerge.io.atomic import atomic_path
from motionmerge.io.hashing import cache_file
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.sparsify import Dare
from motionmerge.merging.compute.kernel import CHUNK, STRETCH
from motionmerge.merging.compute.streaming import num_threads
from motionmerge.merging.inputs.sources import OpenInputs
from motionmerge.merging.report import peak_memory
from motionmerge.tensors import num_bytes

_TENSOR, _READ, _WRITTEN, _COMPUTED, _MASKED = 0.1e-3, 0.12e-9, 0.3e-9, 0.4e-9, 0.5e-9
"""Seconds per tensor, byte read and written, element computed and masked; on two cores, with the
files in memory."""

_SHORTEST = 0.1
"""Work that should take fewer seconds tells little about a machine."""

_REMEMBERED = 5


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much a merge has to do.

    Attributes:
        num_tensors: Tensors of all results.
        bytes_read: Bytes of the inputs.
        bytes_written: Bytes of the results.
        num_computed: Elements that task vectors reach, in all results.
        num_masked: Those of experts with a `dare(...)`.
        largest: Elements of the largest tensor that has to be in memory as a whole.
        num_vectors: Task vectors in the recipe, those inside others included.
        num_sources: Inputs.
    """

    num_tensors: int
    bytes_read: int
    bytes_written: int
    num_computed: int
    num_masked: int
    largest: int
    num_vectors: int
    num_sources: int

    @property
    def reference_seconds(self) -> float:
        """How long it takes on the machine of docs/benchmarks/merging.md."""
        return (
            _TENSOR * self.num_tensors
            + _READ * self.bytes_read
            + _WRITTEN * self.bytes_written
            + _COMPUTED * self.num_computed
            + _MASKED * self.num_masked
        )


@dataclass(frozen=True)
class MergeEstimate:
    """What a merge will take.

    Attributes:
        seconds: Wall time, without hashing inputs for the first time.
        disk_bytes: Size of the results.
        memory_bytes: The most memory of the whole process.
        num_merges: Earlier merges on this machine that `seconds` rests on; 0 if none was large
            enough to tell.
    """

    seconds: float
    disk_bytes: int
    memory_bytes: int
    num_merges: int


def work_of(
    bound: Mapping[str, Checkpoint],
    reached: Mapping[str, Mapping[str, int]],
    opened: OpenInputs,
    *,
    num_tensors: int,
    bytes_written: int,
) -> Work:
    """Add up what has to be done, from headers alone.

    Args:
        bound: The experts' expressions.
        reached: Per expert, the elements of each tensor that a task vector reaches.
        opened: Their inputs.
        num_tensors: Tensors of all results.
        bytes_written: Size of all results.
    """
    vectors = {name: list(checkpoint.vectors_inside()) for name, checkpoint in bound.items()}
    counts = {name: sum(sizes.values()) for name, sizes in reached.items()}
    whole = [name for name, inside in vectors.items() if not all(v.is_blockwise for v in inside)]
    return Work(
        num_tensors=num_tensors,
        bytes_read=sum(
            num_bytes(opened.dtype(source, name), opened.shape(source, name))
            for source in opened.sources
            for name in opened.names(source)
        ),
        bytes_written=bytes_written,
        num_computed=sum(counts.values()),
        num_masked=sum(
            counts[name]
            for name, inside in vectors.items()
            if any(isinstance(vector, Dare) for vector in inside)
        ),
        largest=max((size for name in whole for size in reached[name].values()), default=0),
        num_vectors=sum(map(len, vectors.values())),
        num_sources=len(opened.sources),
    )


def estimate(work: Work) -> MergeEstimate:
    """Estimate what some work will take on this machine."""
    slowdowns = _remembered()
    buffers = 4 * CHUNK * (work.num_sources + 1)
    buffers += 4 * STRETCH * 2 * (work.num_sources + work.num_vectors + 1)
    whole_tensors = 4 * work.largest * (work.num_sources + work.num_vectors)
    return MergeEstimate(
        seconds=work.reference_seconds * (statistics.median(slowdowns) if slowdowns else 1.0),
        disk_bytes=work.bytes_written,
        memory_bytes=peak_memory() + num_threads(work.bytes_written) * buffers + whole_tensors,
        num_merges=len(slowdowns),
    )


def remember(work: Work, *, seconds: float) -> None:
    """Keep how long some work took, for later estimates; small work is not kept.

    It goes to `$XDG_CACHE_HOME/motionmerge/speed.json` (`~/.cache` by default). A place that cannot
    be written to is no reason to stop.
    """
    if work.reference_seconds < _SHORTEST:
        return
    kept = [*_remembered(), seconds / work.reference_seconds][-_REMEMBERED:]
    try:
        with atomic_path(_file()) as path:
            path.write_text(json.dumps({"slowdowns": kept}), encoding="utf-8")
    except OSError:
        return


def _file() -> Path:
    return cache_file("speed.json")


def _remembered() -> list[float]:
    """Return how many times longer than on the reference machine the last merges took."""
    try:
        slowdowns = json.loads(_file().read_text(encoding="utf-8"))["slowdowns"]
        return [value for value in map(float, slowdowns) if math.isfinite(value) and value > 0]
    except (OSError, ValueError, KeyError, TypeError):
        return []
