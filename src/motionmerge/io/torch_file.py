"""Write tensors in the format of `torch.save`, one in memory at a time.

Layout: an uncompressed zip archive; `data.pkl` describes the tensors, `data/<number>` holds the
bytes of each. Source: torch/serialization.py and caffe2/serialize/inline_container.cc of PyTorch.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError, ShapeError
from motionmerge.io.atomic import atomic_path
from motionmerge.io.safetensors_file import TensorSpec
from motionmerge.lazy_torch import torch
from motionmerge.tensors import DType, bytes_of, dtype_name, num_bytes, storable

_STORAGES = {
    DType.FP64: "DoubleStorage",
    DType.FP32: "FloatStorage",
    DType.FP16: "HalfStorage",
    DType.BF16: "BFloat16Storage",
    DType.INT64: "LongStorage",
    DType.INT32: "IntStorage",
    DType.INT16: "ShortStorage",
    DType.INT8: "CharStorage",
    DType.UINT8: "ByteStorage",
    DType.BOOL: "BoolStorage",
}
_ALIGNMENT = 64
_ZIP64_FIELD = 20


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
    path = Path(path)
    try:
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            _add(archive, "data.pkl", _description(specs))
            _add(archive, "byteorder", sys.byteorder.encode())
            for number, (name, spec) in enumerate(specs.items()):
                tensor = read(name).detach().cpu().contiguous()
                found = (storable(tensor.dtype), tuple(tensor.shape))
                if found != (storable(spec[0]), tuple(spec[1])):
                    raise ShapeError(
                        f"Tensor `{name}` is {dtype_name(tensor.dtype)} {list(tensor.shape)}, its "
                        f"spec says {dtype_name(spec[0])} {list(spec[1])}.",
                        fix="Convert the tensor, or correct the spec.",
                    )
                _add(archive, f"data/{number}", bytes_of(tensor).data)
            _add(archive, "version", b"3\n")
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {path}: {error}", fix="Check the folder and its free space."
        ) from error


@dataclass(frozen=True)
class _Storage:
    number: int
    dtype: DType
    count: int


@dataclass(frozen=True)
class _Described:
    """Pickles as a tensor would whose storage lies elsewhere in the archive."""

    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.shape, device="meta").stride()
        hooks: OrderedDict[str, Any] = OrderedDict()
        arguments = (self.storage, 0, self.shape, strides, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        """Name the storages, which `torch.load` looks up by number."""
        if not isinstance(value, _Storage):
            return None
        return (
            "storage",
            getattr(torch, _STORAGES[value.dtype]),
            str(value.number),
            "cpu",
            value.count,
        )


def _description(specs: Mapping[str, TensorSpec]) -> bytes:
    state = {}
    for number, (name, (given, shape)) in enumerate(specs.items()):
        dtype = storable(given)
        if dtype not in _STORAGES:
            raise CheckpointError(
                f"`{name}` is {dtype_name(dtype)}, which a .ckpt cannot hold.",
                fix="Write .safetensors.",
            )
        count = num_bytes(dtype, shape) // dtype.itemsize
        state[name] = _Described(_Storage(number, dtype, count), tuple(shape))
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({"state_dict": state})
    return buffer.getvalue()


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Add a member whose bytes begin at a multiple of 64, as `torch.load(mmap=True)` likes them."""
    member = zipfile.ZipInfo(f"archive/{name}")
    member.file_size = len(data)
    is_large = member.file_size * 1.05 > zipfile.ZIP64_LIMIT
    assert archive.fp is not None
    begin = archive.fp.tell() + 30 + len(member.filename) + 4 + is_large * _ZIP64_FIELD
    padding = -begin % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(member, "w", force_zip64=is_large) as file:
        file.write(data)
