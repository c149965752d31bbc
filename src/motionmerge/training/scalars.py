"""The numbers of a run as scalars: TensorBoard's where it is installed, wandb's where asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from motionmerge.packages import missing_package

from .settings import TrainingProgress

SCALARS = "tensorboard"
"""Folder of the scalars inside a run's."""


@contextmanager
def scalars_of(folder: Path, *, wandb_project: str | None = None) -> Iterator[RunScalars | None]:
    """Yield what writes the scalars of a run; None where nothing would read them.

    Args:
        folder: Of the run.
        wandb_project: A project of Weights & Biases, which then receives them as well.

    Raises:
        ConfigError: wandb is asked for and not installed.
    """
    if wandb_project is not None and find_spec("wandb") is None:
        error = ModuleNotFoundError(name="wandb")
        raise missing_package(error) or error
    has_board = find_spec("tensorboard") is not None
    if not has_board and wandb_project is None:
        yield None
        return
    scalars = RunScalars(folder, has_board=has_board, wandb_project=wandb_project)
    try:
        yield scalars
    finally:
        scalars.close()


class RunScalars:
    """Writes scalars; what an earlier sitting wrote of steps that are done again is hidden.

    Args:
        folder: Of the run; nothing is made before the first scalar.
        has_board: Whether TensorBoard is written.
        wandb_project: See `scalars_of`.
    """

    def __init__(self, folder: Path, *, has_board: bool, wandb_project: str | None) -> None:
        self._folder, self._has_board, self._project = folder, has_board, wandb_project
        self._board: Any = None
        self._wandb: Any = None

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
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Write all that waits."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _add(self, step: int, scalars: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in scalars.items() if value is not None}
        if self._has_board:
            if self._board is None:
                self._board = self._open_board(step)
            for name, value in known.items():
                self._board.add_scalar(name, value, step)
        if self._project is not None:
            if self._wandb is None:
                self._wandb = self._open_wandb(self._project)
            self._wandb.log({**known, "step": step})

    def _open_board(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(  # type: ignore[no-untyped-call]
            str(self._folder / SCALARS), purge_step=step
        )

    def _open_wandb(self, project: str) -> Any:
        """Begin a run of wandb, or go on with that of the same folder."""
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=project,
            name=self._folder.name,
            id=hashlib.sha256(str(self._folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=self._folder,
        )
        run.define_metric("*", step_metric="step")
        return run
