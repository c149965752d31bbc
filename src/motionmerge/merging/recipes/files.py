"""Find and read recipe files: a user's own, or one that ships with the package."""

from __future__ import annotations

from pathlib import Path

from motionmerge.errors import RecipeError
from motionmerge.io.paths import exists, open_plain_file
from motionmerge.merging.inputs.resolvers import PACKAGE
from motionmerge.merging.recipes.sections import MAX_BYTES
from motionmerge.text import nearest_name


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that ship with the package, by name."""
    paths = (PACKAGE / "recipes").glob("*.yaml")
    return dict(sorted((path.stem, path) for path in paths))


def read_recipe(path: Path) -> tuple[str, Path]:
    """Read the text of a recipe file, or of one that ships with the package, by its name.

    Returns:
        The text, and the file that it is from.

    Raises:
        RecipeError: The file is missing, cannot be read or is no text.
    """
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
            return file.read(MAX_BYTES + 1).decode("utf-8"), path
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
