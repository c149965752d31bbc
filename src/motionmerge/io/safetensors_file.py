"""One safetensors file: a header that is checked before it is believed, and a streaming writer.

Layout: 8 bytes little-endian header size, JSON header, tensor data back to back.
Source: the format description of safetensors (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from motionmerge.errors import CheckpointError, ShapeError
from motionmerge.io.atomic import disk_errors
from motionmerge.io.first_bytes import MAX_HEADER_BYTES
from motionmerge.io.positioned import read_at, write_at
from motionmerge.lazy_torch import torch
from motionmerge.tensors import (
    AnyDtype,
    DType,
    bytes_of,
    code_to_dtype,
    dtype_name,
    num_bytes,
    storable,
)

_METADATA = "__metadata__"
_WRITTEN_AT_ONCE = 512 << 10
"""Bytes. Linux caches what is written at once in one piece of memory; pieces of 1 MiB and more take
up to three times as long where a virtual machine has to get them from its host."""

_IS_LINUX = sys.platform == "linux" and sys.maxsize > 2**32
_FALLOCATE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, use_errno=True
)
_DOWNLOAD_AGAIN = "Download or export the file again."

TensorSpec = tuple[AnyDtype, tuple[int, ...]]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `begin` and `end` are offsets from the start of the file, in bytes."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """Lazy reader of one file. Safe to share between threads.

    Args:
        path: A safetensors file.

    Raises:
        CheckpointError: The file is missing, truncated, or its header lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"Cannot open {path}: {error}", fix="Check the path.") from error
        try:
            self.tensors, self.metadata = _read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype.torch)
        self.read_into(name, 0, bytes_of(tensor).data)
        return tensor

    def read_into(self, name: str, begin: int, target: memoryview) -> None:
        """Read the bytes of a tensor from `begin` on; `target` says how many.

        Raises:
            CheckpointError: The file has been cut off since it was opened, or the disk fails.
        """
        position = self.tensors[name].begin + begin
        while target:
            try:
                count = read_at(self._file, target, position)
            except OSError as error:
                raise CheckpointError(
                    f"Cannot read `{name}` of {self.path}: {error}", fix="Check the disk."
                ) from error
            if not count:
                raise CheckpointError(
                    f"{self.path} ended while `{name}` was read.", fix=_DOWNLOAD_AGAIN
                )
            target, position = target[count:], position + count

    def place(self, name: str) -> tuple[object, int]:
        """Return the file and the byte where a tensor begins; one may read past its end."""
        return self, self.tensors[name].begin

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is not a whole safetensors file: {what}.", fix=_DOWNLOAD_AGAIN
        )

    file_size = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise refuse(f"it has {file_size} bytes")
    (header_size,) = struct.unpack("<Q", prefix)
    if header_size > MAX_HEADER_BYTES:
        raise refuse(f"its header claims {header_size} bytes, more than {MAX_HEADER_BYTES}")
    if 8 + header_size > file_size:
        raise refuse(f"its header claims {header_size} bytes, the file has {file_size}")
    try:
        header = json.loads(file.read(header_size), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise refuse("its header is not a JSON object")

    if not _is_unicode((*header, *_texts_of(header.get(_METADATA)))):
        raise refuse("its header holds half a character (a lone surrogate), which is no text")
    metadata = header.pop(_METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("its metadata does not map names to text")
    start = 8 + header_size
    tensors = {}
    for name, entry in header.items():
        try:
            tensors[name] = _read_entry(entry, start)
        except CheckpointError as error:
            message = f"{path} holds `{name[:100]}`: {error.message}"
            raise CheckpointError(message, fix=error.fix) from error
        except ValueError as error:
            raise refuse(f"tensor `{name[:100]}`: {error}") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = start
    for name, stored in tensors.items():
        if stored.begin != position:
            fault = "overlaps the one before it" if stored.begin < position else "follows a hole"
            raise refuse(f"the data of tensor `{name}` {fault}")
        position = stored.end
    if position != file_size:
        fault = "is cut off" if position > file_size else "has bytes that belong to no tensor"
        raise refuse(f"its data needs {position} bytes, the file has {file_size}, so it {fault}")
    return tensors, metadata


def _texts_of(metadata: Any) -> Iterator[str]:
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return (text for pair in pairs for text in pair if isinstance(text, str))


def _is_unicode(texts: Iterable[str]) -> bool:
    """Check what JSON can escape and no file can hold: such names could not be written again."""
    try:
        "\n".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _read_entry(entry: Any, start: int) -> StoredTensor:
    # Like the official reader, which lets further fields pass.
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError("its entry is not {dtype, shape, data_offsets}")
    if not isinstance(entry["dtype"], str):
        raise ValueError("its dtype is not text")
    dtype = code_to_dtype(entry["dtype"])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_count_list(shape) or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise ValueError(f"its shape {str(shape)[:100]} is impossible")
    if not _is_count_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"its offsets {str(offsets)[:100]} are impossible")
    if dtype.bits * math.prod(shape) % 8:
        raise ValueError(f"{dtype_name(dtype)} {shape} ends within a byte")
    if offsets[1] - offsets[0] != num_bytes(dtype, shape):
        raise ValueError(
            f"{dtype_name(dtype)} {shape} needs {num_bytes(dtype, shape)} bytes, its offsets hold "
            f"{offsets[1] - offsets[0]}"
        )
    return StoredTensor(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_count_list(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**60 for value in values)
    )


class SafetensorsWriter:
    """A file whose header is written first and whose tensors come in any order, in any pieces.

    Data lies in the order of `specs`, wider dtypes first, so that every tensor is aligned. Any
    thread may write.

    Args:
        path: The file; it is created, or replaced.
        specs: Dtype and shape of every tensor.
        metadata: Text to keep in the header.

    Raises:
        CheckpointError: A dtype or name cannot be stored, or the disk refuses.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        header, offsets, end = _layout(specs, metadata)
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        if len(encoded) > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"The header of {path} would have {len(encoded)} bytes, more than "
                f"{MAX_HEADER_BYTES}.",
                fix="Store less metadata.",
            )
        start = 8 + len(encoded)
        self._positions = {name: start + offset for name, offset in offsets.items()}
        with disk_errors(CheckpointError, path):
            self._file = path.open("wb", buffering=0)
        try:
            with disk_errors(CheckpointError, path):
                self._file.write(struct.pack("<Q", len(encoded)) + encoded)
                _reserve(self._file.fileno(), start + end)
        except BaseException:
            self._file.close()
            raise

    def place(self, name: str) -> tuple[object, int]:
        """Return the file and the byte where a tensor begins; one may write past its end."""
        return self, self._positions[name]

    def write_at(self, name: str, begin: int, data: memoryview) -> None:
        """Write bytes of a tensor from `begin` on.

        Raises:
            CheckpointError: The disk refuses, e.g. because it is full.
        """
        position = self._positions[name] + begin
        with disk_errors(CheckpointError, self.path):
            while data:
                count = write_at(self._file, data[:_WRITTEN_AT_ONCE], position)
                data, position = data[count:], position + count

    def close(self) -> None:
        """Close the file; the disk may refuse what it accepted before."""
        with disk_errors(CheckpointError, self.path):
            self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reserve(file: int, size: int) -> None:
    """Make a file `size` bytes long, on blocks of its own where the disk can promise them.

    Writing into reserved blocks is a quarter quicker, and a full disk is found before the work.
    `os.posix_fallocate` writes to every block of a disk that cannot, so Linux is asked itself.
    """
    if _IS_LINUX:
        fallocate = _FALLOCATE(("fallocate", ctypes.CDLL(None)))
        if fallocate(file, 0, 0, size) == 0:
            return
        if ctypes.get_errno() == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(file, size)


def _layout(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None
) -> tuple[dict[str, Any], dict[str, int], int]:
    """Return the header, where each tensor begins in the data, and where the data ends."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offsets, position = {}, 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):
        if name == _METADATA:
            raise CheckpointError(f"No tensor can be named `{_METADATA}`.", fix="Rename it.")
        offsets[name] = position
        end = position + num_bytes(dtype, shape)
        header[name] = {
            "dtype": storable(dtype).code,
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    return header, offsets, position


def check_spec(name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
    """Refuse a tensor that differs from its spec.

    Raises:
        ShapeError: It has another dtype or shape.
    """
    dtype, shape = spec
    if storable(tensor.dtype) != storable(dtype) or tuple(tensor.shape) != tuple(shape):
        raise ShapeError(
            f"Tensor `{name}` is {dtype_name(tensor.dtype)} {list(tensor.shape)}, its spec says "
            f"{dtype_name(dtype)} {list(shape)}.",
            fix="Convert the tensor, or correct the spec.",
        )
