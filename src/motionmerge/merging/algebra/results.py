"""The results of a checkpoint expression: dtype, shape and bits of its tensors, and its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from motionmerge.io.weights import write_weights
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.rounding import round_once
from motionmerge.merging.algebra.steps import Lowering
from motionmerge.merging.inputs.coverage import Mergeable, check_coverage
from motionmerge.merging.inputs.sources import OpenInputs
from motionmerge.tensors import AnyDtype, DType, is_mergeable, parse_dtype

ResultSpec = tuple[DType, tuple[int, ...]]
"""Dtype and shape of one tensor."""


class Computable(Mergeable, Protocol):
    """A checkpoint expression, as far as its results go."""

    def lower(self, lowering: Lowering, /) -> int | None: ...


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
    """Return dtype and shape of every tensor of the result, in order; no tensor is read."""
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
    value = whole_value(checkpoint, name, inputs) if mergeable else None
    return round_once(stored if value is None else value, target, name)


def whole_value(checkpoint: Computable, name: str, inputs: OpenInputs) -> torch.Tensor | None:
    """Compute one tensor as a whole, unrounded; None if no task vector changes it."""
    lowering = Lowering(name, len(inputs.shape(checkpoint.anchor, name)), inputs)
    last = checkpoint.lower(lowering)
    return None if last is None else lowering.value(last)


def tensors(checkpoint: Computable, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Compute tensors of a checkpoint, all by default; see `Checkpoint.tensors`."""
    with OpenInputs(checkpoint.sources()) as inputs:
        check_coverage([checkpoint], inputs, names=names)
        names = inputs.names(checkpoint.anchor) if names is None else names
        return {name: realised(checkpoint, name, inputs) for name in names}


def save(checkpoint: Computable, path: Path, *, formula: str, dtype: str | AnyDtype | None) -> None:
    """Compute a checkpoint tensor by tensor into one file; see `Checkpoint.save`."""
    wanted = None if dtype is None else parse_dtype(dtype)
    with OpenInputs(checkpoint.sources()) as inputs:
        check_coverage([checkpoint], inputs)
        names = inputs.names(checkpoint.anchor)
        write_weights(
            path,
            ((name, realised(checkpoint, name, inputs, dtype=wanted)) for name in names),
            specs=result_specs(checkpoint, inputs, dtype=wanted),
            metadata={"format": "pt", "motionmerge.formula": formula},
        )
