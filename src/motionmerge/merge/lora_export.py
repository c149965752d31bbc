"""Experts as LoRA files, one each, by truncated singular value decomposition.

    expert - base ~ up @ down,   energy captured = |up @ down|^2 / |expert - base|^2

A LoRA holds what changes in the weights of linear and convolution layers; biases, norms and bare
parameters do not fit into one, and the report says how much that leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from motionmerge import __version__
from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.families import GROUPS, OTHER, group_of
from motionmerge.io.weights import save_weights
from motionmerge.lazy_torch import torch
from motionmerge.merge.algebra import Checkpoint
from motionmerge.merge.coverage import Missing, check_coverage
from motionmerge.merge.functions import LowRank, factorise
from motionmerge.merge.lora_layout import Layout, StoredLayer, diffusers_layout
from motionmerge.merge.recipe import METADATA_KEY, InputValue, Recipe
from motionmerge.merge.sources import OpenInputs, Source
from motionmerge.tensors import AnyDtype, is_mergeable, parse_dtype
from motionmerge.text import fix_unknown_name


@dataclass(frozen=True)
class Energy:
    """How much of a group's change a LoRA holds.

    Attributes:
        layers: Number of layers in the LoRA.
        captured: Share of the squared norm of the change that the LoRA holds.
        rank_90: Smallest rank of all layers that holds 90 % of what any rank can hold.
        rank_99: The same for 99 %.
        left_out: Share of the squared norm in biases, norms and bare parameters.
    """

    layers: int
    captured: float
    rank_90: int
    rank_99: int
    left_out: float


@dataclass(frozen=True)
class LoraExport:
    """One expert's LoRA.

    Attributes:
        path: The file.
        formula: The expert.
        base: The input that the LoRA is to be added to.
        rank: Its rank.
        groups: The energy by parameter group, and under `all` of everything.
    """

    path: str
    formula: str
    base: str
    rank: int
    groups: Mapping[str, Energy]

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.formula}, as a LoRA of rank {self.rank} for {self.base} -> {self.path}"]
        lines.append(
            f"  {'group':16}{'layers':>7}{'captured':>10}{'rank 90%':>10}{'rank 99%':>10}"
            f"{'left out':>10}"
        )
        lines += [
            f"  {group:16}{found.layers:7,}{found.captured:10.1%}{found.rank_90:10,}"
            f"{found.rank_99:10,}{found.left_out:10.1%}"
            for group, found in self.groups.items()
        ]
        return "\n".join(lines)


def export_loras(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    rank: int,
    base: str | None = None,
    layout: Layout = diffusers_layout,
    inputs: Mapping[str, InputValue] | None = None,
    missing: Missing = "error",
    dtype: str | AnyDtype = "fp32",
    overwrite: bool = False,
) -> dict[str, LoraExport]:
    """Write each expert of a recipe as a LoRA, `output/<expert>.safetensors`.

    There are no keys of alpha: scale 1 gives the expert. Every layer has the same rank, filled up
    with zeros where the layer has less, because loaders expect that.

    Args:
        recipe: A recipe, its file, or the name of a shipped one.
        output: The folder to write to.
        rank: Rank of every layer.
        base: The input that the LoRAs are for; the one at the front of the first expert by default.
        layout: How the layers are called: `diffusers_layout`, or `original_layout`.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        missing: `error` or `keep`; see `check_coverage`.
        dtype: Dtype of the factors.
        overwrite: Replace files that exist.

    Raises:
        RecipeError: `base` is no input, or `rank` is no positive integer.
        CheckpointError: An expert equals the base in all layers; or as `merge`.
        ConfigError: A file exists already, or the layout has no names for the model.
        ShapeError: As `merge`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    output, wanted = Path(output), parse_dtype(dtype).torch
    base = next(iter(recipe.experts.values())).anchor.name if base is None else base
    if base not in recipe.inputs:
        raise RecipeError(
            f"The recipe has no input `{base}`.", fix=fix_unknown_name(base, recipe.inputs)
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"rank={rank!r} is not a positive integer.", fix="Use e.g. `rank=64`.")
    paths = {expert: output / f"{expert}.safetensors" for expert in recipe.experts}
    for path in paths.values():
        if path.exists() and not overwrite:
            raise ConfigError(
                f"{path} exists already.", fix="Choose another folder, or pass overwrite=True."
            )
    origins = recipe.origins(inputs)
    pinned = recipe.pinned(origins, overridden=inputs)
    start = Source(base, origins[base])
    reports = {}
    for expert, path in paths.items():
        checkpoint = recipe.experts[expert].bind(origins)
        with OpenInputs([start, *checkpoint.sources()]) as opened:
            check_coverage([checkpoint], opened, missing=missing)
            tensors, energy = _factorise_all(checkpoint, start, opened, rank, layout)
        if not tensors:
            raise CheckpointError(
                f"`{expert}` equals `{base}` in every layer.",
                fix="Give the input that the LoRA is to be added to as `base`.",
            )
        metadata = {
            "format": "pt",
            METADATA_KEY: pinned.print(),
            "motionmerge.expert": expert,
            "motionmerge.lora_base": base,
            "motionmerge.version": __version__,
        }
        save_weights(path, {key: tensor.to(wanted) for key, tensor in tensors.items()}, metadata)
        reports[expert] = LoraExport(
            str(path), str(recipe.experts[expert]), base, rank, energy.report()
        )
    return reports


