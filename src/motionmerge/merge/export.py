"""Experts in folders that other tools understand: one weights file for each module that changed.

A two-expert folder is that of Wan 2.2: `transformer` denoises while it is noisy, `transformer_2`
after that, and `boundary_ratio` says when. Plain diffusers runs it, and what reads its folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.io.atomic import atomic_folder, check_new_folder
from motionmerge.io.folder_copy import copy_folder
from motionmerge.io.json_file import read_json
from motionmerge.io.weights import open_weights, write_weights
from motionmerge.io.weights_writer import is_weights_of
from motionmerge.lazy_torch import torch
from motionmerge.merge.algebra import Checkpoint, realised, result_specs
from motionmerge.merge.coverage import Missing, check_coverage
from motionmerge.merge.recipe import METADATA_KEY, InputValue, Recipe
from motionmerge.merge.sources import MODULES, OpenInputs
from motionmerge.tensors import AnyDtype, DType, parse_dtype

INDEX_FILE = "model_index.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TWO_EXPERT_DENOISER = "WanTransformer3DModel"


@dataclass(frozen=True)
class FolderExport:
    """What was written.

    Attributes:
        path: The folder.
        modules: Per module whose weights were written, the expert that they are.
        tensors: Number of tensors by module.
        boundary_ratio: The share of the noise schedule above which `transformer` denoises; None in
            a folder of one expert.
    """

    path: str
    modules: Mapping[str, str]
    tensors: Mapping[str, int]
    boundary_ratio: float | None = None


def export_two_experts(
    recipe: Recipe | str | Path,
    pipeline: str | Path,
    output: str | Path,
    *,
    inputs: Mapping[str, InputValue] | None = None,
    missing: Missing = "error",
    dtype: str | AnyDtype | None = None,
    overwrite: bool = False,
) -> FolderExport:
    """Write a recipe's two experts as one Wan 2.2 pipeline folder, loadable by plain diffusers.

    Of a model with two denoisers, the first expert gives `transformer` and the second
    `transformer_2`; of a model with one, each expert gives the whole of it. At a timestep exactly
    on the boundary diffusers uses the first expert, and `ExpertSchedule` the second.

    Args:
        recipe: A recipe with two experts, the first `above` a noise level or a `timestep`.
        pipeline: A diffusers folder of a Wan pipeline, for all that is not a denoiser; its other
            weights are linked where the disk allows, else copied.
        output: The folder to write.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        missing: `error` or `keep`; see `check_coverage`.
        dtype: Dtype of the floating-point tensors; that of the inputs by default.
        overwrite: Replace a pipeline folder that exists.

    Raises:
        RecipeError: The recipe has not two experts, or a boundary that the folder cannot express.
        ConfigError: `pipeline` is no Wan folder, or `output` exists.
        CheckpointError, ShapeError: As `merge`; or an expert does not fit the pipeline.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    pipeline = Path(pipeline)
    index = _read_index(pipeline)
    if (index.get("transformer") or [None, None])[1] != TWO_EXPERT_DENOISER:
        raise ConfigError(
            f"{pipeline} is no Wan pipeline; others cannot switch between two denoisers.",
            fix="Write `motionmerge export loras`, or sample with `motionmerge.experts`.",
        )
    first, second, boundary = _two_experts(recipe, pipeline)
    modules = {"transformer": first, "transformer_2": second}
    written = export_folder(
        recipe,
        pipeline,
        output,
        modules=modules,
        inputs=inputs,
        missing=missing,
        dtype=dtype,
        overwrite=overwrite,
        index={**index, "transformer_2": index["transformer"], "boundary_ratio": boundary},
    )
    return FolderExport(written.path, written.modules, written.tensors, boundary)


