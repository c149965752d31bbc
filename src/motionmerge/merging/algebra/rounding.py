"""The one rounding at the end of a merge: to the nearest, or up and down at random."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from motionmerge.errors import CheckpointError
from motionmerge.lazy_torch import torch
from motionmerge.rng import MASK_BLOCK, mask_bits
from motionmerge.tensors import DType, bytes_of, dtype_name, storable

_INFINITY = {  # the bits of +infinity, or of NaN where a dtype has no infinity
    DType.FP64: 0x7FF0000000000000,
    DType.FP32: 0x7F800000,
    DType.FP16: 0x7C00,
    DType.BF16: 0x7F80,
    DType.FP8_E5M2: 0x7C,
    DType.FP8_E4M3FN: 0x7F,
}
_LARGEST_E4M3FN = 464.0
"""What rounds to the largest number of fp8 (e4m3fn), 448, at most. torch makes 448 of more, too."""

_SMALLEST_NORMAL_FP16 = np.float32(2.0**-14)


def round_once(tensor: torch.Tensor, dtype: DType, name: str) -> torch.Tensor:
    """Convert a result to the dtype it is stored in, to the nearest value (ties to even).

    Raises:
        CheckpointError: A finite value does not fit into the dtype.
    """
    rounded = tensor.to(dtype.torch)
    if tensor.dtype != rounded.dtype and dtype.is_floating_point:
        refuse_overflow(tensor, rounded, name)
    return rounded


def round_stochastically(
    tensor: torch.Tensor, dtype: DType, name: str, *, seed: int
) -> torch.Tensor:
    """Round each entry up or down at random, so that the expected value is the unrounded one.

    P(up) = (x - down) / (up - down), in steps of 1 / 65536 (bf16) or 1 / 8192 (fp16)

    The random numbers depend on the seed and the name alone; other dtypes round to the nearest.

    Raises:
        CheckpointError: A finite value does not fit into the dtype.
    """
    values = tensor.float().reshape(-1).numpy().copy()
    for block, start in enumerate(range(0, values.size, MASK_BLOCK)):
        part = values[start : start + MASK_BLOCK]
        scatter_(part, rounding_bits(seed, name, block, part.size), dtype)
    return round_once(torch.from_numpy(values).reshape(tensor.shape), dtype, name)


def rounding_bits(seed: int, name: str, block: int, count: int) -> npt.NDArray[np.uint16]:
    """Draw the random numbers that round one block of a tensor: a stream of mask v1's kind."""
    return mask_bits(seed, f"{name}|rounding", block, count)


def scatter_(values: npt.NDArray[np.float32], bits: npt.NDArray[np.uint16], dtype: DType) -> None:
    """Move fp32 values, in place, to one of their two neighbours in bf16 or fp16, at random.

    A random number below the last bit that the dtype keeps is added, and what it does not keep is
    cut off. Values that are not finite stay what they are.
    """
    dropped = {DType.BF16: 16, DType.FP16: 13}.get(dtype)
    if dropped is None:
        return
    odd = ~np.isfinite(values)
    kept = values[odd]
    # fp16 has a fixed spacing below its smallest normal number: lift such values to that spacing.
    tiny = np.abs(values) < _SMALLEST_NORMAL_FP16 if dtype == DType.FP16 else None
    shift = None if tiny is None else np.where(tiny, np.copysign(_SMALLEST_NORMAL_FP16, values), 0)
    if shift is not None:
        values += shift
    words = values.view(np.uint32)
    words += bits >> np.uint16(16 - dropped)
    words &= np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
    if shift is not None:
        values -= shift
    values[odd] = kept


def all_finite(raw: npt.NDArray[np.uint8], dtype: DType) -> bool:
    """Check by the bytes of floating-point numbers that none of them is infinite or NaN.

    As integers, the bits of all others are below those of infinity, whatever the sign.
    """
    if raw.size == 0:
        return True
    bits, size = _INFINITY[dtype], dtype.itemsize
    signed, unsigned = raw.view(f"i{size}"), raw.view(f"u{size}")
    return bool(signed.max() < bits and unsigned.max() < bits | 1 << 8 * size - 1)


def fits(ideal: npt.NDArray[np.float32], dtype: DType) -> bool:
    """Check whether no value is lost that rounding to fp8 (e4m3fn) would hide; others show it."""
    if dtype != DType.FP8_E4M3FN or ideal.size == 0:
        return True
    return bool(max(np.fmax.reduce(ideal), -np.fmin.reduce(ideal)) <= _LARGEST_E4M3FN)


def refuse_overflow(ideal: torch.Tensor, rounded: torch.Tensor, name: str) -> None:
    """Check that no finite value became infinite (or NaN) by rounding.

    fp8 (e4m3fn) has no infinity: torch stores its largest number instead, which is refused too.

    Raises:
        CheckpointError: One did.
    """
    dtype = storable(rounded.dtype)
    if ideal.numel() == 0 or (dtype != DType.FP8_E4M3FN and all_finite(bytes_of(rounded), dtype)):
        return
    wide = ideal if ideal.dtype == torch.float64 else ideal.float()
    refuse_lost(wide.detach().cpu().numpy(), rounded.float().cpu().numpy(), dtype, name)


def refuse_lost(
    ideal: npt.NDArray[np.floating], rounded: npt.NDArray[np.float32], dtype: DType, name: str
) -> None:
    """Check the same of values in fp32 or fp64, and of what they were rounded to, as fp32.

    Raises:
        CheckpointError: A finite value became infinite (or NaN).
    """
    if dtype == DType.FP8_E4M3FN:
        lost = np.abs(ideal) > _LARGEST_E4M3FN
    else:
        lost = np.isfinite(ideal) & ~np.isfinite(rounded)
    if lost.any():
        largest = float(np.abs(ideal[lost]).max())
        raise CheckpointError(
            f"`{name}` reaches {largest:.3g}, which does not fit into {dtype_name(dtype)}.",
            fix="Write it with dtype bf16 or fp32.",
        )
