"""What somebody asks of the studio: words and numbers of a page, turned into requests."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from motionmerge.errors import ConfigError, RecipeError
from motionmerge.io.paths import exists, path_of
from motionmerge.merging.algebra.groups import restrict, restrictions
from motionmerge.merging.recipes.files import shipped_recipes
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.merging.recipes.writing import sections_text
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.model import ModelChoice
from motionmerge.sampling.request.request import POCKET, VideoRequest
from motionmerge.sampling.request.step_plan import StepPlan
from motionmerge.sampling.videos.checks import describe_limits
from motionmerge.sampling.videos.settings import VideoSettings

KNOWN_WORDS = "The pocket model knows camera moves, and balls and boxes in five colors."

_HUB_NAME = re.compile(r"(hub:)?[\w.-]+/[\w.-]+")

MOST_PROMPT = 2000  # characters
MOST_RECIPE = 20_000
MOST_COMPARED, MOST_SWEPT, MOST_SEEDS = 4, 9, 4

SEVERAL = "several"
"""Stands in the field for the group where the recipe restricts its differences unlike."""


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
        recipes: Recipes by what they are called on the page.
        points: Values of the knob, one per recipe, in a sweep.
        boundary: Instead of the recipes' own.
        motion: For models without a recipe.
        kind: `motion`, `compare`, `sweep` or `export`.
    """

    photo: Path
    model: str
    settings: VideoSettings
    recipes: Mapping[str, Recipe | None]
    base: str | None = None
    lora: str | None = None
    num_seeds: int = 1
    paints: bool = False
    points: Sequence[float] = ()
    boundary: float | None = None
    motion: float | None = None
    kind: str = "motion"

    @property
    def shared(self) -> VideoRequest:
        """The model with nothing asked of its weights."""
        return VideoRequest(model=self.model or POCKET)

    def experts(self, model: ModelChoice) -> dict[str, ExpertChoice]:
        """Find the weights of every video, the model's own first; nothing is loaded.

        Raises:
            MotionMergeError: As `VideoRequest.open_experts`.
        """
        found = {} if self.kind == "sweep" else {"the model as it is": ExpertChoice()}
        for name, recipe in self.recipes.items():
            found[name] = self._request(recipe, model).open_experts(model)
        return found

    def _request(self, recipe: Recipe | None, model: ModelChoice) -> VideoRequest:
        if recipe is not None:
            has_two = len(recipe.experts) == 2
            inputs = {}
            if model.path is None:  # recipes for any model name inputs that somebody passes
                own = {name: one.path for name, one in recipe.inputs.items()}
                inputs = {
                    name: f"pocket:{name}" for name, path in own.items() if path == f"memory:{name}"
                }
            elif self.base and {"base", "tuned"} <= recipe.inputs.keys():
                inputs = {"base": self.base, "tuned": str(model.path)}
            elif self.base:
                raise ConfigError(
                    "The recipe has no inputs `base` and `tuned` that the base could be.",
                    fix="Empty Base, or choose another recipe, such as `edg-official`.",
                )
            elif is_of_pocket(recipe):
                raise ConfigError(
                    "The recipe merges weights of the pocket model.",
                    fix="Write another recipe, or fill Base: what the model was fine-tuned from.",
                )
            return VideoRequest(
                model=self.model,
                recipe=recipe,
                inputs=inputs,
                boundary=self.boundary if has_two else None,
            )
        has_one_weight = self.lora is not None and self.motion == -1  # the same on either side
        return VideoRequest(
            model=self.model,
            base=self.base,
            loras=[self.lora] if self.lora else [],
            motion=self.motion,
            boundary=None if has_one_weight else self.boundary,
        )


def is_pocket(model: str) -> bool:
    """Return whether what stands under Model, or nothing there, is the pocket model."""
    return (model.strip() or POCKET) == POCKET


def is_of_pocket(recipe: Recipe) -> bool:
    """Return whether a recipe names weights that ship with the pocket model."""
    return any(one.path.startswith("pocket:") for one in recipe.inputs.values())


