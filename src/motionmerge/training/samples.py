"""What a training sample is: a function of (seed, index), whatever came before it.

An epoch shows every clip once, in an order of its own; a clip has views (spans of frames). Caption
and image are dropped as DynamiCrafter does, from one number u in [0, 1) and the share p:

    caption dropped  if u < 2 p,    image dropped  if p <= u < 3 p      (p each alone, p both)

Models whose guidance never drops the image drop the caption alone: u >= 1 - q.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from motionmerge.errors import ConfigError
from motionmerge.rng import whole_number_for

from .config_file import ConfigSection
from .motion_balance import epoch_order
from .objectives.noised import NoiseProcess


class NoiseRange(ConfigSection):
    """Noise levels to train on, in the unit of recipes: `above` < level <= `below`."""

    above: Annotated[float, Field(ge=0, le=1)] = 0.0
    below: Annotated[float, Field(ge=0, le=1)] = 1.0


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


@dataclass(frozen=True, eq=False)
class ClipOrder:
    """In which order clips are shown.

    Args:
        num_clips: How many there are.
        weights: How often each is shown, see `epoch_order`; None for all alike.
    """

    num_clips: int
    weights: npt.NDArray[np.float64] | None = None


def draw_sample(
    seed: int,
    index: int,
    *,
    order: ClipOrder,
    num_views: int,
    num_condition_frames: int,
    drop: float,
    drop_caption: float = 0.0,
) -> SampleDraw:
    """Draw what the sample with this index shows.

    Args:
        seed: Of the run.
        index: Of the sample; as many as there are clips are an epoch.
        order: Of the clips.
        num_views, num_condition_frames: How many there are to choose from.
        drop, drop_caption: p and q of the formulas above.
    """
    epoch, place = divmod(index, order.num_clips)
    clips = _clips_of(order, seed, epoch)
    rng = np.random.default_rng(whole_number_for(seed, "sample", str(index)))
    u, time_share = rng.random(2)
    without_caption, without_image = dropped(torch.tensor([u]), share=drop)
    return SampleDraw(
        clip=int(clips[place]),
        view=int(rng.integers(num_views)),
        condition_frame=int(rng.integers(num_condition_frames)),
        without_caption=bool(without_caption) or bool(u >= 1 - drop_caption),
        without_image=bool(without_image),
        time_share=float(time_share),
    )


@lru_cache(maxsize=4)
def _clips_of(order: ClipOrder, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the clips of an epoch, which all of its samples share; it is not to be changed."""
    return epoch_order(order.num_clips, seed=seed, epoch=epoch, weights=order.weights)


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
