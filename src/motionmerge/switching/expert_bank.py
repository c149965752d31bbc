"""Run one model with several sets of weights, switched in place by noise level while it denoises.

Paper: Tian et al. 2025, stage 3. The official sampler keeps two whole pipelines in memory; this
keeps one, plus the tensors in which the experts differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.in_memory import realise
from motionmerge.merging.inputs.coverage import Missing, check_missing
from motionmerge.merging.inputs.pieces import Shapes
from motionmerge.merging.recipes.bound import AnyRecipe, BoundRecipe
from motionmerge.merging.recipes.recipe import OWN_MODEL, Recipe
from motionmerge.models.video_pipeline import Scheduler, VideoPipeline
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.bank import Bank, attached_bank, check_attachable
from motionmerge.switching.lora_layers import is_own_model, loras_of_recipe
from motionmerge.switching.placement import Weights, check_placement, should_recompute
from motionmerge.switching.recompute import RecomputedExpert, recomputed_experts
from motionmerge.switching.switchable import modules_of
from motionmerge.switching.switched_module import SwitchedModule
from motionmerge.text import fix_unknown_name

__all__ = ["ExpertBank", "attached_bank", "experts"]

AnyWeights = Weights | Checkpoint | str | Path


class ExpertBank(Bank):
    """Several sets of weights for one model, the right one in place at every denoising step.

    Before each call of a denoiser the bank reads the timestep that it really receives (of several,
    one per token or sample, the largest), asks the schedule for the expert, and if that is another
    one copies its values over the module's, exactly. Only tensors that differ between experts are
    copied. Nothing is ever added to a weight, so nothing drifts.

    A module that sees no timestep, the image projector, runs before the loop. It holds the
    schedule's last expert, except inside `with_expert`, with which a pipeline computes image
    tokens once per expert and then asks `expert_for` at every step; `DynamiCrafterPipeline` does.

    Works with `torch.compile` of the repeated blocks, layerwise casting, model and group offload,
    and diffusers' caches, which are emptied at a switch.

    Use it as a context manager, or call `detach`: either way the module gets its own values back,
    bit for bit, unless it was told not to keep them.

    Args:
        target: A pipeline with a `unet`, `transformer` or `transformer_2`, or one such module.
        experts: For each expert its tensors, `unet.<name>` or `image_projector.<name>`; a name
            without such a prefix belongs to the first denoiser. An expert that lacks a tensor uses
            the module's own. Values are rounded once to the module's dtype; they are not copied if
            dtype and device already fit, so do not change them while the bank is attached.
        schedule: Which expert denoises when.
        scheduler: Needed for a bare module; a pipeline's own is used otherwise.
        module: Switch only this module of the pipeline, e.g. `transformer_2`.
        placement: Where the experts' tensors wait: `resident`, `prefetch` or `recompute`, see
            `placement`; `auto` chooses from the memory that is free.
        restore: Keep the module's own values to give them back. Without, they take no memory, and
            `detach` leaves what was in place last.

    Raises:
        CheckpointError: An expert has no tensors, names unknown ones, or would write into
            quantised, packed or sharded ones.
        ShapeError: A tensor has another shape than the module's.
        RecipeError: The schedule names an expert that does not exist.
        ConfigError: There is nothing to attach to, experts are attached already, the weights are
            offloaded in a way that would drop what is written, or there is no such placement.
    """

    def __init__(
        self,
        target: VideoPipeline | nn.Module,
        experts: Mapping[str, Weights],
        *,
        schedule: ExpertSchedule,
        scheduler: Scheduler | None = None,
        module: str | None = None,
        placement: str = "auto",
        restore: bool = True,
    ) -> None:
        super().__init__(target, experts, schedule=schedule, scheduler=scheduler)
        check_placement(placement)
        parts = self._build_parts(experts, module, placement, restore)
        chosen = [(part.name, part.placement) for part in parts if part.placement and part.differs]
        self.placement = "; ".join(f"{name}: {one.reason}" for name, one in chosen)
        self._attach(parts, module)

    def _build_parts(
        self, experts: Mapping[str, Weights], module: str | None, placement: str, restore: bool
    ) -> list[SwitchedModule]:
        """Split the experts' tensors by module and fit them; nothing is written yet."""
        found = modules_of(self._target, only=module)
        parts = [
            SwitchedModule(name=name, module=module, keeps_own=restore) for name, module in found
        ]
        live = {part.name: part.tensors() for part in parts}
        ignored = ignored_names(part.module for part in parts)
        split = {
            name: by_module(name, weights, live, ignored=ignored)
            for name, weights in experts.items()
        }
        named = {parts[0].name}.union(*split.values())
        used = [part for part in parts if part.name in named]
        for part in used:
            check_attachable(part.name, part.module)
            per_expert = {name: modules.get(part.name, {}) for name, modules in split.items()}
            part.fit(per_expert)
            part.place(placement, self.schedule.experts)
        return used


