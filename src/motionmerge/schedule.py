"""What is in force at which noise level: an expert, and knobs; `noise_levels` computes the levels.

Paper: Tian et al. 2025, stage 3 (T = 500 of 1000 is noise level 0.640 on DynamiCrafter).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, TypeGuard

import numpy as np
from pydantic import (
    ConfigDict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass as validated_dataclass
from pydantic.functional_validators import ModelWrapValidatorHandler

from motionmerge.conditions import CONDITIONS as _CONDITIONS
from motionmerge.conditions import holds
from motionmerge.config import explained, named_fault, shown
from motionmerge.errors import RecipeError
from motionmerge.knobs import (
    IMAGE_KNOBS,
    FirstFrame,
    ImageKnob,
    MotionAmplitude,
    NoisyImage,
    parse_attention,
    parse_image,
    write_image,
)
from motionmerge.named import number_text
from motionmerge.noise_levels import noise_level

__all__ = ["ExpertSchedule", "ScheduleEntry", "noise_level"]


PAPER_BOUNDARY = 0.64
"""Noise level of the paper's boundary: timestep 500 of DynamiCrafter's schedule."""


def is_finite_number(value: object) -> TypeGuard[float]:
    """Check whether a value is a number that 64 bits hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < 1 << 63  # NaN is not


