"""The algebra of checkpoints and task vectors: typed, immutable, lazy expressions.

Paper: Tian et al. 2025, stages 2 and 3. An expression is written like the formula, checked when it
is written, and evaluated tensor by tensor in fp32 with one rounding at the end.

    Checkpoint - Checkpoint -> TaskVector       Checkpoint + TaskVector -> Checkpoint
    number * TaskVector     -> TaskVector       TaskVector + TaskVector -> TaskVector
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn, overload

from motionmerge.errors import RecipeError
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra import results
from motionmerge.merging.algebra.results import realised, result_specs
from motionmerge.merging.algebra.steps import Add, Lowering, Read, Subtract
from motionmerge.merging.algebra.terms import (
    ATOM,
    CHECKPOINT,
    PRODUCT,
    SIGN,
    SUM,
    TASK_VECTOR,
    Expression,
    is_number,
    negation_refusal,
    refusal,
)
from motionmerge.merging.inputs.resolvers import resolve
from motionmerge.merging.inputs.sources import MemoryTensors, Origin, Source
from motionmerge.named import NamedFloat, NamedInt, number_text
from motionmerge.tensors import AnyDtype

__all__ = [
    "Checkpoint",
    "Difference",
    "Scaled",
    "Sum",
    "TaskVector",
    "realised",
    "result_specs",
]


@dataclass(frozen=True)
class Checkpoint(Expression):
    """The weights of a whole model: stored ones, plus any number of task vectors.

    result = anchor + vectors[0] + vectors[1] + ...

    The anchor is the stored checkpoint at the front. It gives the result its tensor names, their
    order, their dtype, and every tensor that no task vector reaches (bytes unchanged), as well as
    all integer and 0-d tensors.

    Attributes:
        anchor: The stored checkpoint.
        vectors: What is added to it, in order.
    """

    kind: ClassVar[str] = CHECKPOINT

    anchor: Source
    vectors: tuple[TaskVector, ...] = ()

    @classmethod
    def load(cls, path: str | Path, *, name: str | None = None) -> Checkpoint:
        """Refer to weights on disk; nothing is read before it is needed.

        Args:
            path: A .safetensors file, a folder of (sharded) ones, a diffusers pipeline folder
                (its `unet`, `image_projector` ... become prefixes of the names), or a .ckpt; or
                shipped weights by name, e.g. `pocket:base`; or weights on the hub, which are
                downloaded now, e.g. `hub:owner/name`.
            name: What formulas call it; the file's or folder's name by default.
        """
        path = resolve(str(path))
        return cls(Source(name or re.sub(r"\W", "_", path.stem) or "checkpoint", path))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], *, name: str) -> Checkpoint:
        """Refer to a state dict in memory; its tensors are shared, not copied."""
        return cls(Source(name, MemoryTensors(tensors)))

    def bind(self, origins: Mapping[str, Origin]) -> Checkpoint:
        """Replace names in a formula by their weights; LoRAs get the names of the anchor.

        Args:
            origins: Weights by name; what is not among them keeps its own.
        """
        anchor = replace(self.anchor, origin=origins.get(self.anchor.name, self.anchor.origin))
        return Checkpoint(anchor, tuple(vector.bind(origins, anchor) for vector in self.vectors))

    @property
    def precedence(self) -> int:
        """ATOM for a stored checkpoint, else SUM."""
        return SUM if self.vectors else ATOM

    def formula(self) -> str:
        """Print the canonical text, e.g. `base + 0.25 * (base - tuned)`."""
        return self.anchor.name + "".join(_signed(vector) for vector in self.vectors)

    def vectors_inside(self) -> Iterator[TaskVector]:
        """Return every task vector in the expression, outermost first."""
        for vector in self.vectors:
            yield from vector.vectors_inside()

    def sources(self, name: str | None = None) -> Iterator[Source]:
        """Return the sources whose tensor `name` enters the result; all sources for None."""
        yield self.anchor
        for vector in self.vectors:
            yield from vector.sources(name)

    def __add__(self, other: object) -> Checkpoint:
        if not isinstance(other, TaskVector):
            raise refusal(self, "+", other)
        return replace(self, vectors=(*self.vectors, other))

    @overload
    def __sub__(self, other: Checkpoint) -> Difference: ...
    @overload
    def __sub__(self, other: TaskVector) -> Checkpoint: ...
    def __sub__(self, other: object) -> Difference | Checkpoint:
        if isinstance(other, Checkpoint):
            return Difference(self, other)
        if isinstance(other, TaskVector):
            return self + -other
        raise refusal(self, "-", other)

    def __mul__(self, other: object) -> NoReturn:
        raise refusal(self, "*", other)

    def __rmul__(self, other: object) -> NoReturn:
        raise refusal(other, "*", self)

    def __neg__(self) -> NoReturn:
        raise negation_refusal(self)

    def lower(self, lowering: Lowering) -> int | None:
        """Add the steps that compute one tensor; None if no task vector changes it."""
        total: int | None = None
        for vector in self.vectors:
            term = vector.lower(lowering)
            if term is not None:
                anchor = lowering.add(Read(self.anchor)) if total is None else total
                total = lowering.add(Add(anchor, term))
        return total

    def evaluate(self, name: str) -> torch.Tensor:
        """Compute one tensor: fp32 arithmetic, one rounding to the anchor's dtype.

        Raises:
            CheckpointError: An input lacks the tensor, cannot be read, or holds NaN.
            ShapeError: Two inputs disagree about its shape.
        """
        return next(iter(results.tensors(self.bind({}), [name]).values()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Compute every tensor, in the anchor's order.

        Raises:
            CheckpointError: A tensor is missing on one side, cannot be read, or holds NaN.
            ShapeError: Two inputs disagree about a shape.
        """
        return results.tensors(self.bind({}))

    def save(self, path: str | Path, *, dtype: str | AnyDtype | None = None) -> None:
        """Compute every tensor and write one .safetensors file, its formula in the header.

        Args:
            path: The file to write.
            dtype: Dtype of the floating-point tensors; the anchor's own by default.

        Raises:
            CheckpointError: A tensor is missing on one side, cannot be read, or holds NaN.
            ShapeError: Two inputs disagree about a shape.
        """
        results.save(self.bind({}), Path(path), formula=str(self), dtype=dtype)


