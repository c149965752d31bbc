"""Where the experts' tensors wait until they are due, chosen from free memory.

resident    on the module's device, as a second copy of what experts change
prefetch    in main memory, part of the next one sent ahead on a side stream (`prefetch`)
recompute   nowhere: computed at every switch from the inputs (`recompute`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from motionmerge.errors import ConfigError
from motionmerge.memory import SHARE, free_memory, gigabytes
from motionmerge.text import fix_unknown_name

PLACEMENTS = ("auto", "resident", "prefetch", "recompute")

DEVICE_SHARE = 0.5
"""How much of a device's free memory waiting experts may take; activations need the rest."""

AHEAD_SHARE = 0.4
"""How much of an expert is sent ahead. All of it would take what `resident` takes, and at 50 GB/s
the rest of DynamiCrafter's in bf16 arrives in 35 ms."""

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ExpertPlacement:
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
            fix="Give every input of the recipe as a path, or use another placement.",
        )
    free = free_memory(torch.device("cpu"))
    fits = free is None or num_bytes <= SHARE * free
    if placement == "recompute" or (placement == "auto" and not fits and can_recompute):
        return True
    if not fits:
        raise ConfigError(
            f"The experts take {gigabytes(num_bytes)}, and {gigabytes(free or 0)} of main memory "
            "are free.",
            fix="Give every input as a path and use placement='recompute', or use LoRAs.",
        )
    return False


def choose_placement(
    placement: str, *, expert_bytes: Mapping[str, int], device: torch.device, free: int | None
) -> ExpertPlacement:
    """Choose where tensors that were computed wait.

    Args:
        placement: What was asked for; `auto` takes the fastest that fits.
        expert_bytes: What each expert has of tensors that change.
        device: Where the module computes.
        free: Free bytes there; None if unknown, which counts as none on a GPU.
    """
    largest = max(expert_bytes.values(), default=0)
    waiting = sum(expert_bytes.values()) - largest  # one is in place
    what = f"{len(expert_bytes)} experts of {gigabytes(largest)}"
    if placement == "auto" and device.type == "cpu":
        return ExpertPlacement("resident", device, reason=f"{what} in main memory")
    room = int(DEVICE_SHARE * (free or 0))
    known = f"{gigabytes(free)} free there" if free is not None else "free memory unknown"
    if placement == "resident" or (placement == "auto" and waiting <= room):
        return ExpertPlacement("resident", device, reason=f"{what} on {device}, {known}")
    ahead = min(int(AHEAD_SHARE * largest), room)
    reason = f"{what} in main memory, {gigabytes(ahead)} sent ahead to {device}, {known}"
    return ExpertPlacement("prefetch", device, ahead, reason)


def free_or_none(device: torch.device) -> int | None:
    """Return the free bytes of a device whose system tells; other accelerators do not."""
    return free_memory(device) if device.type in ("cpu", "cuda") else None
