"""The recipe: inputs, experts and schedule as a file that a person can read.

inputs:
  base: pocket:base
  tuned: {path: tuned.safetensors, sha256: 0123...}
experts:
  dynamics: base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)
  consistency: tuned + 0.25 * dare(tuned - base, drop_rate=0.7, seed=1)
schedule:
  - {expert: dynamics, above: 0.64}
  - {expert: consistency}

Numbers may have names, which expressions and the schedule use: `parameters: {motion: 0.25}`.
"""

from __future__ import annotations

import keyword
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.io.paths import behind_links, exists, folder_of, path_of
from motionmerge.io.weights import open_weights
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.named import NamedFloat, NamedInt, named, number_text
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.sparsify import Dare
from motionmerge.merging.algebra.terms import is_number
from motionmerge.merging.inputs.resolvers import PACKAGE, resolve, split_name
from motionmerge.merging.inputs.sources import MemoryTensors, Origin
from motionmerge.merging.recipes.parser import FUNCTIONS, parse_expression
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.text import fix_unknown_name, parse_yaml

MAX_BYTES = 64 * 1024
"""Longest recipe."""

METADATA_KEY = "motionmerge.recipe"
"""Where a merged file's header keeps the recipe that made it."""

OWN_MODEL = "memory:base"
"""The path of an input that stands for the model in a pipeline, to which LoRAs are added."""

_SECTIONS = ("description", "parameters", "inputs", "experts", "schedule")
_INPUT_FIELDS = ("path", "sha256")

InputValue: TypeAlias = "str | Path | Mapping[str, torch.Tensor]"


def shipped_recipes() -> dict[str, Path]:
    """Give the recipes that ship with the package, by name."""
    return {path.stem: path for path in sorted((PACKAGE / "recipes").glob("*.yaml"))}


@dataclass(frozen=True)
class RecipeInput:
    """Where an input's weights are.

    Attributes:
        path: A path, relative to the recipe's folder, or `prefix:name` (see `register_resolver`).
        sha256: Hex digest that the weights must have; None accepts any.
    """

    path: str
    sha256: str | None = None


