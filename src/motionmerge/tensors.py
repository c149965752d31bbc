"""Names, sizes and safetensors codes of dtypes, and which tensors a merge may compute with."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from motionmerge.errors import CheckpointError, ConfigError

_NAMES: dict[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e5m2: "fp8_e5m2",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}
_BY_NAME.update({str(dtype).removeprefix("torch."): dtype for dtype in _NAMES})

_CODES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Give the short name of a dtype: `torch.bfloat16` -> `"bf16"`."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """Read a dtype from `"bf16"`, `"bfloat16"`, `"torch.bfloat16"`, or pass a dtype through.

    Raises:
        ConfigError: The name is unknown; the nearest known one is offered.
    """
    if isinstance(name, torch.dtype):
        return name
    known = _BY_NAME.get(name.strip().lower().removeprefix("torch."))
    if known is None:
        near = difflib.get_close_matches(name.lower(), _BY_NAME, n=1)
        choice = f"`{near[0]}`" if near else "one of " + ", ".join(_NAMES.values())
        raise ConfigError(f"Unknown dtype `{name}`.", fix=f"Use {choice}.")
    return known


def dtype_to_code(dtype: torch.dtype) -> str:
    """Give the code of a dtype in a safetensors header: `torch.bfloat16` -> `"BF16"`.

    Raises:
        CheckpointError: The format has no code for it.
    """
    if dtype not in _CODE_OF:
        raise CheckpointError(
            f"A tensor of dtype {dtype} cannot be stored in a safetensors file.",
            fix="Convert it to fp32, fp16 or bf16 first.",
        )
    return _CODE_OF[dtype]


def code_to_dtype(code: str) -> torch.dtype:
    """Give the dtype of a safetensors header's code: `"BF16"` -> `torch.bfloat16`.

    Raises:
        CheckpointError: The code is unknown.
    """
    if code not in _CODES:
        raise CheckpointError(
            f"Unknown dtype code `{code}`; known are {', '.join(_CODES)}.",
            fix="Export the checkpoint again in fp32, fp16 or bf16.",
        )
    return _CODES[code]


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Count the bytes of a contiguous tensor."""
    return dtype.itemsize * math.prod(shape)


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Expose the memory of a contiguous CPU tensor; a copy of any other."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def is_mergeable(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Tell whether a merge computes with such a tensor: floating point and at least 1-d.

    Everything else (counters, index buffers, scalars) is copied from the base checkpoint.
    """
    return dtype.is_floating_point and len(shape) >= 1
