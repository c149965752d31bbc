"""What stands in the page's fields, turned into wishes; what cannot be is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import ConfigError, DataError
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.request.request import POCKET
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.studio.recipe_text import RecipeText, shipped_text
from motionmerge.studio.wishes import Wish, model_of

MOST_PROMPT = 2000  # characters
MOST_COMPARED, MOST_SWEPT, MOST_SEEDS = 4, 9, 4

THIS_RECIPE = "the recipe on this page"


@dataclass(frozen=True, kw_only=True)
class PageValues:
    """The values of the page's left column, under the names of its fields."""

    photo: str | None
    prompt: str
    model: str
    base: str
    lora: str
    recipe: str
    motion: float
    boundary: float
    drop_rate: float
    steps: float | None
    guidance: float | None
    seed: float | None
    num_seeds: float | None
    width: float | None
    height: float | None
    frames: float | None
    paints: bool

    def of_kind(self, kind: str, more: Sequence[Any]) -> Wish:
        """Return what a button asks for.

        Args:
            kind: `motion`, `compare`, `sweep` or `export`.
            more: The values of the button's own tab.

        Raises:
            MotionMergeError: One of the values cannot be.
        """
        if kind == "compare":
            names = list(more[0] or ())
            if not 1 <= len(names) <= MOST_COMPARED:
                raise ConfigError(
                    f"{len(names)} recipes are chosen.", fix=f"Choose 1 to {MOST_COMPARED}."
                )
            return self._wish(kind, {name: self._named(name) for name in names})
        own = self._own_recipe()
        if own is None and not (self.lora.strip() or self.base.strip()):
            if kind == "motion":
                return self._wish(kind, {})  # nothing is there that a knob could turn
            raise ConfigError(
                "The model has nothing to be merged with.", fix="Give a recipe, a LoRA or a base."
            )
        if kind in ("motion", "export"):
            return self._wish(kind, {self._own_name(own): own})
        if own is None or "motion" not in own.parameters:
            raise ConfigError(
                "A sweep turns the parameter `motion`, and this recipe has none.",
                fix="Choose the recipe `pocket` or `knob`.",
            )
        points = sweep_points(*more)
        recipes = {f"motion {point:g}": own.with_parameters(motion=point) for point in points}
        return self._wish(kind, recipes, points)

    def default_recipe(self) -> RecipeText:
        """Return the pocket model's own recipe as the knobs are turned, for an empty field."""
        shipped = RecipeText.read(shipped_text(POCKET))
        turned = shipped.with_parameters(motion=self.motion, drop_rate=self.drop_rate)
        return turned.with_boundary(self.boundary)

    def _own_recipe(self) -> Recipe | None:
        """Return the recipe on the page, None where a LoRA or a base stands in its place.

        Raises:
            ConfigError: It is wrong, or something else is there as well.
        """
        read = RecipeText.read(self.recipe)
        if read.is_empty and (model_of(self.model) != POCKET or self.lora.strip()):
            return None
        if self.lora.strip():
            raise ConfigError(
                "There are a LoRA and a recipe.",
                fix="Empty one of them; a recipe names LoRAs itself: `lora(FILE, 0.8)`.",
            )
        read = self.default_recipe() if read.is_empty else read
        if read.recipe is None:
            raise ConfigError(read.fault)
        return read.recipe

    def _own_name(self, own: Recipe | None) -> str:
        # The recipe's own: somebody who turns the knob and presses at once is ahead of the text.
        motion = self.motion if own is None else own.parameters.get("motion")
        return THIS_RECIPE if motion is None else f"motion {motion:g}"

    def _named(self, name: str) -> Recipe | None:
        return self._own_recipe() if name == THIS_RECIPE else Recipe.parse(shipped_text(name))

    def _wish(
        self, kind: str, recipes: Mapping[str, Recipe | None], points: Sequence[float] = ()
    ) -> Wish:
        if not self.photo:
            raise DataError("There is no photo.", fix="Drop one, or pick one of the list.")
        settings, number = self._settings(), self._num_seeds()
        settings.changed(seed=settings.seed + number - 1)  # the last one must be in range as well
        return Wish(
            photo=Path(self.photo),
            model=model_of(self.model),
            base=self.base.strip() or None,
            lora=self.lora.strip() or None,
            settings=settings,
            num_seeds=number,
            paints=self.paints,
            recipes=recipes,
            points=points,
            boundary=self.boundary,
            motion=self.motion,
            kind=kind,
        )

    def _settings(self) -> VideoSettings:
        prompt = self.prompt.strip()
        if len(prompt) > MOST_PROMPT:
            raise ConfigError(
                f"The prompt has {len(prompt):,} characters.", fix=f"Write at most {MOST_PROMPT:,}."
            )
        return VideoSettings(
            prompt=prompt or None,
            seed=whole_number(self.seed, "seed"),
            num_inference_steps=whole_number(self.steps, "steps") or None,
            width=whole_number(self.width, "width") or None,
            height=whole_number(self.height, "height") or None,
            num_frames=whole_number(self.frames, "frames") or None,
            guidance_scale=self.guidance or None,
        )

    def _num_seeds(self) -> int:
        number = whole_number(self.num_seeds, "seeds") or 1
        if not 1 <= number <= MOST_SEEDS:
            raise ConfigError(
                f"{number} seeds were asked for.",
                fix=f"Write 1 to {MOST_SEEDS}; `motionmerge batch --num-videos` makes more.",
            )
        return number


def whole_number(number: float | None, name: str) -> int:
    """Return a number of the page as an int; an empty field is 0.

    Raises:
        ConfigError: It is none.
    """
    if number is None:
        return 0
    if not math.isfinite(number) or number != int(number):
        raise ConfigError(f"`{name}` is {number}.", fix="Write a whole number.")
    return int(number)


def sweep_points(low: float | None, high: float | None, number: float | None) -> list[float]:
    """Return values from low to high, evenly spread.

    Raises:
        ConfigError: They are none.
    """
    count = whole_number(number, "values")
    if low is None or high is None or not math.isfinite(low + high):
        raise ConfigError("A sweep needs two numbers.", fix="Write from where to where.")
    if not 2 <= count <= MOST_SWEPT or low == high:
        raise ConfigError(
            f"A sweep of {count} values from {low:g} to {high:g} is none.",
            fix=f"Give 2 to {MOST_SWEPT} values between two different numbers.",
        )
    return [round(low + (high - low) * at / (count - 1), 4) for at in range(count)]