@dataclass(frozen=True)
class Recipe:
    """How experts are made of checkpoints, and when each of them denoises.

    Attributes:
        inputs: The checkpoints by name.
        experts: Per expert, an expression over those names.
        schedule: When each expert denoises; None leaves that to whoever uses the experts.
        description: What the recipe is for.
        parameters: Numbers that the expressions and the schedule call by name.
        folder: What relative paths are relative to; None for the working directory.
    """

    inputs: Mapping[str, RecipeInput]
    experts: Mapping[str, Checkpoint]
    schedule: ExpertSchedule | None = None
    description: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.experts:
            raise RecipeError(
                "The recipe has no experts.", fix="Add at least `experts: {merged: base}`."
            )
        if self.schedule is None and len(self.experts) == 1:
            only_one = ExpertSchedule((ScheduleEntry(next(iter(self.experts))),))
            object.__setattr__(self, "schedule", only_one)
        for expert in self.schedule.experts if self.schedule else ():
            if expert not in self.experts:
                raise RecipeError(
                    f"The schedule names the expert `{expert}`, which the recipe does not have.",
                    fix=fix_unknown_name(expert, self.experts),
                )

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file, or one that ships with the package by its name (`edg-official`).

        Raises:
            RecipeError: The file is missing or is no recipe.
        """
        path = Path(path)
        shipped = shipped_recipes()
        if not exists(path) and str(path) in shipped:
            path = shipped[str(path)]
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"Cannot read the recipe {path}: {error}.",
                fix=f"Give a .yaml file, or one of: {', '.join(shipped)}.",
            ) from error
        return cls.parse(text, folder=folder_of(path))

    @classmethod
    def made(cls, path: str | Path) -> Recipe:
        """Give the recipe that made a merged file, from its header.

        Raises:
            CheckpointError: The file cannot be read or was not made by a recipe.
        """
        with open_weights(Path(path)) as reader:
            text = reader.metadata.get(METADATA_KEY)
        if text is None:
            raise CheckpointError(
                f"{path} does not say which recipe made it.",
                fix="Give a file that `motionmerge merge` wrote.",
            )
        return cls.parse(text, folder=folder_of(path))

    @classmethod
    def parse(cls, text: str, *, folder: Path | None = None) -> Recipe:
        """Parse the text of a recipe. Nothing in it is executed and no file is opened.

        A path in quotes in an expression, as in `lora("motion.safetensors", 1.0)`, becomes an input
        of its own, so that it is hashed, can be pinned, and moves with the recipe.

        Raises:
            RecipeError: It is no YAML, has unknown or missing parts, or an expression is wrong.
        """
        sections = _load_yaml(text)
        for key in sections:
            if key not in _SECTIONS:
                raise RecipeError(
                    f"Unknown section `{key}`.", fix=fix_unknown_name(str(key), _SECTIONS)
                )
        parameters = _parse_parameters(sections)
        inputs = {
            name: _parse_input(name, value)
            for name, value in _mapping(sections, "inputs").items()
            if _check_name(name, "inputs")
        }
        for name in parameters:
            if name in inputs:
                raise RecipeError(
                    f"`{name}` is both an input and a parameter.", fix="Rename one of them."
                )
        files: dict[str, str] = {}
        experts = {
            name: parse_expression(
                _text(value, where), inputs, where=where, files=files, parameters=parameters
            )
            for name, value in _mapping(sections, "experts").items()
            if _check_name(name, "experts") and (where := f"experts.{name}")
        }
        inputs |= {name: RecipeInput(path) for name, path in files.items()}
        entries = _with_values(sections.get("schedule"), parameters)
        schedule = None if entries is None else ExpertSchedule.from_list(entries)
        _check_use(parameters, experts, entries)
        description = sections.get("description")
        return cls(
            inputs=inputs,
            experts=experts,
            schedule=schedule,
            description=None if description is None else _text(description, "description").strip(),
            parameters=parameters,
            folder=folder,
        )

    def print(self) -> str:
        """Write the canonical text: `Recipe.parse(recipe.print()) == recipe`."""
        text = "" if self.description is None else _dump({"description": self.description})
        if self.parameters:
            text += _dump({"parameters": dict(self.parameters)})
        inputs = {
            name: entry.path
            if entry.sha256 is None
            else {"path": entry.path, "sha256": entry.sha256}
            for name, entry in self.inputs.items()
        }
        text += _dump({"inputs": inputs})
        text += _dump({"experts": {name: str(expert) for name, expert in self.experts.items()}})
        if self.schedule is not None:
            lines = (
                yaml.safe_dump(
                    entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=_WIDE
                )
                for entry in _as_written(self.schedule)
            )
            text += "schedule:\n" + "".join(f"  - {line}" for line in lines)
        return text

    def with_parameters(self, **values: float) -> Recipe:
        """Return the recipe with other values of its parameters.

        Raises:
            RecipeError: It has no such parameter, or a value is no number or out of range.
        """
        for name in values:
            if name not in self.parameters:
                known = ", ".join(f"`{one}`" for one in self.parameters) or "none"
                raise RecipeError(
                    f"The recipe has no parameter `{name}`; its parameters: {known}.",
                    fix=fix_unknown_name(name, self.parameters)
                    if self.parameters
                    else f"Add `parameters: {{{name}: ...}}` to the recipe, and use it there.",
                )
        changed = replace(self, parameters={**self.parameters, **values})
        return Recipe.parse(changed.print(), folder=self.folder)

    @property
    def seeds(self) -> dict[str, list[int]]:
        """The seeds of each expert's masks, in the order they are written."""
        return {
            name: [node.seed for node in expert.vectors_inside() if isinstance(node, Dare)]
            for name, expert in self.experts.items()
        }

    def check_names(self, inputs: Iterable[str]) -> None:
        """Refuse names that are no inputs.

        Raises:
            RecipeError: Gives the nearest one.
        """
        for name in inputs:
            if name not in self.inputs:
                raise RecipeError(
                    f"The recipe has no input `{name}`.", fix=fix_unknown_name(name, self.inputs)
                )

    def origin(self, name: str, replacement: InputValue | None = None) -> Origin:
        """Find the weights of one input, or of what replaces it.

        Raises:
            CheckpointError: A `prefix:name` cannot be resolved.
        """
        if isinstance(replacement, Mapping):
            return MemoryTensors(replacement)
        if replacement is not None:
            return resolve(str(replacement), None)
        return resolve(self.inputs[name].path, self.folder)

    def relocated(self, folder: Path) -> Recipe:
        """Rewrite relative paths for a recipe file in another folder."""
        inputs = {
            name: entry
            if split_name(entry.path) or path_of(entry.path).is_absolute()
            else replace(entry, path=relative_path(resolve(entry.path, self.folder), folder))
            for name, entry in self.inputs.items()
        }
        return replace(self, inputs=inputs, folder=behind_links(folder))


_WIDE = 10**9


