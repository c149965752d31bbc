"""`motionmerge show`: what is in a weights file, a recipe or a video of ours, and what made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.options import JsonOption, recipe_names
from motionmerge.cli.printing import harmless, harmless_lines, print_json
from motionmerge.cli.show_lora import check_base, described, print_note
from motionmerge.errors import CheckpointError, MotionMergeError, RecipeError
from motionmerge.text import nearest_name

if TYPE_CHECKING:
    from motionmerge.merging.recipes.recipe import Recipe

EXAMPLE = "Example: motionmerge show edg-official"

_VIDEOS = (".mp4", ".webp")
"""What `generate` writes: a video, or a picture that moves."""

_EDG = """@inproceedings{tian2025extrapolating,
  title     = {Extrapolating and Decoupling Image-to-Video Generation Models:
               Motion Modeling is Easier Than You Think},
  author    = {Tian, Jie and others},
  booktitle = {CVPR},
  year      = {2025},
  eprint    = {2503.00948}
}"""


def show(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECT",
            help="Weights or a LoRA (also pocket:base), a recipe file, a shipped recipe's name, or "
            "a video that motionmerge wrote.",
            autocompletion=recipe_names,
        ),
    ],
    groups: Annotated[bool, typer.Option("--groups", help="Count parameters by group.")] = False,
    cite: Annotated[bool, typer.Option("--cite", help="Print BibTeX of what it uses.")] = False,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="For a LoRA: the weights that it is for, to see what it does to them.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a recipe's formulas, schedule and sizes, or a file's contents and its recipe.

    Of a LoRA also ranks, the scale in force and where it stands, and what of --base it reaches. Of
    a video also its prompt, seed and other settings.
    """
    from motionmerge.merging.inputs.sources import names_in
    from motionmerge.merging.lora.detection import is_lora
    from motionmerge.merging.recipes.files import shipped_recipes
    from motionmerge.merging.recipes.recipe import Recipe

    is_recipe = subject in shipped_recipes() or Path(subject).suffix in (".yaml", ".yml")
    if is_recipe and not Path(subject).is_dir():
        recipe: Recipe | None = Recipe.load(subject)
        check_base(base)
        found = _describe_recipe(recipe, groups=groups) if recipe else {}
    elif Path(subject).suffix.lower() in _VIDEOS and Path(subject).is_file():
        check_base(base)
        found, recipe = _describe_video(Path(subject))
    else:
        path = _path(subject)
        found, recipe = _describe_weights(path, groups=groups)
        if is_lora(names_in(path)):
            found["lora"] = described(path, base=base)
        else:
            check_base(base)
    if cite and recipe is not None:
        found["cite"] = _citations(recipe)
    if as_json:
        print_json(found)
        return
    note = found.pop("lora", None)
    print(_as_text(found))
    if note is not None:
        print()
        print_note(note)


def _citations(recipe: Recipe) -> list[str]:
    """Return the paper, and the sources of the functions that the recipe calls."""
    from motionmerge.merging.recipes.functions import FUNCTIONS

    nodes = [node for expert in recipe.experts.values() for node in expert.vectors_inside()]
    called = {node.function for node in nodes}
    sources = [function.citation for name, function in FUNCTIONS.items() if name in called]
    return [_EDG, *filter(None, dict.fromkeys(sources))]


def _describe_recipe(recipe: Recipe, *, groups: bool) -> dict[str, Any]:
    from motionmerge.merging.recipes.recipe import OWN_MODEL

    found: dict[str, Any] = {
        "description": recipe.description,
        "inputs": {},
        "experts": {name: str(expert) for name, expert in recipe.experts.items()},
        "schedule": recipe.schedule.draw() if recipe.schedule else None,
        "recipe": recipe.print(),
    }
    for name, entry in recipe.inputs.items():
        found["inputs"][name] = {"path": entry.path}
        try:
            if entry.path.startswith("hub:"):
                found["inputs"][name] |= {"missing": "not looked up: showing downloads nothing"}
                continue
            if entry.path.startswith("memory:"):
                own = " (generate takes its own model)" if entry.path == OWN_MODEL else ""
                found["inputs"][name] |= {"missing": f"until you give it: --input {name}=FILE{own}"}
                continue
            path = recipe.origin(name)
            if isinstance(path, Path):
                found["inputs"][name] |= _sizes(path, groups=groups)
        except CheckpointError as error:
            found["inputs"][name]["missing"] = error.message
    if not any("missing" in entry for entry in found["inputs"].values()):
        found["merging_takes"] = _preview(recipe)
    return found


def _preview(recipe: Recipe) -> dict[str, Any]:
    """Return how much disk the results take, or why the inputs do not fit together."""
    from motionmerge.merging.merge import preview

    try:
        return {"disk_bytes": preview(recipe)}
    except MotionMergeError as error:
        return {"impossible": error.message}


