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
import torch

Bytes = npt.NDArray[np.uint8]

STREAMS = 4
"""Blocks whose masks are drawn side by side."""

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_size_t


class Kernels:
    """The functions of the library, for buffers of the right size."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._draw = library.draw_keep
        self._draw_streams = library.draw_keep_of_streams
        for draw in (self._draw, self._draw_streams):
            draw.argtypes = (_POINTER, ctypes.c_uint32, _POINTER, _COUNT)
            draw.restype = None
        self._steps = {
            torch.bfloat16: library.step_along_bf16,
            torch.float32: library.step_along_fp32,
        }
        for step in self._steps.values():
            factors = (ctypes.c_float,) * 3
            step.argtypes = (*(_POINTER,) * 3, *factors, *(_POINTER,) * 2, _COUNT)
            step.restype = ctypes.c_int

    def draw_keep(self, streams: Sequence[np.random.SFC64], threshold: int, keep: Bytes) -> None:
        """Draw mask v1 of one block, or of `STREAMS` blocks of one size: 1 where an entry is kept.

        Args:
            streams: One for each block, at its start; they are left as they are.
            threshold: Entries whose 16 bits are below it are kept; up to 65536.
            keep: Where the masks go, one behind the other, `[count]` or `[STREAMS * count]`.
        """
        states: npt.NDArray[np.uint64] = np.concatenate(
            [stream.state["state"]["state"] for stream in streams]
        )
        draw = self._draw if len(streams) == 1 else self._draw_streams
        draw(states.ctypes.data, threshold, keep.ctypes.data, keep.size // len(streams))

    def takes(self, dtype: torch.dtype) -> bool:
        """Tell whether `step_along` knows a dtype."""
        return dtype in self._steps

    def step_along(
        self,
        dtype: torch.dtype,
        anchor: Bytes,
        minuend: Bytes,
        subtrahend: Bytes,
        factors: Sequence[float],
        keep: Bytes | None,
        result: Bytes,
    ) -> bool:
        """anchor + f3 * (f2 * (f1 * (minuend - subtrahend))) in fp32, rounded to `dtype` once.

        Args:
            dtype: Of all entries: bf16 or fp32.
            anchor, minuend, subtrahend, result: The bytes of `count` entries.
            factors: f1, f2 and f3; they are rounded to fp32.
            keep: 1 where the step is taken, 0 where the anchor stays, `[count]`; None takes all.

        Returns:
            Every entry is finite, also where the step is dropped.
        """
        places = [side.ctypes.data for side in (anchor, minuend, subtrahend)]
        mask = None if keep is None else keep.ctypes.data
        count = result.size // dtype.itemsize
        step = self._steps[dtype]
        return bool(step(*places, *factors, mask, result.ctypes.data, count))


@lru_cache(maxsize=1)
def compiled_kernels() -> Kernels | None:
    """Load the library, or give None where it was not built or is of another version."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.is_file():
            with suppress(AttributeError):  # a function is missing
                return Kernels(ctypes.CDLL(str(path)))
    return None
