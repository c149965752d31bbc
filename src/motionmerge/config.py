"""Settings from files and flags: frozen, complete, and unforgiving of a mistyped name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from motionmerge.errors import ConfigError
from motionmerge.text import MAX_YAML, fix_unknown_name, parse_yaml


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
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ConfigError(
                        f"{cls.__name__} has no setting `{key}`.",
                        fix=fix_unknown_name(str(key), cls.model_fields),
                    )
        try:
            return handler(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([cls.__name__, *map(str, first["loc"])])
            raise ConfigError(
                f"{where}: {first['msg']} (got {first['input']!r}).",
                fix=f"Correct `{where}`.",
            ) from error


SettingsType = TypeVar("SettingsType", bound=FrozenModel)


def load_yaml(path: str | Path, model: type[SettingsType]) -> SettingsType:
    """Read a YAML file into a settings class.

    Raises:
        ConfigError: The file is missing, is not YAML, or does not fit `model`.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_YAML + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}", fix="Check the path.") from error
    values = parse_yaml(text, source=str(path))
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__}, not a mapping of settings.",
            fix=f"Write `name: value` lines; the names are {', '.join(model.model_fields)}.",
        )
    return model.model_validate(values)
