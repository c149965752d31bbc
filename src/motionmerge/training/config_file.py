"""Configurations of training runs: YAML files, shipped or one's own, with single values replaced.

Every fault is named with its line; a mistyped name with the nearest one that there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from motionmerge.config import FrozenModel, Place, explained
from motionmerge.errors import ConfigError
from motionmerge.io.paths import exists, open_plain_file, path_of
from motionmerge.text import at_line, nearest_name, parse_yaml

MAX_BYTES = 64 * 1024
"""Longest configuration."""

_FOLDER = Path(__file__).parent / "configs"


class ConfigSection(FrozenModel):
    """A part of a configuration, whose faults `ConfigFile.read` names."""

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_fault(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        return handler(data)  # the whole configuration knows where the fault is

    @field_validator("*", mode="wrap")
    @classmethod
    def _place_the_fault(
        cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        try:
            return handler(value)
        except ConfigError as error:  # of a part that names its own; its class comes first
            error.place = (cls.__name__, info.field_name or "", *error.place[1:])
            raise


Config = TypeVar("Config", bound=ConfigSection)


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that ship with the package, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


@dataclass(frozen=True)
class ConfigFile:
    """A configuration that was read, but not checked.

    Attributes:
        name: Of the file, without its ending.
        source: What errors call it.
        text: Of the file.
        content: What it holds, with changes.
    """

    name: str
    source: str
    text: str
    content: Mapping[str, Any]

    @classmethod
    def load(cls, path: str | Path, *, changes: Mapping[str, Any] | None = None) -> ConfigFile:
        """Read a file, or a shipped configuration by its name.

        Args:
            path: Of the file, or the name.
            changes: Values that replace those of the file, by keys such as `settings.steps`.

        Raises:
            ConfigError: There is no such configuration, or it is no YAML of keys and values.
        """
        shipped = shipped_configs()
        path = path_of(path)
        if not exists(path) and str(path) in shipped:
            path = shipped[str(path)]
        if not exists(path):
            near = nearest_name(str(path), shipped)
            raise ConfigError(
                f"There is no configuration `{path}`: no such file, and no shipped one of that "
                "name.",
                fix=f"Give a .yaml file, or one of: {', '.join(shipped)}."
                if near is None
                else f"Write `{near}` instead of `{path}`.",
            )
        try:
            with open_plain_file(path) as file:
                text = file.read(MAX_BYTES + 1).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"Cannot read the configuration {path}: {error}.", fix="Give a YAML file."
            ) from error
        if len(text) > MAX_BYTES:
            raise ConfigError(f"{path} is longer than {MAX_BYTES:,} bytes.", fix="Shorten it.")
        content = parse_yaml(text, source=str(path))
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path} is no mapping of keys to values.", fix="Write `model: ...` and so on."
            )
        for key, value in (changes or {}).items():
            content = _with_value(content, key.split("."), value)
        return cls(path.stem, str(path), text, content)

    def read(self, kind: type[Config]) -> Config:
        """Check the content.

        Raises:
            ConfigError: A name is unknown or missing, or a value is refused; with the line.
        """
        try:
            return kind.model_validate(self.content)
        except ValidationError as fault:
            error = explained(
                fault,
                names=lambda place: _names_at(kind, place),
                whole=self.source,
                fix=_fix,
            )
            place = error.place
        except ConfigError as fault:
            error, place = fault, fault.place[1:]
        if not place:
            raise error
        message = at_line(error.message, self.text, place, source=self.source)
        raise ConfigError(message, fix=error.fix, place=place) from error


def _fix(place: Place) -> str:
    key = ".".join(map(str, place))
    return f"Give `{key}` such a value in the file, or pass changes={{'{key}': VALUE}}."


def _with_value(content: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """Return a mapping with another value behind some keys; what is no mapping becomes one."""
    own = dict(content) if isinstance(content, dict) else {}
    first, *rest = keys
    own[first] = _with_value(own.get(first), rest, value) if rest else value
    return own


def _names_at(kind: type, place: Place) -> Iterable[str]:
    """Return the names that are known where the last of a place stands."""
    for key in place[:-1]:
        kind = next((one for one in _parts_of(kind, key) if _names_of(one)), type(None))
    return _names_of(kind)


def _parts_of(kind: type, key: int | str) -> tuple[Any, ...]:
    if not issubclass(kind, BaseModel) or key not in kind.model_fields:
        return ()
    annotation = kind.model_fields[str(key)].annotation
    return (annotation, *get_args(annotation))


def _names_of(kind: Any) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [one.name for one in fields(kind)] if is_dataclass(kind) else []
