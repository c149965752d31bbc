"""Experts of a motionmerge recipe, computed by motionmerge whenever ComfyUI patches a weight.

So masks, groups and LoRAs are those of the command line: there is no second way to compute them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import folder_paths
import torch
from comfy.weight_adapter import WeightAdapterBase

from .errors import NodeError
from .experts import Expert, Patch
from .task_vectors import NETWORK, shapes_of

THE_MODEL = "model"
"""What stands for the MODEL in the lines that say what a recipe's inputs are."""

FOLDERS = ("loras", "diffusion_models")
"""Where the inputs of a recipe are looked for. A recipe opens no other file."""


def experts_of_recipe(model: Any, recipe: str, values: str) -> list[Expert]:
    """Return the experts of a recipe on a MODEL.

    Args:
        model: The MODEL, which is the recipe's input `memory:base`.
        recipe: The name of a recipe that ships with motionmerge, or the text of one.
        values: A line `name: value` for each parameter, and for each input a file or `model`.

    Raises:
        NodeError: motionmerge is absent, or a line or an input fits nothing.
        MotionMergeError: The recipe is wrong, or its inputs do not fit the model.
    """
    try:
        from motionmerge.merging.recipes.bound import BoundRecipe
        from motionmerge.merging.recipes.files import shipped_recipes
        from motionmerge.merging.recipes.recipe import OWN_MODEL, Recipe
        from motionmerge.text import fix_unknown_name
    except ImportError as error:
        raise NodeError(
            f"Recipes are read by motionmerge, which cannot be imported here ({error}).",
            fix="Run `python -m pip install --no-deps motionmerge` with ComfyUI's own Python; it "
            "needs numpy, pyyaml and pydantic, which ComfyUI has.",
        ) from error
    text = recipe.strip()
    if ":" not in text and text not in shipped_recipes():
        raise NodeError(
            f"`{text[:100]}` is neither a recipe's text nor the name of a shipped recipe.",
            fix=fix_unknown_name(text[:100], shipped_recipes()),
        )
    read = Recipe.load(text) if text in shipped_recipes() else Recipe.parse(recipe)
    given = _values(values)
    known = {*read.parameters, *read.inputs}
    for name in given.keys() - known:
        raise NodeError(
            f"The recipe has no parameter and no input `{name}`.",
            fix=f"Use one of: {', '.join(sorted(known))}.",
        )
    read = read.with_parameters(
        **{name: _number(name, given[name]) for name in read.parameters if name in given}
    )
    if read.schedule is None:
        raise NodeError("The recipe has no schedule.", fix="Add `schedule:` to it.")
    inputs, own = {}, set()
    for name, entry in read.inputs.items():
        written = THE_MODEL if entry.path == OWN_MODEL else entry.path
        file = given.get(name, written)
        if file == THE_MODEL:
            own.add(name)
            inputs[name] = replace(entry, path=OWN_MODEL, sha256=None)
        else:  # the recipe's checksum is of its own file, not of another one
            checksum = None if name in given else entry.sha256
            inputs[name] = replace(entry, path=_found(name, file), sha256=checksum)
    bound = BoundRecipe.of(replace(read, inputs=inputs))
    computed = ComputedWeights(bound, own, shapes_of(model))
    return [_expert(entry, model, computed) for entry in read.schedule.entries]


def _expert(entry: Any, model: Any, computed: ComputedWeights) -> Expert:
    """Return what an entry of a recipe's schedule means.

    Raises:
        NodeError: It sets more than an expert and the guidance.
    """
    knobs = dict(getattr(entry, "knobs", {}))  # absent in the first versions of motionmerge
    guidance = knobs.pop("guidance", None)
    if knobs:
        raise NodeError(
            f"The schedule entry of `{entry.expert}` also sets {', '.join(knobs)}, which this node "
            "does not do.",
            fix="Take it out of the recipe, or make the video with motionmerge.",
        )
    return Expert(
        name=entry.expert,
        conditions=() if entry.condition is None else (entry.condition,),
        model=model,
        patches=(Patch(computed.patches(entry.expert), 1.0),),
        guidance=None if guidance is None else float(guidance),
    )


