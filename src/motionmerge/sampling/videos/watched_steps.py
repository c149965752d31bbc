"""Watch the denoising steps of any pipeline, in place of its progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Watcher = Callable[[int, int], None]
"""Told how many steps were made, and of how many; what it raises ends the video."""


class WatchedSteps:
    """Stands in for a pipeline's progress bar.

    Args:
        steps: What the pipeline iterates over, if it does.
        total: How many steps there are, if it does not.
        watcher: Told after each step.
    """

    def __init__(
        self,
        steps: Sequence[Any] | None = None,
        total: int | None = None,
        *,
        watcher: Watcher,
    ) -> None:
        self._steps = () if steps is None else steps
        self._total = len(self._steps) if total is None else total
        self._watcher = watcher
        self._done = 0

    def __enter__(self) -> WatchedSteps:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave things as they are."""

    def __iter__(self) -> Iterator[Any]:
        for step in self._steps:
            yield step
            self.update()

    def update(self, count: int = 1) -> None:
        """Count steps that were made."""
        self._done += count
        self._watcher(self._done, self._total)

    def close(self) -> None:
        """Do nothing: there is no bar to remove."""

    def set_description(self, *_: object) -> None:
        """Do nothing: there is no label."""
