"""Tensors known by dtype and shape, read one by one when they are written or loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from motionmerge.io.weights import WeightsReader

from .key_maps import TensorPair


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known by dtype and shape and read when asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        """Wrap a tensor that is in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    def on_meta(self) -> torch.Tensor:
        """Return a stand-in without data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


LazyTensors = dict[str, LazyTensor]


def lazy_tensors(reader: WeightsReader) -> LazyTensors:
    """List the tensors of an open checkpoint; the reader must stay open while they are used."""
    return {
        name: LazyTensor(reader.dtype(name).torch, reader.shape(name), partial(reader.read, name))
        for name in reader.keys()  # noqa: SIM118  (a reader is not a mapping)
    }


def to_ours(tensors: LazyTensors, pairs: Iterable[TensorPair]) -> LazyTensors:
    """Rename and reshape official tensors, lazily."""

    def part(pair: TensorPair, index: int) -> torch.Tensor:
        return pair.to_ours(tensors[pair.official].read())[index]

    result = {}
    for pair in pairs:
        source = tensors[pair.official]
        for index, stand_in in enumerate(pair.to_ours(source.on_meta())):
            name, shape = pair.ours[index], tuple(stand_in.shape)
            result[name] = LazyTensor(source.dtype, shape, partial(part, pair, index))
    return result


def to_official(tensors: LazyTensors, pairs: Iterable[TensorPair]) -> LazyTensors:
    """Rename and reshape our tensors, lazily."""

    def whole(pair: TensorPair) -> torch.Tensor:
        return pair.to_official(tensors[name].read() for name in pair.ours)

    result = {}
    for pair in pairs:
        stand_in = pair.to_official(tensors[name].on_meta() for name in pair.ours)
        shape = tuple(stand_in.shape)
        result[pair.official] = LazyTensor(stand_in.dtype, shape, partial(whole, pair))
    return result
