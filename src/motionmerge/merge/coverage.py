"""Do the inputs of an expression fit together? Answered from their headers, before any work."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.merge.sources import OpenInputs, Source
from motionmerge.tensors import dtype_name, is_mergeable, num_bytes

Missing = Literal["error", "keep"]


class Verifiable(Protocol):
    """A task vector, as far as coverage goes."""

    def verify(self, names: Sequence[str], /) -> None: ...


class Mergeable(Protocol):
    """A checkpoint expression, as far as coverage goes."""

    @property
    def anchor(self) -> Source: ...
    def sources(self, name: str | None = None, /) -> Iterator[Source]: ...
    def vectors_inside(self) -> Iterable[Verifiable]: ...


@dataclass(frozen=True)
class Coverage:
    """How the tensor names of several inputs relate.

    Attributes:
        matched: Names that every input has.
        reached: Per expression, the names that a task vector needs and no needed input lacks.
        unmatched: Names that a task vector needs, with the inputs that lack them.
    """

    matched: tuple[str, ...]
    reached: tuple[tuple[str, ...], ...]
    unmatched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def check_coverage(
    checkpoints: Sequence[Mergeable],
    inputs: OpenInputs,
    *,
    missing: Missing = "error",
    names: Sequence[str] | None = None,
) -> Coverage:
    """Compare names, shapes and dtypes of the inputs of some checkpoint expressions.

    Args:
        checkpoints: The expressions.
        inputs: Their sources, open.
        missing: What to do with a name that only some of the needed inputs have: `error`, or
            `keep` (each result keeps what the checkpoint at its front has).
        names: Look only at these; all by default.

    Raises:
        CheckpointError: A name is missing on one side under `error`, or nothing matches at all.
        ShapeError: Two inputs disagree about a tensor's shape, or one is not floating point.
        RecipeError: An `only(...)` matches no tensor.
        ConfigError: `missing` is neither `error` nor `keep`.
    """
    if missing not in ("error", "keep"):
        raise ConfigError(f"`missing` is {missing!r}.", fix="Use `error` (the default) or `keep`.")
    for checkpoint in checkpoints:
        held = inputs.names(checkpoint.anchor)
        for vector in checkpoint.vectors_inside():
            vector.verify(held)
        for name in names or ():
            if not inputs.has(checkpoint.anchor, name):
                raise _unknown_tensor(name, checkpoint.anchor, held)
    if names is None:
        names = list(
            dict.fromkeys(name for source in inputs.sources for name in inputs.names(source))
        )
    unmatched: dict[str, tuple[str, ...]] = {}
    reached: list[list[str]] = [[] for _ in checkpoints]
    for name in names:
        for checkpoint, found in zip(checkpoints, reached, strict=True):
            needed = tuple(dict.fromkeys(checkpoint.sources(name)))
            lacking = tuple(source.name for source in needed if not inputs.has(source, name))
            if len(needed) > 1 and lacking:
                unmatched[name] = lacking
            elif len(needed) > 1:
                found.append(name)
                _check_shapes(name, checkpoint.anchor, needed, inputs)
    if unmatched and not any(reached):
        raise _nothing_matched(inputs)
    if unmatched and missing == "error":
        raise _one_sided(unmatched)
    matched = (name for name in names if all(inputs.has(s, name) for s in inputs.sources))
    return Coverage(tuple(matched), tuple(map(tuple, reached)), unmatched)


def _check_shapes(name: str, anchor: Source, needed: Iterable[Source], inputs: OpenInputs) -> None:
    shape, dtype = inputs.shape(anchor, name), inputs.dtype(anchor, name)
    _refuse_only_copied(name, anchor, needed, inputs)
    if not is_mergeable(dtype, shape):
        return
    for source in needed:
        other = inputs.shape(source, name)
        if other != shape:
            raise ShapeError(
                f"`{name}` is {list(shape)} in `{anchor.name}` but {list(other)} in "
                f"`{source.name}`.",
                fix="Merge checkpoints of the same architecture, or leave the tensor out with "
                "`only(...)`.",
            )
        if not inputs.dtype(source, name).is_floating_point:
            raise ShapeError(
                f"`{name}` is {dtype_name(dtype)} in `{anchor.name}` but "
                f"{dtype_name(inputs.dtype(source, name))} in `{source.name}`.",
                fix="Use unquantised weights of both.",
            )


def _refuse_only_copied(
    name: str, anchor: Source, needed: Iterable[Source], inputs: OpenInputs
) -> None:
    """Refuse a difference of tensors that nothing computes with; equal ones are copied."""
    found = {source: inputs.dtype(source, name) for source in needed}
    if not any(dtype.is_only_copied for dtype in found.values()):
        return
    if len({(dtype, tuple(inputs.shape(one, name))) for one, dtype in found.items()}) == 1:
        size = num_bytes(found[anchor], inputs.shape(anchor, name))
        if len({_digest(one, name, size, inputs) for one in found}) == 1:
            return
    listed = ", ".join(f"{dtype_name(dtype)} in `{one.name}`" for one, dtype in found.items())
    raise ShapeError(
        f"`{name}` is {listed}: it differs, and merges do not compute with such a dtype.",
        fix="Use weights in fp32, fp16 or bf16, or leave the tensor out with `only(...)`.",
    )


def _digest(source: Source, name: str, size: int, inputs: OpenInputs) -> bytes:
    digest, buffer = hashlib.sha256(), bytearray(min(size, 1 << 20))
    for begin in range(0, size, 1 << 20):
        part = memoryview(buffer)[: size - begin]
        inputs.read_into(source, name, begin, part)
        digest.update(part)
    return digest.digest()


def _unknown_tensor(name: str, anchor: Source, held: Sequence[str]) -> CheckpointError:
    near = difflib.get_close_matches(name, held, n=1)
    example = near or held[:1]
    return CheckpointError(
        f"`{anchor.name}` has no tensor `{name}`.",
        fix=f"Ask for one that it has, e.g. `{example[0]}`." if example else "Use another file.",
    )


def _nothing_matched(inputs: OpenInputs) -> CheckpointError:
    examples = ", ".join(
        f"`{source.name}` has e.g. `{next(iter(inputs.names(source)), '(no tensors)')}`"
        for source in inputs.sources
    )
    return CheckpointError(
        f"The inputs have no tensor name in common: {examples}.",
        fix="Use checkpoints of one layout (`motionmerge convert` changes DynamiCrafter's).",
    )


def _one_sided(unmatched: Mapping[str, tuple[str, ...]]) -> CheckpointError:
    lines = [f"  {name} (not in {', '.join(lacking)})" for name, lacking in unmatched.items()]
    listed = "\n".join(lines[:10] + ([f"  ... {len(lines) - 10} more"] if lines[10:] else []))
    fix = "Pass missing='keep' (--missing keep): each expert keeps what its first checkpoint has."
    if any(part in name for name in unmatched for part in ("temporal_adapter", ".fusion.")):
        fix = (
            "Add the adapter to the checkpoint that lacks it (`motionmerge convert --add-adapter`, "
            "or `unet.add_temporal_adapter()` and save); it starts as the identity. Or pass "
            "missing='keep'."
        )
    plural = "tensor is" if len(lines) == 1 else "tensors are"
    return CheckpointError(f"{len(lines)} {plural} missing on one side:\n{listed}", fix=fix)
