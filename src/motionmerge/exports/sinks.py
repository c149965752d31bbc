"""Where the streaming engine puts exports: under other names, in other pieces, layer by layer."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motionmerge.errors import CheckpointError
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.results import ResultSpec
from motionmerge.merging.compute.plan import Sink
from motionmerge.merging.inputs.pieces import Layout
from motionmerge.merging.inputs.sources import MemoryTensors, Place
from motionmerge.tensors import DType, dtype_name


@dataclass(frozen=True)
class _Part:
    """Bytes of a computed tensor, and where they go."""

    begin: int
    end: int
    target: str
    target_begin: int


class RenamingSink:
    """Passes on what is computed to a sink that knows it under other names, piece by piece.

    Args:
        sink: Where it goes.
        layout: The tensors of `sink`, as pieces of the computed ones.
        specs: Dtype and shape of the computed tensors.
    """

    def __init__(self, sink: Sink, layout: Layout, specs: Mapping[str, ResultSpec]) -> None:
        self._sink = sink
        self._parts: dict[str, list[_Part]] = {}
        for target, tensor in layout.items():
            begin = 0
            for piece in tensor.pieces:
                size = specs[piece.name][0].itemsize
                part = _Part(piece.begin * size, piece.end * size, target, begin * size)
                self._parts.setdefault(piece.name, []).append(part)
                begin += piece.end - piece.begin
        for parts in self._parts.values():
            parts.sort(key=lambda part: part.begin)

    def place(self, name: str, /) -> Place | None:
        """Return the file and the byte where a tensor begins; None if it is cut into pieces."""
        parts = self._parts[name]
        place = self._sink.place(parts[0].target) if len(parts) == 1 else None
        return None if place is None else (place[0], place[1] + parts[0].target_begin)

    def write_at(self, name: str, begin: int, data: memoryview, /) -> None:
        """Write bytes of a computed tensor from `begin` on."""
        parts = self._parts[name]
        if len(parts) == 1:  # it may go on into what is next to it in the file
            self._sink.write_at(parts[0].target, parts[0].target_begin + begin, data)
            return
        end = begin + len(data)
        for part in parts:
            first, last = max(begin, part.begin), min(end, part.end)
            if first < last:
                there = part.target_begin + first - part.begin
                self._sink.write_at(part.target, there, data[first - begin : last - begin])


def renamed_specs(layout: Layout, specs: Mapping[str, ResultSpec]) -> dict[str, ResultSpec]:
    """Return dtype and shape of the tensors of a layout.

    Args:
        layout: Tensors as pieces of computed ones.
        specs: Dtype and shape of the computed ones.

    Raises:
        CheckpointError: One tensor consists of pieces with different dtypes.
    """
    found: dict[str, ResultSpec] = {}
    for target, tensor in layout.items():
        dtypes = {specs[piece.name][0]: piece.name for piece in tensor.pieces}
        if len(dtypes) > 1:
            held = ", ".join(f"`{name}` is {dtype_name(dtype)}" for dtype, name in dtypes.items())
            raise CheckpointError(
                f"`{target}` consists of tensors with different dtypes: {held}.",
                fix="Choose one for all with `dtype`, e.g. bf16.",
            )
        found[target] = (next(iter(dtypes)), tensor.shape)
    return found


class WholeTensors:
    """Gathers fp32 tensors and hands each over when all of it is there, in the thread that is last.

    Only tensors on their way are in memory.

    Args:
        shapes: Shape of each tensor.
        take: Gets name and tensor; any thread may call it.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        take: Callable[[str, torch.Tensor], None],
    ) -> None:
        self._shapes, self._take = shapes, take
        self._lock = threading.Lock()
        self._arriving: dict[str, _Arriving] = {}

    def place(self, name: str, /) -> None:
        """Return None: no tensor lies in a file."""

    def write_at(self, name: str, begin: int, data: memoryview, /) -> None:
        """Store bytes of a tensor at offset `begin`; hand it on once all have arrived."""
        with self._lock:
            if name not in self._arriving:
                self._arriving[name] = _Arriving(np.empty(math.prod(self._shapes[name]), "<f4"))
            arriving = self._arriving[name]
        arriving.values.view(np.uint8)[begin : begin + len(data)] = np.frombuffer(data, np.uint8)
        with self._lock:
            arriving.held += len(data)
            if arriving.held < arriving.values.nbytes:
                return
            del self._arriving[name]
        self._take(name, torch.from_numpy(arriving.values).view(self._shapes[name]))


@dataclass
class _Arriving:
    """A tensor of which some bytes are there."""

    values: npt.NDArray[np.float32]
    held: int = 0


class Zeros(MemoryTensors):
    """A checkpoint of zeros, to which task vectors are added where only their sum is wanted.

    Args:
        shapes: Shape of each tensor.
    """

    is_checkpoint = False

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__({})
        self._shapes = dict(shapes)

    def keys(self) -> list[str]:
        """Return the tensors' names in order."""
        return list(self._shapes)

    def shape(self, name: str, /) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._shapes[name]

    def dtype(self, name: str, /) -> DType:
        """Return fp32."""
        return DType.FP32

    def read(self, name: str, /) -> torch.Tensor:
        """Make a tensor."""
        return torch.zeros(self._shapes[name])

    def read_into(self, name: str, begin: int, target: memoryview, /) -> None:
        """Fill `target` with zeros."""
        np.frombuffer(target, np.uint8).fill(0)
