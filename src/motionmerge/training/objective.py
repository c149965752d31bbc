"""What the training loop minimizes: a loss in three steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

LossFunction = Callable[[nn.Module, Sequence[int]], torch.Tensor]
"""Takes the (possibly wrapped) module and sample indices; returns the mean loss."""

Drawn = Any
"""What `draw` makes of sample indices: tensors in tuples, named or not."""


class Objective(Protocol):
    """A loss in three steps, so that a GPU need not wait for any of them."""

    @property
    def can_use_gpu(self) -> bool: ...

    @property
    def is_captured(self) -> bool:
        """Whether all batches are alike, so that a step may be captured as a CUDA graph."""
        ...

    @property
    def draw(self) -> Callable[[Sequence[int]], Drawn]:
        """Sample indices to tensors on the CPU, in another process: it must pickle."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what `prepare` needs."""
        ...

    def prepare(self, drawn: Drawn) -> tuple[Any, ...]:
        """Convert what was drawn, on the device, to what the loss needs; no gradients."""
        ...

    def loss(self, module: nn.Module, *prepared: Any) -> torch.Tensor:
        """Compute the mean loss.

        Where `is_captured`: no `.item()` and no branch on values.
        """
        ...


class FunctionObjective:
    """A `LossFunction` as an `Objective` that stays on the CPU."""

    can_use_gpu, is_captured = False, False

    def __init__(self, loss_function: LossFunction) -> None:
        self._loss_function = loss_function

    @property
    def draw(self) -> Callable[[Sequence[int]], Drawn]:
        return torch.tensor

    def to(self, device: torch.device) -> None:
        """Move nothing: `fit` heeds `can_use_gpu`."""

    def prepare(self, drawn: Drawn) -> tuple[torch.Tensor, ...]:
        return (drawn,)

    def loss(self, module: nn.Module, *prepared: torch.Tensor) -> torch.Tensor:
        return self._loss_function(module, prepared[0].tolist())


def needs_gradients(noisy: torch.Tensor) -> None:
    """Ask for gradients of what a denoiser is shown, on a CPU.

    `GroupNorm` of torch 2.13 crashes there in backward where its input is channels-last and needs
    no gradient, but its weight or bias does: behind a frozen first layer.
    """
    if noisy.device.type == "cpu" and torch.is_grad_enabled():
        noisy.requires_grad_(True)