def experts(
    pipeline: VideoPipeline | nn.Module,
    recipe: AnyRecipe | Mapping[str, AnyWeights],
    *,
    inputs: Mapping[str, AnyWeights] | None = None,
    schedule: ExpertSchedule | None = None,
    boundary: float | None = None,
    module: str | None = None,
    scheduler: Scheduler | None = None,
    placement: str = "auto",
    restore: bool = True,
    missing: Missing = "error",
) -> Bank:
    """Attach experts to a pipeline for the length of a `with` block.

        with motionmerge.experts(pipeline, "edg-official", inputs={...}):
            video = pipeline(image, "the camera pans left").frames[0]
        with motionmerge.experts(pipeline, Recipe.knob(lora="style.safetensors", motion=0.5)):
            video = pipeline(image, "the camera pans left").frames[0]

    Args:
        pipeline: A diffusers pipeline, or a denoiser; then pass its `scheduler`, or use `timestep`
            conditions.
        recipe: What the experts are: a recipe, its file, the name of a shipped one, or what
            `Recipe.knob`, `Recipe.edg` and `Recipe.of_loras` write; or the weights of each expert
            by its name, from noisy to clean. An input `memory:base` is the model in the pipeline;
            if experts only add LoRAs to it, no dense weights are made; see `LoraBank`.
        inputs: Weights that replace the recipe's inputs, by name.
        schedule: Which expert denoises when; replaces the recipe's own.
        boundary: Instead of a schedule: noise level at which the second of two experts takes over.
        module: Switch only this module, e.g. `transformer_2`; with a block for each, every denoiser
            of a pipeline has experts of its own.
        scheduler: Tells a bare denoiser's noise levels; a pipeline's own is used otherwise.
        placement: Where dense experts wait; see `ExpertBank`. `auto` recomputes those of a recipe
            at every switch if they do not fit into main memory and all its inputs are files.
        restore: Keep the model's own weights, in main memory or with `recompute` on disk. Pass
            False to save that if the model will not be used without experts any more.
        missing: What to do with layers of a LoRA, or tensors of a recipe's inputs, that the other
            side lacks: `error`, or `keep`, which warns and goes on without them.

    Returns:
        The attached bank; leaving the block restores the model exactly, also after an exception.

    Raises:
        ConfigError: `inputs` came without a recipe, there is no schedule for the experts, or what
            the banks raise.
        RecipeError, CheckpointError, ShapeError: As `realise`, `ExpertBank` and `LoraBank`.
    """
    check_placement(placement)
    check_missing(missing)
    dense: dict[str, Weights]
    own_schedule: ExpertSchedule | None = None
    if isinstance(recipe, Mapping):
        if inputs is not None:
            raise ConfigError(
                "`inputs` are those of a recipe, and weights were given.",
                fix="Leave `inputs` out, or pass a recipe.",
            )
        dense = _as_tensors(recipe, _like(pipeline, module))
    else:
        replaced = {name: _in_memory(value) for name, value in (inputs or {}).items()}
        bound = BoundRecipe.of(recipe, replaced)
        own_schedule = bound.recipe.schedule
        signed = loras_of_recipe(bound)
        if signed is None and is_own_model(bound):
            names = list(bound.recipe.experts)
            return Bank.of_model(
                pipeline,
                names,
                schedule=chosen_schedule(names, schedule, boundary, own_schedule),
                scheduler=scheduler,
                module=module,
            )
        if signed is not None:
            from motionmerge.switching.lora_bank import LoraBank  # PEFT takes seconds to import

            return LoraBank(
                pipeline,
                *signed,
                schedule=chosen_schedule(list(signed[1]), schedule, boundary, own_schedule),
                scheduler=scheduler,
                module=module,
                missing=missing,
            )
        bound = with_own_weights(bound, pipeline, module)
        dense = _computed(bound, placement, missing=missing, like=_like(pipeline, module))
    return ExpertBank(
        pipeline,
        dense,
        schedule=chosen_schedule(list(dense), schedule, boundary, own_schedule),
        scheduler=scheduler,
        module=module,
        placement=placement,
        restore=restore,
    )


