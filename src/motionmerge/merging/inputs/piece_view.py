"""A checkpoint seen through a layout: tensors are read in pieces where they are stored.

Nothing is converted ahead, and no tensor is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from motionmerge.errors import CheckpointError
from motionmerge.lazy_torch import torch
from motionmerge.merging.inputs.pieces import Pieced, PieceLayout
from motionmerge.tensors import DType, dtype_name

if TYPE_CHECKING:
    from motionmerge.merging.inputs.sources import Place, TensorSource

_SAMPLED = 8
_SAMPLE = 1 << 14
_ALIKE, _UNLIKE = 0.7, 0.4
"""Cosines: a fine-tuned layer's with its base is near 1, that of strange rows near 0."""


class RenamedTensors:
    """A checkpoint whose tensors have other names, are split, fused, reordered or reshaped.

    Args:
        source: The checkpoint.
        layout: The tensors by their new names, as pieces of the source's.
    """

    def __init__(self, source: TensorSource, layout: PieceLayout) -> None:
        self._source, self._layout = source, layout

    def keys(self) -> list[str]:
        """Return the new names in order."""
        return list(self._layout)

    def shape(self, name: str, /) -> tuple[int, ...]:
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


def nearest(
    layouts: Sequence[PieceLayout], first: TensorSource, source: TensorSource
) -> PieceLayout | None:
    """Return the layout in which a checkpoint resembles another, None if that is not clear.

    Compares some rows of the tensors that lie elsewhere in one layout than in another.

    Args:
        layouts: The checkpoint's tensors under the names of the other.
        first: The other.
        source: The checkpoint.
    """
    places = list(_differing(layouts, first))
    wanted = torch.cat([_entries(first, name, begin, end) for name, begin, end in places])
    cosines = []
    for layout in layouts:
        view = RenamedTensors(source, layout)
        found = torch.cat([_entries(view, name, begin, end) for name, begin, end in places])
        cosines.append(float(torch.cosine_similarity(found, wanted, dim=0)))
    best, *others = sorted(cosines, reverse=True)
    if best < _ALIKE or any(other > _UNLIKE for other in others):
        return None
    return layouts[cosines.index(best)]


def _differing(
    layouts: Sequence[PieceLayout], first: TensorSource
) -> Iterator[tuple[str, int, int]]:
    """Yield entries that differ between layouts, of a few tensors."""
    count = 0
    for name in first.keys():  # noqa: SIM118  (no mapping)
        held = [layout[name] for layout in layouts if name in layout]
        if len(held) < len(layouts) or len({tensor.pieces for tensor in held}) == 1:
            continue
        if first.dtype(name).is_floating_point:
            yield name, *_difference(held)
            count += 1
        if count == _SAMPLED:
            return


def _difference(held: Sequence[Pieced]) -> tuple[int, int]:
    """Return the first entries that every two of some layouts have elsewhere, as far as any are."""
    ends = sorted({end for tensor in held for end in tensor.ends})
    found = begin = 0
    for end in ends:
        distinct = len({tuple(tensor.cut(begin, end)) for tensor in held})
        if distinct == len(held):
            return begin, min(end, begin + _SAMPLE)
        if distinct > 1 and not found:
            found = begin
        begin = end
    return found, min(ends[-1], found + _SAMPLE)


def _entries(source: TensorSource, name: str, begin: int, end: int) -> torch.Tensor:
    """Read some entries of a tensor in fp32."""
    dtype = source.dtype(name)
    data = bytearray((end - begin) * dtype.itemsize)
    source.read_into(name, begin * dtype.itemsize, memoryview(data))
    return torch.frombuffer(data, dtype=dtype.torch).float()
