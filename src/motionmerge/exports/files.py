"""Experts as single files with the names of the family's original code, one for each denoiser.

ComfyUI, Wan2GP and `from_single_file` of diffusers recognise a model by such names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError
from motionmerge.exports.comfyui_limits import HEADER, limits_of
from motionmerge.exports.names import (
    ModelPart,
    Naming,
    family_of_parts,
    naming,
    nothing,
    parts_of_model,
)
from motionmerge.exports.targets import (
    ExportFile,
    ExportPlan,
    how_to_load_files,
    plan_files,
    plan_whole_files,
)
from motionmerge.exports.written import Exports
from motionmerge.io.atomic import check_folder, check_new_file, folder_of_results
from motionmerge.io.safetensors_file import TensorSpec
from motionmerge.io.weights import open_weights
from motionmerge.io.weights_writer import weights_file
from motionmerge.merging.algebra.nodes import Checkpoint, result_specs
from motionmerge.merging.algebra.results import ResultSpec
from motionmerge.merging.compute.plan import MergeJob, Sink
from motionmerge.merging.compute.renaming import RenamingSink, renamed_specs
from motionmerge.merging.compute.scaled_fp8 import (
    SCALED_FP8,
    ScaledFp8,
    measure_scales,
    plan_scaled_fp8,
    scaled_job,
    write_the_rest,
)
from motionmerge.merging.compute.streaming import ReportProgress, stream
from motionmerge.merging.inputs.coverage import Missing
from motionmerge.merging.inputs.pieces import Pieced, PieceLayout
from motionmerge.merging.inputs.sources import MemoryTensors, OpenInputs, Origin, Source
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import InputValue, Recipe
from motionmerge.merging.report import survival_line
from motionmerge.tensors import AnyDtype, DType, num_bytes, parse_dtype


@dataclass(frozen=True, kw_only=True)
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
        note: Which weights are written as codes and scales; None if none are.
    """

    path: str | None
    formula: str
    modules: tuple[str, ...]
    tensors: int
    num_bytes: int
    left_out: int
    survived: float | None
    cosine: float | None
    note: str | None = None

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
        if self.note:
            lines.append(f"  {self.note}")
        if self.survived is not None:
            lines.append(survival_line(self.survived, self.cosine))
        if self.left_out:
            lines.append(
                f"  {self.left_out:,} tensors of the checkpoint are no denoiser's: left out"
            )
        return "\n".join(lines)


Planner = Callable[[Recipe, Sequence[ModelPart], Origin], ExportPlan]
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
    progress: ReportProgress | None = None,
) -> Exports[FileExport]:
    """Write experts as single files with original names and no prefix, for `diffusion_models`.

    Of a pair of denoisers each gets files of its own, `<expert>_high_noise.safetensors` and
    `<expert>_low_noise.safetensors`. If the recipe's boundary and the pipeline's
    `boundary_ratio` are known, files that would never denoise are left out.

    Args:
        recipe: A recipe, its file, or the name of a shipped one.
        output: The folder to write to.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        missing: `error` or `keep`; see `check_coverage`.
        dtype: Dtype of the floating-point tensors; that of the inputs by default. `fp8_scaled`
            writes codes and scales under ComfyUI's names; see `plan_scaled_fp8`.
        overwrite: Replace files that exist.
        dry_run: Check everything that the headers tell; write nothing.
        progress: Called after each chunk.

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
    progress: ReportProgress | None = None,
) -> Exports[FileExport]:
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
        dtype: Dtype of the floating-point tensors; that of the inputs by default. `fp8_scaled` only
            where `opener` is left out.
        overwrite: Replace files that exist.
        dry_run: Check everything that the headers tell; write nothing.
        progress: Called after each chunk.

    Raises:
        ConfigError: No such names are known, or a file exists already or cannot be written.
        RecipeError, CheckpointError, ShapeError: As `merge`.
    """
    bound = BoundRecipe.of(recipe, inputs)
    output = Path(output)
    scaled = dtype == SCALED_FP8 and opener is None
    wanted = None if dtype is None or scaled else parse_dtype(dtype)
    check_folder(output)
    experts = bound.experts
    with bound.open() as opened:
        coverage = bound.fit(opened, missing=missing).coverage
        reached = dict(zip(experts, coverage.reached, strict=True))
        parts = {name: _parts(opened, expert.anchor) for name, expert in experts.items()}
        first = next(iter(experts))
        planned = plan(bound.recipe, parts[first], bound.origins[experts[first].anchor.name])
        paths = {file: output / f"{file.stem}{ending}" for file in planned.files}
        for path in paths.values():
            check_new_file(path, overwrite=overwrite or dry_run)
        contents: dict[ExportFile, Content] = {}
        for file in planned.files:
            expert = experts[file.expert]
            content = _content(file, expert, parts[file.expert], names, opened, wanted)
            if scaled:
                content = content.as_codes(expert.anchor, opened, reached=reached[file.expert])
            contents[file] = content
        jobs: dict[ExportFile, MergeJob] = {}
        if not dry_run:
            with folder_of_results(output), ExitStack() as stack:
                sinks = {
                    file: stack.enter_context(
                        (opener or weights_file_of)(
                            paths[file],
                            content.targets,
                            {
                                **_kept_metadata(experts[file.expert].anchor),
                                **bound.pinned.header(file.expert),
                            },
                        )
                    )
                    for file, content in contents.items()
                }
                chosen = {file: experts[file.expert] for file in contents}
                jobs = _write(chosen, contents, sinks, opened, progress)
    family = family_of_parts(parts[first])
    limits = limits_of(
        family, next(iter(contents.values())).layout, _kept_metadata(experts[first].anchor)
    )
    return Exports(
        files={
            file.stem: FileExport(
                path=None if dry_run else str(paths[file]),
                formula=bound.formulas[file.expert],
                modules=file.modules,
                tensors=len(content.targets),
                num_bytes=sum(num_bytes(*spec) for spec in content.targets.values()),
                left_out=content.left_out,
                survived=jobs[file].survival.share if jobs else None,
                cosine=jobs[file].survival.cosine if jobs else None,
                note=content.codes.note if content.codes else None,
            )
            for file, content in contents.items()
        },
        usage=tuple(how_to_load_files(planned, family, limits)),
        unmatched=coverage.unmatched,
    )


