"""How alike two pictures are: PSNR, SSIM, and the overlap of their colors."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from motionmerge.evaluation.flow import FloatArray, Mask, Picture

MAX_PSNR = 100.0
"""Decibels, of equal pictures."""

_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2
_BINS = 8


def psnr(
    picture: Picture | FloatArray, reference: Picture | FloatArray, *, where: Mask | None = None
) -> float:
    """Return the peak signal-to-noise ratio in decibels, at most `MAX_PSNR`.

    Args:
        picture, reference: `[height, width, ..]`, both of 8 bits or both float in [0, 1].
        where: The pixels that count, `[height, width]`; all if left out.
    """
    error = np.square(picture.astype(np.float32) - reference.astype(np.float32))
    mean = float((error if where is None else error[where]).mean())
    peak = 255 if picture.dtype == np.uint8 else 1
    return MAX_PSNR if mean == 0 else min(MAX_PSNR, 10 * math.log10(peak**2 / mean))


def ssim(picture: Picture, reference: Picture) -> float:
    """Return the mean structural similarity of 8-bit pictures, channel by channel.

    Gaussian window of 11 x 11 pixels, sigma 1.5, mirrored at the border; the mean is over all
    pixels, as torchmetrics takes it.

    Args:
        picture, reference: `[height, width]` or `[height, width, channels]`, 11 pixels a side or
            more.

    Source: Wang et al. 2004, "Image quality assessment".
    """
    return float(ssim_map(picture, reference).mean(dtype=np.float64))


def ssim_map(picture: Picture, reference: Picture) -> npt.NDArray[np.float32]:
    """Return the structural similarity around every pixel."""
    x, y = (one.astype(np.float32) / np.float32(255) for one in (picture, reference))
    mean_x, mean_y = _blur(x), _blur(y)
    both = mean_x * mean_y
    squares = mean_x * mean_x + mean_y * mean_y
    covariance = _blur(x * y) - both
    variances = _blur(x * x + y * y) - squares
    top = (2 * both + _C1) * (2 * covariance + _C2)
    return np.asarray(top / ((squares + _C1) * (variances + _C2)), dtype=np.float32)


def _blur(picture: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    size = 2 * _RADIUS + 1
    blurred = cv2.GaussianBlur(picture, (size, size), _SIGMA, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(blurred, dtype=np.float32)


def color_histogram(picture: Picture, *, where: Mask | None = None) -> npt.NDArray[np.float64]:
    """Return the shares of 8 x 8 x 8 boxes of RGB among the pixels, `[512]`."""
    mask = None if where is None else where.astype(np.uint8)
    counts = cv2.calcHist([picture], [0, 1, 2], mask, [_BINS] * 3, [0, 256] * 3).ravel()
    return np.asarray(counts / max(float(counts.sum()), 1.0), dtype=np.float64)


def color_overlap(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Return how far two color histograms agree, in [0, 1] (Bhattacharyya coefficient)."""
    return float(np.sqrt(first * second).sum())
