"""A recipe whose inputs are found: hashed, pinned and fitted together once, then handed down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from motionmerge.errors import CheckpointError, RecipeError
from motionmerge.merging.algebra.nodes import Checkpoint, result_specs
from motionmerge.merging.algebra.results import ResultSpec
from motionmerge.merging.inputs.coverage import Coverage, Missing, check_coverage
from motionmerge.merging.inputs.pieces import Shapes
from motionmerge.merging.inputs.resolvers import split_name
from motionmerge.merging.inputs.sources import MemoryTensors, OpenInputs, Origin, hash_origin
from motionmerge.merging.recipes.recipe import (
    OWN_MODEL,
    InputValue,
    Recipe,
    as_recipe,
    relative_path,
)
from motionmerge.merging.recipes.sections import RecipeInput
from motionmerge.text import fix_unknown_name


@dataclass(frozen=True)
class Fit:
    """What the headers of a recipe's inputs say when they are laid side by side.

    Attributes:
        coverage: Which tensors the inputs share.
        specs: For each expert, dtype and shape of its tensors.
    """

    coverage: Coverage
    specs: Mapping[str, Mapping[str, ResultSpec]]


class BoundRecipe:
    """A recipe with the weights of its inputs. Make one, and hand it to all who need the experts.

    Each input is looked for, hashed and checked against its pin once, and the inputs are compared
    once, whoever asks. So the files must not change while it is in use.

    Args:
        recipe: What the experts are.
        origins: The weights of each input. The model in a pipeline may be left out until
            `with_inputs` gives it.
        replaced: What stands in place of the recipe's own inputs; their pins do not count.

    Attributes:
        recipe: What the experts are.
        origins: The weights of each input.
    """

    def __init__(
        self,
        recipe: Recipe,
        origins: Mapping[str, Origin],
        replaced: Mapping[str, InputValue] | None = None,
    ) -> None:
        self.recipe, self.origins = recipe, dict(origins)
        self._replaced = dict(replaced or {})
        self._digests: dict[Path, str] = {}
        self._pins_hold = False
        self._fits: dict[object, Fit] = {}

    @classmethod
    def of(
        cls,
        recipe: BoundRecipe | Recipe | str | Path,
        inputs: Mapping[str, InputValue] | None = None,
    ) -> BoundRecipe:
        """Find the weights of every input.

        Args:
            recipe: A recipe, its file, or the name of a shipped one. A bound one is returned as it
                is, or with other inputs.
            inputs: Paths or state dicts that replace the recipe's inputs, pinned hash included.

        Raises:
            RecipeError: There is no such recipe, or `inputs` has a name that it has not.
            CheckpointError: A `prefix:name` cannot be resolved.
        """
        if isinstance(recipe, BoundRecipe):
            return recipe.with_inputs(inputs) if inputs else recipe
        recipe = as_recipe(recipe)
        inputs = inputs or {}
        recipe.check_names(inputs)
        origins = {
            name: recipe.origin(name, inputs.get(name))
            for name, entry in recipe.inputs.items()
            if entry.path != OWN_MODEL or name in inputs
        }
        return cls(recipe, origins, inputs)

    def with_inputs(self, inputs: Mapping[str, InputValue]) -> BoundRecipe:
        """Return the recipe with other weights for some inputs; hashes that are known stay known.

        Raises:
            RecipeError: The recipe has no such input.
            CheckpointError: A `prefix:name` cannot be resolved.
        """
        self.recipe.check_names(inputs)
        found = {name: self.recipe.origin(name, value) for name, value in inputs.items()}
        bound = BoundRecipe(self.recipe, self.origins | found, self._replaced | dict(inputs))
        bound._digests = self._digests
        return bound

    @cached_property
    def experts(self) -> dict[str, Checkpoint]:
        """The recipe's expressions with their weights.

        Raises:
            CheckpointError: An input has no weights, or a LoRA does not fit.
        """
        lacking = next((name for name in self.recipe.inputs if name not in self.origins), None)
        if lacking is not None:
            self.recipe.origin(lacking)  # raises
        return {name: expert.bind(self.origins) for name, expert in self.recipe.experts.items()}

    @cached_property
    def formulas(self) -> dict[str, str]:
        """The experts' expressions with numbers in place of parameters, for reports."""
        return {name: str(one) for name, one in self.recipe.written_out().experts.items()}

    def chosen(self, names: Iterable[str] | None) -> dict[str, Checkpoint]:
        """Return some of the experts; all for None.

        Raises:
            RecipeError: There is no such expert.
        """
        names = list(self.experts) if names is None else list(names)
        for name in names:
            if name not in self.experts:
                raise RecipeError(
                    f"The recipe has no expert `{name}`.", fix=fix_unknown_name(name, self.experts)
                )
        return {name: self.experts[name] for name in names}

    @property
    def are_files(self) -> bool:
        """Whether all inputs are files, which can be read again at any time."""
        return all(isinstance(self.origins.get(name), Path) for name in self.recipe.inputs)

    def open(
        self,
        experts: Iterable[str] | None = None,
        *,
        allow_nonfinite: bool = False,
        like: Shapes | None = None,
    ) -> OpenInputs:
        """Open every source of some experts once; see `OpenInputs`."""
        sources = (source for one in self.chosen(experts).values() for source in one.sources())
        return OpenInputs(sources, allow_nonfinite=allow_nonfinite, like=like)

    def fit(
        self,
        opened: OpenInputs | None = None,
        *,
        experts: Sequence[str] | None = None,
        like: Shapes | None = None,
        missing: Missing = "error",
    ) -> Fit:
        """Align the inputs of some experts, once for each name space.

        Args:
            opened: What `open` returned for these experts and `like`, if it is open.
            experts: Which; all by default.
            like: As for `open`.
            missing: `error` or `keep`; see `check_coverage`.

        Raises:
            CheckpointError, ShapeError, RecipeError, ConfigError: As `check_coverage`.
        """
        names = tuple(self.recipe.experts if experts is None else experts)
        key = (names, missing, None if like is None else tuple(like.items()))
        if key not in self._fits:
            chosen = self.chosen(names)
            with self.open(names, like=like) if opened is None else nullcontext(opened) as held:
                coverage = check_coverage(list(chosen.values()), held, missing=missing)
                specs = {name: result_specs(one, held) for name, one in chosen.items()}
            self._fits[key] = Fit(coverage, specs)
        return self._fits[key]

    def check_pins(self) -> None:
        """Check the hashes that the recipe pins, and read no other file.

        Raises:
            CheckpointError: A file does not have its pinned hash.
        """
        if not self._pins_hold:
            self._compare_pins()
            self._pins_hold = True

    @cached_property
    def pinned(self) -> Recipe:
        """The recipe with the hash of every input, and what replaced its own inputs written down.

        Raises:
            CheckpointError: A file does not have its pinned hash.
        """
        self._hash(self.origins)  # before the pins, so that all files are hashed in parallel
        self.check_pins()
        filled = dict(self.recipe.inputs)
        for name, origin in self.origins.items():
            if isinstance(origin, MemoryTensors):
                filled[name] = RecipeInput(f"memory:{name}")
                continue
            path = self.recipe.inputs[name].path
            if name in self._replaced:
                given = str(self._replaced[name])
                path = given if split_name(given) else relative_path(origin, self.recipe.folder)
            filled[name] = RecipeInput(path, self._digests[origin])
        return replace(self.recipe, inputs=filled)

    def _pin_of(self, name: str) -> str | None:
        return None if name in self._replaced else self.recipe.inputs[name].sha256

    def _hash(self, names: Iterable[str]) -> None:
        """Hash inputs that are files, several at once, unless that was done."""
        origins = (self.origins[name] for name in names)
        files = dict.fromkeys(origin for origin in origins if isinstance(origin, Path))
        paths = [path for path in files if path not in self._digests]
        with ThreadPoolExecutor(max_workers=max(1, len(paths))) as pool:
            for path, digest in zip(paths, pool.map(hash_origin, paths), strict=True):
                self._digests[path] = digest.removeprefix("sha256:")

    def _compare_pins(self) -> None:
        pinned = {
            name: origin
            for name, origin in self.origins.items()
            if isinstance(origin, Path) and self._pin_of(name) is not None
        }
        self._hash(pinned)
        for name, origin in pinned.items():
            digest, pin = self._digests[origin], self._pin_of(name)
            if pin is not None and digest != pin:
                raise CheckpointError(
                    f"`{name}` ({origin}) has sha256 {digest[:16]}..., but the recipe pins "
                    f"{pin[:16]}...",
                    fix="Use the pinned file, or remove `sha256` from the recipe.",
                )


AnyRecipe = BoundRecipe | Recipe | str | Path
"""A recipe, its file, the name of a shipped one, or one whose inputs are found already."""