def _computed(
    recipe: BoundRecipe, placement: str, *, missing: Missing, like: Shapes
) -> dict[str, Weights]:
    """Compute a recipe's experts, or prepare to do so at every switch."""
    prepared = recomputed_experts(recipe, missing=missing, like=like)
    if should_recompute(
        placement,
        num_bytes=sum(expert.num_bytes() for expert in prepared.values()),
        can_recompute=recipe.are_files,
    ):
        return dict(prepared)
    return dict(realise(recipe, missing=missing, like=like))


def with_own_weights(
    recipe: BoundRecipe, pipeline: object, module: str | None = None
) -> BoundRecipe:
    """Bind the model in a pipeline to a recipe that names it and has no other weights for it.

    Args:
        recipe: The recipe.
        pipeline: A pipeline, or a denoiser.
        module: As for `experts`.
    """
    own = {
        name: own_weights(pipeline, module)
        for name, entry in recipe.recipe.inputs.items()
        if entry.path == OWN_MODEL and name not in recipe.origins
    }
    return recipe.with_inputs(own) if own else recipe


def own_weights(pipeline: object, module: str | None) -> Weights:
    """Name the live weights of a pipeline as a pipeline's folder would, of a module as its own."""
    bare = isinstance(pipeline, nn.Module)
    return {
        key if bare else f"{name}.{key}": tensor
        for name, own in modules_of(pipeline, only=module)
        for key, tensor in SwitchedModule(name=name, module=own).tensors().items()
    }


def chosen_schedule(
    names: Sequence[str],
    schedule: ExpertSchedule | None,
    boundary: float | None,
    own_schedule: ExpertSchedule | None,
) -> ExpertSchedule:
    """Pick the schedule that was given, the one that a boundary means, or the recipe's own."""
    if schedule is not None and boundary is not None:
        raise ConfigError("Both schedule and boundary were given.", fix="Pass one of the two.")
    if boundary is not None and own_schedule is not None and own_schedule.has_knobs:
        return own_schedule.with_boundary(boundary)
    if boundary is not None and len(names) == 2:
        return ExpertSchedule.two(*names, boundary=boundary)
    if boundary is None and len(names) == 1:
        return schedule or own_schedule or ExpertSchedule.from_list([{"expert": names[0]}])
    chosen = schedule or own_schedule
    if chosen is None or boundary is not None:
        raise ConfigError(
            f"{len(names)} experts with boundary {boundary} make no schedule.",
            fix="Pass two experts with a boundary such as 0.64, one without, or a schedule.",
        )
    return chosen


def _as_tensors(experts: Mapping[str, AnyWeights], like: Shapes) -> dict[str, Weights]:
    """Read the experts that are files.

    Raises:
        ConfigError: One is no set of weights, e.g. where a state dict stands for all of them.
    """
    for name, value in experts.items():
        if not isinstance(value, (Mapping, Checkpoint, str, Path)):
            raise ConfigError(
                f"The expert `{name}` is a {type(value).__name__}, not weights by name.",
                fix="Pass `{'NAME': WEIGHTS}`, with weights for each expert's name.",
            )
    loaded = {name: _in_memory(value) for name, value in experts.items()}
    return {
        name: _stored(value, like) if isinstance(value, (str, Path)) else value
        for name, value in loaded.items()
    }