def plain_number(value: Any) -> Any:
    """Return Python's own number for one of numpy's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


SCHEDULE_EXAMPLE = "Write one `- {expert: NAME, above: 0.64}` line per expert."


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class ScheduleEntry:
    """One line of a schedule: what is in force while its condition holds.

    At most one condition is set; without one the entry takes everything that is left. Knobs that
    are left out are as the pipeline has them: nothing is inherited from another entry.

    Attributes:
        expert: Name of the expert.
        above: Used while the noise level is strictly above this, in [0, 1].
        timestep: Used while the scheduler's timestep is strictly above this.
        step_fraction: Used while the fraction of steps already done is strictly below this, [0, 1].
        guidance: The guidance scale, from 1 to 1000; at 1 the unconditional pass is left out.
        image: Changes of the condition image; their text in recipes.
        attention: A change of the self-attention; its text in recipes.
        start: Noise level that denoising begins at, in (0, 1]; for the first entry alone.

    Raises:
        RecipeError: The name is empty, a value is out of range, or two conditions are set.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_fault(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        return named_fault(cls, data, handler, fix=SCHEDULE_EXAMPLE)

    expert: str
    _: KW_ONLY
    above: float | None = None
    timestep: float | None = None
    step_fraction: float | None = None
    guidance: float | None = None
    image: tuple[ImageKnob, ...] = ()
    attention: FirstFrame | None = None
    start: float | None = None

    @field_validator("expert", mode="plain")
    @classmethod
    def _check_expert(cls, expert: Any) -> str:
        if not isinstance(expert, str) or not expert.strip():
            raise RecipeError(
                f"A schedule entry names the expert {shown(expert)}.",
                fix="Give the name of one of the recipe's experts.",
            )
        return expert

    @field_validator("above", "timestep", "step_fraction", "guidance", "start", mode="plain")
    @classmethod
    def _check_number(cls, value: Any, info: ValidationInfo) -> float | None:
        """Accept a number as it is: one with a name keeps it."""
        name, expert, value = info.field_name, info.data.get("expert"), plain_number(value)
        place = f"`{name}` of the schedule entry of `{expert}`"
        if value is None:
            return None
        if not is_finite_number(value):
            raise RecipeError(
                f"{place} is {shown(value)}.",
                fix="Write a number, or the name of one of the recipe's parameters.",
            )
        if name == "guidance" and not 1 <= value <= 1000:
            raise RecipeError(
                f"{place} is {value}, {'below 1' if value < 1 else 'above 1000'}.",
                fix="Write 1 for none, or e.g. `guidance: 3.5`.",
            )
        if name == "start" and not 0 < value <= 1:
            raise RecipeError(
                f"{place} is {value}, and denoising begins at a noise level above 0 and up to 1.",
                fix="Write e.g. `start: 0.95`.",
            )
        if name in _CONDITIONS and name != "timestep" and not 0 <= value <= 1:
            raise RecipeError(
                f"{place} is {value}, outside [0, 1].",
                fix="Write a timestep such as 500 as `timestep: 500`, or a noise level as "
                "`above: 0.64`.",
            )
        return value

    @field_validator("image", "attention", mode="plain")
    @classmethod
    def _read_knobs(cls, value: Any, info: ValidationInfo) -> Any:
        """Read knobs that are text; accept those that are made already."""
        expert, name = info.data.get("expert"), info.field_name
        where = f"`{name}` of the schedule entry of `{expert}`"
        if isinstance(value, str):
            return (parse_image if name == "image" else parse_attention)(value, where=where)
        if name == "attention" and (value is None or isinstance(value, FirstFrame)):
            return value
        knobs = value if isinstance(value, tuple) else (value,)
        if name == "image" and all(isinstance(one, IMAGE_KNOBS) for one in knobs):
            return knobs
        raise RecipeError(
            f"{where} is {shown(value)}.",
            fix="Write a call, such as `image: low_pass(0.4)` or `attention: first_frame(-0.6)`.",
        )

    def __post_init__(self) -> None:
        given = [name for name in _CONDITIONS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(
                f"The schedule entry of `{self.expert}` has {len(given)} conditions: "
                f"{', '.join(given)}.",
                fix="Keep one of them.",
            )
        for kind in (MotionAmplitude, NoisyImage):  # filters follow each other, these do not
            if sum(isinstance(knob, kind) for knob in self.image) > 1:
                raise RecipeError(
                    f"`image` of the schedule entry of `{self.expert}` has {kind.name}() twice.",
                    fix="Keep one of them.",
                )

    @property
    def condition(self) -> tuple[str, float] | None:
        """The condition's name and threshold, or None for a catch-all."""
        for name in _CONDITIONS:
            value = getattr(self, name)
            if value is not None:
                return name, value
        return None

    @property
    def knobs(self) -> dict[str, str | float]:
        """What is in force besides the expert, by field, as a recipe writes it."""
        found: dict[str, str | float] = {}
        if self.guidance is not None:
            found["guidance"] = self.guidance
        if self.image:
            found["image"] = write_image(self.image)
        if self.attention is not None:
            found["attention"] = str(self.attention)
        if self.start is not None:
            found["start"] = self.start
        return found

    @property
    def label(self) -> str:
        """The expert and what else is in force, in words: `dynamics (guidance 5)`."""
        knobs = [
            f"{name} {value if isinstance(value, str) else number_text(value)}"
            for name, value in self.knobs.items()
        ]
        return f"{self.expert} ({', '.join(knobs)})" if knobs else self.expert

    def holds(self, *, noise_level: float, timestep: float, step_fraction: float) -> bool:
        """Return whether this entry's expert is the one for such a step."""
        return self.condition is None or holds(
            *self.condition,
            noise_level=noise_level,
            timestep=timestep,
            step_fraction=step_fraction,
        )


@dataclass(frozen=True)
class ExpertSchedule:
    """The order in which experts denoise, from noise to clean. Pure data.

    Attributes:
        entries: From the noisiest on; each but the last has a condition, the last has none.

    Raises:
        RecipeError: No entry, an entry that can never be reached, or no catch-all at the end.
    """

    entries: tuple[ScheduleEntry, ...]

    def __post_init__(self) -> None:
        if not self.entries:
            raise RecipeError("The schedule is empty.", fix="Add at least `- {expert: NAME}`.")
        *conditional, last = self.entries
        thresholds: dict[str, float] = {}
        for number, entry in enumerate(conditional, start=1):
            _check_reachable(entry, number, thresholds)
        if last.condition is not None:
            raise RecipeError(
                f"The last schedule entry (`{last.expert}`) has the condition "
                f"`{last.condition[0]}`, so some steps have no expert.",
                fix="Remove its condition, or add `- {expert: NAME}` after it.",
            )
        for entry in self.entries[1:]:
            if entry.start is not None:
                raise RecipeError(
                    f"The schedule entry of `{entry.expert}` has a `start`, and is not the first.",
                    fix="Move `start` to the first entry: denoising begins once.",
                )

    @classmethod
    def two(cls, dynamics: str, consistency: str, *, boundary: float) -> ExpertSchedule:
        """Use `dynamics` while the noise level is above `boundary`, then `consistency`."""
        return cls((ScheduleEntry(dynamics, above=boundary), ScheduleEntry(consistency)))

    @classmethod
    def from_list(cls, entries: Sequence[Mapping[str, Any]]) -> ExpertSchedule:
        """Read the `schedule:` list of a recipe.

        Raises:
            RecipeError: It is not a list of mappings with the fields of `ScheduleEntry`.
        """
        try:
            return cls(tuple(TypeAdapter(list[ScheduleEntry]).validate_python(entries)))
        except ValidationError as error:
            names = [field.name for field in fields(ScheduleEntry)]
            fault = explained(
                error,
                names=lambda _: names,
                below=("schedule",),
                fix=lambda _: SCHEDULE_EXAMPLE,
            )
            raise RecipeError(fault.message, fix=fault.fix) from error

    def to_list(self) -> list[dict[str, str | float]]:
        """Return the entries as plain mappings, the inverse of `from_list`."""
        return [
            {
                "expert": entry.expert,
                **dict([entry.condition] if entry.condition else []),
                **entry.knobs,
            }
            for entry in self.entries
        ]

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts, each once, in order of first use."""
        return tuple(dict.fromkeys(entry.expert for entry in self.entries))

    @property
    def has_knobs(self) -> bool:
        """Whether any entry sets more than an expert."""
        return any(entry.knobs for entry in self.entries)

    def check_no_knobs(self, what: str) -> None:
        """Refuse knobs where only the experts of a schedule count.

        Args:
            what: What would leave them out, such as `an export`.

        Raises:
            RecipeError: An entry sets more than an expert.
        """
        for entry in self.entries:
            if entry.knobs:
                raise RecipeError(
                    f"The schedule entry of `{entry.expert}` sets {', '.join(entry.knobs)}, which "
                    f"{what} cannot hold.",
                    fix="Remove it from the recipe: experts alone are meant here.",
                )

    def with_boundary(self, boundary: float) -> ExpertSchedule:
        """Return a schedule of two entries that changes at another noise level.

        Raises:
            RecipeError: It has more or fewer entries.
        """
        if len(self.entries) != 2:
            raise RecipeError(
                "A boundary is between the two entries of a schedule, and this one has "
                f"{len(self.entries)}.",
                fix="Leave the boundary out, and change the schedule in the recipe.",
            )
        noisy = replace(self.entries[0], above=boundary, timestep=None, step_fraction=None)
        return ExpertSchedule((noisy, self.entries[1]))

    @property
    def labels(self) -> tuple[str, ...]:
        """What the entries put in force, in words, each once, in order of first use."""
        return tuple(dict.fromkeys(entry.label for entry in self.entries))

    def entry_at(
        self, *, noise_level: float, timestep: float, step_fraction: float
    ) -> ScheduleEntry:
        """Return what is in force at one step: the first entry whose condition holds.

        Args:
            noise_level: 0 (clean) .. 1 (noise), of the step's input.
            timestep: The scheduler's own value.
            step_fraction: Steps already done / all steps, in [0, 1).
        """
        for entry in self.entries:
            if entry.holds(noise_level=noise_level, timestep=timestep, step_fraction=step_fraction):
                return entry
        raise AssertionError("the last entry of a valid schedule always holds")

    def expert_at(self, *, noise_level: float, timestep: float, step_fraction: float) -> str:
        """Name the expert of one step; see `entry_at`."""
        return self.entry_at(
            noise_level=noise_level, timestep=timestep, step_fraction=step_fraction
        ).expert

    def draw(self, *, width: int = 40) -> str:
        """Draw the schedule as one line, noise at the left: `1.0 |a====|0.64 b======| 0.0`."""
        edges = [1.0]
        for index, entry in enumerate(self.entries):
            evenly = 1 - (index + 1) / len(self.entries)
            edges.append(entry.above if entry.above is not None else evenly)
        edges[-1] = 0.0
        line = "1.0 |"
        for entry, high, low in zip(self.entries, edges, edges[1:], strict=False):
            span = max(high - low, 0.0)
            line += entry.label.ljust(round(span * width), "=") + "|"
            line += (
                _DRAWN_THRESHOLD[entry.condition[0]](entry.condition[1]) if entry.condition else ""
            )
        return line + " 0.0"


def _check_reachable(entry: ScheduleEntry, number: int, thresholds: dict[str, float]) -> None:
    """Refuse an entry that hides those after it, or is hidden by one before it.

    Args:
        entry: Not the last.
        number: Its place in the schedule, from 1 on.
        thresholds: The last threshold of each condition so far; that of the entry is noted.

    Raises:
        RecipeError: Such an entry.
    """
    if entry.condition is None:
        raise RecipeError(
            f"Schedule entry {number} (`{entry.expert}`) has no condition, so the entries after it "
            "are never reached.",
            fix="Give it a condition such as `above: 0.64`, or move it to the end.",
        )
    name, threshold = entry.condition
    before = thresholds.get(name)
    sign = 1 if name == "step_fraction" else -1
    if before is not None and sign * threshold <= sign * before:
        raise RecipeError(
            f"Schedule entry {number} (`{entry.expert}`, {name} {threshold:g}) can never be "
            f"reached: an entry before it has {name} {before:g}.",
            fix="Sort the entries from noisy to clean.",
        )
    thresholds[name] = threshold


_DRAWN_THRESHOLD = {
    "above": lambda value: f"{value:g} ",
    "timestep": lambda value: f"t={value:g} ",
    "step_fraction": lambda value: f"{value:.0%} of steps ",
}
