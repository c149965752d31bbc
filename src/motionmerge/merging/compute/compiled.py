"""Calls `kernels.c`, which takes one pass where `kernel` takes many; the same bits.

The library is built with the package where there is a C compiler, and is not needed: without it
merges take longer. While it computes, other threads go on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import numpy.typing as npt

from motionmerge.tensors import DType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

STREAMS = 4
"""Blocks whose masks are drawn side by side."""

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_size_t


def _address(entries: Bytes | Floats) -> int:
    """Return the address of a contiguous array of at least one entry; NumPy's own way is slower."""
    return ctypes.addressof(ctypes.c_char.from_buffer(entries.data))


class Kernels:
    """The functions of the library, for buffers of the right size, at least one entry."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._draw = library.draw_keep
        self._draw_streams = library.draw_keep_of_streams
        for draw in (self._draw, self._draw_streams):
            draw.argtypes = (ctypes.c_char_p, ctypes.c_uint32, _POINTER, _COUNT)
            draw.restype = None
        self._steps = {
            (DType.BF16, DType.BF16): library.step_along_bf16,
            (DType.FP16, DType.FP16): library.step_along_fp16,
            (DType.FP32, DType.FP32): library.step_along_fp32,
            (DType.FP32, DType.BF16): library.step_along_fp32_to_bf16,
        }
        for step in self._steps.values():
            factors = (ctypes.c_float,) * 3
            step.argtypes = (*(_POINTER,) * 3, *factors, *(_POINTER,) * 2, _COUNT)
            step.restype = ctypes.c_int
        self._widen = {DType.BF16: library.widen_bf16, DType.FP16: library.widen_fp16}
        self._round = {DType.BF16: library.round_to_bf16, DType.FP16: library.round_to_fp16}
        for convert in (*self._widen.values(), *self._round.values()):
            convert.argtypes, convert.restype = (_POINTER, _POINTER, _COUNT), None
        self._add_dropped = library.add_dropped
        self._add_dropped.argtypes = (*(_POINTER,) * 2, ctypes.c_float, *(_POINTER,) * 2, _COUNT)
        self._add_dropped.restype = None
        self._dequantise = library.dequantise
        self._dequantise.argtypes = (*(_POINTER,) * 3, *(_COUNT,) * 5, _POINTER, _COUNT)
        self._quantise = library.quantise_to_fp8
        self._quantise.argtypes = (_POINTER, ctypes.c_float, _POINTER, _COUNT)
        self._dequantise.restype = self._quantise.restype = None

    def draw_keep(self, digests: Sequence[bytes], threshold: int, keep: Bytes) -> None:
        """Draw mask v1 of one block, or of `STREAMS` blocks of one size: 1 where an entry is kept.

        Args:
            digests: Of each block, see `rng.mask_digest`.
            threshold: Entries whose 16 bits are below it are kept; up to 65536.
            keep: Where the masks go, one behind the other, `[count]` or `[STREAMS * count]`.
        """
        draw = self._draw if len(digests) == 1 else self._draw_streams
        draw(b"".join(digests), threshold, _address(keep), keep.size // len(digests))

    def takes(self, dtype: DType) -> bool:
        """Return whether it can be computed with: bf16, fp16 or fp32."""
        return (dtype, dtype) in self._steps

    def steps(self, dtype: DType, result: DType) -> bool:
        """Check whether `step_along` takes entries of one dtype and gives another."""
        return (dtype, result) in self._steps

    def step_along(
        self,
        dtype: DType,
        anchor: Bytes,
        minuend: Bytes,
        subtrahend: Bytes,
        factors: Sequence[float],
        keep: Bytes | None,
        result: Bytes,
        *,
        target: DType | None = None,
    ) -> bool:
        """Compute anchor + f3 * (f2 * (f1 * (minuend - subtrahend))) in fp32, rounded once.

        Args:
            dtype: Of the entries that are read; `steps` says which there are.
            anchor, minuend, subtrahend, result: The bytes of `count` entries.
            factors: f1, f2 and f3; they are rounded to fp32.
            keep: 1 where the step is taken, 0 where the anchor stays, `[count]`; None takes all.
            target: Of the result; `dtype` by default.

        Returns:
            Every entry is finite, also where the step is dropped.
        """
        places = [_address(side) for side in (anchor, minuend, subtrahend)]
        mask = None if keep is None else _address(keep)
        target = dtype if target is None else target
        step, count = self._steps[dtype, target], result.size // target.itemsize
        return bool(step(*places, *factors, mask, _address(result), count))

    def widen(self, dtype: DType, stored: Bytes, wide: Floats) -> None:
        """Convert bf16 or fp16 to fp32, exactly; `stored` holds the bytes of as many entries."""
        self._widen[dtype](_address(stored), _address(wide), wide.size)

    def round(self, dtype: DType, wide: Floats, stored: Bytes) -> None:
        """Round fp32 to the nearest bf16 or fp16, ties to even; any NaN becomes a quiet one."""
        self._round[dtype](_address(wide), _address(stored), wide.size)

    def add_dropped(
        self, first: Floats, second: Floats, factor: float, keep: Bytes, target: Floats
    ) -> None:
        """Compute target = first + (factor * second) * keep, every operation rounded to fp32.

        `target` may be `first` or `second`.
        """
        places = _address(first), _address(second)
        self._add_dropped(*places, factor, _address(keep), _address(target), target.size)

    def dequantise(
        self,
        codes: Bytes,
        values: Floats,
        scales: Floats,
        begin: int,
        columns: int,
        block: tuple[int, int],
        wide: Floats,
    ) -> None:
        """Compute wide = values[codes] * scale, rounded to fp32 once.

        Args:
            codes: Entries `begin` and on of a matrix, `[count]`.
            values: What each code stands for, `[256]`.
            scales: One for each block of the matrix, `[rows of blocks, columns of blocks]`.
            begin: The first entry.
            columns: Of the matrix.
            block: Rows and columns of a block.
            wide: Where the values go, `[count]`.
        """
        places = _address(codes), _address(values), _address(scales)
        layout = begin, columns, *block, scales.shape[1]
        self._dequantise(*places, *layout, _address(wide), wide.size)

    def quantise(self, wide: Floats, scale: float, codes: Bytes) -> None:
        """Compute codes = fp8 (e4m3fn) nearest to wide / scale; what does not fit becomes NaN."""
        self._quantise(_address(wide), scale, _address(codes), wide.size)


@lru_cache(maxsize=1)
def compiled_kernels() -> Kernels | None:
    """Load the library, or give None where it was not built or is of another version."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.is_file():
            with suppress(AttributeError):  # a function is missing
                return Kernels(ctypes.CDLL(str(path)))
    return None
