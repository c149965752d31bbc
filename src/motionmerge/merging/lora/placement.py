"""Where everything in a LoRA file goes in a model: one reading for dense and for signed LoRAs.

The rows of a fused projection are dealt over the model's single ones, and the other way round.
Only parts of a fused tensor may meet in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from motionmerge.errors import CheckpointError, ShapeError
from motionmerge.lazy_torch import torch
from motionmerge.merging.inputs.sources import TensorSource
from motionmerge.merging.lora.fused import Fusion
from motionmerge.merging.lora.keys import LoraKeys, LoraModule, clash
from motionmerge.merging.lora.names import (
    FoundParts,
    ModelNames,
    is_dealt_by_head,
    is_other_component,
)
from motionmerge.merging.lora.products import Rows, cut, difference_shape
from motionmerge.merging.lora.reordered import ReorderedNames, Scattered
from motionmerge.merging.lora.scaling import LoraScaling, Strength
from motionmerge.merging.names.original import Spelling
from motionmerge.tensors import dtype_name

WHOLE_WEIGHTS = "whole weights, no difference"
OTHER_COMPONENT = "of a part of the pipeline that is not merged"
NO_PLACE = "fits nothing in the model"
NOT_KNOWN = "no known part of a LoRA"

_MODULATIONS = ("modulation", "scale_shift_table")
"""What models call the bare parameter of a block whose difference is `diff_m`."""


@dataclass(frozen=True, kw_only=True)
class LoraPiece:
    """Rows of what a module of the file adds, and the rows of a tensor they go to; None: all.

    The rows of a layer may stand in another order in the file than in the model.

    Attributes:
        module: The module.
        keys: The keys of the parts that are added here.
        path: The module without what wraps its name.
        rows: Of the product.
        place: In the model's tensor.
    """

    module: LoraModule
    keys: Mapping[str, str]
    path: str
    rows: Rows = None
    place: slice | None = None


@dataclass(frozen=True)
class LoraPlacement:
    """Where the modules of a LoRA file go.

    Attributes:
        home: By tensor of the model, what is added to it.
        strangers: By module or key of the file, why it goes nowhere.
    """

    home: Mapping[str, Sequence[LoraPiece]]
    strangers: Mapping[str, str]


@dataclass
class _Places:
    """Gathers the pieces."""

    home: dict[str, list[LoraPiece]] = field(default_factory=dict)
    gathered: dict[str, tuple[Fusion, dict[int, LoraPiece]]] = field(default_factory=dict)
    scattered: dict[str, dict[str, list[LoraPiece]]] = field(default_factory=dict)

    def add(self, name: str, piece: LoraPiece) -> None:
        """Add a piece to a tensor that holds none."""
        if name in self.home:
            raise _meet(self.home[name][0], piece, name)
        self.home[name] = [piece]

    def scatter(self, name: str, layer: str, pieces: list[LoraPiece]) -> None:
        """Keep the rows of a layer of diffusers that lie apart in a tensor of the model."""
        layers = self.scattered.setdefault(name, {})
        if layer in layers:
            raise _meet(layers[layer][0], pieces[0], name)
        layers[layer] = pieces

    def gather(self, name: str, fusion: Fusion, number: int, piece: LoraPiece) -> None:
        """Keep one of the parts of a fused tensor until all are known."""
        known, parts = self.gathered.setdefault(name, (fusion, {}))
        if known != fusion or number in parts:
            raise _meet(next(iter(parts.values())), piece, name)
        parts[number] = piece


def place(
    file: TensorSource,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    keys: LoraKeys,
    modules: Sequence[str] = (),
) -> LoraPlacement:
    """Find a place for everything in a LoRA file; only headers are read.

    Args:
        file: The open file.
        shapes: Shape of each tensor of the model.
        keys: The file's keys, sorted.
        modules: The modules of the model that it is for, if that stands beside it; empty: all that
            have its layers.

    Raises:
        CheckpointError: The file holds no LoRA, or one that is no task vector; two modules of it
            mean one tensor; the model has none of `modules`.
        ShapeError: A tensor of the file is empty, an alpha is no number, or the rows of a fused
            projection are not those of its parts.
    """
    check_modules(file, keys)
    paths = [module.path for module in keys.modules]
    model = _Model(
        ModelNames(shapes, paths, only=modules),
        ReorderedNames(shapes, paths, only=modules),
        shapes,
        keys.adapters,
    )
    places, strangers = _Places(), _unused(keys)
    for module in keys.modules:
        for target in module.targets():
            if not _place(module, target, model, places, file):
                why = OTHER_COMPONENT if is_other_component(module.path) else NO_PLACE
                parts = module.parts(target)
                strangers |= dict.fromkeys(
                    [module.path] if target == "weight" else parts.values(), why
                )
    for whole, (fusion, found) in places.gathered.items():
        known = {number: num_rows(file, piece) for number, piece in found.items()}
        rows = fusion.rows(known, shapes[whole][0], where=f"the LoRA for `{whole}`")
        if whole in places.home:
            raise _meet(places.home[whole][0], next(iter(found.values())), whole)
        places.home[whole] = [replace(piece, place=rows[n]) for n, piece in found.items()]
    for whole, layers in places.scattered.items():
        pieces = [piece for own in layers.values() for piece in own]
        if whole in places.home:
            raise _meet(places.home[whole][0], pieces[0], whole)
        places.home[whole] = pieces
    return LoraPlacement(places.home, strangers)


def check_modules(file: TensorSource, keys: LoraKeys) -> None:
    """Check that a file holds a LoRA, whose tensors hold numbers.

    Raises:
        CheckpointError: It holds none, or integers in its place.
        ShapeError: A tensor is empty, or an alpha is more than one number.
    """
    if not keys.modules:
        held = (*keys.whole, *keys.unknown, *keys.unused_strengths)
        example = next(iter(held), "(no tensors)")
        raise CheckpointError(
            f"The file holds no LoRA; its keys look like `{example}`.",
            fix="Use a LoRA file; whole weights go into a recipe as `(tuned - base)`.",
        )
    for module in keys.modules:
        for part, key in module.keys.items():
            shape, dtype = list(file.shape(key)), file.dtype(key)
            if part != "alpha" and not dtype.is_floating_point:
                raise CheckpointError(
                    f"`{key}` of `{module.path}` is {dtype_name(dtype)}: codes without a scale "
                    "that is known, not the numbers of a LoRA.",
                    fix="Use the LoRA before it was quantised.",
                )
            if 0 in shape:
                raise ShapeError(
                    f"`{key}` of `{module.path}` has the shape {shape} and holds no numbers; "
                    "expected [rank, inputs] and [outputs, rank], with a rank of 1 or more.",
                    fix="Download the file again, or save it again with the weights gathered "
                    "(ZeRO-3 leaves empty tensors).",
                )
            if part == "alpha" and shape not in ([], [1]):
                raise ShapeError(
                    f"The alpha of `{module.path}` has the shape {shape}; expected one number.",
                    fix="Download the file again.",
                )


def check_values(file: TensorSource, keys: LoraKeys, *, name: str) -> None:
    """Read every tensor of a LoRA once and look for NaN and infinity.

    Raises:
        CheckpointError: There are some.
    """
    bad: dict[str, int] = {}
    for module in keys.modules:
        for key in module.keys.values():
            values = file.read(key)
            if values.is_floating_point():
                count = values.numel() - int(torch.isfinite(values.float()).sum())
                bad |= {key: count} if count else {}
    if bad:
        first, count = next(iter(bad.items()))
        raise CheckpointError(
            f"The LoRA `{name}` holds NaN or infinity in {len(bad)} of its tensors: `{first}` "
            f"in {count} entries" + (", ..." if len(bad) > 1 else "") + ".",
            fix="Use an earlier state of its training; this one would make black videos.",
        )


def num_rows(file: TensorSource, piece: LoraPiece) -> int:
    """Count the output rows of what a piece adds; nothing is read."""
    return (*piece_shape(file, piece), 1)[0]


def piece_shape(file: TensorSource, piece: LoraPiece) -> tuple[int, ...]:
    """Return the shape of what a piece adds; nothing is read."""
    shapes = {part: file.shape(key) for part, key in piece.keys.items()}
    return difference_shape(shapes, piece.rows, path=piece.module.path)


def strength_of(piece: LoraPiece, file: TensorSource, scaling: LoraScaling) -> Strength:
    """Return alpha / rank of a piece; a LoKr of two whole matrices has no rank in the file."""
    ranked = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    keys = piece.module.keys
    found = (file.shape(keys[part])[0] for part in ranked if part in keys)
    alpha = keys.get("alpha")
    return scaling.strength(
        piece.module.path,
        layer=piece.path,
        rank=next(found, None),
        alpha=None if alpha is None else float(file.read(alpha)),
    )


def _unused(keys: LoraKeys) -> dict[str, str]:
    """List what cannot be added to any model."""
    found = dict.fromkeys(keys.whole, WHOLE_WEIGHTS) | dict.fromkeys(keys.unknown, NOT_KNOWN)
    return {key: OTHER_COMPONENT if is_other_component(key) else why for key, why in found.items()}


def _place(
    module: LoraModule, target: str, model: _Model, places: _Places, file: TensorSource
) -> bool:
    """Find where a module's weight, bias or modulation goes; tell whether there is a place."""
    if is_other_component(module.path):
        return False
    of_bias, keys = target == "bias", module.parts(target)
    paths = [module.path]
    if target == "modulation":
        paths = [f"{module.path}.{leaf}" for leaf in _MODULATIONS]
    for path in paths:
        if found := model.names.find(path, of_bias=of_bias):
            piece = LoraPiece(module=module, keys=keys, path=found.path)
            if model.is_dealt_by_head(found.path):
                raise _dealt_unknown(module.path)
            piece = replace(piece, rows=_order(found.spelling, piece, file))
            for name in found.names:
                places.add(name, piece)
            return True
    if dealt := model.names.find_parts(module.path, of_bias=of_bias):
        piece = LoraPiece(module=module, keys=keys, path=dealt.path)
        for parts in dealt.denoisers:
            rows = _order(dealt.spelling, piece, file, head_dim=model.head_dim(dealt, parts))
            for name, part in zip(parts, model.deal(dealt, piece, parts, file), strict=True):
                places.add(name, replace(piece, rows=rows if part is None else cut(rows, part)))
        return True
    if fused := model.names.find_whole(module.path, of_bias=of_bias):
        for name in fused.names:
            places.gather(
                name,
                fused.fusion,
                fused.number,
                LoraPiece(module=module, keys=keys, path=fused.path),
            )
        return True
    apart = model.reordered.find(module.path, of_bias=of_bias)
    for found_apart in apart:
        _scatter(
            found_apart, LoraPiece(module=module, keys=keys, path=found_apart.path), places, file
        )
    return bool(apart)


