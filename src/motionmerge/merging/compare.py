"""How two checkpoints differ: norms, cosines and changed tensors, by parameter group.

    relative change = |a - b| / |a|,   cosine = <a, b> / (|a| |b|)

Given a base, a and b are the task vectors from it, and the cosine says whether they agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.io.quantised import looks_like_codes
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.nodes import Checkpoint, realised
from motionmerge.merging.inputs.coverage import check_checkpoints
from motionmerge.merging.inputs.sources import MemoryTensors, OpenInputs, Source
from motionmerge.merging.lora.detection import is_lora
from motionmerge.merging.lora.task_vector import LoraTensors
from motionmerge.packages import missing_package
from motionmerge.parameter_groups import GROUPS, OTHER, group_of
from motionmerge.tensors import dtype_name, is_mergeable

Weights = str | Path | Checkpoint
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Change:
    """How one tensor, or all of a group, differs between two checkpoints.

    Attributes:
        tensors: How many tensors.
        changed: How many of them differ at all.
        parameters: Number of entries.
        norm_first: Euclidean norm in the first checkpoint.
        norm_second: The same in the second.
        norm_difference: Norm of the difference.
        dot: Inner product of the two.
    """

    tensors: int
    changed: int
    parameters: int
    norm_first: float
    norm_second: float
    norm_difference: float
    dot: float

    @property
    def relative(self) -> float:
        """Norm of the difference over that of the first; infinite if only the first is zero."""
        if not self.norm_difference:
            return 0.0
        return self.norm_difference / self.norm_first if self.norm_first else math.inf

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the two; None if one of them is zero."""
        norms = self.norm_first * self.norm_second
        return max(-1.0, min(1.0, self.dot / norms)) if norms else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the relative change and the cosine among them."""
        relative = self.relative if math.isfinite(self.relative) else None
        return {**asdict(self), "relative": relative, "cosine": self.cosine}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two checkpoints differ.

    Attributes:
        first: What the first is called.
        second: What the second is called.
        base: What both are measured from, or None.
        tensors: The difference of each tensor that both have, in the order of the first.
        only_first: Names that only the first has.
        only_second: Names that only the second has.
        other_shape: Names whose shapes differ; they are not compared.
    """

    first: str
    second: str
    base: str | None
    tensors: Mapping[str, Change]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other_shape: tuple[str, ...]

    @property
    def groups(self) -> dict[str, Change]:
        """The differences added up by parameter group; groups without tensors are left out."""
        members: dict[str, list[Change]] = {group: [] for group in (*GROUPS, OTHER)}
        for name, difference in self.tensors.items():
            members[group_of(name)].append(difference)
        return {group: _total(found) for group, found in members.items() if found}

    @property
    def total(self) -> Change:
        """The differences of all tensors added up."""
        return _total(self.tensors.values())

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that differ, the largest relative change first."""
        found = [name for name, difference in self.tensors.items() if difference.changed]
        return tuple(sorted(found, key=lambda name: -self.tensors[name].relative))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "base": self.base,
            "total": self.total.to_dict(),
            "groups": {group: found.to_dict() for group, found in self.groups.items()},
            "changed": {name: self.tensors[name].to_dict() for name in self.changed},
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "other_shape": list(self.other_shape),
        }

    def __str__(self) -> str:
        measured = f", both measured from {self.base}" if self.base else ""
        lines = [f"{self.first} and {self.second}{measured}:"]
        lines.append(f"{'group':16}{'tensors':>8}{'changed':>9}{'relative':>10}{'cosine':>9}")
        for group, found in [*self.groups.items(), ("all", self.total)]:
            cosine = "-" if found.cosine is None else f"{found.cosine:.4f}"
            lines.append(
                f"{group:16}{found.tensors:8,}{found.changed:9,}{found.relative:10.2%}{cosine:>9}"
            )
        for title, names in (
            ("largest changes", self.changed),
            (f"only in {self.first}", self.only_first),
            (f"only in {self.second}", self.only_second),
            ("of different shape", self.other_shape),
        ):
            if names:
                more = f" ... {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{title}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)


def compare(
    first: Weights,
    second: Weights,
    *,
    base: Weights | None = None,
    allow_nonfinite: bool = False,
) -> Comparison:
    """Compare two checkpoints, tensor by tensor, with one of each in memory.

    Two LoRA files are compared by what they add to the weights, alpha / rank * up @ down: the same
    LoRA may have other factors.

    Args:
        first: Weights, or an expression; or a LoRA file.
        second: Weights, or an expression; or a LoRA file if the first is one.
        base: Measure both from these weights: compares task vectors. Of LoRA files, the model
            that they are for, which lets their layers find each other in any style of names.
        allow_nonfinite: Accept NaN and infinity.

    Raises:
        CheckpointError: Weights cannot be read, hold NaN, or have no tensor in common that can be
            compared.
        ShapeError: `base` differs in a shape from both.
    """
    sides = [_checkpoint(first, "first"), _checkpoint(second, "second")]
    start = None if base is None else _checkpoint(base, "base")
    if all(map(_is_lora, sides)):
        sides, start = _changes_of_loras(sides, start), None
    everything = [*sides, *([start] if start else [])]
    sources = [source for checkpoint in everything for source in checkpoint.sources()]
    with OpenInputs(sources, allow_nonfinite=allow_nonfinite) as inputs:
        check_checkpoints(inputs)
        names = [inputs.names(side.anchor) for side in sides]
        shared = [name for name in names[0] if inputs.has(sides[1].anchor, name)]
        if not shared:
            raise _nothing_in_common(sides, names)
        tensors, other_shape = {}, []
        for name in shared:
            shape = inputs.shape(sides[0].anchor, name)
            if shape != inputs.shape(sides[1].anchor, name):
                other_shape.append(name)
            elif is_mergeable(inputs.dtype(sides[0].anchor, name), shape):
                a, b = (_values(side, name, inputs) for side in sides)
                tensors[name] = _difference(a, b, _start_of(start, name, a, inputs))
            elif (dtype := inputs.dtype(sides[0].anchor, name)).is_only_copied:
                raise ShapeError(
                    f"`{name}` is {dtype_name(dtype)}, with which nothing is computed here.",
                    fix="Compare weights in fp32, fp16 or bf16.",
                )
            else:
                _refuse_codes(name, sides[0], inputs)
        if not tensors:
            raise _nothing_comparable(sides, shared, other_shape, inputs)
    return Comparison(
        first=str(sides[0]),
        second=str(sides[1]),
        base=None if start is None else str(start),
        tensors=tensors,
        only_first=_alone(names[0], names[1], sides[0]),
        only_second=_alone(names[1], names[0], sides[1]),
        other_shape=tuple(other_shape),
    )


def draw_comparison(comparison: Comparison, path: str | Path) -> None:
    """Draw the relative change of each group, and of each tensor along the model.

    Args:
        comparison: What to draw.
        path: The picture to write, .png or .svg.

    Raises:
        ConfigError: The ending is another one, or matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"Cannot draw `{path.name}`.", fix="End the name with .png or .svg.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package(error) or error from error
    groups = comparison.groups
    figure = Figure(figsize=(10, 0.4 * len(groups) + 2), layout="constrained")
    bars, line = figure.subplots(1, 2, width_ratios=(1, 2))
    changes = {group: found.relative for group, found in groups.items()}
    finite = {group: value for group, value in changes.items() if math.isfinite(value)}
    bars.barh(list(finite), list(finite.values()))
    bars.invert_yaxis()
    bars.set_xlabel("relative change")
    for group in groups:
        points = [
            (place, found.relative)
            for place, (name, found) in enumerate(comparison.tensors.items())
            if group_of(name) == group and found.changed and math.isfinite(found.relative)
        ]
        if points:
            line.scatter(*zip(*points, strict=True), s=6, label=group)
    if comparison.changed:
        line.set_yscale("log")
        line.legend(fontsize="small")
    line.set_xlabel("tensor, from input to output")
    figure.suptitle(f"{comparison.first} and {comparison.second}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _checkpoint(weights: Weights, name: str) -> Checkpoint:
    if isinstance(weights, Checkpoint):
        return weights.bind({})
    return Checkpoint.load(weights, name=Path(weights).stem or name)


def _nothing_in_common(
    sides: Sequence[Checkpoint], names: Sequence[Sequence[str]]
) -> CheckpointError:
    """Make the error for checkpoints, or LoRAs, without a tensor to compare."""
    examples = [
        next(iter((*own, *_alone(own, (), side))), "(none)")
        for side, own in zip(sides, names, strict=True)
    ]
    listed = " and ".join(f"`{example}`" for example in examples)
    if isinstance(sides[0].anchor.origin, LoraTensors):
        return CheckpointError(
            f"The LoRAs change no layer in common: {listed}.",
            fix="If they are for one model and only name its layers differently, pass "
            "`base=MODEL`. If they change different layers, there is nothing to compare.",
        )
    return CheckpointError(
        f"The checkpoints have no tensor name in common: {listed}.",
        fix="Compare weights of one layout (`motionmerge convert` changes DynamiCrafter's).",
    )


def _nothing_comparable(
    sides: Sequence[Checkpoint],
    shared: Sequence[str],
    other_shape: Sequence[str],
    inputs: OpenInputs,
) -> CheckpointError:
    """Make the error for checkpoints whose common tensors all differ in shape or are no weights."""
    name = next(iter((*other_shape, *shared)))
    first, second = (list(inputs.shape(side.anchor, name)) for side in sides)
    kind = dtype_name(inputs.dtype(sides[0].anchor, name))
    why = f"{first} and {second}" if other_shape else f"{kind} {first}"
    return CheckpointError(
        f"None of the {len(shared)} tensors that both checkpoints have can be compared: "
        f"{len(other_shape)} differ in shape, and the others are no weights. E.g. `{name}` is "
        f"{why}.",
        fix="Compare weights of one model.",
    )


def _alone(own: Sequence[str], others: Sequence[str], side: Checkpoint) -> tuple[str, ...]:
    """List what one side alone has, and what of a LoRA file is no layer of the model."""
    known, origin = set(others), side.anchor.origin
    strangers = origin.strangers() if isinstance(origin, LoraTensors) else ()
    return (*(name for name in own if name not in known), *strangers)


def _is_lora(side: Checkpoint) -> bool:
    """Return whether a stored checkpoint is a LoRA file; only its header is read."""
    if side.vectors:
        return False
    with OpenInputs([side.anchor]) as inputs:
        return is_lora(inputs.names(side.anchor))


def _changes_of_loras(loras: Sequence[Checkpoint], base: Checkpoint | None) -> list[Checkpoint]:
    """Return what LoRA files add to the weights of a model, as checkpoints.

    Without a base the layers of the first stand for the model, so that those of the second find
    them in any style of names.
    """
    model = _model_of(loras[0].anchor) if base is None else base.anchor
    changes = []
    for found in (lora.anchor for lora in loras):
        assert found.origin is not None
        changes.append(Checkpoint(Source(found.name, LoraTensors.fitted(found.origin, model))))
    return changes


def _model_of(lora: Source) -> Source:
    """Return a model without values that has just the layers of a LoRA file."""
    assert lora.origin is not None
    alone = LoraTensors.fitted(lora.origin, Source("nothing", MemoryTensors({})))
    layers = {name: torch.empty(shape, device="meta") for name, shape in alone.layers().items()}
    return Source("model", MemoryTensors(layers))


def _refuse_codes(name: str, side: Checkpoint, inputs: OpenInputs) -> None:
    dtype, shape = inputs.dtype(side.anchor, name), inputs.shape(side.anchor, name)
    if looks_like_codes(name, dtype, shape):
        raise CheckpointError(
            f"`{name}` of `{side.anchor.name}` is {dtype_name(dtype)} {list(shape)}: codes of a "
            "quantised weight without a scale that is known.",
            fix="Compare unquantised weights (bf16, fp16 or fp32).",
        )


def _values(side: Checkpoint, name: str, inputs: OpenInputs) -> Doubles:
    """Compute a tensor as it would be stored; codes and scales of a file give their own values."""
    if not side.vectors:
        return inputs.doubles(side.anchor, name)
    found: Doubles = realised(side, name, inputs).detach().double().numpy()
    return found


def _start_of(
    start: Checkpoint | None, name: str, like: Doubles, inputs: OpenInputs
) -> Doubles | None:
    if start is None or not inputs.has(start.anchor, name):
        return None
    tensor = _values(start, name, inputs)
    if tensor.shape != like.shape:
        raise ShapeError(
            f"`{name}` is {list(tensor.shape)} in the base but {list(like.shape)} in the others.",
            fix="Give the base that both were made from.",
        )
    return tensor


def _difference(a: Doubles, b: Doubles, start: Doubles | None) -> Change:
    gap = a - b
    if start is not None:
        a, b = a - start, b - start
    return Change(
        tensors=1,
        changed=int(bool(gap.any())),
        parameters=gap.size,
        norm_first=float(np.linalg.norm(a.ravel())),
        norm_second=float(np.linalg.norm(b.ravel())),
        norm_difference=float(np.linalg.norm(gap.ravel())),
        dot=float(np.vdot(a, b)),
    )


def _total(differences: Iterable[Change]) -> Change:
    found = list(differences)
    return Change(
        tensors=sum(each.tensors for each in found),
        changed=sum(each.changed for each in found),
        parameters=sum(each.parameters for each in found),
        norm_first=math.hypot(*(each.norm_first for each in found)),
        norm_second=math.hypot(*(each.norm_second for each in found)),
        norm_difference=math.hypot(*(each.norm_difference for each in found)),
        dot=math.fsum(each.dot for each in found),
    )
