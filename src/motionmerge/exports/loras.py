"""Experts as LoRA files: matrices by truncated singular value decomposition, the rest as it is.

    expert - base ~ up @ down,   energy captured = |up @ down|^2 / |expert - base|^2

What no matrices hold (biases, norms, bare parameters) is stored as a plain difference where the
tool reads such keys. What it cannot load is left out, and the report says which tensors and how
much that is. Changes come out of the streaming engine, one at a time in each of its threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError, RecipeError
from motionmerge.exports.lora_energy import Energy
from motionmerge.exports.lora_layers import LoraLayers
from motionmerge.exports.names import ModelPart, Naming, family_of_parts, naming, parts_of_model
from motionmerge.exports.sinks import Zeros
from motionmerge.exports.targets import (
    DIFFUSERS,
    MOTIONMERGE,
    ExportFile,
    Target,
    how_to_load,
    parse_target,
    plan_files,
    plan_whole_files,
)
from motionmerge.exports.written import Exports
from motionmerge.io.atomic import (
    check_folder,
    check_new_file,
    folder_of_results,
    prepare_folder,
)
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.nodes import Checkpoint, Difference
from motionmerge.merging.compute.plan import MergeJob
from motionmerge.merging.compute.streaming import ReportProgress, stream
from motionmerge.merging.inputs.coverage import Missing, check_coverage
from motionmerge.merging.inputs.sources import OpenInputs, Source
from motionmerge.merging.lora.settings import MODULES_KEY
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import InputValue, Recipe
from motionmerge.tensors import AnyDtype, DType, is_mergeable, parse_dtype
from motionmerge.text import fix_unknown_name


@dataclass(frozen=True, kw_only=True)
class LoraExport:
    """One LoRA file.

    Attributes:
        path: The file; None in a dry run.
        formula: The expert.
        base: The input that the LoRA is to be added to.
        rank: Its rank.
        target: The tool that it is for.
        modules: The modules of the model that it holds; an empty name is the whole model.
        groups: The energy by parameter group, and under `all` of everything; empty in a dry run.
        differences: Tensors that it holds as plain differences.
        left_out: Tensors that change and that the tool cannot load from such a file.
        multipliers: When it is in force, one number for each phase, e.g. `1;0`; None if the recipe
            does not tell.
    """

    path: str | None
    formula: str
    base: str
    rank: int
    target: str
    modules: tuple[str, ...]
    groups: Mapping[str, Energy]
    differences: int
    left_out: tuple[str, ...]
    multipliers: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        modules = ", ".join(module for module in self.modules if module)
        lines = [
            f"{self.formula}, as a LoRA of rank {self.rank} for {self.base}"
            f"{f' ({modules})' if modules else ''} -> "
            f"{self.path or '(dry run: nothing was written)'}"
        ]
        if self.groups:
            lines.append(
                f"  {'group':16}{'layers':>7}{'captured':>10}{'rank 90%':>10}{'rank 99%':>10}"
                f"{'left out':>10}"
            )
        lines += [f"  {group:16}{found}" for group, found in self.groups.items()]
        if self.groups:
            held = self.groups["all"].captured
            lines.append(f"  The file holds {held:.2%} of the change (of its squared norm).")
        if self.differences:
            lines.append(f"  {self.differences} biases, norms and the like are in it whole.")
        if self.left_out:
            some = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            lines.append(
                f"  Left out, as {self.target} loads none of their kind from a LoRA: "
                f"{len(self.left_out)} tensors that change, {some}"
            )
        return "\n".join(lines)


def export_loras(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    rank: int,
    base: str | None = None,
    target: str | Target | None = None,
    names: Naming | None = None,
    inputs: Mapping[str, InputValue] | None = None,
    missing: Missing = "error",
    dtype: str | AnyDtype = "fp32",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: ReportProgress | None = None,
) -> Exports[LoraExport]:
    """Write each expert of a recipe as LoRA files, `output/<expert>.safetensors`.

    There are no keys of alpha: scale 1 gives the expert. Every layer has the same rank, filled up
    with zeros where the layer has less, because loaders expect that. Where the rank is no smaller
    than a layer's smaller side, the file holds the change bit for bit.

    Args:
        recipe: A recipe, its file, or the name of a shipped one.
        output: The folder to write to.
        rank: Rank of every layer.
        base: The input that the LoRAs are for; the one at the front of the first expert by default.
        target: The tool: `comfyui`, `diffusers`, `wan2gp` or `motionmerge`. Of a pair of denoisers,
            each gets files of its own (`<expert>_high_noise`, `<expert>_low_noise`), except for
            motionmerge. That is the default for models of several modules and for DynamiCrafter,
            diffusers for others.
        names: How the tensors of a module are called, if not by the names of the target.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        missing: `error` or `keep`; see `check_coverage`.
        dtype: Dtype of what is written.
        overwrite: Replace files that exist.
        dry_run: Check everything that the headers tell; write nothing.
        progress: Called after each chunk of the experts.

    Raises:
        RecipeError: `base` is no input, or `rank` is no positive integer.
        CheckpointError: An expert equals the base in all that the file can hold; or as `merge`.
        ConfigError: A file exists already, cannot be written, or no names are known for the model.
        ShapeError: As `merge`.
    """
    bound = BoundRecipe.of(recipe, inputs)
    recipe = bound.recipe
    output, wanted = Path(output), parse_dtype(dtype)
    base = _checked_base(recipe, base)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"`rank={rank!r}` is not a positive integer.", fix="Use e.g. `rank=64`.")
    check_folder(output)
    changed = _changed(bound, base)
    start = Source(base, bound.origins[base])
    sources = [source for expert in changed.values() for source in expert.sources()]
    with OpenInputs(sources) as opened:
        coverage = check_coverage(list(changed.values()), opened, missing=missing)
        shapes = _mergeable(opened, start)
        parts = parts_of_model(shapes)
        chosen = _target(target, parts)
        plan_of = plan_files if chosen.each_denoiser else plan_whole_files
        plan = plan_of(recipe, parts, bound.origins[base])
        paths = {file: output / f"{file.stem}.safetensors" for file in plan.files}
        for path in paths.values():
            check_new_file(path, overwrite=overwrite or dry_run)
        named = names or naming(chosen.style, chosen.front)
        layouts = {part.module: named(part) for part in parts}
        layers = {
            file: LoraLayers(
                {name: t for module in file.modules for name, t in layouts[module].items()},
                chosen,
                rank=rank,
                dtype=wanted,
            )
            for file in plan.files
        }
        if not dry_run:
            with folder_of_results(output), ExitStack() as stack:
                prepare_folder(output)
                for held in layers.values():
                    stack.enter_context(held.file_in(output))
                _stream({file: changed[file.expert] for file in layers}, layers, shapes, progress)
                _refuse_empty(layers, base)
                for file, held in layers.items():
                    held.write(paths[file], _metadata(bound.pinned, file, base))
    files = {
        file.stem: LoraExport(
            path=None if dry_run else str(paths[file]),
            formula=bound.formulas[file.expert],
            base=base,
            rank=rank,
            target=chosen.title,
            modules=file.modules,
            groups=held.energies.report(),
            differences=held.differences,
            left_out=tuple(sorted(held.left_out)),
            multipliers=plan.multipliers(file),
        )
        for file, held in layers.items()
    }
    usage = how_to_load(chosen, plan, output, family_of_parts(parts))
    return Exports(files, tuple(usage), coverage.unmatched)


def _checked_base(recipe: Recipe, base: str | None) -> str:
    base = next(iter(recipe.experts.values())).anchor.name if base is None else base
    if base not in recipe.inputs:
        raise RecipeError(
            f"The recipe has no input `{base}`.", fix=fix_unknown_name(base, recipe.inputs)
        )
    return base


def _target(target: str | Target | None, parts: Sequence[ModelPart]) -> Target:
    if target is None:
        return DIFFUSERS if len(parts) == 1 and parts[0].is_in_diffusers else MOTIONMERGE
    return target if isinstance(target, Target) else parse_target(target)


def _changed(bound: BoundRecipe, base: str) -> dict[str, Checkpoint]:
    """Return each expert as the base and what is added to it."""
    changed = {}
    for name, expert in bound.experts.items():
        start = Source(base, bound.origins[base])
        if expert.anchor != start:
            expert = Checkpoint(start, (Difference(expert, Checkpoint(start)),))
        changed[name] = expert
    return changed


def _mergeable(opened: OpenInputs, start: Source) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a merge can change."""
    shapes = {name: opened.shape(start, name) for name in opened.names(start)}
    return {n: shape for n, shape in shapes.items() if is_mergeable(opened.dtype(start, n), shape)}


