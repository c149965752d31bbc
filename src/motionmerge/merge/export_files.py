"""Experts as single files with the names of the family's original code, one for each denoiser.

ComfyUI, Wan2GP and `from_single_file` of diffusers recognise a model by such names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motionmerge import __version__
from motionmerge.errors import CheckpointError
from motionmerge.io.atomic import check_folder, check_new_file
from motionmerge.io.safetensors_file import TensorSpec
from motionmerge.io.weights import open_weights
from motionmerge.io.weights_writer import weights_file
from motionmerge.merge.algebra import Checkpoint, result_specs
from motionmerge.merge.coverage import Missing, check_coverage
from motionmerge.merge.export_names import Naming, Part, naming, nothing, parts_of_model
from motionmerge.merge.export_sinks import RenamingSink, renamed_specs
from motionmerge.merge.export_targets import (
    ExportFile,
    ExportPlan,
    plan_files,
    plan_whole_files,
)
from motionmerge.merge.in_memory import as_recipe
from motionmerge.merge.pieces import Layout, Pieced
from motionmerge.merge.plan import Job, Sink
from motionmerge.merge.recipe import METADATA_KEY, InputValue, Recipe
from motionmerge.merge.results import ResultSpec
from motionmerge.merge.sources import MemoryTensors, OpenInputs, Origin, Source
from motionmerge.merge.streaming import Progress, stream
from motionmerge.tensors import AnyDtype, DType, num_bytes, parse_dtype

_KEPT = "config"
"""What a single file of LTX says about itself in its header, which ComfyUI and diffusers read."""


@dataclass(frozen=True)
class FileExport:
    """One file.

    Attributes:
        path: The file; None in a dry run.
        formula: The expert.
        modules: The modules of the model that it holds; an empty name is the whole model.
        tensors: Number of tensors.
        num_bytes: Their size.
        left_out: Tensors of the checkpoint that belong to no denoiser and are not in the file.
        survived: Share of the entries to be changed that still differ after rounding; None if none
            should, and in a dry run.
        cosine: Between the realised and the ideal change; None likewise.
    """

    path: str | None
    formula: str
    modules: tuple[str, ...]
    tensors: int
    num_bytes: int
    left_out: int
    survived: float | None
    cosine: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        modules = ", ".join(module for module in self.modules if module)
        lines = [
            f"{self.formula}{' of ' if modules else ''}{modules} -> "
            f"{self.path or '(dry run: nothing was written)'}",
            f"  {self.tensors:,} tensors, {self.num_bytes / 1e6:,.1f} MB",
        ]
        if self.survived is not None:
            lines.append(
                f"  survives rounding: {self.survived:.1%} of the entries, cosine "
                f"{self.cosine or 0:.4f}"
            )
        if self.left_out:
            lines.append(
                f"  {self.left_out:,} tensors of the checkpoint are no denoiser's: left out"
            )
        return "\n".join(lines)


Planner = Callable[[Recipe, Sequence[Part], Origin], ExportPlan]
"""Works out the files of an export: `plan_files` or `plan_whole_files`."""

Opener = Callable[[Path, Mapping[str, TensorSpec], Mapping[str, str]], AbstractContextManager[Sink]]
"""Grows a file at a path, for tensors of given dtypes and shapes, with metadata in its header."""


def export_comfyui(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    inputs: Mapping[str, InputValue] | None = None,
    missing: Missing = "error",
    dtype: str | AnyDtype | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, FileExport]:
    """Write experts as single files with original names and no prefix, for `diffusion_models`.

    Of a pair of denoisers each gets files of its own, `<expert>_high_noise.safetensors` and
    `<expert>_low_noise.safetensors`. If the recipe's boundary and the pipeline's
    `boundary_ratio` are known, files that would never denoise are left out.

    Args:
        recipe: A recipe, its file, or the name of a shipped one.
        output: The folder to write to.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        missing: `error` or `keep`; see `check_coverage`.
        dtype: Dtype of the floating-point tensors; that of the inputs by default.
        overwrite: Replace files that exist.
        dry_run: Check everything that the headers tell; write nothing.
        progress: Called after each chunk.

    Returns:
        The files by name without ending.

    Raises:
        ConfigError: No original names are known for the model, or a file exists already or cannot
            be written.
        RecipeError, CheckpointError, ShapeError: As `merge`.
    """
    return export_files(
        recipe,
        output,
        names=naming("single_file", nothing),
        plan=plan_files,
        inputs=inputs,
        missing=missing,
        dtype=dtype,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )


def export_files(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    names: Naming,
    plan: Planner = plan_whole_files,
    ending: str = ".safetensors",
    opener: Opener | None = None,
    inputs: Mapping[str, InputValue] | None = None,
    missing: Missing = "error",
    dtype: str | AnyDtype | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, FileExport]:
    """Write experts as files under other names; see `export_comfyui`.

    Args:
        recipe: A recipe, its file, or the name of a shipped one.
        output: The folder to write to.
        names: How the tensors of a module are called.
        plan: Which files there are.
        ending: That of the files.
        opener: Grows a file; safetensors by default.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        missing: `error` or `keep`; see `check_coverage`.
        dtype: Dtype of the floating-point tensors; that of the inputs by default.
        overwrite: Replace files that exist.
        dry_run: Check everything that the headers tell; write nothing.
        progress: Called after each chunk.

    Raises:
        ConfigError: No such names are known, or a file exists already or cannot be written.
        RecipeError, CheckpointError, ShapeError: As `merge`.
    """
    recipe = as_recipe(recipe)
    output = Path(output)
    wanted = None if dtype is None else parse_dtype(dtype)
    check_folder(output)
    origins = recipe.origins(inputs)
    bound = {name: expert.bind(origins) for name, expert in recipe.experts.items()}
    with OpenInputs([s for expert in bound.values() for s in expert.sources()]) as opened:
        check_coverage(list(bound.values()), opened, missing=missing)
        parts = {name: _parts(opened, expert.anchor) for name, expert in bound.items()}
        first = next(iter(bound))
        planned = plan(recipe, parts[first], origins[bound[first].anchor.name])
        paths = {file: output / f"{file.stem}{ending}" for file in planned.files}
        for path in paths.values():
            check_new_file(path, overwrite=overwrite or dry_run)
        contents = {
            file: _content(file, bound[file.expert], parts[file.expert], names, opened, wanted)
            for file in planned.files
        }
        jobs: dict[ExportFile, Job] = {}
        if not dry_run:
            pinned = recipe.pinned(origins, overridden=inputs)
            with ExitStack() as stack:
                for file, content in contents.items():
                    metadata = {
                        **_kept_metadata(bound[file.expert].anchor),
                        "format": "pt",
                        METADATA_KEY: pinned.print(),
                        "motionmerge.expert": file.expert,
                        "motionmerge.version": __version__,
                    }
                    sink = stack.enter_context(
                        (opener or weights_file_of)(paths[file], content.targets, metadata)
                    )
                    renaming = RenamingSink(sink, content.layout, content.specs)
                    jobs[file] = Job(bound[file.expert], content.specs, renaming)
                stream(list(jobs.values()), opened, progress=progress)
        return {
            file.stem: FileExport(
                path=None if dry_run else str(paths[file]),
                formula=str(recipe.experts[file.expert]),
                modules=file.modules,
                tensors=len(content.targets),
                num_bytes=sum(num_bytes(*spec) for spec in content.targets.values()),
                left_out=content.left_out,
                survived=jobs[file].survival.share if jobs else None,
                cosine=jobs[file].survival.cosine if jobs else None,
            )
            for file, content in contents.items()
        }


def weights_file_of(
    path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> AbstractContextManager[Sink]:
    """Grow one safetensors file."""
    return weights_file(path, specs, metadata=metadata)


@dataclass(frozen=True)
class _Content:
    """The contents of one file.

    Attributes:
        layout: Its tensors, as pieces of the expert's.
        specs: Dtype and shape of the expert's tensors that are needed.
        targets: Dtype and shape of its tensors.
        left_out: Tensors of the checkpoint that belong to no module.
    """

    layout: Layout
    specs: Mapping[str, ResultSpec]
    targets: Mapping[str, TensorSpec]
    left_out: int


def _content(
    file: ExportFile,
    expert: Checkpoint,
    parts: Iterable[Part],
    names: Naming,
    opened: OpenInputs,
    dtype: DType | None,
) -> _Content:
    """Work out what a file holds.

    Raises:
        CheckpointError: The expert has no such module.
    """
    held = {part.module: part for part in parts}
    layout: dict[str, Pieced] = {}
    for module in file.modules:
        if module not in held:
            raise CheckpointError(
                f"`{file.expert}` has no `{module}`.",
                fix="Give all experts of the recipe models of the same kind.",
            )
        layout |= names(held[module])
    specs = result_specs(expert, opened, dtype=dtype)
    used = {piece.name for tensor in layout.values() for piece in tensor.pieces}
    known = {name for part in held.values() for name in part.names.values()}
    return _Content(
        layout,
        {name: spec for name, spec in specs.items() if name in used},
        renamed_specs(layout, specs),
        len(specs.keys() - known),
    )


def _parts(opened: OpenInputs, anchor: Source) -> list[Part]:
    return parts_of_model({name: opened.shape(anchor, name) for name in opened.names(anchor)})


def _kept_metadata(anchor: Source) -> dict[str, str]:
    """Return what the header of the file at the front says about its model."""
    origin = anchor.origin
    if origin is None or isinstance(origin, MemoryTensors) or origin.is_dir():
        return {}
    with open_weights(origin) as reader:
        return {key: text for key, text in reader.metadata.items() if key == _KEPT}
