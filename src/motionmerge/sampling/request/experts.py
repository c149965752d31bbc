"""Which weights denoise, chosen by recipe, knob, LoRA or file; every choice is a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from motionmerge.errors import ConfigError
from motionmerge.io.paths import path_of_weights
from motionmerge.merging.inputs.coverage import Missing
from motionmerge.merging.inputs.resolvers import resolve, split_name
from motionmerge.merging.inputs.sources import MODULES, Origin, names_in
from motionmerge.merging.lora.scaling import LoraScaling
from motionmerge.merging.names.wrappers import DENOISERS
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import Recipe, as_recipe
from motionmerge.merging.recipes.sections import RecipeInput
from motionmerge.models.video_pipeline import Scheduler, VideoPipeline
from motionmerge.sampling.request.model import ModelChoice
from motionmerge.sampling.request.step_plan import StepPlan, plan_steps
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.schedule import ExpertSchedule
from motionmerge.switching.bank import Bank
from motionmerge.switching.denoising_steps import start_step_of
from motionmerge.switching.expert_bank import chosen_schedule, experts
from motionmerge.switching.knob_families import check_knobs, knob_family
from motionmerge.switching.rehearsal import check_fit


@dataclass(frozen=True)
class ExpertChoice:
    """Which weights denoise: the model's own, or the experts of a recipe.

    Attributes:
        recipe: What the experts are; None for the model as it is.
        boundary: Noise level at which the second of two experts takes over, instead of the
            recipe's schedule.
        missing: `error`, or `keep`, which goes on without layers of a LoRA or tensors of inputs
            that the other side lacks; `check` warns which.
    """

    recipe: Recipe | None = None
    boundary: float | None = None
    missing: Missing = "error"

    def __post_init__(self) -> None:
        if self.recipe is None:
            if self.boundary is not None:
                raise ConfigError("A boundary needs experts.", fix="Leave `boundary` out.")
            return
        if self.boundary is not None and not 0 <= self.boundary <= 1:
            raise ConfigError(
                f"The boundary {self.boundary:g} is no noise level.",
                fix="Use a value from 0 to 1, e.g. 0.64.",
            )
        chosen_schedule(list(self.recipe.experts), None, self.boundary, self.recipe.schedule)

    @property
    def whole_recipe(self) -> Recipe | None:
        """The recipe with the boundary in its schedule: alone it means what the choice means."""
        if self.recipe is None or self.boundary is None:
            return self.recipe
        names, own = list(self.recipe.experts), self.recipe.schedule
        return replace(self.recipe, schedule=chosen_schedule(names, None, self.boundary, own))

    def attach(
        self, pipeline: VideoPipeline, *, restore: bool = False
    ) -> AbstractContextManager[Bank | None]:
        """Return a context in which these weights denoise; it yields the bank, or None.

        Args:
            pipeline: What denoises.
            restore: Keep its own weights to give them back. Without, it is not for use without
                these weights afterwards.
        """
        if self.bound is None:
            return nullcontext()
        return experts(
            pipeline,
            self.bound,
            boundary=self.boundary,
            restore=restore,
            missing=self.missing,
        )

    def description(self) -> dict[str, object]:
        """Describe the choice, for a video's metadata."""
        if self.recipe is None:
            return {}
        return {"recipe": self.recipe.print(), "boundary": self.boundary, **self._kept()}

    def plan_steps(
        self, model: ModelChoice, scheduler: Scheduler | None, settings: VideoSettings
    ) -> StepPlan | None:
        """Plan what is in force at which steps; None if there is nothing to say of it.

        Raises:
            ConfigError: As `step_plan.plan_steps`; or a step is guided, and the video is not.
        """
        schedule, whole = None, self.whole_recipe
        if whole is not None:
            plain = whole.written_out()
            schedule = chosen_schedule(list(plain.experts), None, None, plain.schedule)
            if schedule.entries[0].start is not None and scheduler is not None:
                start = settings.start_step or start_step_of(schedule, scheduler)
                settings = settings.changed(start_step=start)
        is_told = schedule is not None and (len(schedule.labels) > 1 or schedule.has_knobs)
        plan = plan_steps(
            model.family.name,
            scheduler,
            settings,
            schedule=schedule if is_told else None,
            configs=model.configs,
        )
        if schedule is not None and settings.guidance_scale is not None:
            _check_guided(schedule, plan, scale=settings.guidance_scale)
        return plan

    def check_knobs(self, model: ModelChoice) -> None:
        """Refuse what a schedule sets besides experts and a model cannot do, before it is loaded.

        Raises:
            ConfigError: Names it.
        """
        if self.recipe is not None and self.recipe.schedule is not None:
            family = knob_family(model.family.pipelines[0], model.configs)
            check_knobs(self.recipe.schedule, family)

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        """Look for the weights of every input and whether the experts fit, before any is loaded.

        Args:
            modules: See `check_fit`.

        Raises:
            RecipeError, CheckpointError, ShapeError: As `check_fit`; an input is missing, or is to
                be passed.
        """
        if self.bound is not None:
            check_fit(self.bound, modules, missing=self.missing)

    def fingerprint(self) -> dict[str, object]:
        """Describe the choice with the hash of every input, wherever their files are.

        Raises:
            CheckpointError: An input is missing or is not the one that the recipe pins.
        """
        if self.bound is None:
            return {}
        hashed = self.bound.pinned
        inputs = {
            name: entry if entry.sha256 is None else replace(entry, path=name)
            for name, entry in hashed.inputs.items()
        }
        recipe = replace(hashed, inputs=inputs, description=None)
        found: dict[str, object] = {
            "recipe": recipe.print(),
            "boundary": self.boundary,
            **self._kept(),
        }
        settings = self._lora_settings()
        return {**found, "lora_settings": settings} if settings else found

    def _kept(self) -> dict[str, str]:
        """Name what is not the default, and so not in the names of earlier videos."""
        return {} if self.missing == "error" else {"missing": self.missing}

    def _lora_settings(self) -> dict[str, object]:
        """Read what stands beside LoRA files, and so not in their hashes."""
        beside = {
            name: dict(LoraScaling.beside(origin, {}).settings)
            for name, origin in self.origins.items()
            if isinstance(origin, Path)
        }
        return {name: settings for name, settings in beside.items() if settings}

    @cached_property
    def bound(self) -> BoundRecipe | None:
        """The recipe with its inputs, found once for all who ask; None without one.

        Raises:
            CheckpointError: A `prefix:name` cannot be resolved.
        """
        return None if self.recipe is None else BoundRecipe.of(self.recipe)

    @property
    def origins(self) -> Mapping[str, Origin]:
        """The weights of every input but the model's own."""
        return {} if self.bound is None else self.bound.origins