@dataclass(frozen=True)
class RecipeText:
    """A recipe as it stands on the page.

    Args:
        text: What is written.
        recipe: What it means; None where it means nothing.
        fault: Why, with a caret below the place; "" if it is right.
    """

    text: str
    recipe: Recipe | None = None
    fault: str = ""
    knobs: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read_file(cls, content: bytes) -> RecipeText:
        """Read a file that somebody opened; of one that is no text nothing is kept."""
        if len(content) > 4 * MOST_RECIPE:  # as many bytes as characters can have
            return cls("", fault=_too_long())
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            return cls("", fault=f"The file is no text in UTF-8: {error.reason}.")
        read = cls.read(text)
        return read if len(text) <= MOST_RECIPE else cls("", fault=read.fault)

    @classmethod
    def read(cls, text: str) -> RecipeText:
        """Read what somebody wrote; nothing is raised."""
        if len(text) > MOST_RECIPE:
            return cls(text, fault=_too_long())
        try:
            recipe = Recipe.parse(text, source="recipe")
        except (RecipeError, ConfigError) as error:
            return cls(text, fault=str(error))
        return cls(text, recipe, knobs=dict(recipe.parameters))

    def with_knobs(self, **values: float) -> RecipeText:
        """Turn parameters that the recipe has; the text is printed anew."""
        if self.recipe is None:
            return self
        known = {name: one for name, one in values.items() if name in self.recipe.parameters}
        changed = {name: one for name, one in known.items() if one != self.recipe.parameters[name]}
        if not changed:
            return self
        try:
            return RecipeText.read(self.recipe.with_parameters(**changed).print())
        except (RecipeError, ConfigError) as error:
            return RecipeText(self.text, fault=str(error))

    @property
    def while_noisy(self) -> tuple[float, str, str]:
        """Guidance, image and attention of the schedule's first entry: 0 and "" where unset."""
        schedule = self.recipe.schedule if self.recipe is not None else None
        first: dict[str, Any] = schedule.to_list()[0] if schedule is not None else {}
        return first.get("guidance", 0), first.get("image", ""), first.get("attention", "")

    @property
    def group(self) -> str:
        """What the recipe's differences are restricted to: "" for all, `SEVERAL` where unlike."""
        experts = self.recipe.experts.values() if self.recipe is not None else ()
        found = {one for expert in experts for one in restrictions(expert)}
        return SEVERAL if len(found) > 1 else next(iter(found), None) or ""

    def with_group(self, group: str) -> RecipeText:
        """Restrict every difference to a group or a pattern, "" to none; it is printed anew."""
        if self.recipe is None or group in (self.group, SEVERAL):
            return self
        try:
            experts = {
                name: restrict(expert, group or None)
                for name, expert in self.recipe.experts.items()
            }
        except RecipeError as error:
            return RecipeText(self.text, fault=str(error))
        return RecipeText.read(replace(self.recipe, experts=experts).print())

    def with_while_noisy(self, *, guidance: float, image: str, attention: str) -> RecipeText:
        """Set the knobs of the schedule's first entry; the text is printed anew."""
        changed = {"guidance": guidance, "image": image.strip(), "attention": attention.strip()}
        if self.recipe is None or tuple(changed.values()) == self.while_noisy:
            return self
        sections = self.recipe.to_sections()
        if "schedule" not in sections:
            return RecipeText(self.text, fault="The recipe has no schedule that could have knobs.")
        first, *rest = sections["schedule"]
        kept = {name: value for name, value in first.items() if name not in changed}
        first = {**kept, **{name: value for name, value in changed.items() if value}}
        read = RecipeText.read(sections_text({**sections, "schedule": [first, *rest]}))
        return read if read.recipe is not None else RecipeText(self.text, fault=read.fault)


def _too_long() -> str:
    return f"A recipe has at most {MOST_RECIPE:,} characters here."


def shipped_text(name: str) -> str:
    """Return the text of a shipped recipe.

    Raises:
        ConfigError: There is none of this name.
    """
    known = shipped_recipes()
    if name not in known:
        raise ConfigError(f"There is no recipe `{name[:80]}`.", fix="Choose one of the list.")
    return known[name].read_text(encoding="utf-8")


def sweep_points(low: float, high: float, number: float) -> list[float]:
    """Return values from low to high, evenly spread.

    Raises:
        ConfigError: They are none.
    """
    if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in (low, high, number)):
        raise ConfigError("A sweep needs two numbers.", fix="Write from where to where.")
    count = int(number)
    if not 2 <= count <= MOST_SWEPT or low == high:
        raise ConfigError(
            f"A sweep of {count} values from {low:g} to {high:g} is none.",
            fix=f"Give 2 to {MOST_SWEPT} values between two different numbers.",
        )
    return [round(low + (high - low) * at / (count - 1), 4) for at in range(count)]


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
    def about(cls, name: str) -> ModelNote:
        """Look at a model; one on the hub is not downloaded for it.

        Raises:
            MotionMergeError: There is no such model, or none that makes videos.
        """
        name, anything = name.strip() or POCKET, "What happens in the video."
        if _HUB_NAME.fullmatch(name) and not exists(path_of(name)):
            return cls(f"{name} is downloaded from the hub when a video is made.", anything)
        model = VideoRequest(model=name).open_model()
        family = model.family
        prompt = KNOWN_WORDS if name == POCKET else anything
        return cls(
            describe_limits(family, model.limits),
            prompt if family.takes_text else f"{family.name} has no prompts: leave it empty.",
        )


def planned_steps(
    model: ModelChoice, experts: ExpertChoice, settings: VideoSettings
) -> StepPlan | None:
    """Return which expert will denoise which steps, before anything is loaded."""
    resolved = settings.resolved(model.family, model.limits)
    return experts.plan_steps(model, model.scheduler(), resolved)


Teller = Callable[[str, float], None]
"""Told what is being done, and which share of all is done."""
