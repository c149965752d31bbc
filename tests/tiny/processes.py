"""Two processes that know of each other, forked so that neither imports anything."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

from accelerate.state import AcceleratorState


def forked(rank: int, work: Callable[[], None], *, port: int) -> int:
    """Do something as one of two processes; returns the process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        work()
        status = 0
    finally:
        traceback.print_exc() if status else None
        os._exit(status)


def as_two(work: Callable[[], None]) -> None:
    """Do something in two processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [forked(rank, work, port=port) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
