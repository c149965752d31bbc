"""Networks built from strangers' configurations, bounded before memory is.

A configuration of a few bytes can ask for a billion layers, or for one of terabytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from motionmerge.errors import CheckpointError
from motionmerge.models.video_pipeline import Config

MAX_MODULES = 50_000
"""The largest video models have some 5,000."""

_PLENTY = 1 << 20


@contextmanager
def bounded_layers(name: str) -> Iterator[None]:
    """Refuse to build more than `MAX_MODULES` modules in this thread.

    Raises:
        CheckpointError: From whatever builds too many.
    """
    own, count = threading.get_ident(), 0

    def registered(module: nn.Module, key: str, submodule: nn.Module | None) -> None:
        nonlocal count
        if threading.get_ident() != own:
            return
        count += 1
        if count > MAX_MODULES:
            raise CheckpointError(
                f"The configuration of {name} asks for more than {MAX_MODULES:,} layers.",
                fix="Download it again, or get it from a source that you trust.",
            )

    hook = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def empty_network(made_by: Any, config: Config, *, name: str, num_stored: int) -> nn.Module:
    """Build a network without memory for its weights.

    Args:
        made_by: Its class, of diffusers.
        config: Its configuration.
        name: What to call it in errors.
        num_stored: How many numbers its weights files hold; 0 if that is not known.

    Raises:
        CheckpointError: The configuration asks for too many layers, or for a network several times
            as large as its weights.
    """
    # `init_empty_weights` takes away what legacy constructors make in spite of the device.
    with bounded_layers(name), init_empty_weights(), torch.device("meta"):
        network: nn.Module = made_by.from_config(config)
    wanted = sum(parameter.numel() for parameter in network.parameters())
    if num_stored and wanted > 4 * num_stored + _PLENTY:
        raise CheckpointError(
            f"The configuration of {name} describes {wanted:,} parameters, its weights hold "
            f"{num_stored:,}.",
            fix="Download both again.",
        )
    return network