def _stream(
    experts: Mapping[ExportFile, Checkpoint],
    layers: Mapping[ExportFile, LoraLayers],
    shapes: Mapping[str, tuple[int, ...]],
    progress: ReportProgress | None,
) -> None:
    """Compute what each expert adds to the base, and put it into its files.

    What is added to zeros is the change itself, not what rounding leaves of it beside the base.
    """
    zeros = Source("(zeros)", Zeros(shapes))
    jobs = []
    for file, held in layers.items():
        names = held.names()
        specs = {name: (DType.FP32, shape) for name, shape in shapes.items() if name in names}
        jobs.append(
            MergeJob(
                checkpoint=Checkpoint(zeros, experts[file].vectors),
                specs=specs,
                sink=held.sink(specs),
            )
        )
    sources = [source for job in jobs for source in job.checkpoint.sources()]
    torch.linalg.eigvalsh(torch.eye(1))  # loads LAPACK before threads do
    with OpenInputs(sources) as opened:
        stream(jobs, opened, progress=progress)


def _refuse_empty(layers: Mapping[ExportFile, LoraLayers], base: str) -> None:
    """Refuse files in which no layer changes.

    Raises:
        CheckpointError: There is one.
    """
    for file, held in layers.items():
        if not held.finish():
            raise CheckpointError(
                f"`{file.stem}` would be empty: `{file.expert}` equals `{base}` in every layer of "
                "it.",
                fix="Name the input that the LoRA is to be added to with `base`.",
            )


def _metadata(recipe: Recipe, file: ExportFile, base: str) -> dict[str, str]:
    return {
        **recipe.header(file.expert),
        "motionmerge.lora_base": base,
        MODULES_KEY: ",".join(file.modules),
    }
