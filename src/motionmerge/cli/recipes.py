"""`motionmerge recipes`: the recipes that ship with the package."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.options import JsonOption, recipe_names
from motionmerge.cli.printing import print_json

EXAMPLE = "Example: motionmerge recipes edg-official"

if TYPE_CHECKING:
    from motionmerge.merging.recipes.recipe import Recipe


def recipes(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="Print this recipe, to be changed and given back as a file.",
            autocompletion=recipe_names,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or print one: what each is for, its inputs and its parameters.

    `motionmerge show RECIPE` prints formulas, schedule and sizes of one.
    """
    from motionmerge.merging.recipes.files import shipped_recipes
    from motionmerge.merging.recipes.recipe import Recipe

    if recipe is not None:
        one = Recipe.load(recipe)
        print(json.dumps(_described(one), indent=2) if as_json else one.print().rstrip("\n"))
        return
    found = {name: _described(Recipe.load(path)) for name, path in shipped_recipes().items()}
    if as_json:
        print_json(found)
        return
    for name, shipped in found.items():
        print(name)
        print(f"    {shipped['summary']}")
        print("    inputs: " + ", ".join(map(_input, shipped["inputs"].items())))
        if shipped["parameters"]:
            pairs = shipped["parameters"].items()
            print("    parameters: " + ", ".join(f"{one} = {value:g}" for one, value in pairs))
        print()
    print(
        "`motionmerge show NAME` explains one, `motionmerge recipes NAME` prints it as a file to "
        "change; --input NAME=PATH gives an input of yours."
    )


def _described(recipe: Recipe) -> dict[str, Any]:
    return {
        "summary": _first_sentence(recipe.description or ""),
        "inputs": {name: entry.path for name, entry in recipe.inputs.items()},
        "parameters": dict(recipe.parameters),
        "experts": list(recipe.experts),
    }


def _first_sentence(text: str) -> str:
    """Return a text up to the first full stop that a capital letter or the end follows."""
    line = " ".join(text.split())
    return re.split(r"(?<=\.) (?=[A-Z`])", line, maxsplit=1)[0]


def _input(item: tuple[str, str]) -> str:
    """Return an input's name and where its weights come from."""
    from motionmerge.merging.recipes.recipe import OWN_MODEL

    name, path = item
    if path == OWN_MODEL:
        return f"{name} (the model that makes the video)"
    return f"{name} (yours)" if path.startswith("memory:") else f"{name} = {path}"
