"""LoRA files as task vectors: products of matrices (`products`) and plain differences.

    scale * alpha / rank * up @ down

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from motionmerge.errors import RecipeError
from motionmerge.io.weights import open_weights
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.nodes import Checkpoint, Scaled, Sum, TaskVector
from motionmerge.merging.algebra.steps import Lowering
from motionmerge.merging.algebra.terms import is_number
from motionmerge.merging.inputs.renamed import is_alike
from motionmerge.merging.inputs.sources import (
    MemoryTensors,
    OpenInputs,
    Origin,
    Source,
    TensorSource,
)
from motionmerge.merging.lora.keys import group_keys
from motionmerge.merging.lora.placement import (
    LoraPiece,
    check_values,
    piece_shape,
    place,
    strength_of,
)
from motionmerge.merging.lora.products import difference, rows_of
from motionmerge.merging.lora.scaling import LoraScaling
from motionmerge.named import number_text
from motionmerge.tensors import DType

__all__ = ["Lora", "LoraScaling", "LoraTensors", "lora", "lora_terms"]


class LoraTensors(MemoryTensors):
    """A LoRA file as a source of differences, under the names of a model's tensors.

    What fits no tensor of the model is listed by `strangers`.

    Args:
        file: The open LoRA file.
        scaling: The settings beside it.
        shapes: Shape of each tensor of the model.
        name: What to call it in errors.

    Raises:
        CheckpointError, ShapeError: As `place`.
    """

    is_checkpoint = False

    def __init__(
        self,
        file: TensorSource,
        scaling: LoraScaling,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        name: str = "lora",
    ) -> None:
        super().__init__({})
        self._file, self._scaling, self._model_shapes = file, scaling, shapes
        self._name, self._is_checked = name, False
        self._lora_keys = group_keys(file.keys())
        scaling.check_kind(file.keys(), name=name)
        self._placement = place(file, shapes, keys=self._lora_keys, modules=scaling.modules)
        self._home = self._placement.home

    @classmethod
    def fitted(cls, origin: Origin, anchor: Source, *, name: str = "lora") -> LoraTensors:
        """Open a LoRA file for the model that it will be added to; only headers are read.

        Args:
            origin: The file.
            anchor: The model.
            name: What to call the LoRA in errors.

        Raises:
            CheckpointError: The file cannot be read or holds no LoRA.
        """
        with OpenInputs([anchor]) as opened:
            shapes = {name: opened.shape(anchor, name) for name in opened.names(anchor)}
        if isinstance(origin, MemoryTensors):
            return cls(origin, LoraScaling(), shapes, name=name)
        reader = open_weights(origin)
        try:
            scaling = LoraScaling.beside(origin, reader.metadata)
            fitted = cls(reader, scaling, shapes, name=name)
        except BaseException:
            reader.close()
            raise
        weakref.finalize(fitted, reader.close)
        return fitted

    def strangers(self) -> Mapping[str, str]:
        """List what of the file goes nowhere in the model, with the reason."""
        return self._placement.strangers

    def unused_strengths(self) -> Sequence[str]:
        """List the keys of alpha whose layers the file does not hold."""
        return self._lora_keys.unused_strengths

    def layers(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of a model's tensors that would be just the file's layers."""
        return {
            f"{module.path}.{target}": piece_shape(
                self._file, LoraPiece(module=module, keys=module.parts(target), path=module.path)
            )
            for module in self._lora_keys.modules
            for target in module.targets()
        }

    def places(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Return, by module of the file, its path without wrappers and the tensors it changes."""
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        for name, pieces in self._home.items():
            for piece in pieces:
                _, names = found.get(piece.module.path, (piece.path, ()))
                found[piece.module.path] = (piece.path, (*names, name))
        return found

    def check_values(self) -> None:
        """Read the file once and look for NaN and infinity.

        Raises:
            CheckpointError: There are some.
        """
        if not self._is_checked:
            check_values(self._file, self._lora_keys, name=self._name)
            self._is_checked = True

    def keys(self) -> list[str]:
        """Return the names of the model's tensors that change."""
        return list(self._home)

    def has(self, name: str) -> bool:
        """Return whether a name is among `keys()`."""
        return name in self._home

    def shape(self, name: str, /) -> tuple[int, ...]:
        """Return the shape of a difference: the model's if it has as many entries per channel."""
        wanted = self._model_shapes.get(name)
        for piece in self._home[name]:
            shape = self._shape(piece)
            if wanted is None:
                return shape
            place, rest = wanted, shape
            if piece.place is not None:
                place = (piece.place.stop - piece.place.start, *wanted[1:])
                rest = (wanted[0], *shape[1:])
            same_rows = shape[:1] == place[:1] or is_alike(shape, place)
            if math.prod(shape) != math.prod(place) or not same_rows:
                return rest
        return wanted or ()

    def dtype(self, name: str, /) -> DType:
        """Return fp32, in which differences are computed."""
        return DType.FP32

    def read(self, name: str, /) -> torch.Tensor:
        """Compute a difference, unscaled, in the model's shape."""
        shape, pieces = self.shape(name), self._home[name]
        values = []
        for piece in pieces:
            parts = {part: self._file.read(key).float() for part, key in piece.keys.items()}
            factor = strength_of(piece, self._file, self._scaling).factor
            values.append(difference(parts, piece.rows, factor=factor, path=piece.module.path))
        if len(pieces) == 1 and pieces[0].place is None:
            return values[0].reshape(shape).contiguous()
        total = torch.zeros(shape)
        for piece, value in zip(pieces, values, strict=True):
            place = rows_of(total, piece.place)
            place += value.reshape(place.shape)
        return total

    def _shape(self, piece: LoraPiece) -> tuple[int, ...]:
        """Return the shape of what a piece adds; nothing is read."""
        return piece_shape(self._file, piece)


@dataclass(frozen=True)
class Lora(TaskVector):
    """A LoRA file as a task vector; build it with `lora`."""

    function: ClassVar[str] = "lora"
    is_blockwise: ClassVar[bool] = False  # a difference is computed as a whole

    source: Source
    scale: float

    def formula(self) -> str:
        """Print e.g. `lora(lightning, 0.8)`."""
        return f"lora({self.source.name}, {number_text(self.scale)})"

    def bind(self, origins: Mapping[str, Origin], anchor: Source) -> Lora:
        """Open the file for the model it is added to."""
        origin = origins.get(self.source.name, self.source.origin)
        if origin is None or anchor.origin is None or isinstance(origin, LoraTensors):
            return replace(self, source=replace(self.source, origin=origin))
        fitted = LoraTensors.fitted(origin, anchor, name=self.source.name)
        return replace(self, source=replace(self.source, origin=fitted))

    def sources(self, name: str | None = None) -> Iterator[Source]:
        """Return the file, unless it leaves the tensor alone."""
        origin = self.source.origin
        if name is None or not isinstance(origin, LoraTensors) or origin.has(name):
            yield self.source

    def lower(self, lowering: Lowering) -> int | None:
        """Scale the file's difference, which is computed as a whole."""
        name, inputs = lowering.name, lowering.inputs
        if not inputs.has(self.source, name):
            return None
        given = lowering.give(self.source, lambda: inputs.value(self.source, name))
        return lowering.scale(given, self.scale.real)


def lora(file: str | Path | Checkpoint | Mapping[str, torch.Tensor], scale: float) -> Lora:
    """Refer to a LoRA file as a task vector; nothing is read before it is needed.

        scale * alpha / rank * up @ down

    Styles of keys: diffusers and peft, kohya and LyCORIS (LoHa, LoKr), Wan and Lightning. Keys that
    fit no tensor of the model, and whole weights, are an error unless missing tensors are allowed
    (`missing="keep"`). A model with two denoisers gets it in both, unless the file itself names
    `transformer_2.`; restrict it with `only(..., "transformer_2.*")`.

    Args:
        file: A path, an input of a recipe, or the tensors of such a file.
        scale: Strength; negative extrapolates away from what the LoRA learnt.

    Raises:
        RecipeError: `file` is no file, or `scale` is no finite number.
        CheckpointError: When evaluated: the file cannot be read, holds no LoRA, or a DoRA.
    """
    if not is_number(scale) or not math.isfinite(scale):
        raise RecipeError(
            f"`lora()` got the scale {scale!r}, not a number.", fix="Write e.g. `lora(file, 0.8)`."
        )
    if isinstance(file, Checkpoint) and not file.vectors:
        return Lora(file.anchor, scale)
    if isinstance(file, Mapping):
        return Lora(Source("lora_tensors", MemoryTensors(file)), scale)
    if not isinstance(file, (str, Path)):
        raise RecipeError(
            f"`lora()` got a {type(file).__name__}, not a file.",
            fix='Name an input, or give a path in quotes: `lora("lightning.safetensors", 1.0)`.',
        )
    return lora(Checkpoint.load(file), scale)


def lora_terms(vector: TaskVector) -> list[tuple[str | None, float]]:
    """List the LoRAs in a task vector with their weights; None stands for anything else."""
    if isinstance(vector, Lora):
        return [(vector.source.name, vector.scale)]
    if isinstance(vector, Scaled):
        return [(name, vector.factor * weight) for name, weight in lora_terms(vector.vector)]
    if isinstance(vector, Sum):
        return lora_terms(vector.left) + lora_terms(vector.right)
    return [(None, 0.0)]
