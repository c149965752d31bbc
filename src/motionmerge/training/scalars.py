"""The numbers of a run as scalars of TensorBoard, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .settings import TrainingProgress

SCALARS = "tensorboard"
"""Folder of the scalars inside a run's."""


@contextmanager
def scalars_of(folder: Path) -> Iterator[RunScalars | None]:
    """Yield what writes the scalars of a run; None without TensorBoard.

    Args:
        folder: Of the run.
    """
    if find_spec("tensorboard") is None:
        yield None
        return
    scalars = RunScalars(folder / SCALARS)
    try:
        yield scalars
    finally:
        scalars.close()


class RunScalars:
    """Writes scalars; what an earlier sitting wrote of steps that are done again is hidden.

    Args:
        folder: Made with the first scalar.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def add_progress(self, progress: TrainingProgress) -> None:
        """Write a line of the log."""
        names = ("loss", "grad_norm", "learning_rate")
        self._add(progress.step, {f"train/{name}": getattr(progress, name) for name in names})

    def add_validation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Write what was measured after a step: its numbers, and the means over its videos."""
        found = {f"held_out/{band}": loss for band, loss in figures.get("held_out", {}).items()}
        found["videos/relative_motion"] = figures.get("relative_motion")
        for name in ("motion_degree", "first_frame_psnr"):
            known = [one[name] for one in figures.get("videos", ()) if one[name] is not None]
            found[f"videos/{name}"] = sum(known) / len(known) if known else None
        self._add(step, found)
        self._writer.flush()

    def close(self) -> None:
        """Write all that waits."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, step: int, scalars: Mapping[str, float | None]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(  # type: ignore[no-untyped-call]
                str(self._folder), purge_step=step
            )
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
