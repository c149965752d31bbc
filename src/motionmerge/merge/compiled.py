"""One pass where `kernel` takes many, compiled by numba; the same bits.

Import it through `kernel.compiled_kernels`: numba is an extra, `motionmerge[fast]`. The first use
on a machine compiles for some seconds; numba keeps the result on disk. Nothing here is fused or
reordered beyond what is written: numba's `fastmath` is off.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit, uint16, uint32, uint64

Function = TypeVar("Function")
Words = npt.NDArray[np.uint64]
Halves = npt.NDArray[np.uint16]
Bits = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

TILE = 2048  # entries whose fp32 values stay in the nearest cache


def _compile(function: Function) -> Function:
    compiled: Any = njit(nogil=True, cache=True, error_model="numpy")(function)
    return compiled  # type: ignore[no-any-return]


@_compile
def draw_keep(state: Words, threshold: int, keep: npt.NDArray[np.uint8]) -> None:
    """Draw mask v1 of one block: 1 where an entry is kept, else 0.

    Args:
        state: Of SFC64, as NumPy seeds it: `[4]`.
        threshold: Entries whose 16 bits are below it are kept; up to 65536.
        keep: Where the mask goes, `[count]`.
    """
    a, b, c, w = state[0], state[1], state[2], state[3]
    count = keep.shape[0]
    words = np.empty(TILE // 4, np.uint64)
    bits = words.view(np.uint16)
    for start in range(0, count, TILE):
        size = min(TILE, count - start)
        for i in range((size + 3) // 4):
            out = a + b + w
            w = w + uint64(1)
            a = b ^ (b >> uint64(11))
            b = c + (c << uint64(3))
            c = ((c << uint64(24)) | (c >> uint64(40))) + out
            words[i] = out
        _below(bits[:size], uint32(threshold), keep[start : start + size])


@_compile
def _below(bits: Halves, threshold: Any, keep: npt.NDArray[np.uint8]) -> None:
    for i in range(bits.shape[0]):
        keep[i] = uint32(bits[i]) < threshold


@_compile
def step_along(
    anchor: Halves,
    minuend: Halves,
    subtrahend: Halves,
    scale: float,
    factor: float,
    result: Halves,
) -> Any:
    """anchor + factor * (scale * (minuend - subtrahend)) in fp32, rounded to bf16 once.

    Args:
        anchor, minuend, subtrahend, result: bf16 as its bits, `[count]`.
        scale, factor: fp32.

    Returns:
        Every result is finite.
    """
    base, first, second = _tile(), _tile(), _tile()
    largest: Any = uint32(0)
    for start in range(0, anchor.shape[0], TILE):
        stop = min(start + TILE, anchor.shape[0])
        size = stop - start
        _widen(anchor[start:stop], base)
        _widen(minuend[start:stop], first)
        _widen(subtrahend[start:stop], second)
        _add(base.view(np.float32)[:size], first, second, scale, factor)
        largest = max(largest, _narrow(base[:size], result[start:stop]))
    return largest < uint32(0x7F80)


@_compile
def step_along_kept(
    anchor: Halves,
    minuend: Halves,
    subtrahend: Halves,
    scale: float,
    factor: float,
    keep: npt.NDArray[np.uint8],
    result: Halves,
) -> Any:
    """The same where `keep` is 1; the anchor where it is 0."""
    base, first, second = _tile(), _tile(), _tile()
    largest: Any = uint32(0)
    for start in range(0, anchor.shape[0], TILE):
        stop = min(start + TILE, anchor.shape[0])
        size = stop - start
        _widen(anchor[start:stop], base)
        _widen(minuend[start:stop], first)
        _widen(subtrahend[start:stop], second)
        _add_kept(base.view(np.float32)[:size], first, second, scale, factor, keep[start:stop])
        largest = max(largest, _narrow(base[:size], result[start:stop]))
    return largest < uint32(0x7F80)


@_compile
def _tile() -> Bits:
    return np.empty(TILE, np.uint32)


@_compile
def _widen(halves: Halves, bits: Bits) -> None:
    for i in range(halves.shape[0]):
        bits[i] = uint32(halves[i]) << uint32(16)


@_compile
def _add(total: Floats, first: Bits, second: Bits, scale: float, factor: float) -> None:
    minuend, subtrahend = first.view(np.float32), second.view(np.float32)
    for i in range(total.shape[0]):
        scaled = scale * (minuend[i] - subtrahend[i])
        total[i] = total[i] + factor * scaled


@_compile
def _add_kept(
    total: Floats,
    first: Bits,
    second: Bits,
    scale: float,
    factor: float,
    keep: npt.NDArray[np.uint8],
) -> None:
    minuend, subtrahend = first.view(np.float32), second.view(np.float32)
    for i in range(total.shape[0]):
        scaled = factor * (scale * (minuend[i] - subtrahend[i]))
        total[i] = total[i] + scaled * np.float32(keep[i])


@_compile
def _narrow(bits: Bits, halves: Halves) -> Any:
    """Round fp32 to the nearest bf16, ties to even; returns the largest exponent, as bf16 bits."""
    largest: Any = uint32(0)
    for i in range(bits.shape[0]):
        odd = (bits[i] >> uint32(16)) & uint32(1)
        rounded = (bits[i] + uint32(0x7FFF) + odd) >> uint32(16)
        halves[i] = uint16(rounded)
        largest = max(largest, rounded & uint32(0x7F80))
    return largest
