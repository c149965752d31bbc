"""Calls `kernels.c`, which takes one pass where `kernel` takes many; the same bits.

The library is built with the package where there is a C compiler, and is not needed: without it
merges take longer. While it computes, other threads go on.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_size_t


class Kernels:
    """The functions of the library, for buffers of the right size."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._draw = library.draw_keep
        self._draw.argtypes = (_POINTER, ctypes.c_uint32, _POINTER, _COUNT)
        self._draw.restype = None
        self._step = library.step_along
        factors = (ctypes.c_float, ctypes.c_float)
        self._step.argtypes = (*(_POINTER,) * 3, *factors, *(_POINTER,) * 2, _COUNT)
        self._step.restype = ctypes.c_int

    def draw_keep(self, stream: np.random.SFC64, threshold: int, keep: Bytes) -> None:
        """Draw mask v1 of one block: 1 where an entry is kept, else 0.

        Args:
            stream: At the start of the block; it is left as it is.
            threshold: Entries whose 16 bits are below it are kept; up to 65536.
            keep: Where the mask goes, `[count]`.
        """
        state: npt.NDArray[np.uint64] = stream.state["state"]["state"]
        self._draw(state.ctypes.data, threshold, keep.ctypes.data, keep.size)

    def step_along(
        self,
        anchor: Bytes,
        minuend: Bytes,
        subtrahend: Bytes,
        scale: float,
        factor: float,
        keep: Bytes | None,
        result: Bytes,
    ) -> bool:
        """anchor + factor * (scale * (minuend - subtrahend)) in fp32, rounded to bf16 once.

        Args:
            anchor, minuend, subtrahend, result: The bytes of bf16 entries, `[2 * count]`.
            scale, factor: They are rounded to fp32.
            keep: 1 where the step is taken, 0 where the anchor stays, `[count]`; None takes all.

        Returns:
            Every result is finite.
        """
        places = [side.ctypes.data for side in (anchor, minuend, subtrahend)]
        mask, count = None if keep is None else keep.ctypes.data, result.size // 2
        return bool(self._step(*places, scale, factor, mask, result.ctypes.data, count))


@lru_cache(maxsize=1)
def compiled_kernels() -> Kernels | None:
    """Load the library, or give None where it was not built."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.is_file():
            return Kernels(ctypes.CDLL(str(path)))
    return None
