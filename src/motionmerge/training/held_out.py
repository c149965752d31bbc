"""The loss on clips that are not trained on, at fixed noise: comparable from step to step.

A training loss says little: it is as noisy as the timesteps that were drawn. Here the clips, the
noise and the noise levels are the same each time, and bands of noise are told apart: motion is
decided where it is noisy, detail where it is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from motionmerge.errors import ConfigError

from .clip_batches import ClipBatch, ClipDrawing
from .clip_objective import ClipObjective
from .samples import NoiseRange, shares_within

BANDS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
"""Of noise levels, in the unit of recipes."""


class HeldOutLoss:
    """Computes the mean loss in each band.

    Args:
        objective: Draws from the clips that are held out.
        num_samples: The first so many of them are used.
    """

    def __init__(self, objective: ClipObjective, num_samples: int) -> None:
        self._objective, self._num_samples = objective, num_samples
        self._batches: tuple[ClipBatch, ...] | None = None

    @torch.no_grad()
    def __call__(self, module: nn.Module, step: int) -> dict[str, Any]:
        """Return the losses by band, such as `0.25-0.5`; bands without noise levels are left out.

        Args:
            module: The denoiser.
            step: Of the run; it changes nothing.
        """
        objective = self._objective
        objective.to(next(module.parameters()).device)
        found = {}
        for least, most in BANDS:
            try:
                prepared = objective.prepare(self._in_band(NoiseRange(above=least, below=most)))
            except ConfigError:  # this model has no such levels
                continue
            found[f"{least:g}-{most:g}"] = float(objective.loss(module, *prepared))
        return {"held_out": found}

    def _in_band(self, band: NoiseRange) -> tuple[ClipBatch, ...]:
        draw = self._objective.draw
        assert isinstance(draw, ClipDrawing)
        if self._batches is None:
            self._batches = self._objective.batches(draw(range(self._num_samples)))
        middle = draw.process.times_at(shares_within(torch.tensor([0.5]), draw.process, band))
        return tuple(
            batch._replace(times=middle.to(batch.times).expand(len(batch.times)))
            for batch in self._batches
        )
