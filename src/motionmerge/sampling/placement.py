"""Where the experts' tensors wait until they are due, chosen from free memory.

resident    on the module's device, as a second copy of what experts change
prefetch    in main memory, pinned for a GPU; as many as fit are sent ahead on a side stream
recompute   nowhere: computed at every switch from the inputs (`recompute`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.sampling.memory import SHARE, free_memory, gigabytes
from motionmerge.text import fix_unknown_name

PLACEMENTS = ("auto", "resident", "prefetch", "recompute")

DEVICE_SHARE = 0.5
"""How much of a device's free memory waiting experts may take; activations need the rest."""

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Placement:
    """Where tensors wait.

    Attributes:
        kind: One of `PLACEMENTS` but `auto`.
        device: Where the module computes.
        ahead_bytes: With `prefetch`, how much may be sent to the device before it is due.
        reason: The choice in words, with its numbers.
    """

    kind: str
    device: torch.device
    ahead_bytes: int = 0
    reason: str = ""


def check_placement(placement: str) -> None:
    """Refuse an unknown placement.

    Raises:
        ConfigError: Names the known ones.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(
            f"There is no placement `{placement}`.", fix=fix_unknown_name(placement, PLACEMENTS)
        )


def should_recompute(placement: str, *, num_bytes: int, can_recompute: bool) -> bool:
    """Decide, before experts are computed, whether to keep them.

    Args:
        placement: What was asked for.
        num_bytes: Of all experts.
        can_recompute: Whether their inputs are files.

    Raises:
        ConfigError: They can neither be kept nor recomputed.
    """
    check_placement(placement)
    if placement == "recompute" and not can_recompute:
        raise ConfigError(
            "Experts can be recomputed only from files, not from weights in memory.",
            fix="give every input of the recipe as a path, or use another placement.",
        )
    free = free_memory(torch.device("cpu"))
    fits = free is None or num_bytes <= SHARE * free
    if placement == "recompute" or (placement == "auto" and not fits and can_recompute):
        return True
    if not fits:
        raise ConfigError(
            f"The experts take {gigabytes(num_bytes)}, and {gigabytes(free or 0)} of main memory "
            "are free.",
            fix="give every input as a path and use placement='recompute', or use LoRAs.",
        )
    return False


def choose_placement(
    placement: str, *, expert_bytes: Mapping[str, int], device: torch.device, free: int | None
) -> Placement:
    """Choose where tensors that were computed wait.

    Args:
        placement: What was asked for; `auto` takes the fastest that fits.
        expert_bytes: What each expert has of tensors that change.
        device: Where the module computes.
        free: Free bytes there; None if unknown, which counts as none on a GPU.
    """
    total, largest = sum(expert_bytes.values()), max(expert_bytes.values(), default=0)
    what = f"{len(expert_bytes)} experts of {gigabytes(largest)}"
    if placement == "auto" and device.type == "cpu":
        return Placement("resident", device, reason=f"{what} in main memory")
    room = int(DEVICE_SHARE * (free or 0))
    known = f"{gigabytes(free)} free there" if free is not None else "free memory unknown"
    if placement == "resident" or (placement == "auto" and total <= room):
        return Placement("resident", device, reason=f"{what} on {device}, {known}")
    ahead = largest if device.type == "cpu" else min(largest, room)
    reason = f"{what} in main memory, {gigabytes(ahead)} sent ahead to {device}, {known}"
    return Placement("prefetch", device, ahead, reason)


def free_or_none(device: torch.device) -> int | None:
    """Give the free bytes of a device whose system tells; other accelerators do not."""
    return free_memory(device) if device.type in ("cpu", "cuda") else None


def computing_device(module: nn.Module) -> torch.device:
    """Find where a module computes, which with model offload is not where it is."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    tensors: Any = (tensor for group in (module.parameters(), module.buffers()) for tensor in group)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


class Lane(Protocol):
    """How tensors reach a device."""

    def prepare(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def send(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def wait(self) -> None: ...


class PlainLane:
    """Copies at once; for CPUs, and devices without streams.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put a tensor into main memory."""
        return tensor.to("cpu")

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the device."""
        return tensor.to(self._device, copy=True)

    def wait(self) -> None:
        """Wait until what was sent is there, which it is."""


class StreamLane:
    """Copies from pinned memory on a stream of its own, beside what the GPU computes.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def prepare(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put a tensor into pinned memory, from which copies need not be waited for."""
        return tensor.to("cpu").pin_memory()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor to the device, once what is under way there has read the last."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return tensor.to(self._device, non_blocking=True)

    def wait(self) -> None:
        """Let what is computed next wait until what was sent is there."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def lane_to(device: torch.device) -> Lane:
    """Choose how tensors reach a device."""
    return StreamLane(device) if device.type == "cuda" else PlainLane(device)


@dataclass
class Prefetcher:
    """Sends the next expert's tensors ahead, as many as may be there.

    Attributes:
        lane: How they reach the device.
        max_bytes: How much may be there before it is due.
        sent: What is there or on its way.
    """

    lane: Lane
    max_bytes: int
    sent: dict[str, torch.Tensor] = field(default_factory=dict)

    def start(self, values: Weights) -> None:
        """Begin to send; what finds no memory is left for `arrived`."""
        self.sent = {}
        left = self.max_bytes
        for name, value in values.items():
            left -= value.nbytes
            if left < 0:
                return
            try:
                self.sent[name] = self.lane.send(value)
            except torch.OutOfMemoryError:
                return

    def arrived(self, values: Weights) -> dict[str, torch.Tensor]:
        """Give all tensors of the expert that was sent ahead: those that were, and the others."""
        self.lane.wait()
        ready = {name: self.sent.get(name, value) for name, value in values.items()}
        self.sent = {}
        return ready
