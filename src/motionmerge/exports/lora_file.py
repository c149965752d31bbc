"""A LoRA file whose tensors are not known before they are computed, and come in any order."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from motionmerge.errors import CheckpointError
from motionmerge.io.safetensors_file import TensorSpec
from motionmerge.io.weights_writer import weights_file
from motionmerge.lazy_torch import torch
from motionmerge.tensors import bytes_of, num_bytes, storable

_COPIED_AT_ONCE = 16 << 20


class LoraFile:
    """Keeps tensors in a nameless file until all are there; then writes them in order.

    Args:
        folder: Where the file will be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._held: dict[tuple[int, str], tuple[TensorSpec, int]] = {}
        self._end = 0

    def __enter__(self) -> LoraFile:
        self._body = tempfile.TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._body.close()

    def add(self, position: int, key: str, tensor: torch.Tensor) -> None:
        """Add a tensor; any thread may.

        Args:
            position: Where it belongs in the file, among others.
            key: Its name.
            tensor: Its values.

        Raises:
            CheckpointError: The disk refuses.
        """
        spec = (storable(tensor.dtype), tuple(tensor.shape))
        with self._lock:
            try:
                self._body.seek(self._end)
                self._body.write(bytes_of(tensor).data)
            except OSError as error:
                raise CheckpointError(
                    f"Cannot write to {self._folder}: {error}", fix="Check its free space."
                ) from error
            self._held[position, key] = (spec, self._end)
            self._end += num_bytes(*spec)

    def __len__(self) -> int:
        return len(self._held)

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write all tensors to a file, by position and name.

        Raises:
            CheckpointError: The disk refuses.
        """
        held = dict(sorted(self._held.items()))
        with weights_file(
            path, {key: spec for (_, key), (spec, _) in held.items()}, metadata=metadata
        ) as writer:
            for (_, key), (spec, begin) in held.items():
                size = num_bytes(*spec)
                self._body.seek(begin)
                for done in range(0, size, _COPIED_AT_ONCE):
                    data = self._body.read(min(_COPIED_AT_ONCE, size - done))
                    writer.write_at(key, done, memoryview(data))