def _dump(section: Mapping[str, Any]) -> str:
    return yaml.safe_dump(
        dict(section), default_flow_style=False, sort_keys=False, allow_unicode=True, width=_WIDE
    )


def _load_yaml(text: str) -> dict[Any, Any]:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(
            f"The recipe is longer than {MAX_BYTES // 1024} KiB.", fix="Write a shorter recipe."
        )
    try:
        sections = parse_yaml(text, source="The recipe")
    except ConfigError as error:
        raise RecipeError(error.message, fix=error.fix) from error
    if not isinstance(sections, dict):
        raise RecipeError(
            f"The recipe is a {type(sections).__name__}, not a mapping.",
            fix="Write the sections `inputs:`, `experts:` and `schedule:`.",
        )
    return sections


def _mapping(sections: Mapping[Any, Any], key: str) -> dict[Any, Any]:
    value = sections.get(key)
    if not isinstance(value, dict) or not value:
        raise RecipeError(
            f"The recipe has no `{key}:`, or it is not a mapping.",
            fix=f"Write `name: ...` lines under `{key}:`.",
        )
    return value


def _parse_parameters(sections: Mapping[Any, Any]) -> dict[str, float]:
    if "parameters" not in sections:
        return {}
    found = {}
    for name, value in _mapping(sections, "parameters").items():
        _check_name(name, "parameters")
        if not is_number(value) or not math.isfinite(value) or abs(value) >= 1 << 63:
            raise RecipeError(
                f"parameters.{name} is {value!r}, not a number.", fix=f"Write e.g. `{name}: 0.25`."
            )
        found[name] = value
    return found


def _with_values(schedule: Any, parameters: Mapping[str, float]) -> Any:
    """Put parameters in place of their names in a schedule as it was read."""
    if not parameters or not isinstance(schedule, list):
        return schedule
    return [
        {
            key: named(parameters[value], value)
            if key != "expert" and isinstance(value, str) and value in parameters
            else value
            for key, value in entry.items()
        }
        if isinstance(entry, dict)
        else entry
        for entry in schedule
    ]


def _check_use(
    parameters: Mapping[str, float], experts: Mapping[str, Checkpoint], schedule: Any
) -> None:
    """Refuse a parameter that changes nothing, as a mistyped one does."""
    text = " ".join([*map(str, experts.values()), *map(_named_values, schedule or ())])
    used = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text))
    for name in parameters:
        if name not in used:
            raise RecipeError(
                f"The parameter `{name}` is used nowhere.",
                fix="Use it in an expression or in the schedule, or remove it.",
            )


def _named_values(entry: Any) -> str:
    values = entry.values() if isinstance(entry, dict) else ()
    return " ".join(number_text(one) for one in values if isinstance(one, (NamedFloat, NamedInt)))


def _as_written(schedule: ExpertSchedule) -> list[dict[str, Any]]:
    """Return a schedule's entries with the names of their numbers."""
    return [
        {
            key: value.text if isinstance(value, (NamedFloat, NamedInt)) else value
            for key, value in entry.items()
        }
        for entry in schedule.to_list()
    ]


def _check_name(name: Any, section: str) -> bool:
    fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name)
    if not fits or keyword.iskeyword(name) or (section != "experts" and name in FUNCTIONS):
        raise RecipeError(
            f"`{str(name)[:80]}` is not a name for one of the {section}.",
            fix="Use letters, digits and underscores, and no function's name.",
        )
    return True


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(
            f"{where} is a {type(value).__name__}, not text.", fix="Write text; quote it if needed."
        )
    return value


def _parse_input(name: str, value: Any) -> RecipeInput:
    where = f"inputs.{name}"
    if not isinstance(value, dict):
        return RecipeInput(_text(value, where))
    for key in value:
        if key not in _INPUT_FIELDS:
            raise RecipeError(
                f"{where} has an unknown field `{key}`.",
                fix=fix_unknown_name(str(key), _INPUT_FIELDS),
            )
    digest = value.get("sha256")
    if digest is not None:
        digest = _text(digest, f"{where}.sha256").removeprefix("sha256:").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise RecipeError(
                f"{where}.sha256 is not 64 hexadecimal digits.",
                fix="Copy it from `sha256sum FILE`, in quotes.",
            )
    return RecipeInput(_text(value.get("path"), f"{where}.path"), digest)


def relative_path(path: Path, folder: Path | None) -> str:
    """Return a path as seen from a folder; from the working directory for None."""
    try:
        return Path(os.path.relpath(path, behind_links(folder or Path.cwd()))).as_posix()
    except ValueError:  # another drive
        return path.as_posix()
