"""How frames reach each network of VBench: resize, cut, normalise.

torchvision changed under VBench: tensors are antialiased since 0.17, and VBench switched that off
for some dimensions only. `Era` chooses whose numbers to compare with, and is part of every result.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

Era = Literal["torchvision>=0.17", "torchvision<0.17"]
ERAS: tuple[Era, ...] = ("torchvision>=0.17", "torchvision<0.17")

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_SIDE = 224


def antialias_of(dimension: str, era: Era) -> bool:
    """Return whether frames are antialiased: in the two i2v dimensions, since torchvision 0.17."""
    return dimension.startswith("i2v_") and era == ERAS[0]


def subject_frames(frames: torch.Tensor) -> torch.Tensor:
    """Prepare frames for subject_consistency: shorter side 224, bilinear, nothing cut off."""
    return _normalised(_resized(frames, _SIDE, mode="bilinear", antialias=False), _IMAGENET)


def i2v_subject_frames(frames: torch.Tensor, *, era: Era) -> torch.Tensor:
    """Prepare frames for i2v_subject: shorter side 256, bicubic, the middle 224 x 224."""
    antialias = antialias_of("i2v_subject", era)
    wide = _resized(frames, 256, mode="bicubic", antialias=antialias)
    return _normalised(_middle(wide), _IMAGENET)


def i2v_subject_image(image: Image.Image) -> torch.Tensor:
    """Prepare the first image for i2v_subject; Pillow resizes it, always antialiased."""
    width, height = image.size
    size = _shorter_side(height, width, 256)
    wide = _pixels(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return _normalised(_middle(wide), _IMAGENET)


def clip_frames(frames: torch.Tensor) -> torch.Tensor:
    """Prepare frames for CLIP: shorter side 224, bicubic, not antialiased, the middle square."""
    wide = _resized(frames, _SIDE, mode="bicubic", antialias=False)
    return _normalised(_middle(wide), _CLIP)


def dreamsim_frames(frames: torch.Tensor, *, era: Era) -> torch.Tensor:
    """Prepare frames for i2v_background: squashed to 224 x 224, bicubic, about [0, 1]."""
    antialias = antialias_of("i2v_background", era)
    return _to_size(frames, (_SIDE, _SIDE), mode="bicubic", antialias=antialias) / 255


def dreamsim_image(image: Image.Image) -> torch.Tensor:
    """Prepare the first image for i2v_background."""
    return _pixels(image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)) / 255


def quality_frames(frames: torch.Tensor) -> torch.Tensor:
    """Prepare frames for imaging_quality: the longer side at most 512, bilinear, [0, 1]."""
    height, width = frames.shape[-2:]
    scale = 512 / max(height, width)
    if scale < 1:
        size = (int(height * scale), int(width * scale))
        frames = _to_size(frames, size, mode="bilinear", antialias=False)
    return frames / 255


def flow_frames(frames: torch.Tensor) -> torch.Tensor:
    """Pad frames for dynamic_degree to multiples of 8, half of it on either side."""
    height, width = frames.shape[-2:]
    down, across = -height % 8, -width % 8
    padding = [across // 2, across - across // 2, down // 2, down - down // 2]
    return F.pad(frames, padding, mode="replicate")


def _shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the size whose shorter side is `side`; torchvision cuts the longer one down."""
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def _resized(frames: torch.Tensor, side: int, *, mode: str, antialias: bool) -> torch.Tensor:
    height, width = frames.shape[-2:]
    size = _shorter_side(height, width, side)
    return _to_size(frames, size, mode=mode, antialias=antialias)


def _to_size(
    frames: torch.Tensor, size: tuple[int, int], *, mode: str, antialias: bool
) -> torch.Tensor:
    if tuple(frames.shape[-2:]) == size:
        return frames
    return F.interpolate(frames, size=size, mode=mode, align_corners=False, antialias=antialias)


def _middle(frames: torch.Tensor) -> torch.Tensor:
    height, width = frames.shape[-2:]
    top, left = round((height - _SIDE) / 2), round((width - _SIDE) / 2)
    return frames[..., top : top + _SIDE, left : left + _SIDE]


def _pixels(image: Image.Image) -> torch.Tensor:
    """Return an image as `[1, 3, height, width]` in 0..255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()


def _normalised(
    pixels: torch.Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]
) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
    return (pixels / 255 - mean) / std
