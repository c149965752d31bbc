"""I3D, the network of Frechet's video distance, under the key names of `i3d_pretrained_400.pt`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from motionmerge.errors import ShapeError

FEWEST_FRAMES = 9
"""Time is divided by 8, rounded up, and the last pooling takes two."""

# Channels of each mixed block: of its 1x1 branch, of the two 3x3 branches before and after, and of
# the branch after pooling (Carreira and Zisserman 2017, figure 3; Szegedy et al. 2015, table 1).
_MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
_POOL_BEFORE = {"Mixed_3b": (1, 3, 2), "Mixed_4b": (3, 3, 2), "Mixed_5b": (2, 2, 2)}
"""Kernel in time, kernel in space, stride in space; the stride in time is 1 for a kernel of 1."""


class I3D(nn.Module):
    """Inception-v1 with filters inflated to three dimensions.

    Args:
        num_classes: 400, of Kinetics.

    Source: Carreira and Zisserman 2017.
    """

    def __init__(self, num_classes: int = 400) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        for name, channels in _MIXED.items():
            self.add_module(name, _Mixed(*channels))
        self.logits = _Unit(1024, num_classes, 1, is_output=True)

    def forward(self, videos: torch.Tensor) -> torch.Tensor:
        """Compute logits `[batch, classes]` of videos `[batch, 3, frames, 224, 224]` in [-1, 1].

        Raises:
            ShapeError: The videos are shorter than `FEWEST_FRAMES`, or are not of this shape.
        """
        if videos.ndim != 5 or videos.shape[1] != 3 or videos.shape[2] < FEWEST_FRAMES:
            raise ShapeError(
                f"I3D cannot look at videos of shape {list(videos.shape)}.",
                fix=f"Pass [batch, 3, frames, 224, 224] with at least {FEWEST_FRAMES} frames.",
            )
        hidden = self.Conv3d_2b_1x1(_pooled(self.Conv3d_1a_7x7(videos), 1, 3, 2))
        hidden = self.Conv3d_2c_3x3(hidden)
        for name in _MIXED:
            if name in _POOL_BEFORE:
                hidden = _pooled(hidden, *_POOL_BEFORE[name])
            hidden = self.get_submodule(name)(hidden)
        hidden = functional.avg_pool3d(hidden, (2, 7, 7), stride=1)
        logits: torch.Tensor = self.logits(hidden)
        return logits.mean(dim=(2, 3, 4))


class _Unit(nn.Module):
    """A convolution, normalised and rectified unless it is the output."""

    def __init__(
        self, inner: int, outer: int, kernel: int, *, stride: int = 1, is_output: bool = False
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inner, outer, kernel, stride=stride, bias=is_output)
        # The code around `i3d_pretrained_400.pt` has this eps; the paper's own has 0.001.
        self.bn = None if is_output else nn.BatchNorm3d(outer, eps=1e-5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        hidden = self.conv3d(_padded(hidden, kernel, stride))
        return hidden if self.bn is None else self.bn(hidden).relu()


class _Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(
        self, inner: int, one: int, two_a: int, two_b: int, three_a: int, three_b: int, four: int
    ) -> None:
        super().__init__()
        self.b0 = _Unit(inner, one, 1)
        self.b1a, self.b1b = _Unit(inner, two_a, 1), _Unit(two_a, two_b, 3)
        self.b2a, self.b2b = _Unit(inner, three_a, 1), _Unit(three_a, three_b, 3)
        self.b3b = _Unit(inner, four, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        branches = (
            self.b0(hidden),
            self.b1b(self.b1a(hidden)),
            self.b2b(self.b2a(hidden)),
            self.b3b(_pooled(hidden, 3, 3, 1)),
        )
        return torch.cat(branches, dim=1)


def _pooled(hidden: torch.Tensor, time: int, space: int, stride: int) -> torch.Tensor:
    kernel, strides = (time, space, space), (1 if time == 1 else stride, stride, stride)
    return functional.max_pool3d(_padded(hidden, kernel, strides), kernel, strides)


def _padded(hidden: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Pad with zeros as TensorFlow's `SAME` does: more at the end, as much as the stride needs."""
    padding: list[int] = []
    for size, of_kernel, of_stride in zip(hidden.shape[2:], kernel, stride, strict=True):
        total = max(of_kernel - (size % of_stride or of_stride), 0)
        padding = [total // 2, total - total // 2, *padding]  # the last axis comes first
    return functional.pad(hidden, padding)
