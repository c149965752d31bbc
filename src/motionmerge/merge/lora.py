"""LoRA files as task vectors: products of matrices (`lora_products`) and plain differences.

    scale * alpha / rank * up @ down

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from motionmerge.errors import CheckpointError, RecipeError
from motionmerge.io.weights import open_weights
from motionmerge.lazy_torch import torch
from motionmerge.merge.algebra import Checkpoint, TaskVector
from motionmerge.merge.lora_fused import Fusion
from motionmerge.merge.lora_names import LoraModule, ModelNames, group_keys
from motionmerge.merge.lora_products import product, rows_of
from motionmerge.merge.lora_scaling import LoraScaling
from motionmerge.merge.sources import MemoryTensors, OpenInputs, Origin, Source, TensorSource
from motionmerge.merge.terms import ATOM, is_number
from motionmerge.tensors import DType

__all__ = ["Lora", "LoraScaling", "LoraTensors", "lora"]


@dataclass(frozen=True)
class _Piece:
    """Rows of what a module of the file adds, and the rows of a tensor they go to; None: all."""

    module: LoraModule
    keys: Mapping[str, str]
    rows: slice | None = None
    place: slice | None = None


_Gathered = dict[str, tuple[Fusion, dict[int, _Piece]]]
"""By fused tensor of the model, the pieces for its parts, by number."""


class LoraTensors(MemoryTensors):
    """A LoRA file as a source of differences, under the names of a model's tensors.

    The rows of a fused projection are dealt over the model's single ones, and the other way round.
    What fits no tensor of the model keeps the name that it has in the file, so that it is reported
    as missing in the model.

    Args:
        file: The open LoRA file.
        scaling: The settings beside it.
        shapes: Shape of each tensor of the model.

    Raises:
        CheckpointError: The file holds no LoRA, or one that is no task vector.
        ShapeError: The rows of a fused projection are not those of its parts.
    """

    def __init__(
        self, file: TensorSource, scaling: LoraScaling, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__({})
        self._file, self._scaling, self._model_shapes = file, scaling, shapes
        self._home: dict[str, list[_Piece]] = {}
        modules, unknown = group_keys(file.keys())
        if not modules:
            raise CheckpointError(
                f"The file holds no LoRA; its keys look like `{(unknown or ['(none)'])[0]}`.",
                fix="Use a LoRA file, or subtract the base: `(tuned - base)`.",
            )
        names = ModelNames(shapes)
        gathered: _Gathered = {}
        for module in modules:
            for of_bias in (False, True):
                if keys := module.parts(of_bias=of_bias):
                    self._place(module, keys, names, gathered, of_bias=of_bias)
        for whole, (fusion, found) in gathered.items():
            known = {number: self._num_rows(piece) for number, piece in found.items()}
            rows = fusion.rows(known, shapes[whole][0], where=f"the LoRA for `{whole}`")
            for number, piece in found.items():
                self._add(whole, replace(piece, place=rows[number]))
        for key in unknown:
            self._add(key, _Piece(LoraModule(key), {"full": key}))

    def _place(
        self,
        module: LoraModule,
        keys: Mapping[str, str],
        names: ModelNames,
        gathered: _Gathered,
        *,
        of_bias: bool,
    ) -> None:
        """Find where a module's weight or bias goes; parts of a fused tensor are gathered first."""
        piece = _Piece(module, keys)
        if found := names.find(module.path, of_bias=of_bias):
            for name in found:
                self._add(name, piece)
        elif dealt := names.find_parts(module.path, of_bias=of_bias):
            fusion, denoisers = dealt
            for parts in denoisers:
                for name, rows in zip(parts, self._deal(fusion, piece, parts), strict=True):
                    self._add(name, replace(piece, rows=rows))
        elif fused := names.find_wholes(module.path, of_bias=of_bias):
            fusion, number, wholes = fused
            for whole in wholes:
                gathered.setdefault(whole, (fusion, {}))[1][number] = piece
        else:
            for name in keys.values() if of_bias else [module.path]:
                self._add(name, piece)

    def _deal(self, fusion: Fusion, piece: _Piece, parts: Sequence[str]) -> Sequence[slice | None]:
        if len(parts) == 1:
            return [None]
        known = {number: self._model_shapes[name][0] for number, name in enumerate(parts)}
        return fusion.rows(
            known, self._num_rows(piece), where=f"`{piece.module.path}` for `{parts[0]}`, ..."
        )

    def _add(self, name: str, piece: _Piece) -> None:
        self._home.setdefault(name, []).append(piece)

    @classmethod
    def fitted(cls, origin: Origin, anchor: Source) -> LoraTensors:
        """Open a LoRA file for the model that it will be added to; only headers are read.

        Raises:
            CheckpointError: The file cannot be read or holds no LoRA.
        """
        with OpenInputs([anchor]) as opened:
            shapes = {name: opened.shape(anchor, name) for name in opened.names(anchor)}
        if isinstance(origin, MemoryTensors):
            return cls(origin, LoraScaling({}), shapes)
        reader = open_weights(origin)
        fitted = cls(reader, LoraScaling.beside(origin, reader.metadata), shapes)
        weakref.finalize(fitted, reader.close)
        return fitted

    def keys(self) -> list[str]:
        """Give the names of the model's tensors that change, and of what fits none."""
        return list(self._home)

    def has(self, name: str) -> bool:
        """Tell whether a name is among `keys()`."""
        return name in self._home

    def shape(self, name: str, /) -> tuple[int, ...]:
        """Give the shape of a difference: the model's if it has as many entries per channel."""
        wanted = self._model_shapes.get(name)
        for piece in self._home[name]:
            shape = self._shape(piece)
            if wanted is None:
                return shape
            place, rest = wanted, shape
            if piece.place is not None:
                place = (piece.place.stop - piece.place.start, *wanted[1:])
                rest = (wanted[0], *shape[1:])
            if math.prod(shape) != math.prod(place) or shape[:1] != place[:1]:
                return rest
        return wanted or ()

    def dtype(self, name: str, /) -> DType:
        """Differences are computed in fp32."""
        return DType.FP32

    def read(self, name: str, /) -> torch.Tensor:
        """Compute a difference, unscaled, in the model's shape."""
        shape, pieces = self.shape(name), self._home[name]
        values = []
        for piece in pieces:
            parts = {part: self._file.read(key).float() for part, key in piece.keys.items()}
            values.append(self._difference(piece, parts))
        if len(pieces) == 1 and pieces[0].place is None:
            return values[0].reshape(shape).contiguous()
        total = torch.zeros(shape)
        for piece, value in zip(pieces, values, strict=True):
            place = rows_of(total, piece.place)
            place += value.reshape(place.shape)
        return total

    def _shape(self, piece: _Piece) -> tuple[int, ...]:
        """Give the shape of what a piece adds; nothing is read."""
        empty = {
            part: torch.empty(self._file.shape(key), device="meta")
            for part, key in piece.keys.items()
        }
        return tuple(self._difference(piece, empty).shape)

    def _num_rows(self, piece: _Piece) -> int:
        return (*self._shape(piece), 1)[0]

    def _difference(self, piece: _Piece, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Compute what a module's weight or bias gains.

        Raises:
            CheckpointError: The parts are incomplete or do not fit together.
        """
        if piece.module.path.startswith("base_model.") and _is_line(parts.get("lokr_w2")):
            raise CheckpointError(
                f"`{piece.module.path}` is a LoKr of a 1-d convolution, which peft multiplies in "
                "an order of its own.",
                fix="Merge it with peft, and use the difference to the base.",
            )
        try:
            terms = [rows_of(parts[part], piece.rows) for part in ("full", "bias") if part in parts]
            multiplied = product(parts, piece.rows)
            if multiplied is not None:
                terms.append(multiplied * self._factor(piece.module))
            return functools.reduce(lambda total, more: total + more.view_as(total), terms)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            found = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
            raise CheckpointError(
                f"The LoRA of `{piece.module.path}` is incomplete or damaged: it has {found}.",
                fix="Download the file again.",
            ) from error

    def _factor(self, module: LoraModule) -> float:
        """Give alpha / rank; a LoKr of two whole matrices has no rank in the file."""
        ranked = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        found = (self._file.shape(module.keys[part])[0] for part in ranked if part in module.keys)
        alpha = module.keys.get("alpha")
        return self._scaling.factor(
            module.path,
            rank=next(found, None),
            alpha=None if alpha is None else float(self._file.read(alpha)),
        )


def _is_line(kernel: torch.Tensor | None) -> bool:
    return kernel is not None and kernel.ndim == 3


@dataclass(frozen=True)
class Lora(TaskVector):
    """A LoRA file as a task vector; build it with `lora`."""

    source: Source
    scale: float

    @property
    def precedence(self) -> int:
        """ATOM."""
        return ATOM

    def formula(self) -> str:
        """Print e.g. `lora(lightning, 0.8)`."""
        return f"lora({self.source.name}, {self.scale!r})"

    def bind(self, origins: Mapping[str, Origin], anchor: Source) -> Lora:
        """Open the file for the model it is added to."""
        origin = origins.get(self.source.name, self.source.origin)
        if origin is None or anchor.origin is None or isinstance(origin, LoraTensors):
            return replace(self, source=replace(self.source, origin=origin))
        fitted = LoraTensors.fitted(origin, anchor)
        return replace(self, source=replace(self.source, origin=fitted))

    def sources(self, name: str | None = None) -> Iterator[Source]:
        """Give the file, unless it leaves the tensor alone."""
        origin = self.source.origin
        if name is None or not isinstance(origin, LoraTensors) or origin.has(name):
            yield self.source

    def value(self, name: str, inputs: OpenInputs) -> torch.Tensor | None:
        """Compute one tensor."""
        if not inputs.has(self.source, name):
            return None
        return inputs.value(self.source, name) * self.scale


def lora(file: str | Path | Checkpoint | Mapping[str, torch.Tensor], scale: float) -> Lora:
    """Refer to a LoRA file as a task vector; nothing is read before it is needed.

        scale * alpha / rank * up @ down

    Styles of keys: diffusers and peft, kohya and LyCORIS (LoHa, LoKr), Wan and Lightning. Keys that
    fit no tensor of the model are an error unless missing tensors are allowed (`missing="keep"`). A
    model with two denoisers gets it in both; restrict it with `only(..., "transformer_2.*")`.

    Args:
        file: A path, an input of a recipe, or the tensors of such a file.
        scale: Strength; negative extrapolates away from what the LoRA learnt.

    Raises:
        RecipeError: `file` is no file, or `scale` is no finite number.
        CheckpointError: When evaluated: the file cannot be read, holds no LoRA, or a DoRA.
    """
    if not is_number(scale) or not math.isfinite(scale):
        raise RecipeError(
            f"lora() got the scale {scale!r}, not a number.", fix="Write e.g. `lora(file, 0.8)`."
        )
    if isinstance(file, Checkpoint) and not file.vectors:
        return Lora(file.anchor, scale)
    if isinstance(file, Mapping):
        return Lora(Source("lora_tensors", MemoryTensors(file)), scale)
    if not isinstance(file, (str, Path)):
        raise RecipeError(
            f"lora() got a {type(file).__name__}, not a file.",
            fix='Name an input, or give a path in quotes: `lora("lightning.safetensors", 1.0)`.',
        )
    return lora(Checkpoint.load(file), scale)
