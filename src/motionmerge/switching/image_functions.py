"""What a schedule's image knobs compute on the latents of the condition image.

Sources: ALG, arXiv 2506.08456; ComfyUI-PainterI2V; CIL, arXiv 2406.15735.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from motionmerge.errors import ShapeError
from motionmerge.knobs import (
    Blur,
    Fade,
    ImageFilter,
    ImageKnob,
    LowPass,
    MotionAmplitude,
    NoisyImage,
)
from motionmerge.rng import generator_for
from motionmerge.switching.denoising_steps import Moment

_CLAMP = 6.0
"""Largest latent that Painter's node lets through, in the units of the VAE."""


def low_pass(image: torch.Tensor, keep: float) -> torch.Tensor:
    """Scale an image down to a share of its sides and up again, bilinearly with antialiasing.

    Args:
        image: `[..., height, width]`.
        keep: The share, in [0, 1]; 1 returns the image as it is.
    """
    if keep >= 1:
        return image
    height, width = image.shape[-2:]
    small = (max(1, round(height * keep)), max(1, round(width * keep)))
    pixels = image.reshape(-1, 1, height, width)
    for size in (small, (height, width)):
        pixels = F.interpolate(
            pixels, size=size, mode="bilinear", align_corners=False, antialias=True
        )
    return pixels.reshape(image.shape)


def blur(image: torch.Tensor, sigma: float, kernel: float) -> torch.Tensor:
    """Blur an image with a Gaussian; edges are reflected.

    Args:
        image: `[..., height, width]`.
        sigma: In pixels; 0 returns the image as it is.
        kernel: The width in pixels, or below 1 as a share of the height: at least 1, odd.

    Raises:
        ShapeError: The kernel is too wide to be reflected at the edges.
    """
    height, width = image.shape[-2:]
    taps = max(int(kernel * height if kernel < 1 else kernel), 1)
    taps += 1 - taps % 2
    if sigma <= 0 or taps == 1:
        return image
    place = torch.arange(taps, dtype=torch.float32, device=image.device) - (taps - 1) / 2
    weights = torch.exp(-0.5 * (place / sigma) ** 2)
    weights = (weights / weights.sum()).to(image.dtype)
    rim = taps // 2
    if rim >= min(height, width):
        raise ShapeError(
            f"The kernel of blur() has {taps} pixels, and the latents are {height} x {width}.",
            fix=f"Use a kernel of at most {2 * min(height, width) - 1} pixels.",
        )
    pixels = F.pad(image.reshape(-1, 1, height, width), [rim] * 4, mode="reflect")
    pixels = F.conv2d(pixels, weights.reshape(1, 1, taps, 1))
    return F.conv2d(pixels, weights.reshape(1, 1, 1, taps)).reshape(image.shape)


def motion_amplitude(latents: torch.Tensor, amplitude: float) -> torch.Tensor:
    """Push the frames after the first away from it, without moving their mean.

        D = Z[f] - Z[0],   m = mean of D over channels, height, width
        Z'[f] = clamp(Z[0] + a (D - m) + m, -6, 6)    for f >= 1

    Args:
        latents: Z, of a photo and then grey frames, `[batch, channels, frames, height, width]`,
            in the units of the VAE.
        amplitude: a, at least 1; 1 returns the latents as they are.
    """
    if amplitude == 1:
        return latents
    first, rest = latents[:, :, :1], latents[:, :, 1:]
    change = rest - first
    mean = change.mean(dim=(1, 3, 4), keepdim=True)
    moved = (first + amplitude * (change - mean) + mean).clamp(-_CLAMP, _CLAMP)
    return torch.cat([first, moved], dim=2)


def time_noise_center(shares: torch.Tensor, power: float) -> torch.Tensor:
    """Compute 2 s^power - 1, the center of the logarithmic odds of CIL's noise at time s."""
    return 2 * shares**power - 1


def time_noise(
    image: torch.Tensor, *, strength: float, power: float, level: float, seed: int
) -> torch.Tensor:
    """Add noise to an image, as strong as the mean of what CIL adds in training.

    Args:
        image: `[batch, ...]`; all of a batch get the same noise, so that passes agree, but those
            of zeros: SVD's unconditional pass has no image.
        strength, power: See `knobs.NoisyImage`.
        level: s, 0 clean .. 1 noise.
        seed: Of the noise, which is drawn anew for each level.
    """
    if strength == 0:
        return image
    beta = strength * time_noise_center(torch.tensor(level, dtype=torch.float64), power).sigmoid()
    generator = generator_for(seed, "time_noise", f"{level:.9f}")
    noise = torch.randn(image.shape[1:], generator=generator)
    has_image = image.flatten(1).any(dim=1).reshape(-1, *[1] * (image.ndim - 1))
    return image + float(beta) * noise.to(image) * has_image


def noisy(image: torch.Tensor, knobs: Sequence[ImageKnob], *, level: float) -> torch.Tensor:
    """Add the noise that is among an entry's knobs."""
    for knob in knobs:
        if isinstance(knob, NoisyImage):
            strength, power, seed = knob.strength, knob.power, knob.seed
            image = time_noise(image, strength=strength, power=power, level=level, seed=seed)
    return image


def filtered(image: torch.Tensor, knobs: Sequence[ImageKnob], *, x: float) -> torch.Tensor:
    """Apply the filters among an entry's knobs, from left to right.

    Args:
        image: `[..., height, width]`.
        knobs: All knobs of the image; the others are left out.
        x: Share of the steps done: 0 at the first step, 1 at the last.
    """
    for knob in knobs:
        strength = _strength(knob.strength, x) if isinstance(knob, ImageFilter) else 0.0
        if isinstance(knob, LowPass):
            image = low_pass(image, 1 - (1 - knob.keep) * strength)
        elif isinstance(knob, Blur):
            image = blur(image, knob.sigma * strength, knob.kernel)
    return image


def filters_anything(knobs: Sequence[ImageKnob], *, x: float) -> bool:
    """Check whether filters do anything at a step."""
    return any(
        _strength(knob.strength, x) > 0 and not _is_identity(knob)
        for knob in knobs
        if isinstance(knob, ImageFilter)
    )


def shown_images(
    image: torch.Tensor, moment: Moment | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the image of all passes, and that of the conditional one if it has its own.

    Args:
        image: `[videos, channels, frames, height, width]`.
        moment: What is in force.
    """
    if moment is None or not moment.entry.image:
        return image, None
    knobs = moment.entry.image
    image = noisy(image, knobs, level=moment.level)
    if not filters_anything(knobs, x=moment.x):
        return image, None
    return image, filtered(image, knobs, x=moment.x)


def amplitude_of(knobs: Sequence[ImageKnob]) -> float:
    """Return the product of the motion amplitudes among an entry's knobs."""
    return math.prod(knob.amplitude for knob in knobs if isinstance(knob, MotionAmplitude))


def _is_identity(knob: ImageFilter) -> bool:
    is_whole = isinstance(knob, LowPass) and knob.keep == 1
    return is_whole or (isinstance(knob, Blur) and knob.sigma == 0)


def _strength(fade: Fade | None, x: float) -> float:
    return 1.0 if fade is None else fade.at(x)
