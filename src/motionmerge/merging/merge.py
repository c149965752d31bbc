"""Carry out a recipe: write its experts as files, several from one pass over the inputs.

Arithmetic is in fp32 and each result is rounded once. The bits do not depend on threads, order,
shards or layout, and are those of `realise` and `apply`.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.io.atomic import atomic_path, folder_of_results
from motionmerge.io.json_file import read_json
from motionmerge.io.paths import behind_links
from motionmerge.io.safetensors_file import TensorSpec
from motionmerge.io.weights_writer import (
    WeightsWriter,
    free_bytes,
    parse_size,
    pipeline_folder,
    weights_file,
    weights_folder,
)
from motionmerge.merging.algebra.groups import count_parameters
from motionmerge.merging.algebra.nodes import Checkpoint, result_specs
from motionmerge.merging.compute.plan import MergeJob
from motionmerge.merging.compute.scaled_fp8 import (
    SCALED_FP8,
    measure_scales,
    plan_scaled_fp8,
    scaled_job,
    write_the_rest,
)
from motionmerge.merging.compute.streaming import ReportProgress, stream
from motionmerge.merging.in_memory import apply, realise
from motionmerge.merging.inputs.coverage import Coverage, Missing
from motionmerge.merging.inputs.sources import OpenInputs, Origin, module_folders
from motionmerge.merging.recipes.bound import AnyRecipe, BoundRecipe
from motionmerge.merging.recipes.recipe import InputValue, Recipe
from motionmerge.merging.report import ExpertReport, MergeReport, peak_memory
from motionmerge.tensors import AnyDtype, dtype_name, is_mergeable, num_bytes, parse_dtype

__all__ = ["MergeReport", "ReportProgress", "apply", "merge", "realise"]

OutputLayout = Literal["weights", "pipeline"]


def merge(
    recipe: AnyRecipe,
    output: str | Path,
    *,
    dtype: str | AnyDtype | None = None,
    layout: OutputLayout = "weights",
    max_shard_size: int | str | None = None,
    stochastic_rounding: int | None = None,
    missing: Missing = "error",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    inputs: Mapping[str, InputValue] | None = None,
    threads: int | None = None,
    progress: ReportProgress | None = None,
) -> MergeReport:
    """Write every expert of a recipe to `output/<expert>.safetensors`, and `output/recipe.yaml`.

    The headers carry the recipe with the inputs' hashes, the seeds and the version. A file or
    folder appears under its name only when it is whole.

    Args:
        recipe: A recipe, its file, the name of a shipped one, or one whose inputs are found.
        output: The folder to write to.
        dtype: Dtype of the floating-point tensors; by default that of the checkpoint at the front
            of each expression, and bf16 for weights that it stores as codes and scales.
            `fp8_scaled` writes such weights as codes and scales again; see `plan_scaled_fp8`.
        layout: `weights`, or `pipeline`: each expert is a whole diffusers folder
            `output/<expert>/`, made of the folder at the front of its expression; only the
            merged modules' weights are new, all else is hard-linked or copied.
        max_shard_size: E.g. `5GB`: split each expert's (or module's) weights into shards with an
            index, in the folder `output/<expert>/`.
        stochastic_rounding: Seed; rounds up or down at random so that small changes survive in
            16 bits on average. None rounds to the nearest value.
        missing: `error` refuses tensors that only some inputs have; `keep` takes them from the
            checkpoint at the front of each expression.
        overwrite: Replace what is there already.
        dry_run: Check everything that the headers and LoRAs tell, and report; write nothing. NaN in
            a checkpoint is found by the merge itself, as this does not read its values.
        allow_nonfinite: Accept NaN and infinity in the inputs.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        threads: How many; None takes one per core, at most eight. Never changes a bit.
        progress: Called after each block.

    Raises:
        RecipeError: The recipe is wrong, matches nothing, or has knobs alone.
        CheckpointError: An input is missing, damaged, not the pinned one, holds NaN, or lacks
            tensors; a result would replace an input; or the disk is too small or refuses.
        ShapeError: Two inputs disagree about a shape.
        ConfigError: A result exists already and `overwrite` is off, or an option is wrong.
    """
    started = time.perf_counter()
    bound, folder = BoundRecipe.of(recipe, inputs), Path(output)
    knobs = _knobs(bound.recipe)
    scaled = dtype == SCALED_FP8
    wanted = None if dtype is None or scaled else parse_dtype(dtype)
    if scaled and (layout == "pipeline" or stochastic_rounding is not None):
        raise ConfigError(
            "Scaled fp8 is written as one file of weights, rounded to the nearest code.",
            fix="Leave out `layout='pipeline'` and `stochastic_rounding`, or use `dtype='bf16'`.",
        )
    if wanted is not None and not wanted.is_floating_point:
        raise ConfigError(
            f"Dtype {dtype_name(wanted)} is not floating point.", fix="Use fp32, fp16 or bf16."
        )
    if layout not in ("weights", "pipeline"):
        raise ConfigError(f"`layout` is {layout!r}.", fix="Use `weights` or `pipeline`.")
    shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    targets = {
        name: _Target(
            folder=folder,
            expert=name,
            checkpoint=checkpoint,
            layout=layout,
            shard_bytes=shard_bytes,
        )
        for name, checkpoint in bound.experts.items()
    }
    _refuse_inputs([folder, *(target.path for target in targets.values())], bound.origins)
    if not overwrite and not dry_run:
        _refuse_existing([*(target.path for target in targets.values()), folder / "recipe.yaml"])
    with bound.open(allow_nonfinite=allow_nonfinite) as opened:
        fit, experts = bound.fit(opened, missing=missing), bound.experts
        coverage, specs = fit.coverage, fit.specs
        if wanted is not None:
            specs = {name: result_specs(c, opened, dtype=wanted) for name, c in experts.items()}
        free = free_bytes(folder)
        reached = _reached(specs, coverage)
        plans = {
            name: plan_scaled_fp8(c.anchor, specs[name], opened, reached=reached[name])
            for name, c in (experts.items() if scaled else ())
        }
        stored = {**specs} | {name: plan.file_specs for name, plan in plans.items()}
        needed = _size_of(stored)
        jobs: dict[str, MergeJob] = {}
        unchanged = 0
        if dry_run:
            bound.check_pins()
        else:
            _refuse_full_disk(folder, needed, free)
            pinned = bound.pinned
            scales = measure_scales(experts, plans, opened, threads=threads, progress=progress)
            with folder_of_results(folder), ExitStack() as stack:
                files = {}
                for name, target in targets.items():
                    metadata = _metadata(pinned, name, stochastic_rounding)
                    files[name] = stack.enter_context(target.open(stored[name], metadata))
                    jobs[name] = (
                        scaled_job(experts[name], plans[name], files[name], scales[name])
                        if scaled
                        else MergeJob(checkpoint=experts[name], specs=specs[name], sink=files[name])
                    )
                unchanged = stream(
                    list(jobs.values()),
                    opened,
                    seed=stochastic_rounding,
                    threads=threads,
                    progress=progress,
                )
                for name, plan in plans.items():
                    write_the_rest(plan, files[name], scales[name], opened)
            with atomic_path(folder / "recipe.yaml") as path:
                path.write_text(pinned.relocated(folder).print(), encoding="utf-8")
        reports = {
            name: _report(
                bound.formulas[name],
                specs[name],
                reached[name],
                job=jobs.get(name),
                path=targets[name].path,
                note=plans[name].note if scaled else _note(checkpoint, specs[name], opened),
                num_bytes=sum(num_bytes(*spec) for spec in stored[name].values()),
            )
            for name, checkpoint in experts.items()
        }
        return MergeReport(
            experts=reports,
            matched=len(coverage.matched),
            unmatched=coverage.unmatched,
            unused_strengths=len(coverage.unused_strengths),
            unchanged=unchanged,
            knobs=knobs,
            dry_run=dry_run,
            seconds=time.perf_counter() - started,
            bytes_read=opened.bytes_read,
            bytes_written=0 if dry_run else needed,
            peak_memory=peak_memory(),
            disk_bytes=needed,
            free_bytes=free,
        )


def _knobs(recipe: Recipe) -> tuple[str, ...]:
    """List what the schedule sets besides experts, by entry: no file of weights can hold it.

    Raises:
        RecipeError: There is nothing else, as all experts are inputs.
    """
    schedule = recipe.written_out().schedule
    if schedule is None or not schedule.has_knobs:
        return ()
    if not any(expert.vectors for expert in recipe.experts.values()):
        raise RecipeError(
            "The recipe's experts are inputs as they are, and the rest of it is knobs, which are "
            "no weights: there is nothing to merge.",
            fix="Make videos with the recipe as it is, or use one that changes weights.",
        )
    return tuple(dict.fromkeys(entry.label for entry in schedule.entries if entry.knobs))


def preview(recipe: AnyRecipe) -> int:
    """Return how many bytes the results of `merge` will take, from headers alone.

    Args:
        recipe: A recipe, its file, the name of a shipped one, or one whose inputs are found.

    Raises:
        RecipeError, CheckpointError, ShapeError: `merge` would refuse the inputs.
    """
    return _size_of(BoundRecipe.of(recipe).fit().specs)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where one expert goes."""

    folder: Path
    expert: str
    checkpoint: Checkpoint
    layout: OutputLayout
    shard_bytes: int | None

    def __post_init__(self) -> None:
        if self.layout == "pipeline" and not self.template:
            raise ConfigError(
                f"`{self.checkpoint.anchor.name}`, at the front of `{self.expert}`, is no pipeline "
                "folder.",
                fix="Give a diffusers folder with `unet/` or `transformer/`, or leave out "
                "`layout='pipeline'`.",
            )
        if self.layout == "pipeline" and self.template:
            _refuse_part_of_pipeline(self.template)

    @property
    def template(self) -> Path | None:
        """The pipeline folder at the front of the expression."""
        origin = self.checkpoint.anchor.origin
        return origin if isinstance(origin, Path) and module_folders(origin) else None

    @property
    def path(self) -> Path:
        """The file, or the folder."""
        whole_file = self.layout == "weights" and self.shard_bytes is None
        return self.folder / (f"{self.expert}.safetensors" if whole_file else self.expert)

    def open(
        self, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> AbstractContextManager[WeightsWriter]:
        if self.layout == "pipeline" and self.template:
            return pipeline_folder(
                self.path,
                specs,
                template=self.template,
                max_shard_bytes=self.shard_bytes,
                metadata=metadata,
            )
        if self.shard_bytes is not None:
            return weights_folder(
                self.path, specs, max_shard_bytes=self.shard_bytes, metadata=metadata
            )
        return weights_file(self.path, specs, metadata=metadata)


def _reached(
    specs: Mapping[str, Mapping[str, TensorSpec]], coverage: Coverage
) -> dict[str, dict[str, int]]:
    """Return, per expert, the sizes of the tensors that a task vector will change."""
    return {
        name: {key: math.prod(held[key][1]) for key in keys if is_mergeable(*held[key])}
        for (name, held), keys in zip(specs.items(), coverage.reached, strict=True)
    }


def _size_of(specs: Mapping[str, Mapping[str, TensorSpec]]) -> int:
    return sum(num_bytes(*spec) for held in specs.values() for spec in held.values())


def _report(
    formula: str,
    specs: Mapping[str, TensorSpec],
    reached: Mapping[str, int],
    *,
    job: MergeJob | None,
    path: Path,
    note: str | None,
    num_bytes: int,
) -> ExpertReport:
    """Describe what happened to one expert, or without a job what would happen."""
    touched = reached if job is None else {name: round(n) for name, n in job.touched.items()}
    computed = len(reached) if job is None else job.computed
    return ExpertReport(
        formula=formula,
        path=None if job is None else str(path),
        num_tensors=len(specs),
        num_parameters=sum(math.prod(shape) for _, shape in specs.values()),
        computed=computed,
        copied=len(specs) - computed,
        touched=count_parameters(touched),
        survived=None if job is None else job.survival.share,
        cosine=None if job is None else job.survival.cosine,
        num_bytes=num_bytes,
        note=note,
    )


def _note(
    checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], opened: OpenInputs
) -> str | None:
    """Return the dtype of weights that the anchor stores as codes and scales."""
    written = Counter(
        dtype_name(dtype)
        for name, (dtype, _) in specs.items()
        if opened.scaled(checkpoint.anchor, name) is not None
    )
    return (
        ", ".join(
            f"{count} weights that `{checkpoint.anchor.name}` stores as codes and scales are "
            f"written in {dtype}"
            for dtype, count in written.items()
        )
        or None
    )


