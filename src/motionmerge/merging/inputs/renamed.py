"""Several checkpoints under the names of the first: folders of diffusers and original files alike.

Names and shapes decide, and values only between two orders of the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from motionmerge.errors import CheckpointError
from motionmerge.merging.inputs.piece_view import RenamedTensors, nearest
from motionmerge.merging.inputs.pieces import Pieced, PieceLayout, Shapes, composed, inverted, whole
from motionmerge.merging.names.layout import to_ours
from motionmerge.merging.names.original import STYLES, styles_for
from motionmerge.merging.names.rules import Names
from motionmerge.merging.names.wrappers import (
    DENOISERS,
    PROJECTOR,
    bare_names,
    denoiser_alone,
    with_projector,
)

if TYPE_CHECKING:
    from motionmerge.merging.inputs.sources import TensorSource

Key = TypeVar("Key")


@dataclass(frozen=True)
class Reading:
    """A checkpoint in the names of diffusers, as far as one way of naming explains it.

    Attributes:
        names: The way of naming; None if its names are taken for those of diffusers.
        layout: Its tensors, as pieces of the stored ones.
        stored: The shapes of the stored ones.
    """

    names: Names | None
    layout: PieceLayout
    stored: Shapes

    @cached_property
    def denoisers(self) -> list[str]:
        """The denoisers that its names tell apart."""
        found = dict.fromkeys(name.partition(".")[0] for name in self.layout)
        return [name for name in found if name in DENOISERS]

    @cached_property
    def by_stored(self) -> PieceLayout:
        """The stored tensors as pieces of those of diffusers."""
        return inverted(self.layout, self.stored)

    def in_module(self, module: str) -> Reading:
        """Return the same as that one denoiser of a pipeline."""
        named = {
            name if name.startswith(PROJECTOR) else f"{module}.{name}": tensor
            for name, tensor in self.layout.items()
        }
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
    for names in styles_for(with_projector(split.values())):
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

    A checkpoint that is not known under other names keeps its own; `unlike_names` says why.

    Args:
        opened: The checkpoints.
        like: Take these names and shapes instead of the first checkpoint's.

    Raises:
        CheckpointError: Two ways of naming fit a checkpoint equally well, and its values tell
            neither.
    """
    held = list(opened.items())
    if not held:
        return {}
    found = dict(opened)
    first = None
    if like is None:
        first = held.pop(0)[1]
        like = _shapes(first)
    anchors: list[Reading] | None = None
    for key, source in held:
        shapes = _shapes(source)
        if _may_differ(like, shapes):
            anchors = readings(like) if anchors is None else anchors
            pairs = list(_pairs(anchors, readings(shapes), given=first is None))
            layout = _fit(like, shapes, pairs, first, source)
            if layout is not None:
                found[key] = RenamedTensors(source, layout)
    return found


def _shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    return {name: source.shape(name) for name in source.keys()}  # noqa: SIM118  (no mapping)


_DEALT = tuple(
    f"{path.rpartition('{}')[2]}.weight" for names in STYLES for path in names.interleaved
)


def _may_differ(like: Shapes, shapes: Shapes) -> bool:
    """Check whether other names, or another order of rows, might fit better."""
    common = like.keys() & shapes.keys()
    if len(common) < min(len(like), len(shapes)):
        return True
    return any(name.endswith(_DEALT) for name in common)


@dataclass(frozen=True)
class _Pair:
    """The anchor and another checkpoint, both in names of diffusers."""

    anchor: Reading
    other: Reading

    @cached_property
    def num_common(self) -> int:
        """Tensors that both have in one size."""
        return sum(
            name in self.other.layout and is_alike(tensor.shape, self.other.layout[name].shape)
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
                is_alike(self.anchor.layout[part].shape, self.other.layout[part].shape)
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


def is_alike(first: Sequence[int], second: Sequence[int]) -> bool:
    """Check whether two shapes differ in dimensions of size one at most."""
    return [size for size in first if size != 1] == [size for size in second if size != 1]


def _fit(
    like: Shapes,
    shapes: Shapes,
    pairs: Sequence[_Pair],
    first: TensorSource | None,
    source: TensorSource,
) -> PieceLayout | None:
    """Return a checkpoint's tensors under the anchor's names; None to leave it as it is."""
    as_it_is = len(like.keys() & shapes.keys())
    most = max((pair.num_common for pair in pairs), default=0)
    if most < as_it_is or most == 0:
        return None
    layouts: list[PieceLayout] = []
    for pair in pairs:
        if pair.num_common == most and pair.layout is not None and pair.layout not in layouts:
            layouts.append(pair.layout)
    if len(layouts) > 1:
        chosen = None if first is None else nearest(layouts, first, source)
        if chosen is None and most > as_it_is:
            raise _unclear(pair.other for pair in pairs if pair.num_common == most)
        return chosen
    return layouts[0] if layouts and most > as_it_is else None


def _unclear(others: Iterable[Reading]) -> CheckpointError:
    styles = dict.fromkeys(other.names.style for other in others if other.names)
    return CheckpointError(
        f"The names of a checkpoint fit several ways of storing it: {'; '.join(styles)}. Its "
        "values do not tell which.",
        fix="Convert the file with diffusers, which has to be told (for MiniMax-H3: "
        "`from_single_file(file, qkv_layout=...)`), save it, and give that folder.",
    )


def _pairs(
    anchors: Iterable[Reading], others: Sequence[Reading], *, given: bool
) -> Iterator[_Pair]:
    """Yield all that two checkpoints may mean together.

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
