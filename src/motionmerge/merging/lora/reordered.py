"""Layers of a model in original names whose rows diffusers has in another order, for LoRA files.

    norm_out.linear = final_layer.adaLN_modulation.1 with its halves swapped

How the rows lie is what the layouts of whole checkpoints say (`renamed.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from motionmerge.errors import CheckpointError
from motionmerge.merging.inputs.pieces import Pieced, PieceLayout, Shapes
from motionmerge.merging.inputs.renamed import readings
from motionmerge.merging.lora.names import ModelNames
from motionmerge.merging.names.original import Spelling


@dataclass(frozen=True, kw_only=True)
class Scattered:
    """Where the rows of a layer of diffusers lie in a tensor of the model.

    Attributes:
        layer: The tensor in diffusers.
        name: The tensor of the model.
        path, spelling: See `lora_names.Found`.
        num_rows: Rows of the layer.
        blocks: Rows of the layer, and the rows of the tensor that they are.
    """

    layer: str
    name: str
    path: str
    spelling: Spelling
    num_rows: int
    blocks: tuple[tuple[slice, slice], ...]


class ReorderedNames:
    """Finds such layers by the module paths of a LoRA file.

    Args:
        shapes: Shape of each tensor of the model.
        paths, only: See `ModelNames`.
    """

    def __init__(self, shapes: Shapes, paths: Sequence[str], *, only: Sequence[str] = ()) -> None:
        self._shapes, self._paths, self._only = shapes, paths, only

    def find(self, path: str, *, of_bias: bool) -> list[Scattered]:
        """Find the bias or the weight of a module, in every denoiser that is meant.

        Raises:
            CheckpointError: The names fit several orders of its rows.
        """
        found = self._names.find(path, of_bias=of_bias) if self._names else None
        if found is None:
            return []
        return [
            _scattered(layer, self._layout[layer], found.path, found.spelling)
            for layer in found.names
        ]

    @cached_property
    def _layout(self) -> Mapping[str, set[Pieced]]:
        """The tensors of diffusers that lie in several pieces, by every way of naming that fits."""
        layouts: list[PieceLayout] = [read.layout for read in readings(self._shapes) if read.names]
        names = {
            name
            for layout in layouts
            for name, tensor in layout.items()
            if len(tensor.pieces) > 1 and len({piece.name for piece in tensor.pieces}) == 1
        }
        return {n: {layout[n] for layout in layouts if n in layout} for n in sorted(names)}

    @cached_property
    def _names(self) -> ModelNames | None:
        held = self._layout
        return ModelNames(held, self._paths, only=self._only) if held else None


def _scattered(layer: str, found: set[Pieced], path: str, spelling: Spelling) -> Scattered:
    if len(found) > 1:
        raise CheckpointError(
            f"The names of the model fit several orders of the rows of `{layer}`, which the LoRA "
            "changes; they do not tell which.",
            fix="Use the folder of diffusers for the model.",
        )
    (tensor,) = found
    rows = tensor.shape[0]
    size = sum(piece.end - piece.begin for piece in tensor.pieces) // rows
    blocks, begin = [], 0
    for piece in tensor.pieces:
        end = begin + (piece.end - piece.begin) // size
        place = slice(piece.begin // size, piece.end // size)
        blocks.append((slice(begin, end), place))
        begin = end
    return Scattered(
        layer=layer,
        name=tensor.pieces[0].name,
        path=path,
        spelling=spelling,
        num_rows=rows,
        blocks=tuple(blocks),
    )
