"""The denoising steps as they are made: a bar in a terminal, lines elsewhere, both on stderr."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import typer

from motionmerge.sampling.videos.watched_steps import WatchedSteps

_LINES = 10
"""A video of more steps than this prints about so many lines."""


class StepLines(WatchedSteps):
    """Stands in for a pipeline's progress bar where none can be redrawn, as in a log file.

    Args:
        steps: What the pipeline iterates over, if it does.
        total: How many steps there are, if it does not.
        label: The beginning of each line.
    """

    def __init__(
        self, steps: Sequence[Any] | None = None, total: int | None = None, *, label: str
    ) -> None:
        super().__init__(steps, total, watcher=self._print)
        self._label = label
        self._before, self._started = 0, time.monotonic()

    def _print(self, done: int, total: int) -> None:
        """Print a line where a tenth of all is complete."""
        before, self._before = self._before, done
        lines = min(_LINES, total)
        if done * lines // total > before * lines // total:
            left = (time.monotonic() - self._started) / done * (total - done)
            typer.echo(f"{self._label}: step {done} of {total}, {left:.0f} s left", err=True)


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
