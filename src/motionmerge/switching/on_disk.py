"""Tensors that wait in a temporary file instead of main memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping

import torch

from motionmerge.errors import ConfigError
from motionmerge.memory import gigabytes
from motionmerge.tensors import bytes_of


class TensorsOnDisk(Mapping[str, torch.Tensor]):
    """Named tensors in a file without a name, which is gone however the program ends.

    It lies in `tempfile.gettempdir()`, which `TMPDIR` sets. Reading gives a new tensor of the same
    bits in main memory.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (open as long as this is)
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        self._end = 0

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor.

        Raises:
            ConfigError: The disk is full.
        """
        left = bytes_of(tensor.cpu()).data
        begin = self._file.seek(self._end)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise ConfigError(
                f"There is no room in {tempfile.gettempdir()} for the model's own weights: "
                f"{gigabytes(begin)} were written ({error.strerror}).",
                fix="Set TMPDIR to a folder on a larger disk, or use another placement.",
            ) from error
        self._places[name] = (begin, tensor.dtype, tensor.shape)
        self._end = self._file.tell()

    def __getitem__(self, name: str) -> torch.Tensor:
        begin, dtype, shape = self._places[name]
        tensor = torch.empty(shape, dtype=dtype)
        left = bytes_of(tensor).data
        self._file.seek(begin)
        while left:
            left = left[self._file.readinto(left) :]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
