"""The batches of a run that are left, drawn ahead by other processes where a GPU waits for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset

from .objective import Drawn, Objective
from .settings import TrainerSettings

MAX_WORKERS = 14
"""Processes that draw samples for a GPU."""


class _Batches(Dataset[list[Drawn]]):
    """What to draw in each step that is left, by one of several processes."""

    def __init__(
        self,
        draw: Callable[[Sequence[int]], Drawn],
        settings: TrainerSettings,
        first_step: int,
        share: int,
        process: int,
    ) -> None:
        self._draw, self._settings, self._first_step = draw, settings, first_step
        self._share, self._process = share, process

    def __len__(self) -> int:
        return self._settings.steps - self._first_step

    def __getitem__(self, index: int) -> list[Drawn]:
        start = (self._first_step + index) * self._settings.batch_size
        start += self._process * self._share * self._settings.accumulate
        starts = (start + self._share * i for i in range(self._settings.accumulate))
        return [self._draw(range(first, first + self._share)) for first in starts]


def batches_left(
    objective: Objective,
    settings: TrainerSettings,
    first_step: int,
    share: int,
    process: int,
    device: torch.device,
) -> Iterator[list[Drawn]]:
    """Yield each step's batches on the device; for a GPU, worker processes draw ahead."""
    batches = _Batches(objective.draw, settings, first_step, share, process)
    if device.type == "cpu":
        yield from (batches[index] for index in range(len(batches)))
        return
    workers = max(1, min(MAX_WORKERS, (os.cpu_count() or 1) - 2))
    loader = DataLoader(
        batches, batch_size=None, num_workers=workers, prefetch_factor=4, pin_memory=True
    )
    for drawn in loader:
        yield send_to_device(drawn, device, non_blocking=True)
