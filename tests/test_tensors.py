"""Names of dtypes, and which tensors are merged."""

from __future__ import annotations

import pytest
import torch

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.tensors import (
    DType,
    code_to_dtype,
    dtype_name,
    is_mergeable,
    num_bytes,
    parse_dtype,
    storable,
)


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16", "torch.bfloat16", " BF16 "])
def test_every_spelling_of_bf16_is_understood(spelling):
    assert parse_dtype(spelling) is DType.BF16


TORCH_KNOWS = [dtype for dtype in DType if dtype.torch_name]


def test_names_and_codes_are_read_back():
    for dtype in DType:
        assert parse_dtype(dtype_name(dtype)) is code_to_dtype(dtype.code) is dtype
    for dtype in TORCH_KNOWS:
        assert parse_dtype(dtype_name(dtype)) is parse_dtype(dtype.torch) is dtype
        assert code_to_dtype(dtype.code) is storable(dtype.torch) is storable(dtype) is dtype


def test_dtypes_are_those_of_torch():
    for dtype in TORCH_KNOWS:
        assert dtype.itemsize == dtype.torch.itemsize == dtype.bits // 8
        assert dtype.is_only_copied or dtype.is_floating_point == dtype.torch.is_floating_point
        assert dtype_name(dtype) == dtype_name(dtype.torch)


def test_an_unknown_dtype_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"Fix: Use `fp16`"):
        parse_dtype("pf16")


def test_a_dtype_without_a_code_cannot_be_stored():
    with pytest.raises(CheckpointError, match="Fix"):
        storable(torch.complex128)


def test_every_dtype_of_the_installed_safetensors_is_known():
    from safetensors.torch import _TYPES

    assert set(_TYPES) <= {dtype.code for dtype in DType}
    for code, dtype in _TYPES.items():
        assert code_to_dtype(code).itemsize == dtype.itemsize


@pytest.mark.parametrize("dtype", [DType.FP4, DType.FP6_E2M3, DType.FP6_E3M2])
def test_torch_has_no_dtype_of_less_than_a_byte(dtype):
    with pytest.raises(CheckpointError, match="Fix"):
        _ = dtype.torch


def test_bytes_are_counted():
    assert num_bytes(torch.bfloat16, (3, 5)) == 30
    assert num_bytes(torch.float32, ()) == 4
    assert num_bytes(DType.FP4, (3, 2)) == 3
    assert num_bytes(DType.FP6_E2M3, (4,)) == 3


def test_counters_scalars_and_index_buffers_are_not_merged():
    assert is_mergeable(torch.float16, (2,))
    assert not is_mergeable(torch.float32, ())
    assert not is_mergeable(torch.int64, (77,))