@dataclass
class _Energies:
    """Adds up squared singular values by group."""

    rank: int
    cumulated: dict[str, torch.Tensor] = field(default_factory=dict)
    captured: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, energies: torch.Tensor) -> None:
        """Add a layer's squared singular values."""
        for group in (group_of(name), "all"):
            curve = energies.cumsum(0)
            known = self.cumulated.get(group, curve.new_zeros(1))
            longest = max(len(curve), len(known))
            self.cumulated[group] = _lengthened(curve, longest) + _lengthened(known, longest)
            held = float(curve[min(self.rank, len(curve)) - 1])
            self.captured[group] = self.captured.get(group, 0.0) + held
            self.layers[group] = self.layers.get(group, 0) + 1

    def leave_out(self, name: str, difference: torch.Tensor) -> None:
        """Add a change that no LoRA can hold."""
        for group in (group_of(name), "all"):
            energy = float(difference.double().square().sum())
            self.left_out[group] = self.left_out.get(group, 0.0) + energy

    def report(self) -> dict[str, Energy]:
        """Sum up, in the order of the groups."""
        found = {}
        for group in (*GROUPS, OTHER, "all"):
            curve = self.cumulated.get(group)
            outside = self.left_out.get(group, 0.0)
            total = outside + (0.0 if curve is None else float(curve[-1]))
            if total:
                found[group] = Energy(
                    layers=self.layers.get(group, 0),
                    captured=self.captured.get(group, 0.0) / total,
                    rank_90=_rank_for(curve, 0.90),
                    rank_99=_rank_for(curve, 0.99),
                    left_out=outside / total,
                )
        return found


def _lengthened(curve: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([curve, curve[-1:].expand(length - len(curve))])


def _rank_for(curve: torch.Tensor | None, share: float) -> int:
    if curve is None:
        return 0
    return int(torch.searchsorted(curve, share * curve[-1])) + 1


def _factorise_all(
    checkpoint: Checkpoint, start: Source, opened: OpenInputs, rank: int, layout: Layout
) -> tuple[dict[str, torch.Tensor], _Energies]:
    tensors: dict[str, torch.Tensor] = {}
    energies = _Energies(rank)
    shapes = {name: opened.shape(start, name) for name in opened.names(start)}
    layers = layout(shapes)
    for layer in layers:
        differences = [_difference(name, checkpoint, start, opened) for name in layer.weights]
        stacked = _stacked(layer, differences, [shapes[name] for name in layer.weights])
        if stacked is not None:
            factors = factorise(stacked.flatten(1), rank=rank)
            energies.add(layer.weights[0], factors.energies)
            down, up = _padded(factors, rank)
            ones = [1] * (stacked.ndim - 2)
            tensors[f"{layer.path}.lora_A.weight"] = down.reshape(rank, *stacked.shape[1:])
            tensors[f"{layer.path}.lora_B.weight"] = up.reshape(*up.shape, *ones)
    placed = {name for layer in layers for name in layer.weights}
    for name in shapes:
        if name not in placed:
            difference = _difference(name, checkpoint, start, opened)
            if difference is not None:
                energies.leave_out(name, difference)
    return tensors, energies


def _stacked(
    layer: StoredLayer, differences: Sequence[torch.Tensor | None], shapes: Sequence[Sequence[int]]
) -> torch.Tensor | None:
    """Stack the differences of a layer's tensors; None if all are zero."""
    if all(difference is None for difference in differences):
        return None
    parts = [
        torch.zeros(*shape) if difference is None else difference
        for difference, shape in zip(differences, shapes, strict=True)
    ]
    stacked = torch.cat(parts)
    return stacked.reshape(*stacked.shape, *[1] * layer.unit_dims)


def _padded(factors: LowRank, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `down` [rank, columns] and `up` [rows, rank] up with zeros."""
    down = torch.zeros(rank, factors.down.shape[1])
    up = torch.zeros(factors.up.shape[0], rank)
    down[: factors.down.shape[0]] = factors.down
    up[:, : factors.up.shape[1]] = factors.up
    return down, up


def _difference(
    name: str, checkpoint: Checkpoint, start: Source, opened: OpenInputs
) -> torch.Tensor | None:
    """Compute expert - base of one tensor in fp32; None where they are equal."""
    if not is_mergeable(opened.dtype(start, name), opened.shape(start, name)):
        return None
    if not opened.has(checkpoint.anchor, name):
        return None
    moved = checkpoint.value(name, opened)
    if moved is None:
        if checkpoint.anchor == start:
            return None
        moved = opened.value(checkpoint.anchor, name)
    difference = moved - opened.value(start, name)
    return difference if bool(difference.any()) else None
