"""Functions of the recipe language that look at a whole tensor: trim, TIES, low rank.

Each works tensor by tensor; 1-d tensors (biases, norms) are kept whole, as `dare` keeps them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from motionmerge.errors import RecipeError
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.applied import expect_vector
from motionmerge.merging.algebra.computed import ByTensor
from motionmerge.merging.algebra.nodes import TaskVector
from motionmerge.merging.algebra.terms import is_number


def keep_largest(tensor: torch.Tensor, *, keep: float) -> torch.Tensor:
    """Set all entries to zero but the `keep` share of largest magnitude, at least one.

    Of entries with the same magnitude the earlier ones are kept, so that the result is the same
    everywhere.

    Args:
        tensor: Any shape.
        keep: Share of the entries, in (0, 1].
    """
    count = tensor.numel()
    num_kept = max(1, round(keep * count))
    if num_kept >= count:
        return tensor
    magnitudes = tensor.abs().flatten()
    threshold = magnitudes.kthvalue(count - num_kept + 1).values
    kept = magnitudes > threshold
    equal = (magnitudes == threshold).nonzero().squeeze(1)
    kept[equal[: num_kept - int(kept.sum())]] = True
    return tensor * kept.view_as(tensor)


def elect_and_average(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Average, entry by entry, those values that have the sign of the sum.

        sign = sgn(sum_i t_i),   out = mean of { t_i : sgn(t_i) = sign }, and 0 where the sum is 0

    Args:
        tensors: At least one, all of one shape.

    Source: TIES, Yadav et al. 2023 (arXiv 2306.01708), steps 2 and 3.
    """
    sign = functools.reduce(torch.add, tensors).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for tensor in tensors:
        agrees = (tensor.sign() == sign) & (sign != 0)
        total += tensor * agrees
        count += agrees
    return total / count.clamp_(min=1)


@dataclass(frozen=True)
class LowRank:
    """The best approximation of a matrix by one of lower rank, as two factors.

    matrix ~ up @ down

    Attributes:
        up: [rows, rank].
        down: [rank, columns].
        energies: All squared singular values of the matrix, the largest first, in fp64.
    """

    up: torch.Tensor
    down: torch.Tensor
    energies: torch.Tensor


def factorise(matrix: torch.Tensor, *, rank: int) -> LowRank:
    """Truncate the singular value decomposition of a matrix.

    The singular vectors of the smaller side are eigenvectors of the Gram matrix, in fp64, which is
    much quicker than the decomposition itself; the singular values are shared out evenly.

    Args:
        matrix: [rows, columns], floating point.
        rank: Rank of the approximation, at least 1; more than the matrix has gives all of it.

    Source: Eckart and Young 1936.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    work = (matrix if wide else matrix.T).double()
    energies, vectors = torch.linalg.eigh(work @ work.T)
    energies, vectors = energies.flip(0).clamp_(min=0), vectors.flip(1)
    basis, scale = vectors[:, :rank], energies[:rank].pow(0.25)
    inverse = torch.where(scale > 1e-6 * scale.max(), 1 / scale, 0)
    near, far = basis * scale, (basis.T @ work) * inverse[:, None]
    up, down = (near, far) if wide else (far.T, near.T)
    return LowRank(up.to(matrix.dtype), down.to(matrix.dtype), energies)


def trim(vector: TaskVector, *, keep: float) -> TaskVector:
    """Keep the largest entries of a task vector and drop the rest, without rescaling.

    Args:
        vector: What to thin out.
        keep: Share of each tensor's entries that stays, in (0, 1].

    Raises:
        RecipeError: `vector` is no task vector, or `keep` is outside (0, 1].

    Source: TIES, Yadav et al. 2023 (arXiv 2306.01708), step 1.
    """
    expect_vector(vector, "trim", example="trim(tuned - base, keep=0.2)")
    return ByTensor("trim", (vector,), (("keep", _share(keep)),), _trimmed)


def ties(*vectors: TaskVector, keep: float) -> TaskVector:
    """Merge task vectors: keep the largest entries of each, elect a sign, average who agrees.

        t_i = trim(v_i, keep),   sign = sgn(sum t_i),   out = mean of { t_i : sgn(t_i) = sign }

    Weight a vector by scaling it; scale the result like any task vector.

    Args:
        vectors: At least two.
        keep: Share of each tensor's entries that stays in each vector, in (0, 1].

    Raises:
        RecipeError: Fewer than two task vectors, or `keep` is outside (0, 1].

    Source: TIES, Yadav et al. 2023 (arXiv 2306.01708). There the trimming goes over all tensors of
    a vector at once, here over each tensor.
    """
    example = "ties(first - base, second - base, keep=0.2)"
    for vector in vectors:
        expect_vector(vector, "ties", example=example)
    if len(vectors) < 2:
        raise RecipeError(
            f"`ties()` got {len(vectors)} task vector(s).", fix=f"Give it two or more: `{example}`."
        )
    return ByTensor("ties", vectors, (("keep", _share(keep)),), _without_conflicts)


def low_rank(vector: TaskVector, *, rank: int) -> TaskVector:
    """Replace each matrix of a task vector by the nearest one of a lower rank.

    What a LoRA of this rank would hold (see `export_loras`): often what matters of a fine-tune.

    Args:
        vector: What to simplify.
        rank: Rank of each tensor's [output channels, rest] matrix, at least 1.

    Raises:
        RecipeError: `vector` is no task vector, or `rank` is no positive integer.
    """
    expect_vector(vector, "low_rank", example="low_rank(tuned - base, rank=32)")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise RecipeError(f"`rank={rank!r}` is not a positive integer.", fix="Use e.g. `rank=32`.")
    return ByTensor("low_rank", (vector,), (("rank", rank),), _truncated)


def _share(keep: float) -> float:
    if not is_number(keep) or not 0 < keep <= 1:
        raise RecipeError(
            f"`keep={keep!r}` is not a number in (0, 1].",
            fix="Use the share that stays, e.g. `keep=0.2`.",
        )
    return keep


def _trimmed(value: torch.Tensor, *, name: str, keep: float) -> torch.Tensor:
    return value if value.ndim <= 1 else keep_largest(value, keep=keep)


def _without_conflicts(*values: torch.Tensor, name: str, keep: float) -> torch.Tensor:
    return elect_and_average([_trimmed(value, name=name, keep=keep) for value in values])


def _truncated(value: torch.Tensor, *, name: str, rank: int) -> torch.Tensor:
    """Truncate a matrix; a convolution is the matrix of its output channels and the rest."""
    matrix = value.flatten(1) if value.ndim > 1 else None
    if matrix is None or rank >= min(matrix.shape):
        return value
    factors = factorise(matrix, rank=rank)
    return (factors.up @ factors.down).view_as(value)