class ComputedWeights:
    """The weights of a recipe's experts, computed one by one.

    Args:
        bound: The recipe with its files.
        own: The inputs that are the MODEL.
        shapes: The shapes of the MODEL's weights, by ComfyUI's names.

    Raises:
        MotionMergeError: An input does not fit the model.
    """

    def __init__(self, bound: Any, own: set[str], shapes: dict[str, tuple[int, ...]]) -> None:
        from motionmerge.merging.inputs.sources import MemoryTensors

        class Live(MemoryTensors):
            """The MODEL's weights, of which one at a time is there."""

            def check_values(self) -> None:
                """Check nothing: there is nothing yet."""

            def put(self, name: str, tensor: torch.Tensor) -> None:
                """Set the weight that is there."""
                self._tensors[name] = tensor

        like = {name.removeprefix(NETWORK): shape for name, shape in shapes.items()}
        self._empty = {name: torch.zeros(()).expand(shape) for name, shape in like.items()}
        self._live = Live(self._empty)
        bound.origins.update(dict.fromkeys(own, self._live))
        bound.check_pins()
        self._experts = bound.experts
        self._inputs = bound.open(like=like).__enter__()  # its files are open as long as this is
        bound.fit(self._inputs, like=like)

    def patches(self, expert: str) -> dict[str, Any]:
        """Return what ComfyUI's `add_patches` takes, for each weight that an expert changes."""
        from motionmerge.merging.algebra.steps import Lowering

        checkpoint = self._experts[expert]
        is_own = checkpoint.anchor.origin is self._live
        changed = {}
        for name, empty in self._empty.items():
            lowered = checkpoint.lower(Lowering(name, empty.ndim, self._inputs))
            if lowered is not None or not is_own:
                changed[NETWORK + name] = RecipeWeight({name}, (self, expert))
        return changed

    def compute(self, expert: str, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute a weight of an expert in fp32, from that of the MODEL.

        Args:
            expert: The expert.
            name: The weight's name in the model's original code.
            weight: The MODEL's own, with what other nodes did to it before.
        """
        from motionmerge.merging.algebra.results import whole_value

        checkpoint = self._experts[expert]
        self._live.put(name, weight.detach().to("cpu", torch.float32))
        self._inputs.forget()
        value = whole_value(checkpoint, name, self._inputs)
        if value is None:
            value = self._inputs.value(checkpoint.anchor, name)
        self._live.put(name, self._empty[name])
        return value.to(weight.device, weight.dtype)


class RecipeWeight(WeightAdapterBase):
    """One weight of an expert of a recipe, as a patch of ComfyUI.

    Args:
        loaded_keys: The weight's name in the model's original code.
        weights: What computes it, and the expert. ComfyUI makes copies from these two alone.
    """

    name = "motionmerge recipe"

    def __init__(self, loaded_keys: set[str], weights: tuple[ComputedWeights, str]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self, weight: torch.Tensor, key: str, *settings: Any, **more: Any
    ) -> torch.Tensor:
        """Return the weight that replaces the one that is there: ComfyUI calls this."""
        computed, expert = self.weights
        return computed.compute(expert, key.removeprefix(NETWORK), weight)


def _values(text: str) -> dict[str, str]:
    """Return the lines `name: value` of a text, by name."""
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, value = line.partition(":")
        if not colon or not value.strip():
            raise NodeError(f"`{line}` is no value.", fix="Write e.g. `motion: 0.5`, one a line.")
        if name.strip() in found:
            raise NodeError(f"`{name.strip()}` has two values.", fix="Leave one of the lines.")
        found[name.strip()] = value.strip()
    return found


def _number(name: str, text: str) -> float:
    """Return the number of a parameter."""
    try:
        return float(text)
    except ValueError as error:
        raise NodeError(f"`{name}` is `{text}`, no number.", fix=f"Write `{name}: 0.5`.") from error


def _found(name: str, file: str) -> str:
    """Return the path of the file of an input."""
    for folder in FOLDERS:
        if file in folder_paths.get_filename_list(folder):
            return str(folder_paths.get_full_path_or_raise(folder, file))
    raise NodeError(
        f"`{file}`, the recipe's input `{name}`, is in none of ComfyUI's folders "
        f"{' and '.join(FOLDERS)}.",
        fix=f"Put it there, and write `{name}: FILE`, or `{name}: {THE_MODEL}` for the MODEL.",
    )
