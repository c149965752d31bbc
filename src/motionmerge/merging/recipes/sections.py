"""The sections of a recipe's file: read, and refused by name where they make no sense."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic.functional_validators import ModelWrapValidatorHandler

from motionmerge.config import Place, explained, named_fault, shown
from motionmerge.errors import ConfigError, RecipeError
from motionmerge.knobs import parse_attention, parse_image
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.recipes.functions import FUNCTIONS
from motionmerge.named import NamedFloat, NamedInt, named, number_text
from motionmerge.schedule import SCHEDULE_EXAMPLE, ScheduleEntry, is_finite_number
from motionmerge.text import parse_yaml

MAX_BYTES = 64 * 1024
"""Longest recipe."""

_INPUT_FIX = "Give a path as text, and `sha256` as the 64 hexadecimal digits of `sha256sum PATH`."


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RecipeInput:
    """Where an input's weights are.

    Attributes:
        path: A path, relative to the recipe's folder, or `prefix:name` (see `register_resolver`).
        sha256: Hex digest that the weights must have; None accepts any.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_fault(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        return named_fault(cls, data, handler, fix=_INPUT_FIX)

    path: str
    sha256: str | None = None

    @field_validator("sha256")
    @classmethod
    def _read_digest(cls, value: str | None) -> str | None:
        digest = None if value is None else value.removeprefix("sha256:").lower()
        if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError("64 hexadecimal digits")
        return digest


def _entry_of(value: Any) -> Any:
    """Read a path alone as an entry with that path."""
    return value if isinstance(value, (dict, RecipeInput)) else {"path": value}


def _number(value: Any) -> float:
    """Accept a number as it is: an integer stays one."""
    if not is_finite_number(value):
        raise ValueError("a number")
    return value


_ENTRY = TypeAdapter(ScheduleEntry)


@contextmanager
def placed(*place: int | str) -> Iterator[None]:
    """Add to errors inside the block which part of the recipe they are about."""
    try:
        yield
    except RecipeError as error:
        error.place = error.place or place
        raise


class Sections(BaseModel):
    """The sections of a recipe, each of the right kind; expressions are not read yet.

    Attributes:
        description: What the recipe is for.
        parameters: Numbers by name.
        inputs: The weights by name.
        experts: The text of an expression by name.
        schedule: When each expert denoises, from noise to clean.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str | None = None
    parameters: dict[str, Annotated[float, PlainValidator(_number)]] = Field(
        default={}, min_length=1
    )
    inputs: dict[str, Annotated[RecipeInput, BeforeValidator(_entry_of)]] = Field(min_length=1)
    experts: dict[str, str] = Field(min_length=1)
    schedule: list[ScheduleEntry] | None = None

    @field_validator("parameters", "inputs", "experts", mode="before")
    @classmethod
    def _check_names(cls, value: Any, info: ValidationInfo) -> Any:
        for name in value if isinstance(value, dict) else ():
            fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name)
            is_taken = info.field_name != "experts" and name in FUNCTIONS
            if not fits or keyword.iskeyword(name) or is_taken:
                raise RecipeError(
                    f"`{str(name)[:80]}` is not a name for one of the {info.field_name}.",
                    fix="Use letters, digits and underscores, and no function's name.",
                    place=(info.field_name or "", name),
                )
        return value

    @field_validator("schedule", mode="before")
    @classmethod
    def _put_parameters_in(cls, entries: Any, info: ValidationInfo) -> Any:
        """Replace the names of parameters by their values."""
        if "parameters" not in info.data:  # one of them is refused, which is told
            return None
        if not isinstance(entries, list):
            return entries
        numbers = info.data["parameters"]
        named_entries = []
        for number, entry in enumerate(entries):
            with placed("schedule", number), suppress(ValidationError):  # which is told later
                if isinstance(entry, dict):
                    _check_cut_call(entry)
                    entry = {key: _with_names(key, entry[key], numbers) for key in entry}
                _ENTRY.validate_python(entry)
            named_entries.append(entry)
        return named_entries


def _with_names(key: str, value: Any, numbers: Mapping[str, float]) -> Any:
    """Read what an entry says of a field, with the recipe's parameters."""
    if not isinstance(value, str) or key == "expert":
        return value
    if key in ("image", "attention"):
        parse = parse_image if key == "image" else parse_attention
        return parse(value, where=f"`{key}`", parameters=numbers)
    return named(numbers[value], value) if value in numbers else value


def _check_cut_call(entry: Mapping[Any, Any]) -> None:
    """Refuse an entry in which a comma of YAML's ended a call, as in `{image: blur(1, 5)}`.

    Raises:
        RecipeError: Such an entry.
    """
    for key in ("image", "attention"):
        value = entry.get(key)
        if isinstance(value, str) and value.count("(") > value.count(")"):
            raise RecipeError(
                f"`{key}` is cut off at a comma: {shown(value)}.",
                fix=f'Put the call in quotes: `{key}: "{value}, ...)"`.',
            )


_FIXES = {
    "description": "Write text; quote it if needed.",
    "parameters": "Write `NAME: NUMBER` lines under `parameters:`.",
    "inputs": "Write `NAME: PATH` lines under `inputs:`, or `NAME: {path: PATH, sha256: DIGEST}` "
    "with the 64 hexadecimal digits of `sha256sum PATH`, in quotes.",
    "experts": "Write `NAME: EXPRESSION` lines under `experts:`, e.g. `merged: base`.",
    "schedule": SCHEDULE_EXAMPLE,
}


def _names_at(place: Place) -> Iterable[str]:
    """Return the names that can stand in the mapping at a place."""
    if len(place) == 1:
        return Sections.model_fields
    return [one.name for one in fields(RecipeInput if place[0] == "inputs" else ScheduleEntry)]


def read_sections(text: str, *, source: str = "The recipe") -> Sections:
    """Read the sections of a recipe's text.

    Args:
        text: The recipe.
        source: What the text is, for faults of its YAML.

    Raises:
        RecipeError: It is too long, no YAML, or a section is unknown, missing or of another kind.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(
            f"The recipe is longer than {MAX_BYTES // 1024} KiB.", fix="Write a shorter recipe."
        )
    try:
        return Sections.model_validate(parse_yaml(text, source=source))
    except ConfigError as error:
        raise RecipeError(error.message, fix=error.fix) from error
    except ValidationError as error:
        fault = explained(
            error,
            whole="The recipe",
            names=_names_at,
            fix=lambda place: (
                _FIXES[str(place[0])]
                if place
                else "Write the sections `inputs:`, `experts:` and `schedule:`."
            ),
        )
        raise RecipeError(fault.message, fix=fault.fix, place=fault.place) from error


def check_use(
    parameters: Mapping[str, float],
    experts: Mapping[str, Checkpoint],
    schedule: Iterable[ScheduleEntry],
) -> None:
    """Refuse a parameter that changes nothing, as a mistyped one does."""
    entries = list(schedule)
    values = [value for entry in entries for value in entry.knobs.values()]
    values += [entry.condition[1] for entry in entries if entry.condition is not None]
    texts = [
        value if isinstance(value, str) else number_text(value)
        for value in values
        if isinstance(value, (str, NamedFloat, NamedInt))
    ]
    text = " ".join([*map(str, experts.values()), *texts])
    used = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text))
    for name in parameters:
        if name not in used:
            raise RecipeError(
                f"The parameter `{name}` is used nowhere.",
                fix="Use it in an expression or in the schedule, or remove it.",
                place=("parameters", name),
            )
