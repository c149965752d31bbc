"""Two experts as one Wan 2.2 folder, which plain diffusers runs, and what reads its folders.

`transformer` denoises while it is noisy, `transformer_2` after that; `boundary_ratio` says when.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.exports.files import Content
from motionmerge.exports.names import parts_of_model, renamed
from motionmerge.exports.targets import own_model
from motionmerge.io.atomic import check_new_folder, folder_of_results
from motionmerge.io.json_file import read_json
from motionmerge.io.weights import open_weights
from motionmerge.io.weights_writer import pipeline_folder
from motionmerge.merging.algebra.nodes import result_specs
from motionmerge.merging.compute.streaming import ReportProgress, stream
from motionmerge.merging.inputs.coverage import Missing
from motionmerge.merging.inputs.pieces import PieceLayout
from motionmerge.merging.inputs.sources import OpenInputs, Source
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import InputValue, Recipe, as_recipe
from motionmerge.tensors import AnyDtype, parse_dtype

INDEX_FILE = "model_index.json"
TWO_EXPERT_DENOISER = "WanTransformer3DModel"


@dataclass(frozen=True, kw_only=True)
class FolderExport:
    """A two-expert folder that was written, or would be in a dry run.

    Attributes:
        path: The folder; None in a dry run.
        modules: Per module whose weights are new, the expert that they are.
        tensors: Number of tensors by module.
        boundary_ratio: The share of the noise schedule above which `transformer` denoises.
        survived: By module, the share of the change that is left after rounding; None if nothing
            changes, empty in a dry run.
        unmatched: Tensors that keep what the checkpoint at the front has, as some inputs lack them,
            with those inputs.
    """

    path: str | None
    modules: Mapping[str, str]
    tensors: Mapping[str, int]
    boundary_ratio: float
    survived: Mapping[str, float | None]
    unmatched: Mapping[str, tuple[str, ...]]


def export_two_experts(
    recipe: Recipe | str | Path,
    model: str | Path,
    output: str | Path,
    *,
    inputs: Mapping[str, InputValue] | None = None,
    missing: Missing = "error",
    dtype: str | AnyDtype | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: ReportProgress | None = None,
) -> FolderExport:
    """Write a recipe's two experts as one Wan 2.2 pipeline folder, loadable by plain diffusers.

    Of a model with two denoisers, the first expert gives `transformer` and the second
    `transformer_2`; of a model with one, each expert gives the whole of it. At a timestep exactly
    on the boundary diffusers uses the first expert, and `ExpertSchedule` the second. The folder
    appears when it is whole.

    Args:
        recipe: A recipe with two experts, the first `above` a noise level or a `timestep`. An input
            `memory:base` at the front, as recipes of LoRAs have it, is the pipeline's own model.
        model: A diffusers folder of a Wan pipeline, for all that is not a denoiser; its weights
            are linked where the disk allows, else copied.
        output: The folder to write.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        missing: `error` or `keep`; see `check_coverage`.
        dtype: Dtype of the floating-point tensors; that of the inputs by default.
        overwrite: Replace a folder that exists.
        dry_run: Check everything that the headers tell; write nothing.
        progress: Called after each chunk.

    Raises:
        RecipeError: The recipe has not two experts, or a boundary that the folder cannot express.
        ConfigError: `model` is no Wan folder, or `output` exists or cannot be written.
        CheckpointError, ShapeError: As `merge`; or an expert does not fit the pipeline.
    """
    recipe = as_recipe(recipe)
    model, output = Path(model), Path(output)
    check_new_folder(output, overwrite=overwrite or dry_run, marker=INDEX_FILE, keep=[model])
    wanted = None if dtype is None else parse_dtype(dtype)
    index = _index_of_wan(model)
    first, second, boundary = _two_experts(recipe, model)
    modules = {"transformer": first, "transformer_2": second}
    bound = BoundRecipe.of(recipe, own_model(recipe, model, inputs))
    experts = {module: bound.experts[name] for module, name in modules.items()}
    with bound.open([first, second]) as opened:
        coverage = bound.fit(opened, experts=[first, second], missing=missing).coverage
        contents = {
            module: Content.of(
                _layout_of(module, checkpoint.anchor, opened, model),
                result_specs(checkpoint, opened, dtype=wanted),
            )
            for module, checkpoint in experts.items()
        }
        survived: dict[str, float | None] = {}
        if not dry_run:
            index |= {"transformer_2": index["transformer"], "boundary_ratio": boundary}
            files = {
                INDEX_FILE: json.dumps(index, indent=2) + "\n",
                "transformer_2/config.json": _config_of_second(model),
            }
            specs = {n: spec for held in contents.values() for n, spec in held.targets.items()}
            with (
                folder_of_results(output.parent),
                pipeline_folder(
                    output,
                    specs,
                    template=model,
                    metadata_of={m: bound.pinned.header(e) for m, e in modules.items()},
                    files=files,
                ) as writer,
            ):
                jobs = {m: held.job(experts[m], writer) for m, held in contents.items()}
                stream(list(jobs.values()), opened, progress=progress)
            survived = {module: job.survival.share for module, job in jobs.items()}
    return FolderExport(
        path=None if dry_run else str(output),
        modules=modules,
        tensors={module: len(content.layout) for module, content in contents.items()},
        boundary_ratio=boundary,
        survived=survived,
        unmatched=coverage.unmatched,
    )


def _index_of_wan(pipeline: Path) -> dict[str, Any]:
    """Read the index of a pipeline that can switch between two denoisers.

    Raises:
        ConfigError: It is another one, or there is none.
    """
    index = _read_index(pipeline)
    if (index.get("transformer") or [None, None])[1] != TWO_EXPERT_DENOISER:
        raise ConfigError(
            f"{pipeline} is no Wan pipeline; others cannot switch between two denoisers.",
            fix="Write `motionmerge export loras`, or sample with `motionmerge.experts`.",
        )
    return index


def _read_index(pipeline: Path) -> dict[str, Any]:
    if not (pipeline / INDEX_FILE).is_file():
        raise ConfigError(
            f"{pipeline} is no diffusers pipeline folder: it has no {INDEX_FILE}.",
            fix="Give a folder as `save_pretrained` writes it.",
        )
    return read_json(pipeline / INDEX_FILE)


def _config_of_second(pipeline: Path) -> str:
    for module in ("transformer_2", "transformer"):
        config = pipeline / module / "config.json"
        if config.is_file():
            return config.read_text(encoding="utf-8")
    raise ConfigError(
        f"{pipeline} has no transformer/config.json.", fix="Download all of the pipeline."
    )


def _two_experts(recipe: Recipe, pipeline: Path) -> tuple[str, str, float]:
    """Return the high-noise expert, the low-noise expert, and the boundary ratio between them."""
    entries = recipe.schedule.entries if recipe.schedule else ()
    if recipe.schedule is not None:
        recipe.schedule.check_no_knobs("an export")
    if len(entries) != 2:
        raise RecipeError(
            f"The schedule has {len(entries)} entries; the folder holds two experts.",
            fix="Schedule two experts: `{expert: dynamics, above: 0.9}`, `{expert: consistency}`.",
        )
    high, low = entries
    if high.above is not None:
        return high.expert, low.expert, high.above
    if high.timestep is not None:
        config = pipeline / "scheduler" / "scheduler_config.json"
        settings = read_json(config) if config.is_file() else {}
        return high.expert, low.expert, high.timestep / settings.get("num_train_timesteps", 1000)
    raise RecipeError(
        "`step_fraction` depends on the number of steps; the folder has one noise level.",
        fix="Write `above: 0.9`, the noise level at which the expert changes.",
    )


def _layout_of(module: str, anchor: Source, opened: OpenInputs, pipeline: Path) -> PieceLayout:
    """Return a module's tensors under their names in the folder, as pieces of the checkpoint's.

    Raises:
        CheckpointError: The checkpoint has no such module, or the pipeline's has other tensors.
    """
    shapes = {name: opened.shape(anchor, name) for name in opened.names(anchor)}
    parts = {part.module: part for part in parts_of_model(shapes)}
    part = next((parts[name] for name in (module, "transformer", "") if name in parts), None)
    found: PieceLayout = {} if part is None else part.of_model(renamed(part.shapes, "diffusers"))
    folder = next(
        (path for path in (pipeline / module, pipeline / "transformer") if path.is_dir()), None
    )
    expected: set[str] = set()
    if folder is not None and any(folder.glob("*.safetensors")):
        with open_weights(folder) as reader:
            expected = set(reader.keys())
    different = expected.symmetric_difference(found) if expected else set()
    if not found or different:
        example = next(iter(sorted(different)), next(iter(shapes), "(none)"))
        raise CheckpointError(
            f"`{anchor.name}` does not give the tensors of {folder or module}, e.g. `{example}`.",
            fix="Give the pipeline that the recipe's checkpoints belong to.",
        )
    return {f"{module}.{name}": tensor for name, tensor in found.items()}