def export_folder(
    recipe: Recipe,
    pipeline: str | Path,
    output: str | Path,
    *,
    modules: Mapping[str, str],
    index: Mapping[str, Any] | None = None,
    inputs: Mapping[str, InputValue] | None = None,
    missing: Missing = "error",
    dtype: str | AnyDtype | None = None,
    overwrite: bool = False,
) -> FolderExport:
    """Write a pipeline folder in which some modules have experts' weights.

    Args:
        recipe: The recipe.
        pipeline: A pipeline folder for everything else.
        output: The folder to write; it appears when it is whole.
        modules: The expert of each module, e.g. `{"unet": "dynamics"}`.
        index: The new `model_index.json`; that of `pipeline` by default.
        inputs: Paths or state dicts that replace the recipe's inputs, by name.
        missing: `error` or `keep`; see `check_coverage`.
        dtype: Dtype of the floating-point tensors; that of the inputs by default.
        overwrite: Replace a pipeline folder that exists.

    Raises:
        ConfigError: `output` exists, or holds the pipeline or an input.
        CheckpointError, ShapeError: As `merge`; or an expert does not fit the pipeline.
    """
    pipeline, output = Path(pipeline), Path(output)
    wanted = None if dtype is None else parse_dtype(dtype)
    index = _read_index(pipeline) if index is None else index
    origins = recipe.origins(inputs)
    read = (origin for origin in origins.values() if isinstance(origin, Path))
    check_new_folder(output, overwrite=overwrite, marker=INDEX_FILE, keep=[pipeline, *read])
    pinned = recipe.pinned(origins, overridden=inputs)
    bound = {expert: recipe.experts[expert].bind(origins) for expert in set(modules.values())}
    sources = [source for checkpoint in bound.values() for source in checkpoint.sources()]
    with OpenInputs(sources) as opened, _written(output) as folder:
        check_coverage(list(bound.values()), opened, missing=missing)
        plans = {
            module: _tensors_of(module, bound[expert], opened, pipeline)
            for module, expert in modules.items()
        }
        _copy_rest(pipeline, folder, modules)
        for module, expert in modules.items():
            _write_module(
                folder / module / WEIGHTS_FILE,
                bound[expert],
                plans[module],
                opened,
                dtype=wanted,
                metadata={METADATA_KEY: pinned.print(), "motionmerge.expert": expert},
            )
        text = json.dumps(dict(index), indent=2) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")
    counts = {module: len(names) for module, names in plans.items()}
    return FolderExport(str(output), dict(modules), counts)


@contextmanager
def _written(output: Path) -> Iterator[Path]:
    """Yield a folder that becomes `output` once it is whole."""
    try:
        with atomic_folder(output) as folder:
            yield folder
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {output}: {error}", fix="Check the folder and its free space."
        ) from error


def _read_index(pipeline: Path) -> dict[str, Any]:
    try:
        return read_json(pipeline / INDEX_FILE)
    except CheckpointError as error:
        raise ConfigError(
            f"{pipeline} is no diffusers pipeline folder: {error.message}",
            fix="Give a folder with a model_index.json, as `save_pretrained` writes it.",
        ) from error


def _two_experts(recipe: Recipe, pipeline: Path) -> tuple[str, str, float]:
    """Give the high-noise expert, the low-noise expert, and the boundary ratio between them."""
    entries = recipe.schedule.entries if recipe.schedule else ()
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


def _tensors_of(
    module: str, checkpoint: Checkpoint, opened: OpenInputs, pipeline: Path
) -> dict[str, str]:
    """Map the names of a module's tensors to the checkpoint's.

    Raises:
        CheckpointError: The checkpoint has no such module, or the pipeline's has other tensors.
    """
    names = opened.names(checkpoint.anchor)
    prefixed = {name.partition(".")[0] for name in names} & set(MODULES)
    prefix = f"{module}." if module in prefixed else ""
    if not prefix and prefixed:
        prefix = "transformer." if module == "transformer_2" else f"{module}."
    found = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    folder = next(
        (path for path in (pipeline / module, pipeline / "transformer") if path.is_dir()), None
    )
    expected: set[str] = set()
    if folder is not None and any(folder.glob("*.safetensors")):
        with open_weights(folder) as reader:
            expected = set(reader.keys())
    different = expected.symmetric_difference(found) if expected else set()
    if not found or different:
        example = next(iter(sorted(different)), next(iter(names), "(none)"))
        raise CheckpointError(
            f"`{checkpoint}` does not give the tensors of {folder or module}, e.g. `{example}`.",
            fix="Give the pipeline that the recipe's checkpoints belong to.",
        )
    return found


def _copy_rest(pipeline: Path, output: Path, modules: Mapping[str, str]) -> None:
    """Bring over everything but the index and the weights of the modules that are written."""
    copy_folder(
        pipeline,
        output,
        leave_out=lambda path: path == Path(INDEX_FILE) or is_weights_of(path, modules),
    )
    for module in modules:
        (output / module).mkdir(exist_ok=True)
        if not (output / module / "config.json").exists() and module == "transformer_2":
            shutil.copyfile(output / "transformer/config.json", output / module / "config.json")


def _write_module(
    path: Path,
    checkpoint: Checkpoint,
    plan: Mapping[str, str],
    opened: OpenInputs,
    *,
    dtype: DType | None,
    metadata: Mapping[str, str],
) -> None:
    specs = result_specs(checkpoint, opened, dtype=dtype)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for target, name in plan.items():
            yield target, realised(checkpoint, name, opened, dtype=dtype)

    write_weights(
        path,
        tensors(),
        specs={target: specs[name] for target, name in plan.items()},
        metadata={"format": "pt", **metadata},
    )
