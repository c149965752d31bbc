"""Optical-flow pictures: direction as hue, length as saturation, one scale for everything compared.

Color wheel: Baker et al. 2011, "A Database and Evaluation Methodology for Optical Flow".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from motionmerge.evaluation.pocket.motion import FloatArray, dense_flow, to_gray

Picture = npt.NDArray[np.uint8]

_SEGMENTS = (  # number of hues, and how red, green and blue change over them
    (15, (0, +1, 0)),  # red to yellow
    (6, (-1, 0, 0)),  # to green
    (4, (0, 0, +1)),  # to cyan
    (11, (0, -1, 0)),  # to blue
    (13, (+1, 0, 0)),  # to magenta
    (6, (0, 0, -1)),  # to red
)


def video_flow(video: torch.Tensor, *, pairs: Sequence[tuple[int, int]]) -> FloatArray:
    """Optical flow between pairs of frames.

    Args:
        video: `[frames, 3, height, width]` in [0, 1].
        pairs: Indices of frames.

    Returns:
        `[pairs, height, width, 2]` as (x, y) in pixels.
    """
    grays = to_gray(video.float().permute(0, 2, 3, 1).numpy())
    return np.stack([dense_flow(grays[first], grays[second]) for first, second in pairs])


def shared_scale(flows: Iterable[FloatArray]) -> float:
    """One length for full saturation: the 99th percentile of all lengths in pixels, at least 1."""
    lengths = np.concatenate([np.linalg.norm(flow, axis=-1).ravel()[::7] for flow in flows])
    return max(float(np.quantile(lengths, 0.99)), 1.0)


def flow_picture(flow: FloatArray, *, scale: float) -> Picture:
    """Color a flow field.

    Args:
        flow: `[height, width, 2]` as (x, y) in pixels.
        scale: Length in pixels that gets full color; longer ones get darker. No motion is white.

    Returns:
        `[height, width, 3]`.
    """
    wheel = _wheel()
    u, v = flow[..., 0] / (scale + 1e-5), flow[..., 1] / (scale + 1e-5)
    length = np.hypot(u, v)[..., None]
    place = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = np.floor(place).astype(int)
    high = (low + 1) % len(wheel)
    color = wheel[low] + (place - low)[..., None] * (wheel[high] - wheel[low])
    color = np.where(length <= 1, 1 - length * (1 - color), 0.75 * color)
    return np.floor(255 * color).astype(np.uint8)


def flow_legend(size: int = 96) -> Picture:
    """A disc that shows which color means which direction; its rim is the scale's length."""
    axis = np.linspace(-1.05, 1.05, size)
    x, y = np.meshgrid(axis, axis)
    picture = flow_picture(np.stack([x, y], -1).astype(np.float32), scale=1.0)
    picture[np.hypot(x, y) > 1] = 255
    return picture


def _wheel() -> npt.NDArray[np.float64]:
    """The 55 colors `[55, 3]` in [0, 1]."""
    color, colors = np.array([255.0, 0.0, 0.0]), []
    for number, change in _SEGMENTS:
        for step in range(number):
            part = np.floor(255 * step / number) * np.array(change)
            colors.append(color + part)
        color = color + 255 * np.array(change)
    return np.array(colors) / 255
