"""DARE: drop random entries of a task vector and rescale the rest. Masks are "mask v1".

Source: Yu et al. 2024 (arXiv 2311.03099); docs/reference/mask-format.md.
Official: merge/sparsify.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from motionmerge.errors import RecipeError
from motionmerge.merging.algebra.applied import Applied, expect_vector
from motionmerge.merging.algebra.masks import MaskV1
from motionmerge.merging.algebra.nodes import TaskVector
from motionmerge.merging.algebra.steps import Drop, Lowering, Scale
from motionmerge.merging.algebra.terms import is_number
from motionmerge.named import number_text

__all__ = ["Dare", "MaskV1", "dare"]


@dataclass(frozen=True)
class Dare(Applied):
    """A task vector with a random share of its entries dropped; build it with `dare`."""

    function: ClassVar[str] = "dare"

    drop_rate: float
    seed: int

    def formula(self) -> str:
        """Print e.g. `dare(tuned - base, drop_rate=0.7, seed=0)`."""
        drop_rate, seed = number_text(self.drop_rate), number_text(self.seed)
        return f"dare({self.vector}, drop_rate={drop_rate}, seed={seed})"

    def lower(self, lowering: Lowering) -> int | None:
        """Drop entries and scale the rest; 1-d tensors are kept whole and not rescaled."""
        value = self.vector.lower(lowering)
        if value is None or lowering.ndim <= 1:
            return value
        mask = MaskV1(self.seed.real, self.drop_rate.real)
        return lowering.add(Scale(lowering.add(Drop(value, mask)), mask.rescale))


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
            f"`drop_rate={drop_rate!r}` is not a number in [0, 1).",
            fix="Use the fraction that is set to zero, e.g. `drop_rate=0.7`.",
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 1 << 63:
        raise RecipeError(f"`seed={seed!r}` is not a 64-bit integer.", fix="Use e.g. `seed=0`.")
    return Dare(vector, drop_rate, seed)
