"""`--set` and `--motion`: other values of a recipe's parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.merging.recipes.recipe import Recipe

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=NUMBER", help="Another value of a recipe's parameter; repeatable."
    ),
]
MotionOption = Annotated[
    float | None,
    typer.Option(
        help="The same as --set motion=NUMBER: how far to extrapolate away from the fine-tuned "
        "weights. 0 is the base's motion, -1 that of the fine-tuned weights.",
        show_default="the recipe's own",
    ),
]


def load_recipe(recipe: str, changed: Sequence[str] | None, motion: float | None) -> Recipe:
    """Load a recipe with the parameters that --set and --motion give.

    Raises:
        RecipeError: There is no such recipe or parameter.
        ConfigError: As `parse_parameters`.
    """
    from motionmerge.merging.recipes.recipe import Recipe

    return Recipe.load(recipe).with_parameters(**parse_parameters(changed, motion))


def parse_parameters(changed: Sequence[str] | None, motion: float | None) -> dict[str, float]:
    """Read the `NAME=NUMBER` of --set, and --motion.

    Raises:
        ConfigError: One is no NAME=NUMBER, or a parameter is given twice.
    """
    parameters: dict[str, float] = {} if motion is None else {"motion": motion}
    for pair in changed or ():
        name, _, text = pair.partition("=")
        try:
            value = float(text)
        except ValueError as error:
            raise ConfigError(
                f"--set {pair} is not NAME=NUMBER.", fix="Write e.g. `--set motion=0.5`."
            ) from error
        if name in parameters:
            raise ConfigError(f"The parameter `{name}` is given twice.", fix="Give it once.")
        parameters[name] = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else value
    return parameters
