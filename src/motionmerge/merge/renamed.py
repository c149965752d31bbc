"""Several checkpoints under the names of the first: folders of diffusers and original files alike.

Nothing is converted ahead: a view reads the pieces of a tensor where they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from motionmerge.errors import CheckpointError
from motionmerge.lazy_torch import torch
from motionmerge.merge.names.layout import to_ours
from motionmerge.merge.names.rules import Names
from motionmerge.merge.names.wrappers import DENOISERS, bare_names, denoiser_alone
from motionmerge.merge.original_names import STYLES
from motionmerge.merge.pieces import Layout, Pieced, Shapes, composed, inverted, whole
from motionmerge.tensors import DType, dtype_name

if TYPE_CHECKING:
    from motionmerge.merge.sources import Place, TensorSource

Key = TypeVar("Key")


class RenamedTensors:
    """A checkpoint whose tensors have other names, are split, fused, reordered or reshaped.

    Args:
        source: The checkpoint.
        layout: The tensors by their new names, as pieces of the source's.
    """

    def __init__(self, source: TensorSource, layout: Layout) -> None:
        self._source, self._layout = source, layout

    def keys(self) -> list[str]:
        """Return the new names in order."""
        return list(self._layout)

    def shape(self, name: str, /) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._layout[name].shape

    def dtype(self, name: str, /) -> DType:
        """Return a tensor's dtype.

        Raises:
            CheckpointError: Its pieces have several.
        """
        pieces = self._layout[name].pieces
        found = dict.fromkeys(self._source.dtype(piece.name) for piece in pieces)
        if len(found) > 1:
            listed = ", ".join(
                f"`{piece.name}` is {dtype_name(self._source.dtype(piece.name))}"
                for piece in pieces[:4]
            )
            raise CheckpointError(
                f"`{name}` consists of tensors of several dtypes: {listed}.",
                fix="Save them in one dtype.",
            )
        return next(iter(found))

    def read(self, name: str, /) -> torch.Tensor:
        """Read a tensor into memory of its own."""
        tensor = self._layout[name]
        parts = []
        for piece in tensor.pieces:
            stored = self._source.read(piece.name).reshape(-1)
            parts.append(stored[piece.begin : piece.end])
        if len(parts) == 1 and parts[0].numel() == stored.numel():
            return parts[0].reshape(tensor.shape)
        return torch.cat(parts).reshape(tensor.shape)

    def read_into(self, name: str, begin: int, target: memoryview, /) -> None:
        """Read the bytes of a tensor from `begin` on; `target` says how many. Any thread may.

        Reads on into what lies behind the tensor where it has a `place`.
        """
        tensor = self._layout[name]
        size = self._source.dtype(tensor.pieces[0].name).itemsize
        if len(tensor.pieces) == 1:
            piece = tensor.pieces[0]
            self._source.read_into(piece.name, piece.begin * size + begin, target)
            return
        # Bytes, not entries: a caller may ask for a part of an entry.
        end = begin + len(target)
        first, last = begin // size, -(-end // size)
        offset = first * size
        for piece in tensor.cut(first, last):
            skipped = max(0, begin - offset)
            count = min((piece.end - piece.begin) * size, end - offset) - skipped
            part = target[offset + skipped - begin : offset + skipped - begin + count]
            self._source.read_into(piece.name, piece.begin * size + skipped, part)
            offset += (piece.end - piece.begin) * size

    def place(self, name: str, /) -> Place | None:
        """Return the file and the byte in it where a tensor begins; None if it is not one piece."""
        pieces = self._layout[name].pieces
        if len(pieces) > 1:
            return None
        found = self._source.place(pieces[0].name)
        if found is None:
            return None
        file, begin = found
        return file, begin + pieces[0].begin * self._source.dtype(pieces[0].name).itemsize


@dataclass(frozen=True)
class Reading:
    """A checkpoint in the names of diffusers, as far as one way of naming explains it.

    Attributes:
        names: The way of naming; None if its names are taken for those of diffusers.
        layout: Its tensors, as pieces of the stored ones.
        stored: The shapes of the stored ones.
    """

    names: Names | None
    layout: Layout
    stored: Shapes

    @cached_property
    def denoisers(self) -> list[str]:
        """The denoisers that its names tell apart."""
        found = dict.fromkeys(name.partition(".")[0] for name in self.layout)
        return [name for name in found if name in DENOISERS]

    @cached_property
    def by_stored(self) -> Layout:
        """The stored tensors as pieces of those of diffusers."""
        return inverted(self.layout, self.stored)

    def in_module(self, module: str) -> Reading:
        """Return the same as that one denoiser of a pipeline."""
        named = {f"{module}.{name}": tensor for name, tensor in self.layout.items()}
        return Reading(self.names, named, self.stored)

    def without_module(self, module: str) -> Reading:
        """Return the same with a denoiser's tensors under their bare names."""
        bare = {name.removeprefix(f"{module}."): tensor for name, tensor in self.layout.items()}
        return Reading(self.names, bare, self.stored)


