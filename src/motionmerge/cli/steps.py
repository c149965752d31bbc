"""The denoising steps as they are made: a bar in a terminal, lines elsewhere, both on stderr."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import typer

_LINES = 10
"""A video of more steps than this prints about so many lines."""


class StepLines:
    """Stands in for a pipeline's progress bar where none can be redrawn, as in a log file.

    Args:
        steps: What the pipeline iterates over, if it does.
        total: How many steps there are, if it does not.
        label: The beginning of each line.
    """

    def __init__(
        self, steps: Sequence[Any] | None = None, total: int | None = None, *, label: str
    ) -> None:
        self._steps = () if steps is None else steps
        self._total = len(self._steps) if total is None else total
        self._label = label
        self._done = 0
        self._started = time.monotonic()

    def __enter__(self) -> StepLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the lines as they are."""

    def __iter__(self) -> Iterator[Any]:
        for step in self._steps:
            yield step
            self.update()

    def update(self, count: int = 1) -> None:
        """Count steps that were made; print a line where a tenth of all is complete."""
        before, self._done = self._done, self._done + count
        lines = min(_LINES, self._total)
        if self._done * lines // self._total > before * lines // self._total:
            left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
            typer.echo(
                f"{self._label}: step {self._done} of {self._total}, {left:.0f} s left", err=True
            )

    def close(self) -> None:
        """Do nothing: there is no bar to remove."""

    def set_description(self, *_: object) -> None:
        """Do nothing: the label stays."""


def show_steps(pipeline: Any, *, label: str) -> None:
    """Show the steps of a pipeline's next call.

    Args:
        pipeline: A pipeline of diffusers, or the pocket model's.
        label: What is made, e.g. `video 2 of 3`.
    """
    from diffusers.utils import logging

    from motionmerge.sampling.request.loading import parts_with_bars

    logging.enable_progress_bar()  # `loaded` may have switched the bars of loading off
    for part in parts_with_bars(pipeline):
        if sys.stderr.isatty():
            part.set_progress_bar_config(desc=label, disable=False)
        else:
            part.progress_bar = functools.partial(StepLines, label=label)
