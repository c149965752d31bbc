"""What a checkpoint expression comes to: the dtype, shape and bits of its tensors."""

from __future__ import annotations

from typing import Protocol

from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.rounding import round_once
from motionmerge.merging.inputs.sources import OpenInputs, Source
from motionmerge.tensors import DType, is_mergeable

ResultSpec = tuple[DType, tuple[int, ...]]
"""Dtype and shape of one tensor."""


class Computable(Protocol):
    """A checkpoint expression, as far as its results go."""

    @property
    def anchor(self) -> Source: ...
    def value(self, name: str, inputs: OpenInputs, /) -> torch.Tensor | None: ...


def result_dtype(
    checkpoint: Computable, name: str, inputs: OpenInputs, *, dtype: DType | None = None
) -> DType:
    """Return the dtype of one tensor of the result: `dtype` replaces floating-point ones only.

    By default it is the anchor's, and bf16 for what the anchor stores as codes and scales.
    """
    stored = inputs.dtype(checkpoint.anchor, name)
    if dtype is not None and stored.is_floating_point:
        return dtype
    return stored if inputs.scaled(checkpoint.anchor, name) is None else DType.BF16


def result_specs(
    checkpoint: Computable, inputs: OpenInputs, *, dtype: DType | None = None
) -> dict[str, ResultSpec]:
    """Give dtype and shape of every tensor of the result, in its order, without reading any."""
    anchor = checkpoint.anchor
    return {
        name: (
            result_dtype(checkpoint, name, inputs, dtype=dtype),
            inputs.shape(anchor, name),
        )
        for name in inputs.names(anchor)
    }


def realised(
    checkpoint: Computable, name: str, inputs: OpenInputs, *, dtype: DType | None = None
) -> torch.Tensor:
    """Compute one tensor of a checkpoint as it is stored: rounded once, or the anchor's bytes."""
    stored = inputs.stored(checkpoint.anchor, name)
    target = result_dtype(checkpoint, name, inputs, dtype=dtype)
    mergeable = is_mergeable(stored.dtype, stored.shape)
    value = checkpoint.value(name, inputs) if mergeable else None
    return round_once(stored if value is None else value, target, name)
