"""XFeat: key points and features of a small network, matched where a move is too large for flow.

Key names are those of the published `xfeat.pt` (Apache-2.0), which users bring; nothing of the
authors' code is used. Source: Potje et al. 2024, "XFeat: Accelerated Features for Lightweight Image
Matching" (arXiv 2404.19174), sparse matching: mutual nearest neighbours of at most 4,096 points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from motionmerge.evaluation.backbones.protocol import fill, hash_sources, read_state
from motionmerge.evaluation.camera import Matches
from motionmerge.evaluation.flow import Picture

CELL = 8
"""Pixels a side of the cells in which the network looks for one key point each."""

_MULTIPLE = 32  # the deepest layers see a 32nd of the picture
_WIDTH = 64
_MOST_POINTS = 4096
_LEAST_SCORE = 0.05
_NEIGHBOURS = 5
_UNUSED = "fine_matcher."
"""Names of the part that refines semi-dense matches, which are not made here."""


class _Layer(nn.Module):
    """Convolution, normalisation without parameters of its own, ReLU."""

    def __init__(self, before: int, after: int, *, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(after, affine=False),
            nn.ReLU(),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(pixels)
        return out


class XFeatNetwork(nn.Module):
    """The network, with the names of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        w = _WIDTH
        self.skip1 = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(1, 24, 1))
        self.block1 = nn.Sequential(
            _Layer(1, 4), _Layer(4, 8, stride=2), _Layer(8, 8), _Layer(8, 24, stride=2)
        )
        self.block2 = nn.Sequential(_Layer(24, 24), _Layer(24, 24))
        self.block3 = nn.Sequential(_Layer(24, w, stride=2), _Layer(w, w), _Layer(w, w, kernel=1))
        self.block4 = nn.Sequential(_Layer(w, w, stride=2), _Layer(w, w), _Layer(w, w))
        self.block5 = nn.Sequential(
            _Layer(w, 128, stride=2), _Layer(128, 128), _Layer(128, 128), _Layer(128, w, kernel=1)
        )
        self.block_fusion = nn.Sequential(_Layer(w, w), _Layer(w, w), nn.Conv2d(w, w, 1))
        self.heatmap_head = nn.Sequential(*_points(w, 2), nn.Conv2d(w, 1, 1), nn.Sigmoid())
        self.keypoint_head = nn.Sequential(*_points(w, 3), nn.Conv2d(w, CELL * CELL + 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, gray: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute features, key points and reliability of gray pictures.

        Args:
            gray: `[batch, 1, height, width]`, any range; sides are multiples of 32.

        Returns:
            Features `[batch, 64, height / 8, width / 8]`, key points as logits of the 64 places in
            a cell and of none `[batch, 65, ...]`, and reliability in 0..1 `[batch, 1, ...]`.
        """
        gray = F.instance_norm(gray)
        fine = self.block3(self.block2(self.block1(gray) + self.skip1(gray)))
        middle = self.block4(fine)
        size = fine.shape[-2:]
        features = self.block_fusion(
            fine
            + F.interpolate(middle, size, mode="bilinear")
            + F.interpolate(self.block5(middle), size, mode="bilinear")
        )
        key_points = self.keypoint_head(F.pixel_unshuffle(gray, CELL))
        return features, key_points, self.heatmap_head(features)


def _points(width: int, num: int) -> list[_Layer]:
    return [_Layer(width, width, kernel=1) for _ in range(num)]


@dataclass(frozen=True)
class XFeat:
    """Finds matches between two pictures; see `camera.Matcher`.

    Attributes:
        network: With its weights.
        fingerprint: `sha256:` and the digits of its weights.
    """

    network: XFeatNetwork
    fingerprint: str

    @classmethod
    def load(cls, path: Path) -> XFeat:
        """Load the published weights, `xfeat.pt`, or the same as safetensors.

        Raises:
            CheckpointError: They are not there, or of another network.
        """
        state = read_state(path)
        network = XFeatNetwork()
        fill(
            network,
            {name: value for name, value in state.items() if not name.startswith(_UNUSED)},
            source=str(path),
        )
        return cls(network, *hash_sources([path]))

    def __call__(self, first: Picture, second: Picture) -> Matches:
        """Return the mutual nearest neighbours among the key points of two gray pictures."""
        (places, features), (its_places, its_features) = map(self.detect, (first, second))
        if not (len(places) and len(its_places)):
            return places, its_places
        alike = features @ its_features.T
        there, back = alike.argmax(1), alike.argmax(0)
        mutual = back[there] == np.arange(len(places))
        return places[mutual], its_places[there[mutual]]

    @torch.inference_mode()
    def detect(self, gray: Picture) -> tuple[np.ndarray, np.ndarray]:
        """Find key points of a gray picture `[height, width]`, the surest first.

        Returns:
            Their places `[points, 2]` as (x, y) in pixels, and their features of length 1
            `[points, 64]`.
        """
        sides = np.array(gray.shape)
        inner = np.maximum(sides // _MULTIPLE, 1) * _MULTIPLE
        height, width = map(int, inner)
        pixels = torch.from_numpy(gray.astype(np.float32))[None, None]
        pixels = F.interpolate(pixels, (height, width), mode="bilinear")
        features, key_points, reliability = self.network(pixels)
        sure = F.pixel_shuffle(key_points.softmax(1)[:, : CELL * CELL], CELL)
        highest = F.max_pool2d(sure, _NEIGHBOURS, stride=1, padding=_NEIGHBOURS // 2)
        y, x = torch.nonzero((sure == highest)[0, 0] & (sure[0, 0] > _LEAST_SCORE), as_tuple=True)
        places = torch.stack([x, y], -1).float()
        grid = (2 * places / torch.tensor([width - 1, height - 1]) - 1)[None, None]
        # The last row and column fall off the map there, which leaves their points a score of 0.
        score = (_at(sure, grid, "nearest") * _at(reliability, grid, "bilinear"))[0]
        order = score.argsort(descending=True, stable=True)[
            : min(_MOST_POINTS, int((score > 0).sum()))
        ]
        own = F.normalize(_at(F.normalize(features, dim=1), grid[:, :, order], "bicubic"), dim=0)
        scale = sides[::-1] / inner[::-1]
        found = (places[order].numpy() + 0.5) * scale - 0.5
        return found.astype(np.float32), own.T.numpy()


def _at(maps: torch.Tensor, grid: torch.Tensor, mode: str) -> torch.Tensor:
    """Read maps `[1, channels, rows, columns]` at places; return `[channels, places]`."""
    return F.grid_sample(maps, grid, mode=mode, align_corners=False)[0, :, 0]
