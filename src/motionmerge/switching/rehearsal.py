"""A recipe's experts tried on a model without weights, before either is loaded or computed."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from accelerate import init_empty_weights
from torch import nn

from motionmerge.merging.inputs.coverage import Missing
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.expert_bank import (
    by_module,
    ignored_names,
    names_of_denoiser,
    with_own_weights,
)
from motionmerge.switching.lora_layers import is_own_model, loras_of_recipe
from motionmerge.switching.recompute import RecomputedExpert, recomputed_experts
from motionmerge.switching.switched_module import SwitchedModule, check_shape


def check_fit(
    recipe: BoundRecipe, modules: Mapping[str, nn.Module], *, missing: Missing = "error"
) -> None:
    """Refuse experts that a model could not take, as far as files' headers and LoRAs tell.

    Args:
        recipe: What the experts are.
        modules: The model's modules by their names in a pipeline, e.g. with weights on the meta
            device. LoRAs are read, attached to them and taken off again.
        missing: As for `experts`: `keep` warns of what is left out.

    Raises:
        RecipeError, CheckpointError, ShapeError: As `experts`.
    """
    pipeline = SimpleNamespace(**modules)
    found = loras_of_recipe(recipe)
    if found is not None:
        from motionmerge.switching.lora_bank import LoraBank  # PEFT takes seconds to import

        schedule = ExpertSchedule.from_list([{"expert": next(iter(recipe.recipe.experts))}])
        with init_empty_weights():  # the LoRAs' layers need none either
            LoraBank(pipeline, *found, schedule=schedule, missing=missing).detach()
        return
    if is_own_model(recipe):
        return
    live = {
        name: SwitchedModule(name=name, module=module).tensors() for name, module in modules.items()
    }
    like, ignored = names_of_denoiser(live), ignored_names(modules.values())
    prepared = recomputed_experts(with_own_weights(recipe, pipeline), missing=missing, like=like)
    for expert, tensors in prepared.items():
        for name, part in by_module(expert, tensors, live, ignored=ignored).items():
            assert isinstance(part, RecomputedExpert)
            for tensor, shape in part.shapes().items():
                check_shape(
                    shape, live[name][tensor].shape, label=f"{name}.{tensor}", expert=expert
                )


def lacking_tensors(
    recipe: BoundRecipe, modules: Mapping[str, nn.Module]
) -> dict[str, tuple[str, ...]]:
    """List the tensors of a model's modules that experts would leave as they are.

    Args:
        recipe: What the experts are; no LoRAs.
        modules: See `check_fit`.

    Returns:
        By the name of each module that an expert has anything of; empty if it has all.
    """
    live = {name: SwitchedModule(name=name, module=own).tensors() for name, own in modules.items()}
    like, ignored = names_of_denoiser(live), ignored_names(modules.values())
    prepared = recomputed_experts(recipe, missing="keep", like=like)
    lacking: dict[str, tuple[str, ...]] = {}
    for expert, tensors in prepared.items():
        for name, part in by_module(expert, tensors, live, ignored=ignored).items():
            assert isinstance(part, RecomputedExpert)
            wanted = modules[name].state_dict().keys()
            lacking[name] = tuple(one for one in wanted if one not in part.shapes())
    return lacking