def _describe_weights(path: Path, *, groups: bool) -> tuple[dict[str, Any], Recipe | None]:
    from motionmerge.io.weights import open_weights
    from motionmerge.merging.inputs.sources import module_folders
    from motionmerge.merging.recipes.recipe import METADATA_KEY, Recipe

    found: dict[str, Any] = {"path": str(path), **_sizes(path, groups=groups)}
    if module_folders(path):
        return found, None
    with open_weights(path) as reader:
        metadata = reader.metadata
    if METADATA_KEY not in metadata:
        return found | _model_card(metadata), None
    recipe = Recipe.made(path)
    expert = metadata.get("motionmerge.expert", "")
    written_out = recipe.written_out().experts
    found |= {
        "made_by": f"motionmerge {metadata.get('motionmerge.version', '?')}",
        "expert": expert,
        "formula": str(written_out[expert]) if expert in written_out else None,
        "schedule": recipe.schedule.draw() if recipe.schedule else None,
        "recipe": metadata[METADATA_KEY],
    }
    return found, recipe


def _describe_video(path: Path) -> tuple[dict[str, Any], Recipe | None]:
    """Return what a video's comment says of how it was made, and its recipe.

    Raises:
        DataError: It is no video, or none that motionmerge wrote.
    """
    from motionmerge.io.video import read_video_metadata
    from motionmerge.merging.recipes.recipe import Recipe

    about = read_video_metadata(path)
    text = about.pop("recipe", None)
    version = about.pop("motionmerge", "?")
    found = {
        "path": str(path),
        "made_by": f"motionmerge {version}",
        "settings": _bounded({name: value for name, value in about.items() if value is not None}),
    }
    if not isinstance(text, str):
        return found, None
    recipe = Recipe.parse(text)
    schedule = recipe.schedule.draw() if recipe.schedule else None
    return found | {"schedule": schedule, "recipe": text}, recipe


def _bounded(value: Any, *, levels: int = 4) -> Any:
    """Return what JSON held without what is nested deeper: a stranger may have written it."""
    if not isinstance(value, dict | list):
        return value
    if not levels:
        return "..."
    if isinstance(value, list):
        return [_bounded(one, levels=levels - 1) for one in value]
    return {name: _bounded(one, levels=levels - 1) for name, one in value.items()}


def _path(subject: str) -> Path:
    """Find the weights that are to be shown.

    Raises:
        RecipeError: There are none, and it looks like the mistyped name of a shipped recipe.
    """
    from motionmerge.io.paths import exists
    from motionmerge.merging.inputs.resolvers import resolve, split_name

    if split_name(subject):
        return resolve(subject)
    near = None if exists(Path(subject)) else nearest_name(subject, recipe_names())
    if near is not None:
        raise RecipeError(
            f"There is neither a file nor a recipe `{subject}`.",
            fix=f"Write `{near}` instead of `{subject}`.",
        )
    return Path(subject)


def _model_card(metadata: Mapping[str, str]) -> dict[str, Any]:
    """List what training wrote into the header: run, settings, data, loss, time and machine."""
    try:
        card = json.loads(metadata.get("model_card", ""))
    except (ValueError, RecursionError):
        return {}
    return {"model_card": card} if isinstance(card, dict) else {}


def _sizes(path: Path, *, groups: bool) -> dict[str, Any]:
    import math

    from motionmerge.io.quantised import beside_weights, describe_quantisation
    from motionmerge.merging.algebra.groups import count_parameters
    from motionmerge.merging.inputs.sources import open_as_stored
    from motionmerge.tensors import dtype_name, num_bytes

    with open_as_stored(path) as parts:
        stored = {
            prefix + name: (reader.dtype(name), reader.shape(name))
            for prefix, reader in parts.items()
            for name in reader.keys()  # noqa: SIM118  (not a mapping)
        }
        described = {p: describe_quantisation(r, r.metadata) for p, r in parts.items()}
        scales = {p + name for p, r in parts.items() for name in beside_weights(r, r.metadata)}
    weights = {name: spec for name, spec in stored.items() if name not in scales}
    counts = {name: math.prod(shape) for name, (_, shape) in weights.items()}
    quantised = [prefix + words for prefix, words in described.items() if words]
    found: dict[str, Any] = {
        "tensors": len(counts),
        **({"with_scales": len(stored)} if scales else {}),
        "parameters": sum(counts.values()),
        "bytes": sum(num_bytes(*spec) for spec in stored.values()),
        "dtypes": sorted({dtype_name(dtype) for dtype, _ in weights.values()}),
    }
    if quantised:
        found["quantised"] = quantised
    return found | ({"groups": count_parameters(counts)} if groups else {})


def _as_text(found: dict[str, Any]) -> str:
    """Format a description as `name: value` lines, the recipe and citations last."""
    lines = []
    for key, value in found.items():
        if key in ("recipe", "cite") or value is None:
            continue
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {name}: {_line(inner)}" for name, inner in value.items()]
        else:
            lines.append(f"{key}: {_line(value)}")
    if "made_by" in found and "recipe" in found:
        lines += ["", "The recipe that made it:", "", found["recipe"].rstrip()]
    for entry in found.get("cite", []):
        lines += ["", entry]
    return harmless_lines("\n".join(lines))


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_line(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(harmless(str(one)) for one in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return harmless(str(value))
