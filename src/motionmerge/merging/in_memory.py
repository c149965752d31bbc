"""Experts without files: as tensors, or straight in the parameters of a live module.

The bits are those of the files that `merge` writes: all three come from `streaming.stream`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.io.safetensors_file import TensorSpec
from motionmerge.lazy_torch import torch
from motionmerge.merging.compute.plan import MergeJob
from motionmerge.merging.compute.streaming import stream
from motionmerge.merging.inputs.coverage import Missing
from motionmerge.merging.inputs.pieces import Shapes
from motionmerge.merging.recipes.bound import AnyRecipe, BoundRecipe
from motionmerge.merging.recipes.recipe import InputValue
from motionmerge.tensors import storable


def realise(
    recipe: AnyRecipe,
    *,
    experts: Sequence[str] | None = None,
    inputs: Mapping[str, InputValue] | None = None,
    like: Shapes | None = None,
    missing: Missing = "error",
    allow_nonfinite: bool = False,
    stochastic_rounding: int | None = None,
    threads: int | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Compute experts in memory: the same bits as the files that `merge` writes.

    Args:
        recipe: A recipe, its file, the name of a shipped one, or one whose inputs are found.
        experts: Which of its experts; all by default.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        like: Names and shapes of a denoiser, which the results get where the inputs' names are
            others that are known for it; by default those of the first input.
        missing: `error` or `keep`; see `check_coverage`.
        allow_nonfinite: Accept NaN and infinity in the inputs.
        stochastic_rounding: Seed; None rounds to the nearest value.
        threads: How many; None takes one per core. Never changes a bit.

    Returns:
        Per expert, its tensors by name in the order of the checkpoint at its front.

    Raises:
        RecipeError, CheckpointError, ShapeError: As `merge`.
    """
    bound = BoundRecipe.of(recipe, inputs)
    bound.check_pins()
    chosen = bound.chosen(experts)
    with bound.open(chosen, allow_nonfinite=allow_nonfinite, like=like) as opened:
        fit = bound.fit(opened, experts=list(chosen), like=like, missing=missing)
        jobs, computed = [], {}
        for name, checkpoint in chosen.items():
            specs = fit.specs[name]
            computed[name] = {key: torch.empty(s, dtype=d.torch) for key, (d, s) in specs.items()}
            jobs.append(
                MergeJob(checkpoint=checkpoint, specs=specs, sink=TensorSink(computed[name]))
            )
        stream(jobs, opened, seed=stochastic_rounding, threads=threads)
    return computed


def apply(
    recipe: AnyRecipe,
    module: torch.nn.Module,
    *,
    expert: str | None = None,
    prefix: str = "",
    inputs: Mapping[str, InputValue] | None = None,
    missing: Missing = "error",
    allow_nonfinite: bool = False,
    stochastic_rounding: int | None = None,
    threads: int | None = None,
) -> None:
    """Compute an expert straight into a live module's parameters; no file is written.

    Each value is rounded once, to the module's own dtype: where that is the checkpoint's dtype, the
    module holds the bits of the merged file. What is no tensor of the expert stays as it is only
    if the module does not save it.

    Args:
        recipe: A recipe, its file, the name of a shipped one, or one whose inputs are found.
        module: Gets the expert's weights, on whatever device it is.
        expert: Which; may be left out if the recipe has only one.
        prefix: Take the tensors whose names begin so, e.g. `unet.`, under the rest of their names.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        missing: `error` or `keep`; see `check_coverage`.
        allow_nonfinite: Accept NaN and infinity in the inputs.
        stochastic_rounding: Seed; None rounds to the nearest value.
        threads: How many; None takes one per core. Never changes a bit.

    Raises:
        ConfigError: The recipe has several experts and `expert` is not given.
        CheckpointError: The expert's names are not the module's, or as `merge`. If an input turns
            out to be damaged on the way, the module is partly changed: load it anew.
        RecipeError, ShapeError: As `merge`, or a shape differs from the module's.
    """
    bound = BoundRecipe.of(recipe, inputs)
    names = list(bound.recipe.experts)
    if expert is None and len(names) > 1:
        raise ConfigError(f"The recipe has the experts {', '.join(names)}.", fix="Pass `expert=`.")
    bound.check_pins()
    ((name, checkpoint),) = bound.chosen([expert or names[0]]).items()
    held = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    like = {name: tuple(tensor.shape) for name, tensor in held.items()}
    with bound.open([name], allow_nonfinite=allow_nonfinite, like=like) as opened:
        fit = bound.fit(opened, experts=[name], like=like, missing=missing)
        specs = {key: spec for key, spec in fit.specs[name].items() if key.startswith(prefix)}
        _check_module(specs, held)
        specs = {name: (storable(held[name].dtype), shape) for name, (_, shape) in specs.items()}
        stream(
            [MergeJob(checkpoint=checkpoint, specs=specs, sink=TensorSink(held))],
            opened,
            seed=stochastic_rounding,
            threads=threads,
        )


class TensorSink:
    """Puts what is computed into tensors that exist, on any device and in any memory layout."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._lock = threading.Lock()
        self._gathered: dict[str, tuple[torch.Tensor, int]] = {}

    def place(self, name: str, /) -> None:
        """Return None: no tensor lies in a file."""

    def write_at(self, name: str, begin: int, data: memoryview, /) -> None:
        if not data:
            return
        target = self._tensors[name]
        values = torch.frombuffer(data, dtype=target.dtype)
        start = begin // target.element_size()
        if target.is_contiguous():
            target.view(-1)[start : start + values.numel()].copy_(values)
            return
        with self._lock:
            whole, filled = self._gathered.pop(name, (None, 0))
            whole = torch.empty(target.shape, dtype=target.dtype) if whole is None else whole
            whole.view(-1)[start : start + values.numel()] = values
            if filled + values.numel() < target.numel():
                self._gathered[name] = (whole, filled + values.numel())
            else:
                target.copy_(whole)


def _check_module(specs: Mapping[str, TensorSpec], held: Mapping[str, torch.Tensor]) -> None:
    lacking = [name for name in held if name not in specs]
    unknown = [name for name in specs if name not in held]
    if lacking or unknown:
        side = "the expert lacks" if lacking else "the module lacks"
        raise CheckpointError(
            f"The expert and the module differ in {len(lacking) + len(unknown)} tensors; {side} "
            f"e.g. `{(lacking or unknown)[0]}`.",
            fix="Give the module that the checkpoint belongs to, and its `prefix`, e.g. 'unet.'.",
        )
    for name, (_, shape) in specs.items():
        if tuple(held[name].shape) != shape:
            raise ShapeError(
                f"`{name}` is {list(held[name].shape)} in the module but {list(shape)} in the "
                "expert.",
                fix="Build the module with the checkpoint's configuration.",
            )