def _write(
    experts: Mapping[ExportFile, Checkpoint],
    contents: Mapping[ExportFile, Content],
    sinks: Mapping[ExportFile, Sink],
    opened: OpenInputs,
    progress: ReportProgress | None,
) -> dict[ExportFile, MergeJob]:
    """Compute all files in one pass over the inputs, or in two where scales are measured first."""
    plans = {file: content.codes for file, content in contents.items() if content.codes}
    scales = measure_scales(experts, plans, opened, threads=None, progress=progress)
    jobs = {}
    for file, content in contents.items():
        if file in plans:
            jobs[file] = scaled_job(experts[file], plans[file], sinks[file], scales[file])
        else:
            jobs[file] = content.job(experts[file], sinks[file])
    stream(list(jobs.values()), opened, progress=progress)
    for file, plan in plans.items():
        write_the_rest(plan, sinks[file], scales[file], opened)
    return jobs


def weights_file_of(
    path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> AbstractContextManager[Sink]:
    """Grow one safetensors file."""
    return weights_file(path, specs, metadata=metadata)


@dataclass(frozen=True)
class Content:
    """The contents of one file, or of one denoiser in a folder.

    Attributes:
        layout: Its tensors, as pieces of the expert's.
        specs: Dtype and shape of the expert's tensors that are needed.
        left_out: Tensors of the checkpoint that belong to no module.
        codes: Which weights become codes and scales; None if none do.
    """

    layout: PieceLayout
    specs: Mapping[str, ResultSpec]
    left_out: int = 0
    codes: ScaledFp8 | None = None

    @classmethod
    def of(
        cls, layout: PieceLayout, specs: Mapping[str, ResultSpec], *, left_out: int = 0
    ) -> Content:
        """Return the tensors of an expert that the export needs."""
        used = {piece.name for tensor in layout.values() for piece in tensor.pieces}
        needed = {name: spec for name, spec in specs.items() if name in used}
        return cls(layout, needed, left_out)

    @cached_property
    def targets(self) -> dict[str, ResultSpec]:
        """Dtype and shape of its tensors."""
        return self.codes.file_specs if self.codes else renamed_specs(self.layout, self.specs)

    def job(self, expert: Checkpoint, sink: Sink) -> MergeJob:
        """Return the job that computes the expert's tensors and puts them into a sink as these."""
        renaming = RenamingSink(sink, self.layout, self.specs)
        return MergeJob(checkpoint=expert, specs=self.specs, sink=renaming)

    def as_codes(self, anchor: Source, opened: OpenInputs, *, reached: Collection[str]) -> Content:
        """Return the same contents with weights as codes and scales; see `plan_scaled_fp8`."""
        codes = plan_scaled_fp8(anchor, self.specs, opened, reached=reached, layout=self.layout)
        return replace(self, codes=codes)


def _content(
    file: ExportFile,
    expert: Checkpoint,
    parts: Iterable[ModelPart],
    names: Naming,
    opened: OpenInputs,
    dtype: DType | None,
) -> Content:
    """Describe what a file holds.

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
    known = {name for part in held.values() for name in part.names.values()}
    return Content.of(layout, specs, left_out=len(specs.keys() - known))


def _parts(opened: OpenInputs, anchor: Source) -> list[ModelPart]:
    return parts_of_model({name: opened.shape(anchor, name) for name in opened.names(anchor)})


def _kept_metadata(anchor: Source) -> dict[str, str]:
    """Return what the header of the file at the front says about its model."""
    origin = anchor.origin
    if origin is None or isinstance(origin, MemoryTensors) or origin.is_dir():
        return {}
    with open_weights(origin) as reader:
        return {key: text for key, text in reader.metadata.items() if key == HEADER}
