"""An expert that is computed from its inputs whenever it is needed, instead of being kept.

The bits are those of `realise`: the same pass over the same inputs computes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch

from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.results import ResultSpec
from motionmerge.merging.compute.plan import MergeJob
from motionmerge.merging.compute.streaming import stream
from motionmerge.merging.in_memory import TensorSink
from motionmerge.merging.inputs.coverage import Missing
from motionmerge.merging.inputs.pieces import Shapes
from motionmerge.merging.inputs.sources import OpenInputs
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.tensors import num_bytes

GROUP_BYTES = 16 << 20
"""How much is computed at a time and then copied; the most memory that recomputing takes."""

_SHOWN = 5
"""Names in a warning of what is left out."""


class RecomputedExpert(Mapping[str, torch.Tensor]):
    """The tensors of an expert by name, of which only the next few are in memory.

    Ask for each once and in the order of the names: neighbours are computed together, and what was
    given is not kept.

    Args:
        checkpoint: The expert's expression, with its inputs.
        specs: Dtype and shape of its tensors under the checkpoint's names.
        names: The checkpoint's name of each tensor; by default they are the same.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        specs: Mapping[str, ResultSpec],
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._checkpoint, self._specs = checkpoint, specs
        self._names = {name: name for name in specs} if names is None else dict(names)
        self._group: dict[str, torch.Tensor] = {}
        self._opened: OpenInputs | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:  # Mapping's own would compute the tensor
        return name in self._names

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._group:
            self._group = {}  # before the next, so that one at a time is in memory
            self._group = self._compute(self._names_from(name))
        return self._group.pop(name)

    def renamed(self, names: Mapping[str, str]) -> RecomputedExpert:
        """Rename some of the tensors.

        Args:
            names: The present name of each new one.
        """
        own = {new: self._names[name] for new, name in names.items()}
        return RecomputedExpert(self._checkpoint, self._specs, own)

    def only(self, names: Iterable[str]) -> RecomputedExpert:
        """Select some of the tensors."""
        return self.renamed({name: name for name in names})

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each tensor, which takes no computing."""
        return {name: torch.Size(self._specs[own][1]) for name, own in self._names.items()}

    def num_bytes(self) -> int:
        """Count the bytes of all tensors."""
        return sum(num_bytes(*self._specs[name]) for name in self._names.values())

    def _names_from(self, name: str) -> list[str]:
        """List the tensors that are computed together, from one on."""
        names = list(self._names)
        group: list[str] = []
        size = 0
        for other in names[names.index(name) :]:
            size += num_bytes(*self._specs[self._names[other]])
            if group and size > GROUP_BYTES:
                break
            group.append(other)
        return group

    def _compute(self, names: list[str]) -> dict[str, torch.Tensor]:
        originals = {self._names[name]: name for name in names}
        specs = {original: self._specs[original] for original in originals}
        computed = {
            name: torch.empty(shape, dtype=dtype.torch) for name, (dtype, shape) in specs.items()
        }
        with ExitStack() as closing:
            if self._opened is None:
                like = {name: shape for name, (_, shape) in self._specs.items()}
                self._opened = OpenInputs(self._checkpoint.sources(), like=like).__enter__()
            closing.callback(self._close)
            stream(
                [MergeJob(checkpoint=self._checkpoint, specs=specs, sink=TensorSink(computed))],
                self._opened,
            )
            if names[-1] != next(reversed(self._names)):
                closing.pop_all()  # the inputs stay open until the last tensor
        return {originals[original]: tensor for original, tensor in computed.items()}

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.__exit__(None, None, None)
        self._opened = None


def recomputed_experts(
    recipe: BoundRecipe, *, missing: Missing = "error", like: Shapes | None = None
) -> dict[str, RecomputedExpert]:
    """Return the experts of a recipe, none of whose tensors is computed yet.

    Args:
        recipe: The recipe. An input that is a state dict is read again at every switch, so it must
            not change: not the live weights that are switched.
        missing: `error`, or `keep`, which warns of what is left out; see `check_coverage`.
        like: As for `realise`.

    Raises:
        RecipeError, CheckpointError, ShapeError: As `realise`, as far as headers tell.
    """
    recipe.check_pins()
    fit = recipe.fit(like=like, missing=missing)
    if fit.coverage.unmatched:
        warnings.warn(_left_out(fit.coverage.unmatched), stacklevel=2)
    return {
        name: RecomputedExpert(expert, fit.specs[name]) for name, expert in recipe.experts.items()
    }


def _left_out(unmatched: Mapping[str, tuple[str, ...]]) -> str:
    names = [f"`{name}` (not in {', '.join(lacking)})" for name, lacking in unmatched.items()]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"{len(names)} tensors are not merged, as one side lacks them: {', '.join(names[:_SHOWN])}"
        f"{more}."
    )