def _check_guided(schedule: ExpertSchedule, plan: StepPlan | None, *, scale: float) -> None:
    """Refuse a schedule that guides in a call without guidance, which has no second pass.

    Raises:
        ConfigError: The first such entry that has steps, as far as the plan knows them.
    """
    used = plan.experts if plan is not None else ()
    for entry in schedule.entries:
        is_used = not used or entry.label in used
        if entry.guidance is not None and entry.guidance > 1 >= scale and is_used:
            raise ConfigError(
                f"The schedule sets guidance {entry.guidance:g} for a step, and the video is made "
                f"with guidance {scale:g}, without the unconditional pass that it needs.",
                fix="Give `guidance_scale=` above 1; at each step the schedule's number counts.",
            )


def from_recipe(
    recipe: Recipe | str | Path,
    *,
    inputs: Mapping[str, str] | None = None,
    parameters: Mapping[str, float] | None = None,
    boundary: float | None = None,
) -> ExpertChoice:
    """Choose the experts of a recipe.

    Args:
        recipe: A recipe, its file, or the name of a shipped one.
        inputs: Paths or names such as `hub:owner/name` that replace the recipe's inputs, pinned
            hash included.
        parameters: Other values of the recipe's parameters.
        boundary: See `ExpertChoice`.

    Raises:
        RecipeError: There is no such recipe, input or parameter.
    """
    recipe = as_recipe(recipe)
    given = inputs or {}
    recipe.check_names(given)
    replaced = {name: RecipeInput(_input_path(path)) for name, path in given.items()}
    recipe = replace(recipe, inputs={**recipe.inputs, **replaced})
    return ExpertChoice(recipe.with_parameters(**(parameters or {})), boundary)


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA and how strongly it acts.

    Attributes:
        file: Its file, or a name such as `hub:owner/name/file.safetensors`.
        noisy: Its weight above the boundary; negative ones take its effect away.
        details: Its weight below it.
    """

    file: str | Path
    noisy: float = 1.0
    details: float = 1.0


def from_loras(loras: Sequence[WeightedLora], *, boundary: float | None = None) -> ExpertChoice:
    """Choose LoRAs on the model, each with a weight for either side of the boundary.

    dynamics    = base + noisy_1 * LoRA_1 + noisy_2 * LoRA_2 ..       above the boundary
    consistency = base + details_1 * LoRA_1 + details_2 * LoRA_2 ..   below it

    One expert, `styled`, where no weight changes.

    Args:
        loras: Which.
        boundary: See `ExpertChoice`; by default `PAPER_BOUNDARY`.

    Raises:
        ConfigError: There is a boundary, and no weight changes there.
    """
    named = {f"lora_{number}": lora for number, lora in enumerate(loras, 1)}
    files = {name: _input_path(lora.file) for name, lora in named.items()}
    noisy = {name: lora.noisy for name, lora in named.items()}
    details = {name: lora.details for name, lora in named.items()}
    if noisy != details:
        weights = {"dynamics": noisy, "consistency": details}
        return ExpertChoice(Recipe.of_loras(weights, files), boundary)
    if boundary is not None:
        raise ConfigError(
            f"The boundary {boundary:g} changes nothing: every LoRA has one weight.",
            fix="Leave `boundary` out, or give a LoRA two weights.",
        )
    return ExpertChoice(Recipe.of_loras({"styled": details}, files))


def from_base(
    base: str | Path, model: Path, *, motion: float, boundary: float | None = None
) -> ExpertChoice:
    """Choose the motion knob, with the model as the fine-tuned weights; see `Recipe.knob`.

    Args:
        base: The weights it was fine-tuned from: a pipeline's folder, or weights of its denoiser.
        model: The pipeline's folder.
        motion: More moves more.
        boundary: See `ExpertChoice`.
    """
    tuned, base = model, resolve(str(base))
    is_whole = all(name.partition(".")[0] in MODULES for name in names_in(base))
    if not is_whole:  # neither a pipeline's folder nor a merged expert with `unet.` in its names
        tuned = next(model / name for name in DENOISERS if (model / name).is_dir())
    recipe = Recipe.knob(base=_input_path(base), tuned=_input_path(tuned), motion=motion)
    return ExpertChoice(recipe, boundary)


def from_weights(weights: str | Path) -> ExpertChoice:
    """Choose one weights file for the whole denoising."""
    sections = {"inputs": {"merged": _input_path(weights)}, "experts": {"all": "merged"}}
    return ExpertChoice(Recipe.from_sections(sections))


def _input_path(name: str | Path) -> str:
    """Return the absolute path of weights; a name such as `hub:..` stays as it is."""
    return str(name) if split_name(str(name)) else str(path_of_weights(name))