def _in_memory(source: AnyWeights) -> Weights | str | Path:
    return source.tensors() if isinstance(source, Checkpoint) else source


def _stored(path: str | Path, like: Shapes) -> Weights:
    """Read weights from a file or folder."""
    recipe = Recipe.parse("inputs: {own: 'memory:own'}\nexperts: {own: own}")
    return realise(recipe, inputs={"own": path}, like=like)["own"]


def _like(pipeline: object, module: str | None) -> Shapes:
    found = modules_of(pipeline, only=module)
    return names_of_denoiser(
        {name: SwitchedModule(name=name, module=own).tensors() for name, own in found[:1]}
    )


def names_of_denoiser(live: Mapping[str, Weights]) -> Shapes:
    """Return the names and shapes of the first denoiser's tensors.

    Args:
        live: The tensors of each module.
    """
    first = next(iter(live.values()))
    return {name: tuple(tensor.shape) for name, tensor in first.items()}


def ignored_names(modules: Iterable[nn.Module]) -> tuple[str, ...]:
    """List the patterns of names that modules leave out of their files, as these do nothing."""
    own = (getattr(module, "_keys_to_ignore_on_load_unexpected", None) for module in modules)
    return tuple(pattern for patterns in own for pattern in patterns or ())


def by_module(
    expert: str, weights: Weights, live: Mapping[str, Weights], *, ignored: Sequence[str] = ()
) -> dict[str, Weights]:
    """Split an expert's tensors by module; refuse empty experts, unknown names, wrong shapes.

    Args:
        expert: Its name.
        weights: Its tensors.
        live: Those of each module.
        ignored: Patterns of names that are left out where a module lacks them.
    """
    if not weights:
        raise CheckpointError(
            f"The expert `{expert}` has no tensors.", fix="Check the file or folder it comes from."
        )
    denoiser = next(iter(live))
    names: dict[str, dict[str, str]] = {}
    unknown = []
    for name in weights:
        module, _, rest = name.partition(".")
        if name in live[denoiser] or module not in live:
            module, rest = denoiser, name
        if rest not in live[module]:
            if not any(re.search(pattern, rest) for pattern in ignored):
                unknown.append(name)
            continue
        names.setdefault(module, {})[rest] = name
    if unknown:
        _refuse_unknown(expert, unknown, matched=len(weights) - len(unknown), live=live)
    if isinstance(weights, RecomputedExpert):
        return {module: weights.renamed(own) for module, own in names.items()}
    return {
        module: {rest: weights[name] for rest, name in own.items()} for module, own in names.items()
    }


def _refuse_unknown(
    expert: str, unknown: list[str], *, matched: int, live: Mapping[str, Weights]
) -> None:
    known = [name for tensors in live.values() for name in tensors]
    listed = ", ".join(f"`{name}`" for name in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    if any("transformer_blocks.0.fusion." in name for name in unknown):  # SVD, I2VGen-XL
        fix = "Call add_text_adapter(unet, ...) of `motionmerge.models.text_adapters` before."
    elif any("temporal_adapter" in name or ".fusion." in name for name in unknown):
        fix = "Call unet.add_temporal_adapter() before attaching these experts."
    elif not matched:
        fix = "Use weights in diffusers' names; official files need `motionmerge convert` first."
    else:
        prefix = unknown[0].partition(".")[0]
        prefix = f"{prefix}." if prefix in live else ""
        fix = fix_unknown_name(unknown[0], [f"{prefix}{name}" for name in known[:20_000]])
    raise CheckpointError(
        f"The expert `{expert}` has tensors that the model does not: {listed}{more}.", fix=fix
    )
