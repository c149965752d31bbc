"""What a training sample is: a function of (seed, index), whatever came before it.

An epoch shows every clip once, in an order of its own; a clip has views (spans of frames). Caption
and image are dropped as DynamiCrafter does, from one number u in [0, 1) and the share p:

    caption dropped  if u < 2 p,    image dropped  if p <= u < 3 p      (p each alone, p both)
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from motionmerge.config import FrozenModel
from motionmerge.errors import ConfigError
from motionmerge.rng import whole_number_for

from .motion_balance import epoch_order
from .objectives.noised import NoiseProcess


class NoiseRange(FrozenModel):
    """Noise levels to train on, in the unit of recipes: `above` < level <= `below`."""

    above: float = 0.0
    below: float = 1.0


class SampleDraw(NamedTuple):
    """Which view a sample shows, and everything about it that is drawn but its noise.

    Args:
        clip, view: What to read.
        condition_frame: Number among the frames that may be the condition.
        without_caption, without_image: Whether they are dropped.
        time_share: Where in the distribution of times, in [0, 1).
    """

    clip: int
    view: int
    condition_frame: int
    without_caption: bool
    without_image: bool
    time_share: float


def draw_sample(
    seed: int, index: int, *, num_clips: int, num_views: int, num_condition_frames: int, drop: float
) -> SampleDraw:
    """Draw what the sample with this index shows.

    Args:
        seed: Of the run.
        index: Of the sample; the first `num_clips` are the first epoch.
        num_clips, num_views, num_condition_frames: How many there are to choose from.
        drop: p of the formula above.
    """
    epoch, place = divmod(index, num_clips)
    order = _order(num_clips, seed, epoch)
    rng = np.random.default_rng(whole_number_for(seed, "sample", str(index)))
    u, time_share = rng.random(2)
    without_caption, without_image = dropped(torch.tensor([u]), share=drop)
    return SampleDraw(
        clip=int(order[place]),
        view=int(rng.integers(num_views)),
        condition_frame=int(rng.integers(num_condition_frames)),
        without_caption=bool(without_caption),
        without_image=bool(without_image),
        time_share=float(time_share),
    )


@lru_cache(maxsize=2)
def _order(num_clips: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return an epoch's order, which all of its samples share; it is not to be changed."""
    return epoch_order(num_clips, seed=seed, epoch=epoch)


def dropped(u: torch.Tensor, *, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether caption and image are dropped, by the rule above: `[batch]` each."""
    return u < 2 * share, (u >= share) & (u < 3 * share)


def shares_within(
    shares: torch.Tensor, process: NoiseProcess, noise_range: NoiseRange
) -> torch.Tensor:
    """Squeeze shares in [0, 1) into those of the noise levels to train on.

    Raises:
        ConfigError: No sample has a noise level in that range.
    """
    lowest = process.share_up_to(noise_range.above) if noise_range.above > 0 else 0.0
    highest = process.share_up_to(noise_range.below) if noise_range.below < 1 else 1.0
    if highest <= lowest:
        raise ConfigError(
            f"No noise level of this model is above {noise_range.above} and at most "
            f"{noise_range.below}.",
            fix="Widen `noise_range`: levels go from 0 (clean) to 1 (noise).",
        )
    return lowest + (highest - lowest) * shares