@dataclass(frozen=True)
class TaskVector(Expression):
    """A difference between checkpoints, scaled, summed, thinned out or restricted.

    Attributes:
        is_blockwise: It is computed block by block, its task vectors aside; else tensor by tensor.
    """

    kind: ClassVar[str] = TASK_VECTOR
    is_blockwise: ClassVar[bool] = True

    @property
    def function(self) -> str:
        """The function of the recipe language that it is a call of; empty if it is none."""
        return ""

    @property
    def children(self) -> Iterator[Checkpoint | TaskVector]:
        """The expressions that this one is made of."""
        for field in fields(self):
            value = getattr(self, field.name)
            each = value if isinstance(value, tuple) else (value,)
            yield from (one for one in each if isinstance(one, (Checkpoint, TaskVector)))

    def reaches(self, name: str) -> bool:
        """Check whether a tensor can be changed, by its name alone.

        Where `lower` asks for the name, this must too: tensors of equal dtypes that all task
        vectors of a merge reach, or do not reach, alike are computed in the same steps.
        """
        return True

    @abstractmethod
    def lower(self, lowering: Lowering) -> int | None:
        """Add the steps that compute one tensor.

        Returns:
            The number of the last step; None if the task vector is zero there by construction.
        """

    def bind(self, origins: Mapping[str, Origin], anchor: Source) -> TaskVector:
        """Replace the names in a formula by their weights.

        Args:
            origins: Weights by name; what is not among them keeps its own.
            anchor: The stored checkpoint that this is added to.
        """
        values = {
            one.name: _bound(getattr(self, one.name), origins, anchor) for one in fields(self)
        }
        return replace(self, **values)

    def sources(self, name: str | None = None) -> Iterator[Source]:
        """Return the sources whose tensor `name` enters the value; all sources for None."""
        for child in self.children:
            yield from child.sources(name)

    def vectors_inside(self) -> Iterator[TaskVector]:
        """Return this task vector and every one inside it."""
        yield self
        for child in self.children:
            yield from child.vectors_inside()

    def verify(self, names: Sequence[str]) -> None:
        """Check what can be checked once the tensor names are known.

        Raises:
            RecipeError: It cannot apply to a checkpoint with these names.
        """

    def __add__(self, other: object) -> TaskVector:
        if not isinstance(other, TaskVector):
            raise refusal(self, "+", other)
        return Sum(self, other)

    def __sub__(self, other: object) -> TaskVector:
        if not isinstance(other, TaskVector):
            raise refusal(self, "-", other)
        return Sum(self, -other)

    def __mul__(self, other: object) -> TaskVector:
        if not is_number(other):
            raise refusal(self, "*", other)
        return Scaled(other, self)

    def __rmul__(self, other: object) -> TaskVector:
        if not is_number(other):
            raise refusal(other, "*", self)
        return Scaled(other, self)

    def __neg__(self) -> TaskVector:
        return Scaled(-1, self)


