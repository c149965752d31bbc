"""Where the streaming engine puts the tensors of an export, to be worked on whole."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motionmerge.lazy_torch import torch
from motionmerge.merging.inputs.sources import MemoryTensors
from motionmerge.tensors import DType


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
        return list(self._shapes)

    def shape(self, name: str, /) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str, /) -> DType:
        """Return fp32."""
        return DType.FP32

    def read(self, name: str, /) -> torch.Tensor:
        return torch.zeros(self._shapes[name])

    def read_into(self, name: str, begin: int, target: memoryview, /) -> None:
        """Fill `target` with zeros."""
        np.frombuffer(target, np.uint8).fill(0)
