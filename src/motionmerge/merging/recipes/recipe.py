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

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from motionmerge.config import shown
from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.io.paths import behind_links, exists, folder_of, open_plain_file, path_of
from motionmerge.io.weights import open_weights
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.sparsify import Dare
from motionmerge.merging.inputs.resolvers import PACKAGE, resolve, split_name
from motionmerge.merging.inputs.sources import MemoryTensors, Origin
from motionmerge.merging.recipes.parser import parse_expression
from motionmerge.merging.recipes.sections import (
    MAX_BYTES,
    RecipeInput,
    Sections,
    check_use,
    placed,
    read_sections,
)
from motionmerge.named import NamedFloat, NamedInt
from motionmerge.schedule import (
    PAPER_BOUNDARY,
    ExpertSchedule,
    ScheduleEntry,
    is_finite_number,
    plain_number,
)
from motionmerge.text import at_line, fix_unknown_name, nearest_name, write_yaml
from motionmerge.version import __version__

METADATA_KEY = "motionmerge.recipe"
"""Where a merged file's header keeps the recipe that made it."""

OWN_MODEL = "memory:base"
"""The path of an input that stands for the model in a pipeline, to which LoRAs are added."""

InputValue: TypeAlias = "str | Path | Mapping[str, torch.Tensor]"


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that ship with the package, by name."""
    paths = (PACKAGE / "recipes").glob("*.yaml")
    return dict(sorted((path.stem, path) for path in paths))


@dataclass(frozen=True, kw_only=True)
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
        names = f"Give a .yaml file, or one of: {', '.join(shipped)}."
        if not exists(path):
            near = nearest_name(str(path), shipped)
            raise RecipeError(
                f"There is no recipe `{path}`: no such file, and no shipped recipe of that name.",
                fix=names if near is None else f"Write `{near}` instead of `{path}`.",
            )
        try:
            with open_plain_file(path) as file:
                text = file.read(MAX_BYTES + 1).decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{path} is no recipe: a recipe is text, which names weights as its inputs.",
                fix=f"{names} Two checkpoints are merged without a recipe by "
                "`motionmerge extrapolate BASE TUNED -o FOLDER`.",
            ) from error
        except OSError as error:
            raise RecipeError(
                f"Cannot read the recipe {path}: {error.strerror or error}.", fix=names
            ) from error
        return cls.parse(text, folder=folder_of(path), source=str(path))

    @classmethod
    def made(cls, path: str | Path) -> Recipe:
        """Return the recipe that made a merged file, from its header.

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
    def parse(cls, text: str, *, folder: Path | None = None, source: str | None = None) -> Recipe:
        """Parse the text of a recipe. Nothing in it is executed and no file is opened.

        A path in quotes in an expression, as in `lora("motion.safetensors", 1.0)`, becomes an input
        of its own, so that it is hashed, can be pinned, and moves with the recipe.

        Args:
            text: The recipe.
            folder: What relative paths are relative to; None for the working directory.
            source: The file that the text is from; errors then name the line.

        Raises:
            RecipeError: It is no YAML, has unknown or missing parts, or an expression is wrong.
        """
        try:
            return cls._of_sections(read_sections(text, source=source or "The recipe"), folder)
        except RecipeError as error:
            if source is None or not error.place:
                raise
            message = at_line(error.message, text, error.place, source=source)
            raise RecipeError(message, fix=error.fix, place=error.place) from error

    @classmethod
    def _of_sections(cls, sections: Sections, folder: Path | None) -> Recipe:
        parameters, inputs = sections.parameters, sections.inputs
        for name in parameters:
            if name in inputs:
                raise RecipeError(
                    f"`{name}` is both an input and a parameter.",
                    fix="Rename one of them.",
                    place=("parameters", name),
                )
        files: dict[str, str] = {}
        experts = {}
        for name, value in sections.experts.items():
            with placed("experts", name):
                experts[name] = parse_expression(
                    value, inputs, where=f"experts.{name}", files=files, parameters=parameters
                )
        entries, description = sections.schedule, sections.description
        check_use(parameters, experts, entries or ())
        unknown = (i for i, entry in enumerate(entries or ()) if entry.expert not in experts)
        with placed("schedule", *itertools.islice(unknown, 1)):
            return cls(
                inputs=inputs | {name: RecipeInput(path) for name, path in files.items()},
                experts=experts,
                schedule=None if entries is None else ExpertSchedule(tuple(entries)),
                description=None if description is None else description.strip(),
                parameters=parameters,
                folder=folder,
            )

    @classmethod
    def from_sections(cls, sections: Mapping[str, Any], *, folder: Path | None = None) -> Recipe:
        """Read the sections of a recipe that is written in Python, as `parse` reads its text.

        Raises:
            RecipeError: As `parse`.
        """
        return cls.parse(json.dumps(sections, ensure_ascii=False), folder=folder)  # JSON is YAML

    @classmethod
    def shipped_for(
        cls, name: str, inputs: Mapping[str, str | Path], **parameters: float
    ) -> Recipe:
        """Return a recipe that ships with the package for weights of the caller's.

        Args:
            name: The recipe's.
            inputs: The path of every input, or a name such as `memory:base`.
            parameters: Other values of the recipe's parameters.

        Raises:
            RecipeError: There is no such recipe or parameter, or an input is no path or name.
        """
        recipe = replace(
            cls.load(name),
            inputs={key: RecipeInput(_path_of_input(key, path)) for key, path in inputs.items()},
            description=None,
            folder=None,
        )
        return recipe.with_parameters(**parameters)

    @classmethod
    def knob(
        cls,
        *,
        motion: float | None = None,
        base: str | Path | None = None,
        tuned: str | Path | None = None,
        lora: str | Path | None = None,
    ) -> Recipe:
        """Return the motion knob: the shipped recipe `knob`, or `lora-rescue` for a LoRA.

            dynamics    = base - motion * (tuned - base)     while it is noisy
            consistency = tuned                              for the details

        With a LoRA, `tuned` is `base` with all of the LoRA. The model in the pipeline stands for
        `base`, or if that alone is given for `tuned`.

        Args:
            motion: 0 is the base's motion, -1 that of the fine-tuned weights; more moves more. The
                recipe's own default if None.
            base: The weights that were fine-tuned.
            tuned: The fine-tuned weights.
            lora: A LoRA, in place of `tuned`.

        Raises:
            ConfigError: `tuned` and `lora` are both given, or nothing at all is.
            RecipeError: `motion` is no finite number.
        """
        if (tuned is not None and lora is not None) or (tuned, lora, base) == (None, None, None):
            raise ConfigError(
                "The knob extrapolates away from fine-tuned weights or from a LoRA.",
                fix="Pass `tuned` or `lora`, or `base` if the pipeline has the fine-tuned weights.",
            )
        parameters = {} if motion is None else {"motion": motion}
        base = OWN_MODEL if base is None else base
        if lora is not None:
            return cls.shipped_for("lora-rescue", {"base": base, "style": lora}, **parameters)
        tuned = OWN_MODEL if tuned is None else tuned
        return cls.shipped_for("knob", {"base": base, "tuned": tuned}, **parameters)

    @classmethod
    def edg(cls, *, base: str | Path, tuned: str | Path, **parameters: float) -> Recipe:
        """Return the paper's method, the shipped recipe `edg-official`, for weights of yours.

            dynamics    = base  + beta * dare(-alpha * (tuned - base), drop_rate, seed=0)
            consistency = tuned + gamma * dare(tuned - base, drop_rate, seed=1)

        Args:
            base: The pretrained weights, or `memory:base` for the model in the pipeline.
            tuned: The fine-tuned weights.
            parameters: Of the recipe: `alpha`, `beta`, `gamma`, `drop_rate`.

        Raises:
            RecipeError: There is no such parameter, or its value is out of range.

        Source: Tian et al. 2025 (arXiv 2503.00948), stage 3.
        """
        return cls.shipped_for("edg-official", {"base": base, "tuned": tuned}, **parameters)

    @classmethod
    def of_loras(
        cls,
        weights: Mapping[str, float | Mapping[str, float]],
        files: Mapping[str, str | Path] | None = None,
        *,
        boundary: float = PAPER_BOUNDARY,
    ) -> Recipe:
        """Return LoRAs on the model in a pipeline, each with a weight for each expert.

            Recipe.of_loras({"dynamics": -0.25, "consistency": 1.0}, {"style": "style.safetensors"})

        Args:
            weights: For each expert, from noisy to clean, the weight of every LoRA by its name; a
                number is that of all.
            files: The LoRAs by name. One that is not there is `memory:NAME`, whose tensors are
                passed as `inputs`; without any there is one, `style`.
            boundary: Noise level at which the second of two experts takes over.

        Raises:
            RecipeError: There are no experts, or a name or a weight is not one.
        """
        files = files or {}
        by_name = [own for own in weights.values() if isinstance(own, Mapping)]
        names = list(dict.fromkeys([*files, *(name for own in by_name for name in own)]))
        names = names or ["style"]
        if "base" in names:
            raise RecipeError(
                "`base` is the model to which the LoRAs are added, and no name for one of them.",
                fix="Give the LoRA another name, such as `style`.",
            )
        inputs = {"base": OWN_MODEL}
        inputs |= {n: _path_of_input(n, files.get(n, f"memory:{n}")) for n in names}
        experts = {}
        for expert, own in weights.items():
            each = own if isinstance(own, Mapping) else dict.fromkeys(names, own)
            numbers = {n: _number(f"The weight of `{n}` in `{expert}`", w) for n, w in each.items()}
            terms = (f"lora({name}, {weight!r})" for name, weight in numbers.items())
            experts[expert] = " + ".join(["base", *terms])
        sections: dict[str, Any] = {"inputs": inputs, "experts": experts}
        if len(experts) == 2:
            sections["schedule"] = ExpertSchedule.two(*experts, boundary=boundary).to_list()
        return cls.from_sections(sections)

    def print(self) -> str:
        """Write the canonical text: `Recipe.parse(recipe.print()) == recipe`."""
        text = "" if self.description is None else write_yaml({"description": self.description})
        if self.parameters:
            text += write_yaml({"parameters": dict(self.parameters)})
        text += write_yaml({"inputs": self._inputs_as_written()})
        text += write_yaml(
            {"experts": {name: str(expert) for name, expert in self.experts.items()}}
        )
        if self.schedule is not None:
            lines = (write_yaml(entry, is_one_line=True) for entry in _as_written(self.schedule))
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
        numbers = {
            name: _number(f"The parameter `{name}`", value) for name, value in values.items()
        }
        changed = replace(self, parameters={**self.parameters, **numbers})
        return Recipe.parse(changed.print(), folder=self.folder)

    def written_out(self) -> Recipe:
        """Return the same recipe with numbers in place of its parameters."""
        if not self.parameters:
            return self
        experts = {
            name: _without_names(str(expert), self.parameters)
            for name, expert in self.experts.items()
        }
        sections: dict[str, Any] = {"inputs": self._inputs_as_written(), "experts": experts}
        if self.schedule is not None:
            sections["schedule"] = [
                {
                    key: _without_names(value, self.parameters)
                    if key in ("image", "attention") and isinstance(value, str)
                    else value
                    for key, value in entry.items()
                }
                for entry in self.schedule.to_list()
            ]
        plain = Recipe.from_sections(sections, folder=self.folder)
        return replace(plain, description=self.description)

    def _inputs_as_written(self) -> dict[str, str | dict[str, str]]:
        return {
            name: entry.path
            if entry.sha256 is None
            else {"path": entry.path, "sha256": entry.sha256}
            for name, entry in self.inputs.items()
        }

    def header(self, expert: str) -> dict[str, str]:
        """Return what the header of a file says of the expert in it."""
        return {
            "format": "pt",
            METADATA_KEY: self.print(),
            "motionmerge.expert": expert,
            "motionmerge.version": __version__,
        }

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


