"""Whole models from one way of naming to the other, as pieces: headers are all that is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from motionmerge.merging.inputs.pieces import Piece, Pieced, PieceLayout, Shape, Shapes, joined
from motionmerge.merging.names.rules import Names, numbered, parts_of


@dataclass(frozen=True)
class Converted:
    """The tensors of a model under other names.

    Attributes:
        layout: The tensors that have such names, as pieces of those of the model.
        left: The model's tensors that have none.
    """

    layout: PieceLayout
    left: tuple[str, ...]


@dataclass(frozen=True)
class _Block:
    """Rows that an original layer and one of diffusers share."""

    ours: int
    begin_in_ours: int
    begin_in_theirs: int
    rows: int


def to_ours(shapes: Shapes, names: Names) -> Converted:
    """Return the tensors of an original model under the names of diffusers.

    Args:
        shapes: Shape of each of its tensors.
        names: How they are called.
    """
    layout: dict[str, Pieced] = {}
    left = []
    for name, shape in shapes.items():
        found = names.theirs.find_tensor(name)
        made = None if found is None else _split(name, shape, found, names, shapes)
        if made is None or layout.keys() & made.keys():
            if not names.is_computed(name):
                left.append(name)
        else:
            layout |= made
    return Converted(layout, tuple(left))


def to_theirs(shapes: Shapes, names: Names) -> Converted:
    """Return the tensors of a model of diffusers under the names of the original.

    Args:
        shapes: Shape of each of its tensors.
        names: How the original calls them.
    """
    layout: dict[str, Pieced] = {}
    used: set[str] = set()
    for name in shapes:
        if name in used or (found := names.ours.find_tensor(name)) is None:
            continue
        template, number, leaf = found
        home = names.homes[template]
        ours = [numbered(part, number) + leaf for part in parts_of(names.table[home])]
        if all(part in shapes for part in ours):
            made = _fused(ours, home, number, names, shapes)
            if made is not None:
                before, behind = names.ones.get(home + leaf, (0, 0))
                shape = (*[1] * before, *made.shape, *[1] * behind)
                layout[numbered(home, number) + leaf] = Pieced(shape, made.pieces)
                used |= set(ours)
    return Converted(layout, tuple(name for name in shapes if name not in used))


def _split(
    name: str, shape: Shape, found: tuple[str, str, str], names: Names, shapes: Shapes
) -> dict[str, Pieced] | None:
    """Return what a tensor of the original holds; None if it cannot be cut as the table says."""
    template, number, leaf = found
    ours = parts_of(names.ours_of(template))
    before, behind = names.ones.get(template + leaf, (0, 0))
    kept = shape[before : len(shape) - behind]
    if kept and math.prod(kept) == math.prod(shape):
        shape = kept
    blocks = _blocks(
        template,
        len(ours),
        names,
        total=(*shape, 1)[0],
        rows_of=lambda path: _rows(numbered(path, number), shapes),
    )
    if blocks is None:
        return None
    row = math.prod(shape[1:])
    made = {}
    for index, path in enumerate(ours):
        own = sorted((b for b in blocks if b.ours == index), key=lambda block: block.begin_in_ours)
        pieces = joined(
            Piece(name, b.begin_in_theirs * row, (b.begin_in_theirs + b.rows) * row) for b in own
        )
        rows = (sum(block.rows for block in own), *shape[1:]) if shape else shape
        made[numbered(path, number) + leaf] = Pieced(rows, pieces)
    return made


def _fused(
    ours: Sequence[str], home: str, number: str, names: Names, shapes: Shapes
) -> Pieced | None:
    """Return the tensor of the original that holds some of ours."""
    first = shapes[ours[0]]
    if any(shapes[name][1:] != first[1:] for name in ours):
        return None
    rows = [(*shapes[name], 1)[0] for name in ours]
    blocks = _blocks(
        home,
        len(ours),
        names,
        total=sum(rows),
        rows_of=lambda path: _rows(numbered(names.ours_of(path), number), shapes),
        sizes=rows,
    )
    if blocks is None:
        return None
    row = math.prod(first[1:])
    pieces = joined(
        Piece(ours[b.ours], b.begin_in_ours * row, (b.begin_in_ours + b.rows) * row) for b in blocks
    )
    return Pieced((sum(rows), *first[1:]) if first else first, pieces)


def _blocks(
    path: str,
    num_ours: int,
    names: Names,
    *,
    total: int,
    rows_of: Callable[[str], int | None],
    sizes: Sequence[int] | None = None,
) -> list[_Block] | None:
    """Cut the rows of an original layer, in its order; None if they cannot be cut so.

    Args:
        path: The template of its path.
        num_ours: How many layers of diffusers it holds.
        names: The table.
        total: Its rows.
        rows_of: The rows of another layer of the block, None if there is none.
        sizes: Rows of each layer of diffusers, if they are known.
    """
    order = names.orders.get(path) or tuple((part, 0) for part in range(num_ours))
    if path in names.interleaved:
        head = rows_of(names.interleaved[path])
        if not head or total % (head * len(order)):
            return None
        heads = total // (head * len(order))
        order = tuple((ours, part + step) for step in range(heads) for ours, part in order)
    counts = [sum(ours == index for ours, _ in order) for index in range(num_ours)]
    if sizes is None:
        equal = None if path not in names.alike else rows_of(names.alike[path])
        if equal is None and path in names.alike:
            return None
        if equal is None:
            sizes = [total * count // len(order) for count in counts]
        else:
            sizes = [*[equal] * (num_ours - 1), total - equal * (num_ours - 1)]
    if sum(sizes) != total or min(sizes) < 0:
        return None
    if any(size % count for size, count in zip(sizes, counts, strict=True)):
        return None
    found, begin = [], 0
    for ours, part in order:
        rows = sizes[ours] // counts[ours]
        found.append(_Block(ours, part * rows, begin, rows))
        begin += rows
    return found


def _rows(path: str, shapes: Shapes) -> int | None:
    shape = shapes.get(f"{path}.weight", shapes.get(path))
    return shape[0] if shape else None
