"""Write tensors with `torch.save`, in any order and in any pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from motionmerge.errors import CheckpointError
from motionmerge.io.atomic import atomic_path, disk_errors, scratch_path
from motionmerge.io.safetensors_file import (
    SafetensorsWriter,
    TensorSpec,
    check_spec,
)
from motionmerge.lazy_torch import torch
from motionmerge.tensors import DType, bytes_of, dtype_name, num_bytes, storable

_DTYPES = {
    *(DType.FP64, DType.FP32, DType.FP16, DType.BF16, DType.BOOL),
    *(DType.INT64, DType.INT32, DType.INT16, DType.INT8, DType.UINT8),
}
"""What every version of torch reads."""


def write_torch_file(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    *,
    read: Callable[[str], torch.Tensor],
) -> None:
    """Write `{"state_dict": {name: tensor, ...}}` for `torch.load`; the file appears when whole.

    Args:
        path: The file to write; missing folders are created.
        specs: Dtype and shape of every tensor.
        read: Gives a tensor; called once per name, in order.

    Raises:
        ShapeError: A tensor differs from its spec.
        CheckpointError: A dtype is unknown to the format, or the disk refuses.
    """
    with torch_file(path, specs) as writer:
        for name, spec in specs.items():
            tensor = read(name).detach().cpu().contiguous()
            check_spec(name, tensor, spec)
            writer.write_at(name, 0, bytes_of(tensor).data)


@contextmanager
def torch_file(path: str | Path, specs: Mapping[str, TensorSpec]) -> Iterator[SafetensorsWriter]:
    """Grow a file of `{"state_dict": {name: tensor, ...}}`, which appears when it is whole.

    Until all tensors are there, they are kept in a temporary file beside it: the disk needs room
    for both.

    Args:
        path: The file to write; missing folders are created.
        specs: Dtype and shape of every tensor.

    Raises:
        CheckpointError: A dtype is unknown to the format, or the disk refuses.
    """
    for name, (dtype, _) in specs.items():
        if storable(dtype) not in _DTYPES:
            raise CheckpointError(
                f"`{name}` is {dtype_name(dtype)}, which a .ckpt cannot hold.",
                fix="Write .safetensors.",
            )
    with disk_errors(CheckpointError, path), scratch_path(path) as body:
        with SafetensorsWriter(body, specs) as writer:
            yield writer
        # A file object, because `torch.save` writes the name of a file into it.
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save({"state_dict": _mapped(body, writer, specs)}, file)
            except RuntimeError as error:  # torch's own, where the disk is full
                raise OSError(str(error).partition("\n")[0]) from error


def _mapped(
    body: Path, writer: SafetensorsWriter, specs: Mapping[str, TensorSpec]
) -> dict[str, torch.Tensor]:
    """Return tensors whose values stay in the file until they are asked for."""
    mapped = {}
    for name, (given, shape) in specs.items():
        dtype, (_, begin) = storable(given), writer.place(name)
        if size := num_bytes(dtype, shape):  # nothing cannot be mapped
            values = np.memmap(body, np.uint8, mode="c", offset=begin, shape=size)
            mapped[name] = torch.from_numpy(values).view(dtype.torch).view(shape)
        else:
            mapped[name] = torch.empty(shape, dtype=dtype.torch)
    return mapped
