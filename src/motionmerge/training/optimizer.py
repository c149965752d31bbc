"""The optimizer of a run: AdamW, with moments of four bytes a number or of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.packages import missing_package

from .settings import TrainerSettings


def optimizer_of(parameters: Sequence[nn.Parameter], settings: TrainerSettings) -> Any:
    """Return the optimizer; its moments have a byte a number each, or four.

    Raises:
        ConfigError: bitsandbytes is not installed, or the run is sharded.
    """
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    if settings.shard:
        raise ConfigError(
            "`settings.optimizer` is adamw8bit, whose moments are not sharded.",
            fix="Leave `shard` or `optimizer` out.",
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise missing_package(error) or error from error
    return AdamW8bit(parameters, weight_decay=settings.weight_decay)
