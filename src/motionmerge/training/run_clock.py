"""How long a run takes, and how fast it trains: validations are counted apart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class RunClock:
    """Runs from when a sitting begins to train.

    Args:
        step: After which the sitting begins.
        seconds: Wall time of the sittings before.
    """

    def __init__(self, *, step: int = 0, seconds: float = 0.0) -> None:
        self._first, self._before = step, seconds
        self._started = time.monotonic()
        self._validating, self._num_validations = 0.0, 0

    @property
    def seconds(self) -> float:
        """Wall time over all sittings."""
        return self._before + time.monotonic() - self._started

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Count what happens inside as a validation."""
        begun = time.monotonic()
        yield
        self._validating += time.monotonic() - begun
        self._num_validations += 1

    def step_seconds(self, step: int) -> float:
        """Compute how long a step took on average in this sitting, without validations.

        Args:
            step: The number of steps done, at least one of them in this sitting.
        """
        trained = time.monotonic() - self._started - self._validating
        return trained / (step - self._first)

    def seconds_left(self, step: int, steps: int, *, validates_every: int | None) -> float:
        """Estimate how long the rest takes, validations included once one was timed.

        Args:
            step: The number of steps done.
            steps: Of the whole run.
            validates_every: After so many steps, and at the end; None for never.
        """
        left = (steps - step) * self.step_seconds(step)
        if validates_every is None or not self._num_validations:
            return left
        done, in_all = (step - 1) // validates_every, -(-steps // validates_every)
        return left + (in_all - done) * self._validating / self._num_validations
