"""What every measuring network offers, and how its weights are read.

A network is made from a file or folder of weights. Its name and the SHA-256 of what it was made of
stand beside every number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from motionmerge.errors import CheckpointError
from motionmerge.io.weights import hash_weights, open_weights

State = dict[str, torch.Tensor]

_WRAPPERS = ("module.", "backbone.", "model.")
"""Prefixes that data-parallel training and self-supervised trainers leave in front of all names."""


_PUBLISHED = (
    "Give the published file: see docs/how-to/vbench.md and fvd.md, or docs/reference/metrics.md."
)


class ImageEncoder(Protocol):
    """A network that turns frames into features."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode normalised frames `[frames, 3, height, width]` into `[frames, channels]`."""
        ...


class FlowNetwork(Protocol):
    """A network that finds optical flow."""

    def flows(self, frames: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the flow `[height, width, 2]` of each pair of neighbours.

        Args:
            frames: `[frames, 3, height, width]` in 0..255; sides are multiples of 8.
        """
        ...


def read_state(path: Path) -> State:
    """Read all tensors of a file or folder as float32, without a wrapper's prefix.

    Raises:
        CheckpointError: There are no such weights, or they are refused.
    """
    with open_weights(path) as reader:
        state = {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118
    for prefix in _WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {
        name: value.float() if value.is_floating_point() else value for name, value in state.items()
    }


def hash_sources(paths: Iterable[Path]) -> tuple[str, ...]:
    """Hash the weights that a network is made of, in order: `sha256:` and 64 digits each.

    Raises:
        CheckpointError: There are no such weights.
    """
    return tuple(hash_weights(path) for path in paths)


def fill(network: nn.Module, state: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load weights into a network, all of them and no others.

    Raises:
        CheckpointError: Names or shapes differ, of which the first of each kind is named, or
            weights are as `check_finite` refuses them.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    other = [n for n in wanted if n in state and wanted[n].shape != state[n].shape]
    if missing or extra or other:
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensors are missing, e.g. `{missing[0]}`")
        if extra:
            parts.append(f"{len(extra)} are not known, e.g. `{extra[0]}`")
        if other:
            shapes = f"{list(state[other[0]].shape)} instead of {list(wanted[other[0]].shape)}"
            parts.append(f"`{other[0]}` is {shapes}")
        raise CheckpointError(
            f"{source} holds no {type(network).__name__}: {'; '.join(parts)}.", fix=_PUBLISHED
        )
    check_finite(state, source=source)
    network.load_state_dict(state)


def check_finite(state: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Refuse weights that are NaN, infinite or complex.

    A network of these measures nothing, and does not say so: NaN is below every threshold.

    Raises:
        CheckpointError: Some are; the first tensor with such entries is named.
    """
    for name, tensor in state.items():
        if tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"`{name}` of {source} has entries that are no finite real numbers.",
                fix=_PUBLISHED,
            )


@contextmanager
def named_source(source: str) -> Iterator[None]:
    """Name the file whose tensors lack something that a network is built from.

    Raises:
        CheckpointError: In place of a KeyError.
    """
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{source} has no tensor {error}.", fix=_PUBLISHED) from error
