"""Dtypes by name, size and safetensors code, and which tensors a merge may compute with."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.lazy_torch import torch


class AnyDtype(Protocol):
    """A `DType`, or torch's own."""

    @property
    def itemsize(self) -> int: ...
    @property
    def is_floating_point(self) -> bool: ...


_ONLY_COPIED = frozenset(
    (
        "U16",
        "U32",
        "U64",
        "C64",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "F8_E8M0",
        "F6_E2M3",
        "F6_E3M2",
        "F4",
    )
)


class DType(Enum):
    """The dtypes of stored tensors. They are known without torch, whose import takes seconds.

    Those from `UINT16` on are only copied: nothing computes with them.

    Attributes:
        short_name, torch_name, code: Its names for people, in torch and in safetensors headers.
        bits: Of one entry.
        is_floating_point: Merges compute with it.
        is_only_copied: Merges refuse to compute with it.
        itemsize: Bytes of one entry, where it has whole ones.
    """

    FP64 = "fp64", "float64", "F64", 64
    FP32 = "fp32", "float32", "F32", 32
    FP16 = "fp16", "float16", "F16", 16
    BF16 = "bf16", "bfloat16", "BF16", 16
    FP8_E4M3FN = "fp8_e4m3fn", "float8_e4m3fn", "F8_E4M3", 8
    FP8_E5M2 = "fp8_e5m2", "float8_e5m2", "F8_E5M2", 8
    INT64 = "int64", "int64", "I64", 64
    INT32 = "int32", "int32", "I32", 32
    INT16 = "int16", "int16", "I16", 16
    INT8 = "int8", "int8", "I8", 8
    UINT8 = "uint8", "uint8", "U8", 8
    BOOL = "bool", "bool", "BOOL", 8
    UINT16 = "uint16", "uint16", "U16", 16
    UINT32 = "uint32", "uint32", "U32", 32
    UINT64 = "uint64", "uint64", "U64", 64
    COMPLEX64 = "complex64", "complex64", "C64", 64
    FP8_E4M3FNUZ = "fp8_e4m3fnuz", "float8_e4m3fnuz", "F8_E4M3FNUZ", 8
    FP8_E5M2FNUZ = "fp8_e5m2fnuz", "float8_e5m2fnuz", "F8_E5M2FNUZ", 8
    FP8_E8M0 = "fp8_e8m0", "float8_e8m0fnu", "F8_E8M0", 8
    FP6_E2M3 = "fp6_e2m3", "", "F6_E2M3", 6
    FP6_E3M2 = "fp6_e3m2", "", "F6_E3M2", 6
    FP4 = "fp4", "", "F4", 4

    def __init__(self, short_name: str, torch_name: str, code: str, bits: int) -> None:
        self.short_name = short_name
        self.torch_name = torch_name
        self.code = code
        self.bits = bits
        self.itemsize = max(1, bits // 8)
        self.is_only_copied = code in _ONLY_COPIED
        is_float = torch_name.lstrip("b").startswith("float")
        self.is_floating_point = is_float and not self.is_only_copied

    @property
    def torch(self) -> torch.dtype:
        """The same dtype in torch.

        Raises:
            CheckpointError: torch has none.
        """
        dtype = getattr(torch, self.torch_name, None) if self.torch_name else None
        if dtype is None:
            raise CheckpointError(
                f"Torch {torch.__version__} has no dtype for {self.short_name} ({self.code}).",
                fix="Use weights in fp32, fp16 or bf16.",
            )
        found: torch.dtype = dtype
        return found

    def __repr__(self) -> str:
        return self.short_name


_BY_NAME = {dtype.short_name: dtype for dtype in DType}
_BY_NAME |= {dtype.torch_name: dtype for dtype in DType if dtype.torch_name}
_BY_CODE = {dtype.code: dtype for dtype in DType}


def dtype_name(dtype: AnyDtype) -> str:
    """Return the short name of a dtype: `torch.bfloat16` -> `"bf16"`."""
    name = str(dtype).removeprefix("torch.")
    known = dtype if isinstance(dtype, DType) else _BY_NAME.get(name)
    return known.short_name if known else name


def parse_dtype(name: str | AnyDtype) -> DType:
    """Read a dtype from `"bf16"`, `"bfloat16"`, `"torch.bfloat16"` or torch's own.

    Raises:
        ConfigError: The name is unknown; the nearest known one is offered.
    """
    if isinstance(name, DType):
        return name
    asked = str(name)
    known = _BY_NAME.get(asked.strip().lower().removeprefix("torch."))
    if known is None and asked == "fp8_scaled":
        raise ConfigError(
            "Scaled fp8 is written by `motionmerge merge`, `extrapolate` and `export comfyui` "
            "alone, where each weight gets a scale; diffusers loads no such folder.",
            fix="Use bf16 here.",
        )
    if known is None:
        near = difflib.get_close_matches(asked.lower(), _BY_NAME, n=1)
        names = ", ".join(dtype.short_name for dtype in DType if not dtype.is_only_copied)
        choice = f"`{near[0]}`" if near else f"one of {names}"
        raise ConfigError(f"Unknown dtype `{asked}`.", fix=f"Use {choice}.")
    return known


def storable(dtype: AnyDtype) -> DType:
    """Return the dtype that a safetensors file has for one of torch's.

    Raises:
        CheckpointError: The format has none.
    """
    if isinstance(dtype, DType):
        return dtype
    known = _BY_NAME.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise CheckpointError(
            f"A tensor of dtype {dtype} cannot be stored in a safetensors file.",
            fix="Convert it to fp32, fp16 or bf16 first.",
        )
    return known


def code_to_dtype(code: str) -> DType:
    """Return the dtype of a safetensors header's code, e.g. of `"BF16"`.

    Raises:
        CheckpointError: The code is unknown.
    """
    if code not in _BY_CODE:
        raise CheckpointError(
            f"Unknown dtype code `{code[:40]}`; known are {', '.join(_BY_CODE)}.",
            fix="Convert the weights to fp32, fp16 or bf16 with the tool that wrote them.",
        )
    return _BY_CODE[code]


def num_bytes(dtype: AnyDtype, shape: Sequence[int]) -> int:
    """Count the bytes of a contiguous tensor; entries of 4 and 6 bits lie close together."""
    bits = dtype.bits if isinstance(dtype, DType) else 8 * dtype.itemsize
    return -(-bits * math.prod(shape) // 8)


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Expose the memory of a contiguous CPU tensor; a copy of any other."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def to_numpy(raw: npt.NDArray[np.uint8], dtype: DType) -> npt.NDArray[np.floating]:
    """Read stored bytes as the numbers that they are; bf16, which NumPy lacks, becomes fp32.

    Args:
        raw: The bytes; the result shares their memory unless they are bf16.
        dtype: fp64, fp32, fp16 or bf16.
    """
    if dtype == DType.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    floats: npt.NDArray[np.floating] = raw.view(f"f{dtype.itemsize}")
    return floats


def is_mergeable(dtype: AnyDtype, shape: Sequence[int]) -> bool:
    """Return whether a merge computes with such a tensor: floating point and at least 1-d.

    Everything else (counters, index buffers, scalars) is copied from the base checkpoint.
    """
    return dtype.is_floating_point and len(shape) >= 1
