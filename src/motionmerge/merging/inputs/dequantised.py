"""A view of a quantised checkpoint in which weights have their values: code * scale, in fp32.

Nothing is kept but the scales of a few weights; values are computed where they are read.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from motionmerge.errors import CheckpointError
from motionmerge.io.quantised import Quantisation, ScaledWeight, Stored, find_quantisation
from motionmerge.lazy_torch import torch
from motionmerge.merging.compute.compiled import Bytes, Floats, compiled_kernels
from motionmerge.tensors import DType, num_bytes, to_numpy

_KEPT = 8
"""Weights whose scales are kept: a large one's, block by block, can take some megabytes."""


class Readable(Stored, Protocol):
    """An open checkpoint whose tensors have places in a file."""

    def read(self, name: str, /) -> torch.Tensor: ...
    def place(self, name: str, /) -> tuple[object, int] | None: ...


@runtime_checkable
class HoldsCodes(Protocol):
    """An open checkpoint that can say which of its tensors are codes in the file."""

    def scaled(self, name: str, /) -> ScaledWeight | None: ...
    def read_codes(self, name: str, begin: int, target: memoryview, /) -> None: ...
    def scales(self, name: str, /) -> Floats: ...


def dequantised(file: Readable, metadata: Mapping[str, str], *, called: str) -> Readable:
    """Return a checkpoint with the values of its weights; itself if it holds nothing else.

    Args:
        file: The open checkpoint.
        metadata: Of its header.
        called: Its name in messages.

    Raises:
        CheckpointError: It is quantised in a way that is not read.
    """
    found = find_quantisation(file, metadata, called=called)
    return file if found is None else DequantisedTensors(file, found, called=called)


class DequantisedTensors:
    """The view. Safe to share between threads."""

    def __init__(self, file: Readable, found: Quantisation, *, called: str) -> None:
        self._file, self._found, self._called = file, found, called
        self._held = lru_cache(maxsize=_KEPT)(self._read_scales)
        self._buffers = threading.local()

    def keys(self) -> list[str]:
        """List the names of the weights, in the file's order."""
        return [name for name in self._file.keys() if name not in self._found.hidden]  # noqa: SIM118

    def shape(self, name: str, /) -> tuple[int, ...]:
        return tuple(self._file.shape(name))

    def dtype(self, name: str, /) -> DType:
        """Return a tensor's dtype: fp32 for what is stored as codes."""
        return DType.FP32 if name in self._found.weights else self._file.dtype(name)

    def scaled(self, name: str, /) -> ScaledWeight | None:
        return self._found.weights.get(name)

    def place(self, name: str, /) -> tuple[object, int] | None:
        """Return where a tensor begins; the values of each weight are a file of their own."""
        weight = self._found.weights.get(name)
        return self._file.place(name) if weight is None else (weight, 0)

    def read(self, name: str, /) -> torch.Tensor:
        if name not in self._found.weights:
            return self._file.read(name)
        tensor = torch.empty(self.shape(name), dtype=torch.float32)
        self.read_into(name, 0, tensor.view(-1).numpy().view(np.uint8).data)
        return tensor

    def read_codes(self, name: str, begin: int, target: memoryview, /) -> None:
        self._file.read_into(name, begin, target)

    def read_into(self, name: str, begin: int, target: memoryview, /) -> None:
        """Read the bytes of a tensor, of values in fp32, from `begin` on; `target` says how many.

        Raises:
            CheckpointError: A scale is negative, infinite or NaN; or the file cannot be read.
        """
        weight = self._found.weights.get(name)
        if weight is None:
            self._file.read_into(name, begin, target)
        elif begin % 4 or len(target) % 4:  # not whole values: take those around them
            first, last = begin // 4, -(-(begin + len(target)) // 4)
            whole = np.empty(last - first, np.float32)
            self._compute(weight, first, whole)
            skipped = begin - 4 * first
            target[:] = whole.view(np.uint8)[skipped : skipped + len(target)].data
        elif len(target):
            self._compute(weight, begin // 4, np.frombuffer(target, np.float32))

    def scales(self, name: str, /) -> Floats:
        """Read the scales of a weight, `[rows of blocks, columns of blocks]`.

        Raises:
            CheckpointError: One is negative, infinite or NaN.
        """
        return self._held(name)

    def _compute(self, weight: ScaledWeight, first: int, values: Floats) -> None:
        codes = self._buffer(values.size)
        self._file.read_into(weight.name, first, codes.data)
        table, scales, grid = values_of_codes(weight.codes), self.scales(weight.name), weight.grid
        if kernels := compiled_kernels():
            kernels.dequantise(codes, table, scales, first, grid.columns, grid.block, values)
        elif scales.size == 1:
            np.multiply(table[codes], scales[0, 0], out=values)
        else:
            rows, columns = np.divmod(np.arange(first, first + codes.size), grid.columns)
            scale = scales[rows // grid.block[0], columns // grid.block[1]]
            np.multiply(table[codes], scale, out=values)

    def _buffer(self, size: int) -> Bytes:
        """Return this thread's memory, which it uses again."""
        held: Bytes | None = getattr(self._buffers, "codes", None)
        if held is None or held.size < size:
            held = self._buffers.codes = np.empty(size, np.uint8)
        return held[:size]

    def _read_scales(self, name: str) -> Floats:
        weight = self._found.weights[name]
        dtype = self._file.dtype(weight.scale)
        raw = np.empty(num_bytes(dtype, self._file.shape(weight.scale)), np.uint8)
        self._file.read_into(weight.scale, 0, raw.data)
        scales: Floats = to_numpy(raw, dtype).astype(np.float32)
        if weight.style == "SCB":
            scales = scales / np.float32(127)
        odd = scales[~(np.isfinite(scales) & (scales >= 0))]
        if odd.size:
            raise CheckpointError(
                f"`{weight.scale}` of `{self._called}` holds {odd[0]}, which is no scale.",
                fix="Download the file again, or use another one.",
            )
        return scales.reshape(weight.grid.scales)


@lru_cache
def values_of_codes(codes: DType) -> Floats:
    """Return the value of each of the 256 codes of a dtype, in fp32."""
    every = np.arange(256, dtype=np.uint8)
    if codes == DType.INT8:
        return every.view(np.int8).astype(np.float32)
    if codes == DType.FP8_E5M2:  # the upper half of fp16
        return (every.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    return _values_of_e4m3fn(every)


def _values_of_e4m3fn(codes: npt.NDArray[np.uint8]) -> Floats:
    """Return the values of fp8 with 4 bits of exponent: no infinity, one NaN for each sign."""
    size, exponent = codes & 7, (codes >> 3) & 15
    scale = np.exp2(np.maximum(exponent, 1).astype(np.float32) - 10)
    values = np.where(exponent > 0, 8 + size, size) * scale
    values = np.where(codes & 0x7F == 0x7F, np.nan, values)
    return np.where(codes & 0x80, -values, values).astype(np.float32)
