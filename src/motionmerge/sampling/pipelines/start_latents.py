"""The latents that videos begin with: noise, mixed with what is known of the video.

Analytic-Init: Zhao et al. 2024 (arXiv 2406.15735). FrameInit: Ren et al. 2024 (arXiv 2402.04324),
with the filters of FreeInit, Wu et al. 2023 (arXiv 2312.07537).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from motionmerge.errors import ConfigError, ShapeError
from motionmerge.io.weights import open_weights
from motionmerge.models.dynamicrafter.scheduler import analytic_latents

FILTERS = ("gaussian", "butterworth", "ideal", "box")


class StartLatents(Protocol):
    """Turn noise into the latents that denoising begins with: A guess + B noise."""

    def __call__(
        self,
        noise: torch.Tensor,
        *,
        still: torch.Tensor | None,
        scheduler: SchedulerMixin,
        start_step: int | None,
    ) -> torch.Tensor:
        """Mix noise with a guess of the video.

        Args:
            noise: As the model draws it, `[videos, channels, frames, height, width]`.
            still: Clean latents of the photo shown in every frame, of the same shape; None for
                models whose image latents are others than their video's.
            scheduler: Tells how noisy each timestep is.
            start_step: M; denoising begins below it. None for the noisiest timestep.
        """


@dataclass(frozen=True, kw_only=True)
class FrameInit:
    """Start from noise with the low frequencies of the noised photo: steadier, closer to the photo.

        noised = sqrt(a) still + sqrt(1 - a) noise,   a = abar[timestep]
        start  = ifft(L fft(noised) + (1 - L) fft(noise))    over frames, height and width
        L      = exp(-d^2 / (2 d_s^2)),   d^2 = (d_s / d_t f_t)^2 + f_h^2 + f_w^2     (gaussian)

    with f from -1 to 1 on each axis.

    Args:
        timestep: How noisy the photo is made; denoising begins where it would without.
        method: "gaussian", or FreeInit's "butterworth", "ideal" and "box".
        order: Of the Butterworth filter.
        spatial_stop_frequency, temporal_stop_frequency: d_s and d_t, 0 to 1.

    Raises:
        ConfigError: A setting is out of range.
    """

    timestep: int = 850
    method: Literal["gaussian", "butterworth", "ideal", "box"] = "gaussian"
    order: int = 4
    spatial_stop_frequency: float = 0.25
    temporal_stop_frequency: float = 0.25

    def __post_init__(self) -> None:
        stops = (self.spatial_stop_frequency, self.temporal_stop_frequency)
        rules = (
            ("timestep", self.timestep, self.timestep >= 0, "0 or more"),
            ("method", self.method, self.method in FILTERS, ", ".join(FILTERS)),
            ("order", self.order, self.order >= 1, "1 or more"),
            ("stop frequencies", stops, all(0 < stop <= 1 for stop in stops), "above 0, up to 1"),
        )
        for name, value, is_fine, expected in rules:
            if not is_fine:
                raise ConfigError(f"FrameInit's {name} is {value!r}.", fix=f"Use {expected}.")

    def __call__(
        self,
        noise: torch.Tensor,
        *,
        still: torch.Tensor | None,
        scheduler: SchedulerMixin,
        start_step: int | None = None,
    ) -> torch.Tensor:
        """Mix noise with the noised photo; see `StartLatents`.

        Raises:
            ConfigError: The model has no latents of a still video, or the scheduler no such
                timestep.
            ShapeError: They have another shape than the noise.
        """
        if still is None:
            raise ConfigError(
                "FrameInit needs the photo as latents of a video, which this model does not have.",
                fix="Leave `start` out, or use AnalyticInit.",
            )
        if still.shape != noise.shape:
            raise ShapeError(
                f"The still video has latents of shape {list(still.shape)}, the noise "
                f"{list(noise.shape)}.",
                fix="Pass the latents of the photo, repeated for every frame.",
            )
        signal = _signal(scheduler, self.timestep, what="FrameInit")
        noised = math.sqrt(signal) * still.to(noise) + math.sqrt(1 - signal) * noise
        return mix_frequencies(noised, noise, self.low_pass(noise.shape[-3:]))

    def low_pass(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return L for `[frames, height, width]`, with frequency 0 where `fftshift` puts it."""
        frames, height, width = shape
        stop, ratio = (
            self.spatial_stop_frequency,
            self.spatial_stop_frequency / self.temporal_stop_frequency,
        )
        if self.method == "box":
            time = round(frames // 2 * self.temporal_stop_frequency)
            space = round(height // 2 * stop)
            inside = [
                (torch.arange(size) - size // 2 >= -half) & (torch.arange(size) - size // 2 < half)
                for size, half in ((frames, time), (height, space), (width, space))
            ]
            return (inside[0][:, None, None] & inside[1][:, None] & inside[2]).float()
        t, h, w = (2 * torch.arange(n, dtype=torch.float64) / n - 1 for n in shape)
        squared = (ratio * t[:, None, None]).square() + h[:, None].square() + w.square()
        if self.method == "butterworth":
            return (1 / (1 + (squared / stop**2) ** self.order)).float()
        if self.method == "ideal":  # FreeInit compares a square with a frequency
            return (squared <= 2 * stop).float()
        return torch.exp(-squared / (2 * stop**2)).float()


def mix_frequencies(low: torch.Tensor, high: torch.Tensor, low_pass: torch.Tensor) -> torch.Tensor:
    """Combine the low frequencies of one video with the high frequencies of another.

    Args:
        low, high: `[..., frames, height, width]`.
        low_pass: The share of `low` at each frequency, `[frames, height, width]`, 0 in the middle.
    """
    axes = (-3, -2, -1)
    share = torch.fft.ifftshift(low_pass.to(low.device), dim=axes)
    mixed = share * torch.fft.fftn(low, dim=axes) + (1 - share) * torch.fft.fftn(high, dim=axes)
    real: torch.Tensor = torch.fft.ifftn(mixed, dim=axes).real
    return real


@dataclass(frozen=True)
class AnalyticInit:
    """Start from noise with the mean and variance of noised data: less of the photo in late starts.

        start = sqrt(a) s E[x0] + sqrt(1 - a + a s^2 TrCov) noise,   a = abar[M - 1],   s = 1

    Args:
        expectation: E[x0], mean of the clean latents of many videos,
            `[1, channels, frames, height, width]`.
        variance: TrCov, trace of their covariance divided by its dimension.
        is_rescaled: Use s = scale[M - 1], by which a model with dynamic rescale noises data; the
            paper's formula leaves it out.
    """

    expectation: torch.Tensor
    variance: float
    is_rescaled: bool = False

    def __call__(
        self,
        noise: torch.Tensor,
        *,
        still: torch.Tensor | None = None,
        scheduler: SchedulerMixin,
        start_step: int | None = None,
    ) -> torch.Tensor:
        """Shift and scale noise; see `StartLatents`.

        Raises:
            ConfigError: The scheduler does not begin with noise of variance 1.
            ShapeError: The statistics are of videos of another size.
        """
        expectation = self.expectation.to(noise)
        sizes = zip(expectation.shape[::-1], noise.shape[::-1], strict=False)
        if expectation.ndim > noise.ndim or any(own not in (1, size) for own, size in sizes):
            raise ShapeError(
                f"The mean of the latents has shape {list(expectation.shape)}; expected "
                f"{[1, *noise.shape[1:]]}, as this video's.",
                fix="Use the statistics of videos of this size and length.",
            )
        last = scheduler.config.num_train_timesteps if start_step is None else start_step
        signal = _signal(scheduler, last - 1, what="Analytic-Init")
        factors = getattr(scheduler, "rescale_factors", None) if self.is_rescaled else None
        scale = 1.0 if factors is None else float(factors[last - 1])
        return analytic_latents(
            scale * expectation, variance=scale**2 * self.variance, noise=noise, signal=signal
        )


def read_statistics(path: str | Path) -> AnalyticInit:
    """Read the file of the official `--analytic_init_path`, as `.pt` or safetensors.

    It holds two tensors, `Expectation_X0` and the scalar `Tr_Cov_d`.

    Raises:
        CheckpointError: It is missing or damaged, or lacks one of them.
        ShapeError: They are no mean and variance.

    Source: Zhao et al. 2024 (arXiv 2406.15735), `scripts/evaluation/inference.py`.
    """
    with open_weights(path) as file:
        expectation, variance = (file.read(name) for name in ("Expectation_X0", "Tr_Cov_d"))
    is_finite = bool(expectation.isfinite().all() and variance.isfinite().all())
    if not expectation.is_floating_point() or variance.numel() != 1 or not is_finite:
        raise ShapeError(
            f"{path} holds a mean of dtype {expectation.dtype} and a variance of shape "
            f"{list(variance.shape)}; expected finite floats, and one variance.",
            fix="Use a file of latent statistics as the authors of Analytic-Init offer them.",
        )
    if variance.item() < 0:
        raise ShapeError(
            f"{path} holds the variance {variance.item():g}; expected 0 or more.",
            fix="Use the trace of a covariance divided by its dimension.",
        )
    return AnalyticInit(expectation.float(), float(variance))


def _signal(scheduler: SchedulerMixin, timestep: int, *, what: str) -> float:
    """Return abar of a timestep.

    Raises:
        ConfigError: The scheduler has none, or scales its latents otherwise.
    """
    rates = getattr(scheduler, "alphas_cumprod", None)
    if rates is None or scheduler.init_noise_sigma != 1:
        raise ConfigError(
            f"{type(scheduler).__name__} has no {what}: it begins with no noise of variance 1.",
            fix="Use a DDIM scheduler, or leave `start` and `analytic_init` out.",
        )
    if not 0 <= timestep < len(rates):
        raise ConfigError(
            f"{what} asks for timestep {timestep}; the model has {len(rates)}.",
            fix=f"Use a timestep from 0 to {len(rates) - 1}.",
        )
    return float(rates[timestep])


def check_start(latents: torch.Tensor | None, start: StartLatents | None) -> None:
    """Refuse latents together with a way to make them, and what is no such way.

    Raises:
        ConfigError: Both were given, or `start` cannot be called.
    """
    if start is not None and not callable(start):
        raise ConfigError(
            f"`start` is {start!r}, which makes no latents.",
            fix="Pass FrameInit(), AnalyticInit(...) or a function like them.",
        )
    if latents is not None and start is not None:
        raise ConfigError("Both latents and start were given.", fix="Pass one of them.")


def correlated_noise(
    shape: tuple[int, ...],
    *,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    correlation: float,
) -> torch.Tensor:
    """Draw noise that the frames of a video partly share.

        noise = sqrt(c^2 / (1 + c^2)) shared + sqrt(1 / (1 + c^2)) own

    The shared frame is drawn first; with a correlation of 0 there is none.

    Args:
        shape: `[videos, channels, frames, height, width]`.
        generator: Draws it; a list has one for each video.
        device: Where it is put.
        correlation: c.

    Source: PYoCo, Ge et al. 2023 (arXiv 2305.10474), "mixed noise".
    """
    if correlation == 0:
        drawn: torch.Tensor = randn_tensor(shape, generator=generator, device=device)
        return drawn
    one_frame = (*shape[:2], 1, *shape[3:])
    shared = randn_tensor(one_frame, generator=generator, device=device)
    own = randn_tensor(shape, generator=generator, device=device)
    of_shared = correlation**2 / (1 + correlation**2)
    mixed: torch.Tensor = math.sqrt(of_shared) * shared + math.sqrt(1 - of_shared) * own
    return mixed


def start_latents(
    still: torch.Tensor,
    latents: torch.Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
    *,
    num_channels: int,
    scheduler: SchedulerMixin,
    start: StartLatents | None,
    start_step: int | None,
    correlation: float = 0.0,
) -> torch.Tensor:
    """Draw the noise that videos begin with and mix it, or check and scale latents that were given.

    Args:
        still: Latents of the still video, `[videos, channels, frames, height, width]`.
        latents: Latents of that shape with `num_channels` channels, instead of noise.
        generator: Draws the noise; a list has one for each video.
        num_channels: Channels of the latents.
        scheduler: Says how strong the first noise is.
        start: What the noise is mixed with; latents that were given are not.
        start_step: As of a call.
        correlation: How much of the noise the frames share; see `correlated_noise`.

    Raises:
        ConfigError: There are not as many generators as videos, or as `start`.
        ShapeError: `latents` have another shape.
    """
    batch, own_channels, *video = still.shape
    shape = (batch, num_channels, *video)
    if isinstance(generator, list) and len(generator) != batch:
        raise ConfigError(
            f"There are {len(generator)} generators for {batch} videos.",
            fix="Pass one generator, or one for each video.",
        )
    if latents is not None and tuple(latents.shape) != shape:
        raise ShapeError(
            f"Latents have shape {list(latents.shape)}; expected {list(shape)}.",
            fix="Draw them for this number of videos, frames and pixels.",
        )
    if latents is None:
        latents = correlated_noise(
            shape, generator=generator, device=still.device, correlation=correlation
        )
        if start is not None:
            known = still if own_channels == num_channels else None
            latents = start(latents, still=known, scheduler=scheduler, start_step=start_step)
    scaled: torch.Tensor = latents.to(still.device).float() * scheduler.init_noise_sigma
    return scaled
