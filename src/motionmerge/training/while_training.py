"""What holds while a run goes on and no longer: frozen parameters, checkpointing, a signal."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed import DistError

from motionmerge.errors import ConfigError, DataError

_LOCK = ".lock"
"""The file in its folder that a run locks. It stays when the run ends: a run was there."""


@contextmanager
def frozen_but(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Compute no gradients of what is not trained."""
    kept = set(map(id, parameters))
    before = [(value, value.requires_grad) for value in module.parameters()]
    for value, _ in before:
        value.requires_grad_(id(value) in kept)
    try:
        yield
    finally:
        for value, flag in before:
            value.requires_grad_(flag)


@contextmanager
def checkpointing(module: nn.Module) -> Iterator[None]:
    """Keep only the inputs of blocks; what is inside is computed again for the gradients.

    Raises:
        ConfigError: No part of the module can do so.
    """
    networks: list[Any] = [
        part
        for part in module.modules()
        if getattr(part, "_supports_gradient_checkpointing", False)
    ]
    if not networks:
        raise ConfigError(
            "This model has no gradient checkpointing.",
            fix="Leave `gradient_checkpointing` out.",
        )
    for part in networks:
        part.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for part in networks:
            part.disable_gradient_checkpointing()


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Replace the errors that a process meets when another one ends by one that says so.

    Raises:
        DataError: Another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, DistError) or "gloo" in str(error)):  # gloo has no class
            raise
        raise DataError(
            "Another process of this run ended, and this one cannot go on alone.",
            fix="Look at its last lines. The same command then goes on from the newest state.",
        ) from error


class StopRequest:
    """Whether a process was asked to end, and by which signal.

    Attributes:
        number: Of the signal that asked; None as long as none did.
    """

    number: int | None = None

    def __call__(self, number: int, _: object) -> None:
        """Handle a signal; a second Ctrl-C ends the process as ever."""
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nsaving after this step; Ctrl-C again ends at once, without saving\n")


@contextmanager
def told_to_stop() -> Iterator[StopRequest]:
    """Yield what SIGTERM and Ctrl-C set, instead of ending the process at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python takes signals in its main thread alone
        return
    before = {one: signal.signal(one, request) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; a run that is killed lets go of it.

    Raises:
        ConfigError: Another run is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"Another run is training in {folder}.",
                fix="Wait for its end, or choose another folder.",
            ) from error
        yield


def check_free(folder: Path, results: Iterable[str], *, run: Path | None = None) -> None:
    """Refuse a folder in which a run would replace what no run wrote.

    Args:
        folder: Of the results.
        results: Their names.
        run: Where the run trains; by default in `folder`.

    Raises:
        ConfigError: Something has the name of a result, and there was no run yet.
    """
    if ((run or folder) / _LOCK).exists():
        return
    taken = [name for name in results if os.path.lexists(folder / name)]
    if taken:
        raise ConfigError(
            f"{folder / taken[0]} is there, no run wrote it, and this one would replace it.",
            fix="Set `output` to another folder.",
        )
