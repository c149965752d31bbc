"""Files for ComfyUI: a recipe's experts as LoRAs, the recipe, and what to type, in one archive."""

from __future__ import annotations

import shutil
from pathlib import Path

from motionmerge.exports.loras import export_loras
from motionmerge.exports.targets import own_model
from motionmerge.merging.compute.streaming import ReportProgress
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.studio.works import EXPORT_FILE, RECIPE_FILE

RANK = 64  # of every layer, as `motionmerge export loras` has it


def write_archive(
    recipe: Recipe, model: Path, folder: Path, *, scratch: Path, progress: ReportProgress
) -> str:
    """Write `EXPORT_FILE` into a folder, and return what is in it and what to type in ComfyUI.

    Args:
        recipe: Its experts become LoRAs.
        model: The pipeline's folder that they are for.
        folder: Where the archive goes.
        scratch: A folder for the files before they are packed.
        progress: See `export_loras`.

    Raises:
        MotionMergeError: ComfyUI takes no such files.
    """
    written = export_loras(
        recipe,
        scratch,
        rank=RANK,
        target="comfyui",
        inputs=own_model(recipe, model, None),
        progress=progress,
    )
    usage = "\n".join([*map(str, written.values()), *written.usage]).replace(f"{scratch}/", "")
    (scratch / RECIPE_FILE).write_text(recipe.print(), encoding="utf-8")
    (scratch / "how-to-load.txt").write_text(usage + "\n", encoding="utf-8")
    shutil.make_archive(str(folder / Path(EXPORT_FILE).stem), "zip", scratch)
    return usage
