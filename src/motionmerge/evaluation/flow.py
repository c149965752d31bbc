"""Optical flow between two frames, a mask of where it is reliable, and pictures of it.

Flow: DIS, Kroeger et al. 2016 (arXiv 1603.03590), OpenCV's preset `MEDIUM`: the quicker ones are
biased by up to 0.2 px. Pictures: direction as hue, length as saturation, one scale for everything
compared; color wheel of Baker et al. 2011, "A Database and Evaluation Methodology for Optical
Flow".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Picture = npt.NDArray[np.uint8]

_SEGMENTS = (  # number of hues, and how red, green and blue change over them
    (15, (0, +1, 0)),  # red to yellow
    (6, (-1, 0, 0)),  # to green
    (4, (0, 0, +1)),  # to cyan
    (11, (0, -1, 0)),  # to blue
    (13, (+1, 0, 0)),  # to magenta
    (6, (0, 0, -1)),  # to red
)


def to_gray(frames: npt.NDArray[np.uint8] | FloatArray) -> Picture:
    """Return the luma of frames as contiguous 8-bit pictures, as DIS wants them.

    Args:
        frames: `[.., height, width, 3]`, 8 bits or float in [0, 1].
    """
    luma = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    scale = 1 if frames.dtype == np.uint8 else 255
    return np.ascontiguousarray((luma * scale).clip(0, 255).round().astype(np.uint8))


def dense_flow(first: Picture, second: Picture) -> FloatArray:
    """Return the optical flow `[height, width, 2]` (x, y) in pixels, from `first` to `second`."""
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    start = np.zeros((*first.shape, 2), dtype=np.float32)
    return np.asarray(method.calc(first, second, start), dtype=np.float32)


@dataclass(frozen=True)
class FlowPair:
    """The flow from one frame to another and back.

    Args:
        forward, backward: `[height, width, 2]` as (x, y) in pixels.
    """

    forward: FloatArray
    backward: FloatArray

    @classmethod
    def between(cls, first: Picture, second: Picture) -> FlowPair:
        """Compute both from two gray frames."""
        return cls(dense_flow(first, second), dense_flow(second, first))

    @cached_property
    def valid(self) -> Mask:
        """Pixels of the first frame that are seen in both frames, `[height, width]`.

        |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5,   b = backward flow where the pixel goes

        Source: Sundaram et al. 2010, "Dense point trajectories by GPU-accelerated large
        displacement optical flow".
        """
        back = warped(self.backward, self.forward)
        apart = lengths(self.forward + back) ** 2
        together = lengths(self.forward) ** 2 + lengths(back) ** 2
        return lands_inside(self.forward) & (apart < 0.01 * together + 0.5)


def lengths(flow: FloatArray) -> FloatArray:
    """Return the length of every vector, `[height, width]` in pixels.

    The last bit of OpenCV's `magnitude` depends on where in memory its result comes to lie, so that
    no two runs on a clip would agree.
    """
    x, y = flow[..., 0], flow[..., 1]
    return np.sqrt(x * x + y * y)


def warped(picture: npt.NDArray[np.float32], flow: FloatArray) -> npt.NDArray[np.float32]:
    """Sample `picture` where the flow leads from each pixel; outside, repeat the border."""
    height, width = flow.shape[:2]
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    back = cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(back, dtype=np.float32)


def lands_inside(flow: FloatArray) -> Mask:
    """Return a mask of the pixels whose flow ends inside the frame, `[height, width]`."""
    height, width = flow.shape[:2]
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def shared_scale(flows: Iterable[FloatArray]) -> float:
    """Compute the length of full saturation: the 99th percentile of all, at least 1 pixel."""
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
    """Draw a disc that shows which color means which direction; its rim is the scale's length."""
    axis = np.linspace(-1.05, 1.05, size)
    x, y = np.meshgrid(axis, axis)
    picture = flow_picture(np.stack([x, y], -1).astype(np.float32), scale=1.0)
    picture[np.hypot(x, y) > 1] = 255
    return picture


def _wheel() -> npt.NDArray[np.float64]:
    """Return the 55 colors `[55, 3]` in [0, 1]."""
    color, colors = np.array([255.0, 0.0, 0.0]), []
    for number, change in _SEGMENTS:
        for step in range(number):
            part = np.floor(255 * step / number) * np.array(change)
            colors.append(color + part)
        color = color + 255 * np.array(change)
    return np.array(colors) / 255
