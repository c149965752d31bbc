"""A tensor as a list of pieces of others: what renames, splits, fuses and reorders stored tensors.

to_k [8, 16]  =  entries 128 .. 256 of  qkv [24, 16]
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Piece:
    """Neighbouring entries of a tensor, counted as they lie in memory.

    Attributes:
        name: The tensor.
        begin: Its first entry.
        end: The entry behind its last.
    """

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Pieced:
    """A tensor made of pieces of others, which lie one behind the other in it.

    Attributes:
        shape: Its shape.
        pieces: The pieces in order. They hold as many entries as the shape.
    """

    shape: Shape
    pieces: tuple[Piece, ...]

    @cached_property
    def ends(self) -> list[int]:
        """Where each piece ends in the tensor."""
        return list(accumulate(piece.end - piece.begin for piece in self.pieces))

    def cut(self, begin: int, end: int) -> list[Piece]:
        """Return the pieces of some of its entries."""
        found = []
        number = bisect_right(self.ends, begin)
        while begin < end:
            piece, stop = self.pieces[number], min(end, self.ends[number])
            offset = piece.end - self.ends[number]
            found.append(Piece(piece.name, begin + offset, stop + offset))
            begin, number = stop, number + 1
        return found


PieceLayout = Mapping[str, Pieced]
"""Tensors by name, each as pieces of those of another layout."""


def whole(name: str, shape: Shape, source_name: str | None = None) -> Pieced:
    """Return a tensor that is one other as it is."""
    return Pieced(shape, joined([Piece(source_name or name, 0, math.prod(shape))]))


def joined(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Join neighbours; empty pieces stay only where there is nothing else."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last and (last.begin == last.end or (last.name, last.end) == (piece.name, piece.begin)):
            found[-1] = piece if last.begin == last.end else Piece(last.name, last.begin, piece.end)
        elif piece.begin < piece.end or not found:
            found.append(piece)
    return tuple(found)


def composed(layout: PieceLayout, inner: PieceLayout) -> dict[str, Pieced]:
    """Return the tensors of a layout as pieces of what the tensors of `inner` are made of.

    Args:
        layout: Tensors made of those of `inner`.
        inner: Tensors made of others.
    """
    return {
        name: Pieced(
            tensor.shape,
            joined(
                deeper
                for piece in tensor.pieces
                for deeper in (
                    inner[piece.name].cut(piece.begin, piece.end) or inner[piece.name].pieces[:1]
                )
            ),
        )
        for name, tensor in layout.items()
        if all(piece.name in inner for piece in tensor.pieces)
    }


def inverted(layout: PieceLayout, shapes: Shapes) -> dict[str, Pieced]:
    """Return the tensors that a layout is made of, as pieces of its tensors.

    Args:
        layout: Tensors in pieces of stored ones; no entry is in two of them.
        shapes: The shapes of the stored ones.

    Returns:
        Those of the stored tensors whose every entry is in the layout.
    """
    held: dict[str, list[tuple[int, Piece]]] = {}
    for name, tensor in layout.items():
        begin = 0
        for piece in tensor.pieces:
            size = piece.end - piece.begin
            held.setdefault(piece.name, []).append((piece.begin, Piece(name, begin, begin + size)))
            begin += size
    found = {}
    for name, parts in held.items():
        pieces = joined(piece for _, piece in sorted(parts, key=lambda part: part[0]))
        if sum(piece.end - piece.begin for piece in pieces) == math.prod(shapes[name]):
            found[name] = Pieced(shapes[name], pieces)
    return found