def _metadata(recipe: Recipe, expert: str, rounding_seed: int | None) -> dict[str, str]:
    hashes = {name: entry.sha256 for name, entry in recipe.inputs.items()}
    metadata = {
        **recipe.header(expert),
        "motionmerge.inputs": json.dumps(hashes),
        "motionmerge.seeds": json.dumps(recipe.seeds),
    }
    if rounding_seed is not None:
        metadata["motionmerge.stochastic_rounding"] = str(rounding_seed)
    return metadata


def _refuse_inputs(outputs: Sequence[Path], origins: Mapping[str, Origin]) -> None:
    for name, origin in origins.items():
        for path in outputs:
            if not isinstance(origin, Path):
                continue
            written, read = behind_links(path), behind_links(origin)
            if written == read or (origin.is_dir() and written.is_relative_to(read)):
                raise CheckpointError(
                    f"The result {path} would replace the input `{name}`, or lie inside it.",
                    fix="Write to another folder.",
                )


def _refuse_part_of_pipeline(template: Path) -> None:
    """Check that all parts are there, which they are not where the hub gave only what is merged."""
    try:
        index = read_json(template / "model_index.json")
        parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    except IndexError as error:
        raise CheckpointError(
            f"{template / 'model_index.json'} cannot be read: {error!r}", fix="Download it again."
        ) from error
    lacking = [name for name in parts if not (template / name).exists()]
    if lacking:
        raise CheckpointError(
            f"{template} is a pipeline without its {', '.join(lacking)}.",
            fix="Download all of it: `hf download OWNER/NAME --local-dir FOLDER`; merge FOLDER.",
        )


def _refuse_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(
                f"{path} exists already.",
                fix="Choose another folder, or pass `overwrite=True`.",
            )


def _refuse_full_disk(folder: Path, needed: int, free: int) -> None:
    if needed > free:
        raise CheckpointError(
            f"The results take {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free.",
            fix="Free some space, or write to another disk (-o).",
        )
