"""Functions of the recipe language that are given as arithmetic: on blocks, or on whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from motionmerge.errors import MotionMergeError, RecipeError
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.nodes import TaskVector
from motionmerge.merging.algebra.steps import Apply, Block, Lowering, promoted
from motionmerge.named import number_text

FunctionSettings: TypeAlias = tuple[tuple[str, float], ...]
"""Keyword arguments of a function by name, in order."""


@dataclass(frozen=True)
class Computed(TaskVector):
    """A function of task vectors, printed like a call.

    It is zero where none of its task vectors reaches a tensor; if some do, the others are zeros.

    Attributes:
        name: Its name.
        vectors: What it is applied to.
        settings: Its keyword arguments.
        compute: Computes it; subclasses say with what.
    """

    name: str
    vectors: tuple[TaskVector, ...]
    settings: FunctionSettings
    compute: Callable[..., Any] = field(repr=False)

    @property
    def function(self) -> str:
        """The name."""
        return self.name

    def formula(self) -> str:
        """Print e.g. `ties(first - base, second - base, keep=0.2)`."""
        settings = (f"{name}={number_text(value)}" for name, value in self.settings)
        return f"{self.name}({', '.join([*map(str, self.vectors), *settings])})"


@dataclass(frozen=True)
class ByBlock(Computed):
    """A function whose every entry depends on the entries at the same place, and on the place.

    `compute` is called with one flat array per task vector, `block` and the settings.
    """

    def lower(self, lowering: Lowering) -> int | None:
        """Apply the function to the task vectors that reach the tensor."""
        numbers = [vector.lower(lowering) for vector in self.vectors]
        reached = tuple(number is not None for number in numbers)
        operands = tuple(number for number in numbers if number is not None)
        call = _BlockCall(self.name, self.compute, self.settings, reached)
        return lowering.add(Apply(call, operands)) if operands else None


@dataclass(frozen=True)
class ByTensor(Computed):
    """A function that looks at a whole tensor.

    `compute` is called with one tensor per task vector, the tensor's `name` and the settings.
    """

    is_blockwise: ClassVar[bool] = False

    def lower(self, lowering: Lowering) -> int | None:
        """Compute the tensor, unless no task vector reaches it."""
        numbers = tuple(vector.lower(lowering) for vector in self.vectors)
        present = [number for number in numbers if number is not None]
        if not present:
            return None

        def compute() -> torch.Tensor:
            held = {number: lowering.value(number) for number in present}
            first = held[present[0]]
            values = [torch.zeros_like(first) if n is None else held[n] for n in numbers]
            found = _call(self.name, self.compute, values, self.settings, {"name": lowering.name})
            if not isinstance(found, torch.Tensor) or found.shape != first.shape:
                raise _wrong(self.name, found, f"a tensor of shape {list(first.shape)}")
            return found.to(promoted(values))

        return lowering.give((self.name, self.compute, self.settings, numbers), compute)


@dataclass(frozen=True)
class _BlockCall:
    """An elementwise function with its settings; `reached` says whose arrays are no zeros."""

    name: str
    compute: Callable[..., npt.NDArray[Any]]
    settings: FunctionSettings
    reached: tuple[bool, ...]

    def __call__(self, entries: Sequence[npt.NDArray[Any]], block: Block) -> npt.NDArray[Any]:
        given = iter(map(_read_only, entries))
        arrays = [next(given) if there else np.zeros_like(entries[0]) for there in self.reached]
        found: Any = _call(self.name, self.compute, arrays, self.settings, {"block": block})
        is_floats = isinstance(found, np.ndarray) and found.dtype.kind == "f"
        if not is_floats or found.shape != entries[0].shape:
            raise _wrong(self.name, found, f"a float array of {block.count} entries")
        return np.asarray(found)


def _call(
    name: str,
    compute: Callable[..., Any],
    values: Sequence[Any],
    settings: FunctionSettings,
    where: Mapping[str, Any],
) -> Any:
    """Call the Python function behind a name; the numbers of a recipe's parameters are plain."""
    plain = {key: value.real for key, value in settings}
    try:
        return compute(*values, **where, **plain)
    except MotionMergeError:
        raise
    except Exception as error:
        raise RecipeError(f"{name}() failed: {error!r}", fix=_correct(name)) from error


def _wrong(name: str, result: object, wanted: str) -> RecipeError:
    shape, kind = getattr(result, "shape", None), type(result).__name__
    came = f"a {kind}" if shape is None else f"a {kind} of shape {list(shape)}"
    return RecipeError(f"{name}() returned {came}, not {wanted}.", fix=_correct(name))


def _correct(name: str) -> str:
    return f"Correct the Python function that is registered as `{name}`."


def _read_only(entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the same memory, protected: other steps may need these entries."""
    view = entries.view()
    view.flags.writeable = False
    return view
