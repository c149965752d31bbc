"""Who makes videos when several tabs ask: one after the other, and each is told its place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from motionmerge.errors import ConfigError

MOST_WAITING = 16

_LOOKS = 0.2  # seconds between two looks at whether somebody gave up


class Stopped(Exception):
    """Somebody pressed Stop."""


@dataclass
class Turns:
    """A line in which whoever came first is served first."""

    _line: list[threading.Event] = field(default_factory=list)
    _moved: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def turn(self, *, tell: Callable[[int], None], stop: threading.Event) -> Iterator[None]:
        """Wait for one's turn, and have it until the block ends.

        Args:
            tell: Told how many are before, whenever that changes; not if nobody is.
            stop: Once it is set, the place in the line is given up.

        Raises:
            ConfigError: Too many are waiting.
            Stopped: `stop` was set.
        """
        with self._moved:
            if len(self._line) > MOST_WAITING:
                raise ConfigError(
                    f"{MOST_WAITING} others are waiting.", fix="Try again when some are done."
                )
            self._line.append(stop)
        try:
            self._wait(tell, stop)
            yield
        finally:
            with self._moved:
                self._line.remove(stop)
                self._moved.notify_all()

    def _wait(self, tell: Callable[[int], None], stop: threading.Event) -> None:
        told = 0
        with self._moved:
            while before := self._line.index(stop):
                if stop.is_set():
                    raise Stopped
                if before != told:
                    tell(before)
                told = before
                self._moved.wait(_LOOKS)
