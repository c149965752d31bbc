"""A recipe as it stands on the page: text, what it means, and knobs that write into it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from motionmerge.errors import ConfigError, RecipeError
from motionmerge.merging.algebra.groups import restrict, restrictions
from motionmerge.merging.recipes.files import shipped_recipes
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.merging.recipes.writing import sections_text
from motionmerge.schedule import ExpertSchedule

MOST_RECIPE = 20_000  # characters

SEVERAL = "several"
"""Stands in the field for the group where the recipe restricts its differences unlike."""


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

    @classmethod
    def read(cls, text: str | None) -> RecipeText:
        """Read what somebody wrote, None for an empty field; nothing is raised."""
        text = text or ""
        if len(text) > MOST_RECIPE:
            return cls(text, fault=_too_long())
        try:
            return cls(text, Recipe.parse(text, source="recipe"))
        except (RecipeError, ConfigError) as error:
            return cls(text, fault=str(error))

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

    @property
    def is_empty(self) -> bool:
        """Whether nothing is written."""
        return not self.text.strip()

    @property
    def boundary(self) -> float | None:
        """Noise level down to which the schedule's first entry is used; None if it has none."""
        schedule = self.recipe.schedule if self.recipe is not None else None
        return schedule.entries[0].above if schedule is not None else None

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

    # What follows returns the text printed anew, the same text where nothing changes, and the old
    # text with a fault where the change is impossible.

    def with_parameters(self, **values: float) -> RecipeText:
        """Turn those of the parameters that the recipe has."""
        if self.recipe is None:
            return self
        own = self.recipe.parameters
        changed = {name: one for name, one in values.items() if own.get(name, one) != one}
        if not changed:
            return self
        try:
            return self._printed(self.recipe.with_parameters(**changed).print())
        except (RecipeError, ConfigError) as error:
            return self._failed(str(error))

    def with_boundary(self, boundary: float) -> RecipeText:
        """Change the noise level at which the second of two experts takes over."""
        if self.recipe is None or boundary == self.boundary:
            return self
        names, schedule = list(self.recipe.experts), self.recipe.schedule
        try:
            if schedule is not None:
                schedule = schedule.with_boundary(boundary)
            elif len(names) == 2:
                schedule = ExpertSchedule.two(*names, boundary=boundary)
            else:
                return self._failed(
                    f"A boundary is between two experts, and the recipe has {len(names)}."
                )
        except RecipeError as error:
            return self._failed(str(error))
        return self._printed(replace(self.recipe, schedule=schedule).print())

    def with_group(self, group: str) -> RecipeText:
        """Restrict every difference to a group or a pattern, "" to none."""
        if self.recipe is None or group in (self.group, SEVERAL):
            return self
        try:
            experts = {
                name: restrict(expert, group or None)
                for name, expert in self.recipe.experts.items()
            }
        except RecipeError as error:
            return self._failed(str(error))
        return self._printed(replace(self.recipe, experts=experts).print())

    def with_while_noisy(self, *, guidance: float, image: str, attention: str) -> RecipeText:
        """Set the knobs of the schedule's first entry."""
        changed = {"guidance": guidance, "image": image.strip(), "attention": attention.strip()}
        if self.recipe is None or tuple(changed.values()) == self.while_noisy:
            return self
        sections = self.recipe.to_sections()
        if "schedule" not in sections:
            return self._failed("The recipe has no schedule that could have knobs.")
        first, *rest = sections["schedule"]
        kept = {name: value for name, value in first.items() if name not in changed}
        first = {**kept, **{name: value for name, value in changed.items() if value}}
        return self._printed(sections_text({**sections, "schedule": [first, *rest]}))

    def _printed(self, text: str) -> RecipeText:
        read = RecipeText.read(text)
        return read if read.recipe is not None else self._failed(read.fault)

    def _failed(self, fault: str) -> RecipeText:
        return RecipeText(self.text, fault=fault)


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
