"""The latents that videos begin with.

Source: Analytic-Init, Zhao et al. 2024 (arXiv 2406.15735).
"""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.models.dynamicrafter.scheduler import DynamicRescaleDDIMScheduler
from motionmerge.sampling.pipelines.inputs import LatentStatistics


def start_latents(
    image_latents: torch.Tensor,
    latents: torch.Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
    *,
    num_channels: int,
    scheduler: SchedulerMixin,
) -> torch.Tensor:
    """Draw the noise that videos begin with, or check and scale latents that were given.

    Args:
        image_latents: `[videos, channels, frames, height, width]`, for their shape and device.
        latents: Latents of that shape with `num_channels` channels, instead of noise.
        generator: Draws the noise; a list has one for each video.
        num_channels: Channels of the latents.
        scheduler: Says how strong the first noise is.

    Raises:
        ConfigError: There are not as many generators as videos.
        ShapeError: `latents` have another shape.
    """
    batch, _, *video = image_latents.shape
    shape = (batch, num_channels, *video)
    if isinstance(generator, list) and len(generator) != batch:
        raise ConfigError(
            f"There are {len(generator)} generators for {batch} videos.",
            fix="Pass one generator, or one for each video.",
        )
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=image_latents.device)
    elif tuple(latents.shape) != shape:
        raise ShapeError(
            f"Latents have shape {list(latents.shape)}; expected {list(shape)}.",
            fix="Draw them for this number of videos, frames and pixels.",
        )
    scaled: torch.Tensor = latents.to(image_latents.device).float() * scheduler.init_noise_sigma
    return scaled


def at_start_step(
    noise: torch.Tensor,
    statistics: LatentStatistics,
    start_step: int | None,
    *,
    scheduler: SchedulerMixin,
) -> torch.Tensor:
    """Shift and scale noise to the mean and variance of noised data at the start step."""
    if not isinstance(scheduler, DynamicRescaleDDIMScheduler):
        raise ConfigError(
            f"{type(scheduler).__name__} has no Analytic-Init.",
            fix="Use DynamicRescaleDDIMScheduler, or leave analytic_init out.",
        )
    expectation = statistics.expectation.to(noise)
    sizes = zip(expectation.shape[::-1], noise.shape[::-1], strict=False)
    if expectation.ndim > noise.ndim or any(own not in (1, size) for own, size in sizes):
        raise ShapeError(
            f"The mean of the latents has shape {list(expectation.shape)}; expected "
            f"{[1, *noise.shape[1:]]}, as this video's.",
            fix="Use the statistics of videos of this size and length.",
        )
    last = scheduler.config.num_train_timesteps if start_step is None else start_step
    latents: torch.Tensor = scheduler.analytic_init(
        expectation, variance=statistics.variance, noise=noise, start_step=last
    )
    return latents
