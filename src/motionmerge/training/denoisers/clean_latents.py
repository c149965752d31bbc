"""Clean latents of a clip, on the scale on which each family's denoiser works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from motionmerge.errors import ConfigError
from motionmerge.io.decoding import Picture
from motionmerge.training.latents_cache import frame_moments, pixels_of

_FOR_PICTURES = ("AutoencoderKL", "AutoencoderKLTemporalDecoder")
"""Autoencoders that take the frames of a clip one by one."""


def clip_moments(vae: Any, frames: Picture) -> torch.Tensor:
    """Encode a clip with its family's autoencoder.

    Args:
        vae: It is run in its own dtype, on its own device, without gradients.
        frames: `[frames, height, width, 3]`.

    Returns:
        Mean and logarithm of the variance, `[1, 2 * channels, frames, height, width]`, of latents.
    """
    if type(vae).__name__ in _FOR_PICTURES:
        return frame_moments(vae, frames).transpose(0, 1)[None]
    pixels = pixels_of(frames).transpose(0, 1)[None]
    with torch.no_grad():
        moments = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters
    return moments.cpu()


@dataclass(frozen=True)
class LatentScale:
    """The way from latents as an autoencoder gives them to those of the denoiser; it pickles.

        (latents - mean) * factor

    Args:
        mean, factor: One for all latents, or one for each channel.
    """

    mean: float | tuple[float, ...]
    factor: float | tuple[float, ...]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Scale `[batch, channels, frames, height, width]`."""
        return (latents - _along_channels(self.mean, latents)) * _along_channels(
            self.factor, latents
        )


def latent_scale(vae: Any) -> LatentScale:
    """Return how the latents of an autoencoder are scaled.

    Raises:
        ConfigError: The scale of this kind of autoencoder is unknown.
    """
    kind = type(vae).__name__
    if kind not in _SCALES:
        raise ConfigError(
            f"The scale of the latents of a `{kind}` is unknown.",
            fix=f"Train a model whose autoencoder is one of {', '.join(_SCALES)}.",
        )
    return _SCALES[kind](vae)


def _by_factor(vae: Any) -> LatentScale:
    return LatentScale(0.0, float(vae.config.scaling_factor))


def _by_factor_or_its_inverse(vae: Any) -> LatentScale:
    factor = vae.config.scaling_factor
    # CogVideoX 1.5 was trained on latents that were divided by mistake.
    return LatentScale(0.0, 1 / factor if vae.config.invert_scale_latents else factor)


def _by_channel(vae: Any) -> LatentScale:
    factors = tuple(1 / std for std in vae.config.latents_std)
    return LatentScale(tuple(vae.config.latents_mean), factors)


def _by_channel_and_factor(vae: Any) -> LatentScale:
    factors = vae.config.scaling_factor / vae.latents_std.float()
    return LatentScale(tuple(vae.latents_mean.tolist()), tuple(factors.tolist()))


def _along_channels(values: float | tuple[float, ...], latents: torch.Tensor) -> Any:
    if isinstance(values, float):
        return values
    return torch.tensor(values).to(latents)[:, None, None, None]


_SCALES: Mapping[str, Callable[[Any], LatentScale]] = {
    "AutoencoderKL": _by_factor,
    "AutoencoderKLTemporalDecoder": _by_factor,
    "AutoencoderKLHunyuanVideo": _by_factor,
    "AutoencoderKLHunyuanVideo15": _by_factor,
    "AutoencoderKLCogVideoX": _by_factor_or_its_inverse,
    "AutoencoderKLWan": _by_channel,
    "AutoencoderKLLTXVideo": _by_channel_and_factor,
}
