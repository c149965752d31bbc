"""Write tensors in the format of `torch.save`, in any order and in any pieces.

Layout: an uncompressed zip archive; `data.pkl` describes the tensors, `data/<number>` holds the
bytes of each. Source: torch/serialization.py and caffe2/serialize/inline_container.cc of PyTorch.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError
from motionmerge.io.atomic import atomic_path, disk_errors
from motionmerge.io.positioned import read_at, write_at
from motionmerge.io.safetensors_file import TensorSpec, check_spec
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
_EXTRA_HEADER = 4
_READ_AT_ONCE = 16 << 20
_WRITTEN_AT_ONCE = 1 << 30


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
def torch_file(path: str | Path, specs: Mapping[str, TensorSpec]) -> Iterator[TorchFileWriter]:
    """Grow a file of `{"state_dict": {name: tensor, ...}}`, which appears when it is whole.

    Args:
        path: The file to write; missing folders are created.
        specs: Dtype and shape of every tensor.

    Raises:
        CheckpointError: A dtype is unknown to the format, or the disk refuses.
    """
    with disk_errors(CheckpointError, path), atomic_path(path) as temporary:
        writer = TorchFileWriter(temporary, specs)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()


class TorchFileWriter:
    """An archive whose members have their places before their bytes come; any thread may write.

    Args:
        path: The file; it is created, or replaced.
        specs: Dtype and shape of every tensor.

    Raises:
        CheckpointError: A dtype is unknown to the format.
        OSError: The disk refuses.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._path = path
        texts = {"data.pkl": _description(specs), "byteorder": sys.byteorder.encode()}
        sizes = {name: len(text) for name, text in texts.items()}
        sizes |= {f"data/{n}": num_bytes(*spec) for n, spec in enumerate(specs.values())}
        texts["version"] = b"3\n"
        sizes["version"] = len(texts["version"])
        self._members: dict[str, tuple[zipfile.ZipInfo, int]] = {}
        self._end = 0
        for name, size in sizes.items():
            member, begin = _member(name, size, self._end)
            self._members[name] = (member, begin)
            self._end = begin + size
        self._data = {name: f"data/{number}" for number, name in enumerate(specs)}
        self._file = path.open("wb+", buffering=0)
        try:
            self._file.truncate(self._end)
            for name, text in texts.items():
                self._write(self._members[name][1], memoryview(text))
        except BaseException:
            self._file.close()
            raise

    def place(self, name: str) -> None:
        """Return None: nothing else can be written together with a tensor."""

    def write_at(self, name: str, begin: int, data: memoryview) -> None:
        """Write bytes of a tensor from `begin` on.

        Raises:
            CheckpointError: The disk refuses, e.g. because it is full.
        """
        with disk_errors(CheckpointError, self._path):
            self._write(self._members[self._data[name]][1] + begin, data)

    def finish(self) -> None:
        """Write what stands around the tensors, when all of them are there.

        Raises:
            OSError: The disk refuses.
        """
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(self._sum_up, self._members.values()))
        with zipfile.ZipFile(self._file, "w") as archive:
            for member, begin in self._members.values():
                self._write(member.header_offset, memoryview(_header(member)))
                archive.filelist.append(member)
                archive.NameToInfo[member.filename] = member
                archive.start_dir = begin + member.file_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _sum_up(self, placed: tuple[zipfile.ZipInfo, int]) -> None:
        """Compute the check sum of a member from what was written."""
        member, begin = placed
        for done in range(0, member.file_size, _READ_AT_ONCE):
            count = min(_READ_AT_ONCE, member.file_size - done)
            data = memoryview(bytearray(count))
            read = read_at(self._file, data, begin + done)
            member.CRC = zlib.crc32(data[:read], member.CRC)

    def _write(self, position: int, data: memoryview) -> None:
        while data:
            count = write_at(self._file, data[:_WRITTEN_AT_ONCE], position)
            data, position = data[count:], position + count


def _member(name: str, size: int, begin: int) -> tuple[zipfile.ZipInfo, int]:
    """Return a member of the archive, and where its bytes begin: at a multiple of 64.

    `torch.load(mmap=True)` likes them so.

    Args:
        name: Its name.
        size: Its bytes.
        begin: Where its header begins.
    """
    member = zipfile.ZipInfo(f"archive/{name}")
    member.file_size = member.compress_size = size
    member.header_offset, member.CRC = begin, 0
    padding = -(begin + len(_header(member)) + _EXTRA_HEADER) % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    return member, begin + len(_header(member))


def _header(member: zipfile.ZipInfo) -> bytes:
    return member.FileHeader(zip64=member.file_size * 1.05 > zipfile.ZIP64_LIMIT)


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
