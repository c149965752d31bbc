"""DARE: drop random entries of a task vector and rescale the rest. Masks are "mask v1".

Source: Yu et al. 2024 (arXiv 2311.03099); docs/mask-format.md. Official: merge/sparsify.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from motionmerge.errors import RecipeError
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.applied import Applied, expect_vector
from motionmerge.merging.algebra.named import number_text
from motionmerge.merging.algebra.nodes import TaskVector
from motionmerge.merging.algebra.terms import is_number
from motionmerge.merging.inputs.sources import OpenInputs
from motionmerge.rng import MASK_BLOCK, mask_bits


class MaskSource(Protocol):
    """Says which entries of each tensor are kept, and by how much those grow."""

    @property
    def rescale(self) -> float: ...
    def keep(self, tensor_name: str, shape: Sequence[int], /) -> torch.Tensor: ...


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


@dataclass(frozen=True)
class GivenMasks:
    """Masks that were drawn elsewhere, to repeat someone else's merge exactly.

    Attributes:
        masks: Nonzero where an entry is kept, by tensor name.
        rescale: Factor of the kept entries.
    """

    masks: Mapping[str, torch.Tensor]
    rescale: float

    def keep(self, tensor_name: str, shape: Sequence[int], /) -> torch.Tensor:
        """Give the mask of one tensor, in its shape."""
        return self.masks[tensor_name].reshape(tuple(shape)).bool()


def drop_and_rescale(tensor: torch.Tensor, *, keep: torch.Tensor, rescale: float) -> torch.Tensor:
    """Zero the entries that are not kept and scale the rest, so that the expected value stays.

    out = keep * tensor * rescale,   rescale = 1 / P(keep)

    Args:
        tensor: One tensor of a task vector, any shape.
        keep: Boolean, of the same shape.
        rescale: Factor of the kept entries.

    Source: DARE, Yu et al. 2024 (arXiv 2311.03099).
    """
    return (tensor * keep).mul_(rescale)


@dataclass(frozen=True)
class Dare(Applied):
    """A task vector with a random share of its entries dropped; build it with `dare`."""

    drop_rate: float
    seed: int
    masks: MaskSource = field(compare=False, repr=False)

    def formula(self) -> str:
        """Print e.g. `dare(tuned - base, drop_rate=0.7, seed=0)`."""
        drop_rate, seed = number_text(self.drop_rate), number_text(self.seed)
        return f"dare({self.vector}, drop_rate={drop_rate}, seed={seed})"

    def value(self, name: str, inputs: OpenInputs) -> torch.Tensor | None:
        """Compute one tensor; 1-d ones are kept whole and not rescaled."""
        value = self.vector.value(name, inputs)
        if value is None or value.ndim <= 1:
            return value
        keep = self.masks.keep(name, value.shape)
        return drop_and_rescale(value, keep=keep, rescale=self.masks.rescale)


def dare(vector: TaskVector, *, drop_rate: float, seed: int) -> TaskVector:
    """Drop a random share of a task vector's entries and rescale the rest.

        out = mask * vector / P(mask),   P(mask) = 1 - drop_rate, rounded to 1 / 65536

    1-d tensors (biases, norms) are kept whole and not rescaled, as in the official code. The mask
    of a tensor depends on the seed and the tensor's name and on nothing else.

    Args:
        vector: What to thin out.
        drop_rate: Fraction set to zero, in [0, 1).
        seed: Seed of the masks; two vectors with one seed get the same masks.

    Raises:
        RecipeError: `vector` is no task vector, `drop_rate` is outside [0, 1) or so near to 1 that
            nothing would be kept, or `seed` is no integer of 64 bits.

    Source: DARE, Yu et al. 2024 (arXiv 2311.03099).
    """
    expect_vector(vector, "dare", example="dare(tuned - base, drop_rate=0.7, seed=0)")
    if not is_number(drop_rate) or not 0 <= drop_rate < 1 or MaskV1(0, drop_rate).threshold == 0:
        raise RecipeError(
            f"drop_rate={drop_rate!r} is not a number in [0, 1).",
            fix="Use the fraction that is set to zero, e.g. `drop_rate=0.7`.",
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 1 << 63:
        raise RecipeError(f"seed={seed!r} is not a 64-bit integer.", fix="Use e.g. `seed=0`.")
    return Dare(vector, drop_rate, seed, MaskV1(seed, drop_rate))
