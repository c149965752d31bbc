"""What the matrices of a LoRA multiply out to: linear and convolution layers, LoHa, LoKr.

    linear, conv   up @ down
    LoHa           (w1_a @ w1_b) * (w2_a @ w2_b)       (entry by entry)
    LoKr           kron(w1, w2)

Source: Hu et al. 2021 (arXiv 2106.09685); LyCORIS, Yeh et al. 2023 (arXiv 2309.14859).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from motionmerge.errors import CheckpointError
from motionmerge.lazy_torch import torch

Rows = tuple[slice, ...] | None
"""Which rows, that is output channels, in which order; None: all."""

_PLAIN = ("full", "bias", "modulation")
"""Parts that are added as they are."""


def difference(
    parts: Mapping[str, torch.Tensor], rows: Rows, *, factor: float, path: str
) -> torch.Tensor:
    """Compute what a module's weight, bias or modulation gains: plain parts + factor * product.

    Args:
        parts: By the names of `keys`.
        rows: Which rows of the result are wanted; None: all.
        factor: Alpha / rank.
        path: The module, as the file spells it.

    Raises:
        CheckpointError: The parts are incomplete or do not fit together.
    """
    if path.startswith("base_model.") and _is_line(parts.get("lokr_w2")):
        raise CheckpointError(
            f"`{path}` is a LoKr of a 1-d convolution, which peft multiplies in an order of its "
            "own.",
            fix="Merge it with peft, and use the difference to the base.",
        )
    try:
        terms = [rows_of(parts[part], rows) for part in _PLAIN if part in parts]
        multiplied = product(parts, rows)
        if multiplied is not None:
            terms.append(multiplied * factor)
        return functools.reduce(lambda total, more: total + more.view_as(total), terms)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        found = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise CheckpointError(
            f"The LoRA of `{path}` is incomplete or damaged: it has {found}.",
            fix="Download the file again.",
        ) from error


def difference_shape(
    shapes: Mapping[str, tuple[int, ...]], rows: Rows, *, path: str
) -> tuple[int, ...]:
    """Return the shape of `difference` for parts of these shapes.

    Raises:
        CheckpointError: The parts are incomplete or do not fit together.
    """
    empty = {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
    return tuple(difference(empty, rows, factor=1.0, path=path).shape)


def product(parts: Mapping[str, torch.Tensor], rows: Rows) -> torch.Tensor | None:
    """Multiply the parts of a module, without alpha and scale; None if they are no product.

    Args:
        parts: By the names of `keys`.
        rows: Which rows of the result are wanted, that is which output channels; None: all.

    Raises:
        KeyError, RuntimeError: The parts are incomplete or do not fit together.
    """
    if "up_bias" in parts:
        return rows_of(parts["up_bias"], rows)
    if "up" in parts and "down" in parts:
        return _lora(rows_of(parts["up"], rows), parts)
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= parts.keys():
        first = _factor(parts, "hada_w1", tucker="hada_t1")
        return rows_of(first * _factor(parts, "hada_w2", tucker="hada_t2"), rows)
    if any(part.startswith("lokr_") for part in parts):
        return rows_of(_lokr(parts), rows)
    return None


def rows_of(tensor: torch.Tensor, rows: Rows | slice) -> torch.Tensor:
    """Return some rows of a tensor, or for None the tensor."""
    if rows is None:
        return tensor
    if isinstance(rows, slice):
        return tensor[rows]
    return tensor[rows[0]] if len(rows) == 1 else torch.cat([tensor[piece] for piece in rows])


def cut(rows: Rows, part: slice) -> tuple[slice, ...]:
    """Return the rows of which a part is asked for, e.g. of a permutation by pieces."""
    if rows is None:
        return (part,)
    found, passed = [], 0
    for piece in rows:
        start = max(part.start - passed, 0) + piece.start
        stop = min(part.stop - passed + piece.start, piece.stop)
        passed += piece.stop - piece.start
        if start < stop:
            found.append(slice(start, stop))
    return tuple(found)


def _lora(up: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Multiply `up` [out, rank] and `down` [rank, in, *kernel]; `mid` [rank, rank, *kernel]."""
    down = parts["down"]
    if "mid" in parts:
        return torch.einsum("pq...,op,qi->oi...", parts["mid"], up.flatten(1), down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _lokr(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    first = _factor(parts, "lokr_w1", tucker=None)
    second = _factor(parts, "lokr_w2", tucker="lokr_t2")
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())


def _factor(parts: Mapping[str, torch.Tensor], name: str, *, tucker: str | None) -> torch.Tensor:
    """Return a matrix: whole, as two factors, or as two factors around a kernel.

    a @ b;   with a kernel t [rank, rank, *kernel]:   out[o, i] = sum_pq a[p, o] t[p, q] b[q, i]
    """
    if name in parts:
        return parts[name]
    first, second = parts[f"{name}_a"], parts[f"{name}_b"]
    if tucker is not None and tucker in parts:
        return torch.einsum("pq...,po,qi->oi...", parts[tucker], first, second)
    return first @ second


def _is_line(kernel: torch.Tensor | None) -> bool:
    return kernel is not None and kernel.ndim == 3
