"""Do the inputs of an expression fit together? Answered from their headers, before any work."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from motionmerge.errors import CheckpointError, ConfigError, ShapeError
from motionmerge.io.quantised import UNQUANTISED, looks_like_codes
from motionmerge.merging.inputs.sources import OpenInputs, Source
from motionmerge.merging.inputs.unlike_names import nothing_matched
from motionmerge.merging.lora.detection import check_whole_weights
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
        unused_strengths: Keys of alpha in LoRA files whose layers these do not hold.
    """

    matched: tuple[str, ...]
    reached: tuple[tuple[str, ...], ...]
    unmatched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unused_strengths: tuple[str, ...] = ()


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
        ShapeError: Two inputs disagree about a tensor's shape, or one that a task vector would
            change is not floating point.
        RecipeError: An `only(...)` matches no tensor.
        ConfigError: `missing` is neither `error` nor `keep`.
    """
    check_missing(missing)
    check_checkpoints(inputs)
    for checkpoint in checkpoints:
        held = inputs.names(checkpoint.anchor)
        for vector in checkpoint.vectors_inside():
            vector.verify(held)
        for name in names or ():
            if not inputs.has(checkpoint.anchor, name):
                raise _unknown_tensor(name, checkpoint.anchor, held)
    names_are_all = names is None
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
    strangers: dict[str, str] = {}
    if names_are_all:  # also what `only(...)` would hide: it fits nothing, whatever is selected
        for checkpoint in checkpoints:
            for source in checkpoint.sources():
                strangers |= inputs.strangers(source)
                unmatched |= dict.fromkeys(inputs.strangers(source), (checkpoint.anchor.name,))
    if unmatched and not any(reached):
        raise nothing_matched(
            {source.name: _held(source, inputs) for source in inputs.sources},
            loras=[source.name for source in inputs.sources if not inputs.is_checkpoint(source)],
        )
    if unmatched and missing == "error":
        raise _one_sided(unmatched, strangers)
    matched = (name for name in names if all(inputs.has(s, name) for s in inputs.sources))
    unused = (key for source in inputs.sources for key in inputs.unused_strengths(source))
    return Coverage(tuple(matched), tuple(map(tuple, reached)), unmatched, tuple(unused))


def _held(source: Source, inputs: OpenInputs) -> dict[str, tuple[int, ...]]:
    shapes = {name: inputs.shape(source, name) for name in inputs.names(source)}
    return shapes | dict.fromkeys(inputs.strangers(source), ())


def check_checkpoints(inputs: OpenInputs) -> None:
    """Check that no input that stands for the weights of a model is a LoRA.

    Raises:
        CheckpointError: One is, or was saved with LoRA adapters in it.
    """
    for source in inputs.sources:
        if inputs.is_checkpoint(source):
            check_whole_weights(source.name, inputs.names(source))


def check_missing(missing: str) -> None:
    """Check the value of a `missing` argument.

    Raises:
        ConfigError: It is neither `error` nor `keep`.
    """
    if missing not in ("error", "keep"):
        raise ConfigError(f"`missing` is {missing!r}.", fix="Use `error` (the default) or `keep`.")


def _check_shapes(name: str, anchor: Source, needed: Iterable[Source], inputs: OpenInputs) -> None:
    shape, dtype = inputs.shape(anchor, name), inputs.dtype(anchor, name)
    _refuse_only_copied(name, anchor, needed, inputs)
    if not is_mergeable(dtype, shape):
        _refuse_codes(name, anchor, needed, inputs)
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
                fix=UNQUANTISED,
            )


def _refuse_codes(name: str, anchor: Source, needed: Iterable[Source], inputs: OpenInputs) -> None:
    """Refuse to keep integers that a task vector should change.

    Those of buffers (counters, indices) are integers in every input and no matrices of 8 bits.
    """
    shape, dtype = inputs.shape(anchor, name), inputs.dtype(anchor, name)
    if dtype.is_floating_point or not shape:
        return
    moved = [source for source in needed if inputs.dtype(source, name).is_floating_point]
    if moved or looks_like_codes(name, dtype, shape):
        raise ShapeError(
            f"`{name}` is {dtype_name(dtype)} {list(shape)} in `{anchor.name}`: integers, codes of "
            "a quantised weight without a scale that is known, and a task vector would change it.",
            fix=UNQUANTISED,
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


def _one_sided(
    unmatched: Mapping[str, tuple[str, ...]], strangers: Mapping[str, str]
) -> CheckpointError:
    lines = [
        f"  {name} ({strangers.get(name) or 'not in ' + ', '.join(lacking)})"
        for name, lacking in unmatched.items()
    ]
    listed = "\n".join(lines[:10] + ([f"  ... {len(lines) - 10} more"] if lines[10:] else []))
    fix = "Pass `missing='keep'`: each expert keeps what its first checkpoint has."
    if any("transformer_blocks.0.fusion." in name for name in unmatched):  # SVD, I2VGen-XL
        fix = (
            "Add the adapter to the checkpoint that lacks it (`add_text_adapter(unet, ...)` of "
            "`motionmerge.models.text_adapters`, and save); it starts as the identity. Or pass "
            "`missing='keep'`."
        )
    elif any(part in name for name in unmatched for part in ("temporal_adapter", ".fusion.")):
        fix = (
            "Add the adapter to the checkpoint that lacks it (`motionmerge convert --add-adapter`, "
            "or `unet.add_temporal_adapter()` and save); it starts as the identity. Or pass "
            "`missing='keep'`."
        )
    plural = "tensor is" if len(lines) == 1 else "tensors are"
    return CheckpointError(f"{len(lines)} {plural} missing on one side:\n{listed}", fix=fix)