def readings(shapes: Shapes) -> list[Reading]:
    """Return all that the names of a checkpoint may mean.

    The first is as they are but for wrappers.

    Args:
        shapes: Shape of each stored tensor.
    """
    split = bare_names(denoiser_alone(shapes))
    modules: dict[str, dict[str, str]] = {}
    for stored, (module, name) in split.items():
        modules.setdefault(module, {}).setdefault(name, stored)
    if sum(map(len, modules.values())) < len(split):  # two tensors would have one name
        return [Reading(None, {name: whole(name, shape) for name, shape in shapes.items()}, shapes)]
    found = [_reading(None, modules, shapes)]
    for names in STYLES:
        known = sum(names.theirs.find_tensor(name) is not None for _, name in split.values())
        if 2 * known > len(split):
            found.append(_reading(names, modules, shapes))
    return found


def _reading(
    names: Names | None, modules: Mapping[str, Mapping[str, str]], shapes: Shapes
) -> Reading:
    layout: dict[str, Pieced] = {}
    for module, stored in modules.items():
        prefix = f"{module}." if module else ""
        own = {name: whole(name, shapes[key], key) for name, key in stored.items()}
        if names is None:
            named: Mapping[str, Pieced] = own
        else:
            converted = to_ours({name: tensor.shape for name, tensor in own.items()}, names)
            left = {name: whole(name, own[name].shape) for name in converted.left}
            named = composed({**left, **converted.layout}, own)
        layout |= {prefix + name: tensor for name, tensor in named.items()}
    return Reading(names, layout, shapes)


def in_one_name_space(
    opened: Mapping[Key, TensorSource], *, like: Shapes | None = None
) -> dict[Key, TensorSource]:
    """Present checkpoints under the names of the first of them.

    What cannot be told for certain keeps its names: two ways of naming that fit equally well, one
    denoiser beside two. `why_not` says so.

    Args:
        opened: The checkpoints.
        like: Take these names and shapes instead of the first checkpoint's.
    """
    found = dict(opened)
    held = list(opened.items())
    is_given = like is not None
    if like is None and held:
        like, held = _shapes(held[0][1]), held[1:]
    anchors: list[Reading] | None = None
    for key, source in held:
        shapes = _shapes(source)
        assert like is not None
        if not _differ(like, shapes):
            continue
        anchors = readings(like) if anchors is None else anchors
        layout = _fit(like, list(_pairs(anchors, readings(shapes), given=is_given)), shapes)
        if layout is not None:
            found[key] = RenamedTensors(source, layout)
    return found


def _shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    return {name: source.shape(name) for name in source.keys()}  # noqa: SIM118  (no mapping)


def _differ(like: Shapes, shapes: Shapes) -> bool:
    """Tell whether other names might fit better: not if one side has all those of the other."""
    common = like.keys() & shapes.keys()
    return len(common) < min(len(like), len(shapes))


@dataclass(frozen=True)
class _Pair:
    """The anchor and another checkpoint, both in names of diffusers."""

    anchor: Reading
    other: Reading

    @cached_property
    def num_common(self) -> int:
        """Tensors that both have in one size."""
        return sum(
            name in self.other.layout and _is_alike(tensor.shape, self.other.layout[name].shape)
            for name, tensor in self.anchor.layout.items()
        )

    @cached_property
    def layout(self) -> dict[str, Pieced] | None:
        """The other's tensors under the anchor's stored names; those left over under their own.

        None if two would have one name.
        """
        made: dict[str, Pieced] = {}
        for name, tensor in self.anchor.by_stored.items():
            parts = dict.fromkeys(piece.name for piece in tensor.pieces)
            if not all(part in self.other.layout for part in parts):
                continue
            if all(
                _is_alike(self.anchor.layout[part].shape, self.other.layout[part].shape)
                for part in parts
            ):
                made |= composed({name: tensor}, self.other.layout)
            elif len(parts) == 1:  # of another size: the other's own shape will be named
                made[name] = self.other.layout[next(iter(parts))]
        used = {piece.name for tensor in made.values() for piece in tensor.pieces}
        explained = {piece.name for t in self.other.layout.values() for piece in t.pieces}
        left = {
            n: whole(n, shape) for n, shape in self.other.stored.items() if n in explained - used
        }
        return None if left.keys() & made.keys() else made | left


def _is_alike(first: Sequence[int], second: Sequence[int]) -> bool:
    """Tell whether two shapes differ in dimensions of size one at most."""
    return [size for size in first if size != 1] == [size for size in second if size != 1]


def _fit(like: Shapes, pairs: Sequence[_Pair], shapes: Shapes) -> Layout | None:
    """Return a checkpoint's tensors under the anchor's names; None if its own fit as well."""
    as_it_is = len(like.keys() & shapes.keys())
    most = max((pair.num_common for pair in pairs), default=0)
    best = [pair for pair in pairs if pair.num_common == most]
    if most <= as_it_is or any(pair.layout != best[0].layout for pair in best[1:]):
        return None
    return best[0].layout


def _pairs(
    anchors: Iterable[Reading], others: Sequence[Reading], *, given: bool
) -> Iterator[_Pair]:
    """Give all that two checkpoints may mean together.

    One denoiser is that of a pipeline that has only one. Where the names are `given`, a checkpoint
    that names its denoiser keeps that name.
    """
    for anchor in anchors:
        for other in others:
            if anchor.denoisers and not other.denoisers:
                if len(anchor.denoisers) == 1:
                    yield _Pair(anchor, other.in_module(anchor.denoisers[0]))
            elif other.denoisers and not anchor.denoisers:
                if len(other.denoisers) == 1 and not given:
                    yield _Pair(anchor, other.without_module(other.denoisers[0]))
            else:
                yield _Pair(anchor, other)
