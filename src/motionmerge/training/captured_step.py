"""A training step that is captured once as a CUDA graph and then replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from motionmerge.models.cuda_graphs import ReplayedCall

WARMUP_RUNS = 3
"""Steps before one is captured: they allocate the optimizer's state and pick kernels."""


class CapturedStep:
    """Run a training step as it is a few times, then capture it as a CUDA graph and replay that.

    Everything that differs from step to step reaches the graph through its inputs' memory, or
    through tensors that are changed in place (the learning rate).
    """

    def __init__(self, step: Callable[..., torch.Tensor], device: torch.device) -> None:
        self._step, self._stream, self._runs = step, torch.cuda.Stream(device), 0
        self._replayed: ReplayedCall | None = None

    def __call__(self, *prepared: torch.Tensor) -> torch.Tensor:
        self._runs += 1
        if self._runs <= WARMUP_RUNS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss = self._step(*prepared)
            torch.cuda.current_stream().wait_stream(self._stream)
            return loss
        if self._replayed is None:
            self._replayed = ReplayedCall(self._step, prepared, self._stream)
        return self._replayed(*prepared)