def _scatter(found: Scattered, piece: LoraPiece, places: _Places, file: TensorSource) -> None:
    """Move the rows of a module to their places in a tensor of the model."""
    if (rows := num_rows(file, piece)) != found.num_rows:
        raise ShapeError(
            f"`{piece.module.path}` of the LoRA has {rows} rows; `{found.layer}`, which is a part "
            f"of `{found.name}`, has {found.num_rows}.",
            fix="Use a LoRA for this model; its layers have other sizes.",
        )
    ours = _order(found.spelling, piece, file)
    places.scatter(
        found.name,
        found.layer,
        [replace(piece, rows=cut(ours, own), place=place) for own, place in found.blocks],
    )


@dataclass(frozen=True)
class _Model:
    """The model, as far as it is needed to place the modules of a file."""

    names: ModelNames
    reordered: ReorderedNames
    shapes: Mapping[str, tuple[int, ...]]
    adapters: tuple[str, ...]

    def is_dealt_by_head(self, path: str) -> bool:
        """Check whether the rows of a layer may be dealt by head."""
        return is_dealt_by_head(path, self.adapters)

    def head_dim(self, dealt: FoundParts, parts: Sequence[str]) -> int | None:
        """Return the rows of one head of a layer that is dealt by head; None if it is not.

        Raises:
            CheckpointError: The model does not tell.
        """
        if not self.is_dealt_by_head(dealt.path):
            return None
        norm = f"{parts[0].rpartition('.')[0].rpartition('.')[0]}.norm_q.weight"
        if norm not in self.shapes:
            raise _dealt_unknown(dealt.path)
        return self.shapes[norm][0]

    def deal(
        self, dealt: FoundParts, piece: LoraPiece, parts: Sequence[str], file: TensorSource
    ) -> Sequence[slice | None]:
        """Compute which rows of a fused module go to each of its parts in the model."""
        if len(parts) == 1:
            return [None]
        known = {number: self.shapes[name][0] for number, name in enumerate(parts)}
        where = f"`{piece.module.path}` for `{parts[0]}`, ..."
        return dealt.fusion.rows(known, num_rows(file, piece), where=where)


def _order(
    spelling: Spelling, piece: LoraPiece, file: TensorSource, *, head_dim: int | None = None
) -> Rows:
    """Return the rows of a module in the order of the model; None if that is their own."""
    if spelling.order is None and head_dim is None:
        return None
    return spelling.rows_in_ours(num_rows(file, piece), head_dim=head_dim)


def _dealt_unknown(path: str) -> CheckpointError:
    return CheckpointError(
        f"The rows of `{path}` may be dealt by head, as DiffSynth-Studio has them, or not; these "
        "weights do not tell.",
        fix="Use the folder of diffusers for the model.",
    )


def _meet(first: LoraPiece, second: LoraPiece, name: str) -> CheckpointError:
    one, other = (next(iter(piece.keys.values())) for piece in (first, second))
    return clash(one, other, what=f"`{name}`")
