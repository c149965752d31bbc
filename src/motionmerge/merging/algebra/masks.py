"""Which entries DARE keeps: masks of the format "mask v1", see docs/reference/mask-format.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from motionmerge.lazy_torch import torch
from motionmerge.rng import MASK_BLOCK, mask_bits


@dataclass(frozen=True)
class MaskV1:
    """Mask v1: keep an entry iff its 16-bit random value is below a threshold.

        threshold = round(65536 * (1 - drop_rate)),   rescale = 65536 / threshold

    A kept entry grows by the inverse of the exact probability of being kept, so the expected value
    is exact; the drop rate itself is met to within 1 / 131072.

    Attributes:
        seed: Seed of the mask.
        drop_rate: Fraction set to zero, in [0, 1).
    """

    seed: int
    drop_rate: float

    @property
    def threshold(self) -> int:
        """Values below it are kept; 65536 keeps all."""
        return round(65536 * (1 - self.drop_rate))

    @property
    def rescale(self) -> float:
        """Factor of the kept entries."""
        return 65536 / self.threshold

    def keep(self, tensor_name: str, shape: Sequence[int], /) -> torch.Tensor:
        """Draw the mask of one tensor: a boolean tensor of its shape."""
        count = math.prod(shape)
        kept = np.empty(count, dtype=np.bool_)
        for block, start in enumerate(range(0, count, MASK_BLOCK)):
            part = kept[start : start + MASK_BLOCK]
            np.less(mask_bits(self.seed, tensor_name, block, len(part)), self.threshold, out=part)
        return torch.from_numpy(kept).reshape(tuple(shape))