def _number(name: str, value: object) -> float:
    """Return a number as Python writes it, also one of numpy's.

    Raises:
        RecipeError: It is no finite number.
    """
    number = plain_number(value)
    if not is_finite_number(number):
        raise RecipeError(f"{name} is {shown(value)}, not a number.", fix="Give a finite number.")
    return number


def _path_of_input(name: str, path: object) -> str:
    """Return an input as a recipe writes it.

    Raises:
        RecipeError: It is no path and no name, but tensors perhaps.
    """
    if not isinstance(path, str | Path):
        raise RecipeError(
            f"The recipe's input `{name}` is a {type(path).__name__}, not a path or a name.",
            fix=f"Write 'memory:{name}' there, and pass `inputs={{'{name}': tensors}}` to "
            "`experts()`.",
        )
    return str(path)


def _without_names(expression: str, parameters: Mapping[str, float]) -> str:
    """Replace parameters' names by numbers, and two minus signs that then meet by a plus."""
    numbers = {name: repr(value) for name, value in parameters.items()}
    name = r"\b[A-Za-z_]\w*\b(?!\s*[=(])"  # of no setting, and of no function
    plain = _replaced(name, numbers, expression)
    return _replaced("- -", {"- -": "+ "}, plain)


def _replaced(pattern: str, texts: Mapping[str, str], expression: str) -> str:
    """Replace what a pattern finds outside quotes by what `texts` has for it."""
    return re.sub(
        rf'"(?:[^"\\]|\\.)*"|{pattern}', lambda found: texts.get(found[0], found[0]), expression
    )


def _as_written(schedule: ExpertSchedule) -> list[dict[str, Any]]:
    """Return a schedule's entries with the names of their numbers."""
    return [
        {
            key: value.text if isinstance(value, (NamedFloat, NamedInt)) else value
            for key, value in entry.items()
        }
        for entry in schedule.to_list()
    ]


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Load a recipe unless it is one."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def relative_path(path: Path, folder: Path | None) -> str:
    """Return a path as seen from a folder; from the working directory for None."""
    try:
        return Path(os.path.relpath(path, behind_links(folder or Path.cwd()))).as_posix()
    except ValueError:  # another drive
        return path.as_posix()
