"""What a run leaves: a pipeline's folder or a LoRA, and the recipe that makes experts of it.

What was not trained is, bit for bit, what the base's files hold, whatever dtype it was trained in:
a task vector of the two is zero there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.io.atomic import write_whole
from motionmerge.io.paths import behind_links, exists, path_of
from motionmerge.io.safetensors_file import TensorSpec
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.io.weights_writer import pipeline_folder
from motionmerge.merging.recipes.recipe import Recipe, relative_path
from motionmerge.parameter_groups import group_of

from .parameters import Trained, trained_header, trained_state
from .while_training import check_free

BASE, TUNED, LORA, RECIPE = "base", "tuned", "lora.safetensors", "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where what came of a run lies.

    Attributes:
        weights: The fine-tuned pipeline, or the LoRA.
        recipe: Makes experts of base and `weights`.
        model: What the recipe is for, as `generate --model` takes it.
    """

    weights: Path
    recipe: Path
    model: str


@dataclass(frozen=True, kw_only=True)
class NewBase:
    """What a base has and the model's folder has not: an adapter, as it was before training.

    Attributes:
        tensors: Of the adapter, with their module's name.
        files: Texts of files that are new or other, by relative path.
        folders: Further folders of the pipeline, by name.
    """

    tensors: Mapping[str, torch.Tensor]
    files: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)


def adapter_of(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the tensors of a U-Net's adapter."""
    return {
        f"unet.{name}": tensor.detach().float().cpu().clone()
        for name, tensor in unet.state_dict().items()
        if group_of(name) == "adapter"
    }


def check_output(output: Path, *, model: Path, clips: Path) -> None:
    """Refuse a run's folder in which its results would replace, or lie among, what others wrote.

    Args:
        output: The folder.
        model: The pipeline that is to be trained.
        clips: The folder of the clips.

    Raises:
        ConfigError: One of that is the case.
    """
    for name in (BASE, TUNED):
        if behind_links(model).is_relative_to(behind_links(output / name)):
            raise ConfigError(
                f"`model` is {model}, which the run would replace with its result.",
                fix="Set `output` to another folder.",
            )
    if behind_links(output) == behind_links(clips):
        raise ConfigError(
            f"The results would lie among the clips in {clips}.",
            fix="Set `output` to another folder.",
        )
    check_free(output, (BASE, TUNED, LORA, RECIPE))


def write_result(
    output: Path,
    base: Path,
    denoiser: nn.Module,
    trained: Trained,
    *,
    model: str,
    new_base: NewBase | None,
    is_lora: bool,
) -> RunResult:
    """Write what was trained, and a recipe for it.

    A model that had no adapter is written once more with the one that does nothing yet: weights can
    only be merged with a base that has all of their tensors.

    Args:
        output: The run's folder.
        base: The folder of the pipeline that was trained.
        denoiser: As it was trained.
        trained: Its parameters.
        model: What the user calls the pipeline.
        new_base: What was added to the pipeline; None for nothing.
        is_lora: Whether the parameters are those of a LoRA.

    Raises:
        CheckpointError: The disk refuses.
    """
    if new_base is not None:
        _write_pipeline(output / BASE, base, new_base)
        base = output / BASE
        model = str(base)
    is_here = exists(path_of(model))
    of_recipe = relative_path(base.absolute(), output) if is_here else f"hub:{model}"
    state = trained_state(denoiser, trained)
    if is_lora:
        weights = output / LORA
        save_weights(weights, state, {"format": "pt", **trained_header(trained)})
        recipe = Recipe.shipped_for("lora-rescue", {"base": "memory:base", "style": LORA})
    else:
        weights = output / TUNED
        _write_pipeline(weights, base, NewBase(tensors=state))
        recipe = Recipe.shipped_for("knob", {"base": of_recipe, "tuned": TUNED})
    recipe = replace(recipe, description=f"What a training run made of {model}: the motion knob.")
    write_whole(output / RECIPE, recipe.print())
    return RunResult(weights=weights, recipe=output / RECIPE, model=model)


def _write_pipeline(folder: Path, template: Path, new: NewBase) -> None:
    """Repeat a pipeline with other tensors in some of its modules, or more of them."""
    changed = new.tensors
    modules = sorted({name.partition(".")[0] for name in changed})
    specs: dict[str, TensorSpec] = {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in changed.items()
    }
    for module in modules:
        with open_weights(template / module) as stored:
            for key in stored.keys():  # noqa: SIM118
                specs.setdefault(f"{module}.{key}", (stored.dtype(key), stored.shape(key)))
    with pipeline_folder(
        folder, specs, template=template, files=new.files, folders=new.folders
    ) as writer:
        for module in modules:
            with open_weights(template / module) as stored:
                for key in stored.keys():  # noqa: SIM118
                    name = f"{module}.{key}"
                    if name not in changed:
                        writer.write_at(name, 0, _bytes_of(stored.read(key)))
        for name, tensor in changed.items():
            writer.write_at(name, 0, _bytes_of(tensor))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    numbers: npt.NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return numbers.data
