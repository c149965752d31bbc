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


class DType(Enum):
    """The dtypes of stored tensors. They are known without torch, whose import takes seconds."""

    FP64 = "fp64", "float64", "F64", 8
    FP32 = "fp32", "float32", "F32", 4
    FP16 = "fp16", "float16", "F16", 2
    BF16 = "bf16", "bfloat16", "BF16", 2
    FP8_E4M3FN = "fp8_e4m3fn", "float8_e4m3fn", "F8_E4M3", 1
    FP8_E5M2 = "fp8_e5m2", "float8_e5m2", "F8_E5M2", 1
    INT64 = "int64", "int64", "I64", 8
    INT32 = "int32", "int32", "I32", 4
    INT16 = "int16", "int16", "I16", 2
    INT8 = "int8", "int8", "I8", 1
    UINT8 = "uint8", "uint8", "U8", 1
    BOOL = "bool", "bool", "BOOL", 1

    def __init__(self, short_name: str, torch_name: str, code: str, itemsize: int) -> None:
        self.short_name = short_name
        self.torch_name = torch_name
        self.code = code
        self.itemsize = itemsize
        self.is_floating_point = torch_name.lstrip("b").startswith("float")

    @property
    def torch(self) -> torch.dtype:
        """The same dtype in torch."""
        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    def __repr__(self) -> str:
        return self.short_name


_BY_NAME = {dtype.short_name: dtype for dtype in DType}
_BY_NAME |= {dtype.torch_name: dtype for dtype in DType}
_BY_CODE = {dtype.code: dtype for dtype in DType}


def dtype_name(dtype: AnyDtype) -> str:
    """Give the short name of a dtype: `torch.bfloat16` -> `"bf16"`."""
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
            "Scaled fp8 is written by `motionmerge merge` and `extrapolate` alone, and each weight "
            "gets a scale there.",
            fix="Use bf16 here.",
        )
    if known is None:
        near = difflib.get_close_matches(asked.lower(), _BY_NAME, n=1)
        names = ", ".join(dtype.short_name for dtype in DType)
        choice = f"`{near[0]}`" if near else f"one of {names}"
        raise ConfigError(f"Unknown dtype `{asked}`.", fix=f"Use {choice}.")
    return known


def storable(dtype: AnyDtype) -> DType:
    """Give the dtype that a safetensors file has for one of torch's.

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
    """Give the dtype of a safetensors header's code, e.g. of `"BF16"`.

    Raises:
        CheckpointError: The code is unknown.
    """
    if code not in _BY_CODE:
        raise CheckpointError(
            f"Unknown dtype code `{code}`; known are {', '.join(_BY_CODE)}.",
            fix="Export the checkpoint again in fp32, fp16 or bf16.",
        )
    return _BY_CODE[code]


def num_bytes(dtype: AnyDtype, shape: Sequence[int]) -> int:
    """Count the bytes of a contiguous tensor."""
    return dtype.itemsize * math.prod(shape)


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Expose the memory of a contiguous CPU tensor; a copy of any other."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def is_mergeable(dtype: AnyDtype, shape: Sequence[int]) -> bool:
    """Tell whether a merge computes with such a tensor: floating point and at least 1-d.

    Everything else (counters, index buffers, scalars) is copied from the base checkpoint.
    """
    return dtype.is_floating_point and len(shape) >= 1
