"""RAFT optical flow, the large network, under the names of its published weights.

Paper: Teed and Deng 2020 (arXiv 2003.12039). Features of both frames are compared everywhere at
four scales; a convolutional GRU looks up what is near its estimate and corrects it, 20 times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from motionmerge.errors import ShapeError
from motionmerge.evaluation.backbones.protocol import fill

NUM_ITERATIONS = 20
_LEVELS, _RADIUS = 4, 4
_HIDDEN = _CONTEXT = 128
_FEATURES = 256
_STRIDE = 8


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels) if kind == "instance" else nn.BatchNorm2d(channels)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, norm: str, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm1, self.norm2 = _norm(norm, outputs), _norm(norm, outputs)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.norm3 = _norm(norm, outputs)  # the published weights name it twice
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride), self.norm3
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = F.relu(self.norm1(self.conv1(x)))
        change = F.relu(self.norm2(self.conv2(change)))
        return F.relu((x if self.downsample is None else self.downsample(x)) + change)


class _Encoder(nn.Module):
    """An image to features at an eighth of its size."""

    def __init__(self, *, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.norm1 = _norm(norm, 64)
        widths = (64, 64, 96, 128)
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            blocks = (
                _Residual(inputs, outputs, norm=norm, stride=1 if number == 1 else 2),
                _Residual(outputs, outputs, norm=norm, stride=1),
            )
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.conv2 = nn.Conv2d(128, _FEATURES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        for number in (1, 2, 3):
            x = getattr(self, f"layer{number}")(x)
        return self.conv2(x)


class _MotionEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(_LEVELS * (2 * _RADIUS + 1) ** 2, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(64 + 192, 128 - 2, 3, padding=1)

    def forward(self, flow: torch.Tensor, similar: torch.Tensor) -> torch.Tensor:
        similar = F.relu(self.convc2(F.relu(self.convc1(similar))))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([similar, moved], 1))), flow], 1)


class _SeparableGRU(nn.Module):
    """A convolutional GRU: once along rows, once along columns."""

    def __init__(self) -> None:
        super().__init__()
        for number, (kernel, padding) in enumerate([((1, 5), (0, 2)), ((5, 1), (2, 0))], start=1):
            for gate in "zrq":
                conv = nn.Conv2d(_HIDDEN + 256, _HIDDEN, kernel, padding=padding)
                self.add_module(f"conv{gate}{number}", conv)

    def forward(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for number in (1, 2):
            update, reset, new = (getattr(self, f"conv{gate}{number}") for gate in "zrq")
            both = torch.cat([hidden, x], 1)
            share = torch.sigmoid(update(both))
            kept = torch.sigmoid(reset(both)) * hidden
            hidden = (1 - share) * hidden + share * torch.tanh(new(torch.cat([kept, x], 1)))
        return hidden


class _FlowHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(_HIDDEN, 256, 3, padding=1)
        self.conv2 = nn.Conv2d(256, 2, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.relu(self.conv1(hidden)))


class _Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _MotionEncoder()
        self.gru = _SeparableGRU()
        self.flow_head = _FlowHead()
        self.mask = nn.Sequential(
            nn.Conv2d(_HIDDEN, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64 * 9, 1)
        )


class Raft(nn.Module):
    """The network; its tensors have the names of princeton-vl/RAFT without `module.`."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet = _Encoder(norm="instance")
        self.cnet = _Encoder(norm="batch")
        self.update_block = _Update()
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def flows(self, frames: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the flow `[height, width, 2]` in pixels, as (x, y), of each pair of neighbours.

        Args:
            frames: `[frames, 3, height, width]` in 0..255, RGB.

        Raises:
            ShapeError: A side is no multiple of 8.
        """
        if frames.shape[-1] % _STRIDE or frames.shape[-2] % _STRIDE:
            raise ShapeError(
                f"Frames of {list(frames.shape[-2:])} pixels do not suit RAFT.",
                fix=f"Pad both sides to multiples of {_STRIDE}.",
            )
        before = None
        device = next(self.parameters()).device
        for image in (2 * (frames.to(device) / 255) - 1).split(1):
            features = self.fnet(image)
            if before is not None:
                coarse, mask = self.coarse_flow(*before, features)
                yield _upsampled(coarse, mask)[0].permute(1, 2, 0)
            before = (image, features)

    @torch.inference_mode()
    def coarse_flow(
        self, image: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the flow at an eighth of the size, and the weights that bring it to full size.

        Args:
            image: The first frame `[1, 3, height, width]` in [-1, 1].
            first: Its features `[1, 256, height / 8, width / 8]`.
            second: Those of the second frame.
        """
        hidden, context = self.cnet(image).split([_HIDDEN, _CONTEXT], 1)
        hidden, context = torch.tanh(hidden), F.relu(context)
        pyramid = _similarities(first, second)
        height, width = first.shape[-2:]
        rows, columns = torch.meshgrid(
            torch.arange(height, device=image.device),
            torch.arange(width, device=image.device),
            indexing="ij",
        )
        start = torch.stack([columns, rows])[None].float()
        place = start.clone()
        for _ in range(NUM_ITERATIONS):
            similar = _look_up(pyramid, place)
            motion = self.update_block.encoder(place - start, similar)
            hidden = self.update_block.gru(hidden, torch.cat([context, motion], 1))
            place = place + self.update_block.flow_head(hidden)
        return place - start, 0.25 * self.update_block.mask(hidden)


def _similarities(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """Compare every place with every place: `[places, 1, height, width]` at four scales."""
    _, channels, height, width = first.shape
    every = first.flatten(2).transpose(1, 2) @ second.flatten(2) / channels**0.5
    level = every.reshape(height * width, 1, height, width)
    pyramid = [level]
    for _ in range(_LEVELS - 1):
        level = F.avg_pool2d(level, 2, stride=2)
        pyramid.append(level)
    return pyramid


def _look_up(pyramid: list[torch.Tensor], place: torch.Tensor) -> torch.Tensor:
    """Read 9 x 9 similarities around each place at each scale: `[1, 324, height, width]`.

    The window's first axis moves x, which is how the published weights order their channels.
    """
    _, _, height, width = place.shape
    steps = torch.arange(-_RADIUS, _RADIUS + 1, device=place.device).float()
    window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)[None]
    centre = place.permute(0, 2, 3, 1).reshape(height * width, 1, 1, 2)
    found = []
    for number, level in enumerate(pyramid):
        rows, columns = level.shape[-2:]
        x, y = (centre / 2**number + window).unbind(-1)
        grid = torch.stack([2 * x / (columns - 1) - 1, 2 * y / (rows - 1) - 1], -1)
        read = F.grid_sample(level, grid, align_corners=True)
        found.append(read.reshape(1, height, width, -1))
    return torch.cat(found, -1).permute(0, 3, 1, 2).contiguous()


def _upsampled(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scale a flow to full size: each pixel is a weighted mean of nine neighbours."""
    batch, _, height, width = flow.shape
    weights = mask.view(batch, 1, 9, _STRIDE, _STRIDE, height, width).softmax(2)
    near = F.unfold(_STRIDE * flow, 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    fine = (weights * near).sum(2).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(batch, 2, _STRIDE * height, _STRIDE * width)


def build_raft(state: Mapping[str, torch.Tensor], *, source: str) -> Raft:
    """Build the network from its published weights.

    Raises:
        CheckpointError: They are those of another network, e.g. of the small RAFT.
    """
    network = Raft()
    fill(network, state, source=source)
    return network
