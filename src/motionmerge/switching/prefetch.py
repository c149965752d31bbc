"""Experts that wait in main memory, part of the next one sent ahead to the device that computes.

Tensors lie one behind the other in large pieces, so that a few long copies move them: a model has
some thousand tensors, and on a GPU every copy costs Python more than it costs the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

PIECE_BYTES = 256 << 20
"""How much lies and travels together at most; a larger tensor is a piece of its own. Pinned memory
is given in powers of two, so that pieces of a single tensor would waste half of it."""

_ALIGNMENT = 256
"""Tensors begin at multiples of so many bytes, as those that a GPU allocates."""


@dataclass(frozen=True)
class TransferBuffer:
    """Tensors one behind the other.

    Attributes:
        buffer: Their bytes, uint8 `[bytes]`.
        places: Where each begins in the buffer, its dtype and shape.
    """

    buffer: torch.Tensor
    places: Mapping[str, tuple[int, torch.dtype, torch.Size]]

    def tensors(self, buffer: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors, which are parts of the buffer, or of a copy of it elsewhere."""
        whole = self.buffer if buffer is None else buffer
        return {
            name: whole[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (begin, dtype, shape) in self.places.items()
        }


class Lane(Protocol):
    """How pieces reach a device."""

    def allocate(self, num_bytes: int) -> torch.Tensor: ...
    def send(self, buffer: torch.Tensor) -> torch.Tensor: ...
    def wait(self) -> None: ...


class PlainLane:
    """Copies at once; for CPUs, and devices without streams.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Allocate main memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, buffer: torch.Tensor) -> torch.Tensor:
        """Copy a buffer to the device."""
        return buffer.to(self._device, copy=True)

    def wait(self) -> None:
        """Wait until what was sent is there, which it is."""


class StreamLane:
    """Copies from pinned memory on a stream of its own, beside what the GPU computes.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Allocate pinned memory, from which copies need not be waited for."""
        return pinned_if_possible(num_bytes)

    def send(self, buffer: torch.Tensor) -> torch.Tensor:
        """Begin to copy a buffer to the device, once what is under way there has read the last."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return buffer.to(self._device, non_blocking=True)

    def wait(self) -> None:
        """Make the next computation wait until what was sent is there."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def pinned_if_possible(num_bytes: int) -> torch.Tensor:
    """Return main memory that the system does not move, or common one where it grants none.

    From common memory copies are as right, but wait for the GPU.
    """
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(num_bytes, dtype=torch.uint8)


@cache
def lane_to(device: torch.device) -> Lane:
    """Choose how pieces reach a device; a stream keeps memory, so there is one for each."""
    return StreamLane(device) if device.type == "cuda" else PlainLane(device)


class Prefetcher:
    """Keeps experts in main memory and sends the next one ahead, as much of it as may be there.

    Args:
        experts: The tensors of each expert; they are taken out as they are packed.
        order: The experts as they follow one another in a video.
        lane: How they reach the device.
        max_bytes: How much may be there before it is due.
    """

    def __init__(
        self,
        experts: Mapping[str, MutableMapping[str, torch.Tensor]],
        *,
        order: Iterable[str],
        lane: Lane,
        max_bytes: int,
    ) -> None:
        self._lane, self._max_bytes = lane, max_bytes
        several = max_bytes // 4  # pieces should be sent, if any may be
        piece_bytes = min(PIECE_BYTES, several or PIECE_BYTES)
        self._pieces = {
            name: list(pack(tensors, lane, piece_bytes=piece_bytes))
            for name, tensors in experts.items()
        }
        used = list(dict.fromkeys(order))
        self._next = dict(zip(used, [*used[1:], *used[:1]], strict=True))
        self._expected: str | None = None
        self._sent: list[torch.Tensor] = []

    def take(self, expert: str) -> dict[str, torch.Tensor]:
        """Return an expert's tensors: those sent ahead on the device, the rest in main memory."""
        self._lane.wait()
        sent = self._sent if expert == self._expected else []
        self._sent, self._expected = [], None
        tensors: dict[str, torch.Tensor] = {}
        for number, piece in enumerate(self._pieces[expert]):
            tensors |= piece.tensors(sent[number] if number < len(sent) else None)
        return tensors

    def send_next(self, after: str) -> None:
        """Begin to send the expert that follows one; what finds no memory is left for `take`."""
        self._sent, self._expected = [], self._next.get(after)
        left = self._max_bytes
        for piece in self._pieces.get(self._expected or "", []):
            left -= piece.buffer.nbytes
            if left < 0:
                return
            try:
                self._sent.append(self._lane.send(piece.buffer))
            except torch.OutOfMemoryError:
                return


def pack(
    tensors: MutableMapping[str, torch.Tensor], lane: Lane, *, piece_bytes: int
) -> Iterator[TransferBuffer]:
    """Copy tensors into pieces, in their order.

    Args:
        tensors: The tensors; each is taken out once it is in its piece.
        lane: Gives the memory.
        piece_bytes: The most that a piece of several tensors takes.
    """
    while tensors:
        places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        end = 0
        for name, tensor in tensors.items():
            begin = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
            if places and begin + tensor.nbytes > piece_bytes:
                break
            places[name] = begin, tensor.dtype, tensor.shape
            end = begin + tensor.nbytes
        piece = TransferBuffer(lane.allocate(end), places)
        for name, place in piece.tensors().items():
            place.copy_(tensors.pop(name))
        yield piece
