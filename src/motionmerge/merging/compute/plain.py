"""The kernels in NumPy alone, for a machine that has neither the compiled library nor torch.

The bits are those of `kernels.c`; it takes longer, as every step is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from motionmerge import lazy_torch
from motionmerge.merging.compute.compiled import Bytes, Floats, Kernels
from motionmerge.rng import draw_bits
from motionmerge.tensors import DType

_NAN_BF16 = 0x7FC0
_QUIET_FP16 = 0x0200
"""The bit of a NaN that is quiet."""


class PlainKernels(Kernels):
    """What `Kernels` does for bf16, fp16 and fp32, without its one-pass steps and without fp8."""

    def __init__(self) -> None:
        pass

    def draw_keep(self, digests: Sequence[bytes], threshold: int, keep: Bytes) -> None:
        for digest, part in zip(digests, np.split(keep, len(digests)), strict=True):
            np.less(draw_bits(digest, part.size), threshold, out=part.view(np.bool_))

    def takes(self, dtype: DType) -> bool:
        return dtype in (DType.BF16, DType.FP16, DType.FP32)

    def steps(self, dtype: DType, result: DType) -> bool:
        """Return False: there is no step in one pass."""
        return False

    def widen(self, dtype: DType, stored: Bytes, wide: Floats) -> None:
        if dtype == DType.BF16:
            np.left_shift(stored.view(np.uint16), 16, out=wide.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(wide, stored.view(np.float16))

    def round(self, dtype: DType, wide: Floats, stored: Bytes) -> None:
        halves = stored.view(np.uint16)
        if dtype == DType.BF16:
            words = wide.view(np.uint32)
            odd = (words >> 16) & np.uint32(1)
            halves[:] = (words + odd + np.uint32(0x7FFF)) >> 16
            halves[np.isnan(wide)] = _NAN_BF16
        else:
            np.copyto(stored.view(np.float16), wide, casting="same_kind")
            halves[np.isnan(wide)] |= _QUIET_FP16

    def add_dropped(
        self, first: Floats, second: Floats, factor: float, keep: Bytes, target: Floats
    ) -> None:
        """Compute target = first + (factor * second) * keep, every operation rounded to fp32."""
        step = second * np.float32(factor)
        step *= keep
        np.add(first, step, out=target)


def plain_kernels() -> Kernels | None:
    """Return the kernels in NumPy; None where torch is installed, which is quicker."""
    return None if lazy_torch.is_installed() else PlainKernels()
