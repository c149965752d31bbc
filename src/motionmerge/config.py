"""Settings from files and flags: frozen, complete, and unforgiving of a mistyped name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import ArgsKwargs

from motionmerge.errors import ConfigError, RecipeError
from motionmerge.text import fix_unknown_name

Place: TypeAlias = "tuple[int | str, ...]"
"""The keys and positions that lead to a value, from the outermost on."""

_UNKNOWN_NAME = ("extra_forbidden", "unexpected_keyword_argument", "invalid_key")
_KINDS = {
    "string_type": "text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "list_type": "a list",
    "too_short": "a mapping with at least one entry",
}
_LONGEST = 100
"""Characters of a stranger's name or value that a message repeats."""


class FrozenModel(BaseModel):
    """Base of every group of settings that comes from a file or a flag.

    Subclasses declare typed fields. Instances are frozen; unknown names and bad values are refused.

    Raises:
        ConfigError: A name is unknown (the nearest is offered), missing, or its value is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_fault(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            names = cls.model_fields
            raise explained(error, below=(cls.__name__,), names=lambda _: names) from error


def explained(
    error: ValidationError,
    *,
    names: Callable[[Place], Iterable[str]],
    below: Place = (),
    whole: str = "",
    fix: Callable[[Place], str | None] = lambda place: None,
) -> ConfigError:
    """Return the error for the first thing that is wrong; unknown names come before all else.

    A validator raises `ValueError("a number")` for what is not one.

    Args:
        error: What pydantic found.
        names: Gives the names that are known where an unknown one stands.
        below: Where that stands which was read.
        whole: What was read, if it stands nowhere, e.g. `The recipe`.
        fix: Gives what helps at a place; None to say that it must be corrected.
    """
    faults = error.errors(include_url=False)
    first = min(faults, key=lambda fault: fault["type"] not in _UNKNOWN_NAME)
    place, value = (*below, *first["loc"]), first["input"]
    above, where = _written(place[:-1]) or whole, _written(place) or whole
    if first["type"] in _UNKNOWN_NAME:
        name = str(place[-1])[:_LONGEST]
        nearest = fix_unknown_name(name, names(place))
        return ConfigError(f"{above} has no setting `{name}`.", fix=nearest, place=place)
    if first["type"] == "missing":
        message = f"{above} has no `{place[-1]}`."
    elif first["type"] == "value_error":  # raised by a validator of ours
        message = f"{where} is {shown(value)}, not {first['ctx']['error']}."
    elif first["type"] in _KINDS:
        message = f"{where} is {shown(value)}, not {_KINDS[first['type']]}."
    else:
        message = f"{where}: {first['msg']} (got {shown(value)})."
    return ConfigError(message, fix=fix(place) or f"Correct `{where}`.", place=place)


def named_fault(cls: type, data: Any, handler: ModelWrapValidatorHandler[Any], *, fix: str) -> Any:
    """Build a part of a recipe; name what is wrong with one that is written in Python.

    Of one in a file, the reader of the file names it, because it knows where it stands.

    Raises:
        RecipeError: An argument is unknown, missing or refused.
    """
    try:
        return handler(data)
    except ValidationError as error:
        if not isinstance(data, ArgsKwargs):
            raise
        below, known = (cls.__name__,), [one.name for one in fields(cls)]
        fault = explained(error, below=below, names=lambda _: known, fix=lambda _: fix)
        raise RecipeError(fault.message, fix=fault.fix) from error


def _written(place: Place) -> str:
    """Write a place as `schedule entry 2.above`; positions in lists count from 1."""
    keys = (f" entry {key + 1}" if isinstance(key, int) else f".{key}" for key in place)
    return "".join(keys).lstrip(".")


def shown(value: object) -> str:
    """Write a stranger's value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__} of very many digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}.."