@dataclass(frozen=True)
class Difference(TaskVector):
    """minuend - subtrahend, the task vector that leads from the second to the first."""

    precedence: ClassVar[int] = SUM

    minuend: Checkpoint
    subtrahend: Checkpoint

    def formula(self) -> str:
        """Print e.g. `tuned - base`."""
        return f"{self.minuend.formula()} - {self.subtrahend.text(at_least=PRODUCT)}"

    def lower(self, lowering: Lowering) -> int | None:
        """Compute the difference; None if a source lacks the tensor (see `check_coverage`)."""
        name, inputs = lowering.name, lowering.inputs
        if not all(inputs.has(source, name) for source in self.sources(name)):
            return None
        first, second = (
            lowering.add(Read(side.anchor)) if (moved := side.lower(lowering)) is None else moved
            for side in (self.minuend, self.subtrahend)
        )
        return lowering.add(Subtract(first, second))


@dataclass(frozen=True)
class Scaled(TaskVector):
    """factor * vector."""

    factor: float
    vector: TaskVector

    def __post_init__(self) -> None:
        factor = self.factor
        keeps_its_type = type(factor) is int or isinstance(factor, (NamedFloat, NamedInt))
        object.__setattr__(self, "factor", factor if keeps_its_type else float(factor))
        if not math.isfinite(self.factor):
            raise RecipeError(
                f"A task vector cannot be scaled by {self.factor}.", fix="Use a finite number."
            )

    @property
    def is_minus(self) -> bool:
        """Whether it prints as a bare minus."""
        return number_text(self.factor) in ("-1", "-1.0")

    @property
    def precedence(self) -> int:
        """SIGN for a bare minus, else PRODUCT."""
        return SIGN if self.is_minus else PRODUCT

    def formula(self) -> str:
        """Print e.g. `0.25 * (tuned - base)` or `-(tuned - base)`."""
        inner = self.vector.text(at_least=SIGN)
        return f"-{inner}" if self.is_minus else f"{number_text(self.factor)} * {inner}"

    def lower(self, lowering: Lowering) -> int | None:
        """Scale the vector's steps."""
        value = self.vector.lower(lowering)
        return None if value is None else lowering.scale(value, self.factor.real)


@dataclass(frozen=True)
class Sum(TaskVector):
    """left + right."""

    precedence: ClassVar[int] = SUM

    left: TaskVector
    right: TaskVector

    def formula(self) -> str:
        """Print e.g. `0.5 * v + 0.25 * w`."""
        return self.left.formula() + _signed(self.right)

    def lower(self, lowering: Lowering) -> int | None:
        """Add both sides, or take the one that reaches the tensor."""
        left, right = self.left.lower(lowering), self.right.lower(lowering)
        if left is None or right is None:
            return right if left is None else left
        return lowering.add(Add(left, right))


def _bound(value: Any, origins: Mapping[str, Origin], anchor: Source) -> Any:
    """Bind the expressions in a field of one; the rest stays as it is."""
    if isinstance(value, tuple):
        return tuple(_bound(one, origins, anchor) for one in value)
    if isinstance(value, Checkpoint):
        return value.bind(origins)
    return value.bind(origins, anchor) if isinstance(value, TaskVector) else value


def _signed(vector: TaskVector) -> str:
    """Print a task vector as a further term of a sum: ` + v`, or ` - w` for `-w`."""
    if isinstance(vector, Scaled) and vector.is_minus:
        return f" - {vector.vector.text(at_least=PRODUCT)}"
    return f" + {vector.text(at_least=PRODUCT)}"
