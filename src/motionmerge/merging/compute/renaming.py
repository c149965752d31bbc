"""Writes computed tensors under other names, as other pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from motionmerge.errors import CheckpointError
from motionmerge.merging.algebra.results import ResultSpec
from motionmerge.merging.compute.plan import Sink
from motionmerge.merging.inputs.pieces import PieceLayout
from motionmerge.merging.inputs.sources import Place
from motionmerge.tensors import dtype_name


@dataclass(frozen=True)
class _Part:
    """Bytes of a computed tensor, and where they go."""

    begin: int
    end: int
    target: str
    target_begin: int


class RenamingSink:
    """Passes on what is computed to a sink that knows it under other names, piece by piece.

    Args:
        sink: Where it goes.
        layout: The tensors of `sink`, as pieces of the computed ones.
        specs: Dtype and shape of the computed tensors.
    """

    def __init__(self, sink: Sink, layout: PieceLayout, specs: Mapping[str, ResultSpec]) -> None:
        self._sink = sink
        self._parts: dict[str, list[_Part]] = {}
        for target, tensor in layout.items():
            begin = 0
            for piece in tensor.pieces:
                size = specs[piece.name][0].itemsize
                part = _Part(piece.begin * size, piece.end * size, target, begin * size)
                self._parts.setdefault(piece.name, []).append(part)
                begin += piece.end - piece.begin
        for parts in self._parts.values():
            parts.sort(key=lambda part: part.begin)

    def place(self, name: str, /) -> Place | None:
        """Return the file and the byte where a tensor begins; None if it is cut into pieces."""
        parts = self._parts[name]
        place = self._sink.place(parts[0].target) if len(parts) == 1 else None
        return None if place is None else (place[0], place[1] + parts[0].target_begin)

    def write_at(self, name: str, begin: int, data: memoryview, /) -> None:
        parts = self._parts[name]
        if len(parts) == 1:  # it may go on into what is next to it in the file
            self._sink.write_at(parts[0].target, parts[0].target_begin + begin, data)
            return
        end = begin + len(data)
        for part in parts:
            first, last = max(begin, part.begin), min(end, part.end)
            if first < last:
                there = part.target_begin + first - part.begin
                self._sink.write_at(part.target, there, data[first - begin : last - begin])


def renamed_specs(layout: PieceLayout, specs: Mapping[str, ResultSpec]) -> dict[str, ResultSpec]:
    """Return dtype and shape of the tensors of a layout.

    Args:
        layout: Tensors as pieces of computed ones.
        specs: Dtype and shape of the computed ones.

    Raises:
        CheckpointError: One tensor consists of pieces with different dtypes.
    """
    found: dict[str, ResultSpec] = {}
    for target, tensor in layout.items():
        dtypes = {specs[piece.name][0]: piece.name for piece in tensor.pieces}
        if len(dtypes) > 1:
            held = ", ".join(f"`{name}` is {dtype_name(dtype)}" for dtype, name in dtypes.items())
            raise CheckpointError(
                f"`{target}` consists of tensors with different dtypes: {held}.",
                fix="Choose one for all with `dtype`, e.g. bf16.",
            )
        found[target] = (next(iter(dtypes)), tensor.shape)
    return found
