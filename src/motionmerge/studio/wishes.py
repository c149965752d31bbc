"""What somebody asks of the studio: a photo, a model, sets of weights, as requests for videos."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from motionmerge.errors import ConfigError
from motionmerge.io.paths import exists, path_of
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.model import ModelChoice
from motionmerge.sampling.request.request import POCKET, VideoRequest
from motionmerge.sampling.request.step_plan import StepPlan
from motionmerge.sampling.videos.checks import describe_limits
from motionmerge.sampling.videos.settings import VideoSettings

KNOWN_WORDS = "The pocket model knows camera moves, and balls and boxes in five colors."

_HUB_NAME = re.compile(r"(hub:)?[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A photo, a prompt, a model, and the sets of weights that are to animate it.

    Args:
        photo: The file.
        model: `pocket`, a folder or a hub id.
        base, lora: What the model was fine-tuned from; a LoRA on it.
        settings: Of the video.
        num_seeds: Videos of each set of weights, with seeds from that of the settings on.
        paints: Whether balls and boxes of the prompt are painted into the photo.
        recipes: Recipes by what they are called on the page; None is the base or the LoRA.
        points: Values of the knob, one per recipe, in a sweep.
        boundary, motion: Of the base or the LoRA; recipes have their own.
        kind: `motion`, `compare`, `sweep` or `export`.
    """

    photo: Path
    model: str
    settings: VideoSettings
    recipes: Mapping[str, Recipe | None]
    boundary: float
    motion: float
    base: str | None = None
    lora: str | None = None
    num_seeds: int = 1
    paints: bool = False
    points: Sequence[float] = ()
    kind: str = "motion"

    @property
    def each_seed(self) -> list[VideoSettings]:
        """The settings of the videos that each set of weights makes."""
        first = self.settings.seed
        return [self.settings.changed(seed=first + more) for more in range(self.num_seeds)]

    def open_model(self) -> ModelChoice:
        """Find the model; nothing is loaded yet.

        Raises:
            MotionMergeError: As `VideoRequest.open_model`.
        """
        return VideoRequest(model=self.model).open_model()

    def experts(self, model: ModelChoice) -> dict[str, ExpertChoice]:
        """Find the weights of every video, the model's own first; nothing is loaded.

        Raises:
            MotionMergeError: As `VideoRequest.open_experts`.
        """
        found = {} if self.kind == "sweep" else {"the model as it is": ExpertChoice()}
        for name, recipe in self.recipes.items():
            request = self._without_recipe() if recipe is None else self._of(recipe, model)
            found[name] = request.open_experts(model)
        return found

    def _of(self, recipe: Recipe, model: ModelChoice) -> VideoRequest:
        return VideoRequest(
            model=self.model,
            recipe=recipe,
            inputs=self._inputs(recipe, model),
            boundary=missing_boundary(recipe, self.boundary),
        )

    def _inputs(self, recipe: Recipe, model: ModelChoice) -> dict[str, str]:
        """Return what a recipe's inputs are on this page, where it is not what they say."""
        if model.path is None:  # recipes for any model name inputs that somebody passes
            own = {name: one.path for name, one in recipe.inputs.items()}
            return {
                name: f"pocket:{name}" for name, path in own.items() if path == f"memory:{name}"
            }
        if self.base and {"base", "tuned"} <= recipe.inputs.keys():
            return {"base": self.base, "tuned": str(model.path)}
        if self.base:
            raise ConfigError(
                "The recipe has no inputs `base` and `tuned` that the base could be.",
                fix="Empty Base, or choose another recipe, such as `edg-official`.",
            )
        if is_of_pocket(recipe):
            raise ConfigError(
                "The recipe merges weights of the pocket model.",
                fix="Write another recipe, or fill Base: what the model was fine-tuned from.",
            )
        return {}

    def _without_recipe(self) -> VideoRequest:
        has_one_weight = self.lora is not None and self.motion == -1  # the same on either side
        return VideoRequest(
            model=self.model,
            base=self.base,
            loras=[self.lora] if self.lora else [],
            motion=self.motion,
            boundary=None if has_one_weight else self.boundary,
        )


def model_of(field: str) -> str:
    """Return the model that a field names; an empty one names the pocket model."""
    return field.strip() or POCKET


def is_of_pocket(recipe: Recipe) -> bool:
    """Return whether a recipe names weights that ship with the pocket model."""
    return any(one.path.startswith("pocket:") for one in recipe.inputs.values())


def missing_boundary(recipe: Recipe, boundary: float) -> float | None:
    """Return the boundary for two experts of which no schedule says when they change, else None."""
    return boundary if recipe.schedule is None and len(recipe.experts) == 2 else None


def planned_steps(
    model: ModelChoice, experts: ExpertChoice, settings: VideoSettings
) -> StepPlan | None:
    """Return which expert will denoise which steps, before anything is loaded."""
    resolved = settings.resolved(model.family, model.limits)
    return experts.plan_steps(model, model.scheduler(), resolved)


@dataclass(frozen=True)
class ModelNote:
    """What somebody should know about a model before a video is made.

    Args:
        text: What it takes, and what it makes by itself.
        prompt: What may be written as a prompt.
    """

    text: str
    prompt: str

    @classmethod
    def about(cls, field: str) -> ModelNote:
        """Look at the model that a field names; one on the hub is not downloaded for it.

        Raises:
            MotionMergeError: There is no such model, or none that makes videos.
        """
        name, anything = model_of(field), "What happens in the video."
        if _HUB_NAME.fullmatch(name) and not exists(path_of(name)):
            return cls(f"{name} is downloaded from the hub when a video is made.", anything)
        model = VideoRequest(model=name).open_model()
        family = model.family
        prompt = KNOWN_WORDS if name == POCKET else anything
        return cls(
            describe_limits(family, model.limits),
            prompt if family.takes_text else f"{family.name} has no prompts: leave it empty.",
        )
