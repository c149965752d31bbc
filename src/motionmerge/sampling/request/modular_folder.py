"""A modular pipeline of diffusers in a folder: its parts are read there and nowhere else.

Its index may name other repositories, and blocks that are code of its own. Neither is followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from motionmerge.errors import CheckpointError
from motionmerge.models.video_pipeline import Config
from motionmerge.sampling.families.limits import VideoFamily

MODULAR_INDEX_FILE = "modular_model_index.json"
_BLOCKS_FILE = "modular_config.json"


def index_as_of_a_pipeline(index: Config) -> dict[str, object]:
    """Rewrite a modular index as a pipeline has it: library and class of each part.

    The class that was saved counts, or what the index expects where none was loaded.
    """
    parts = {
        name: value
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 3 and isinstance(value[2], dict)
    }
    rewritten = {name: value for name, value in index.items() if name not in parts}
    for name, (library, class_name, spec) in parts.items():
        expected = spec.get("type_hint")
        if library is None and isinstance(expected, list) and len(expected) == 2:
            library, class_name = expected
        rewritten[name] = [library, class_name]
    return rewritten


def empty_pipeline(family: VideoFamily) -> Any:
    """Make a modular pipeline of its own blocks, without weights and without the hub."""
    assert family.modular is not None
    kind = getattr(diffusers, family.pipelines[0])
    return kind(workflow=family.modular.workflow)


def parts_of_folder(path: Path, index: Config, family: VideoFamily) -> dict[str, object]:
    """List the parts that a family's pipeline loads from a folder, as `[library, class]`.

    Raises:
        CheckpointError: The folder has blocks of its own, or lacks a part that is needed.
    """
    assert family.modular is not None
    own = getattr(diffusers, family.pipelines[0]).default_blocks_name
    blocks = index.get("_blocks_class_name")
    has_code = any(path.glob("*.py")) or (path / _BLOCKS_FILE).is_file()
    if has_code or blocks not in (own, None):
        what = "files with code" if has_code else f"`{blocks}` in place of `{own}`"
        raise CheckpointError(
            f"{path} has blocks of its own ({what}), which are not run.",
            fix=f"Use a {family.pipelines[0]} of the blocks that diffusers ships.",
        )
    pipeline = empty_pipeline(family)
    parts: dict[str, object] = {}
    for name in pipeline.pretrained_component_names:
        if (path / name).is_dir() and index.get(name, [None])[0] is not None:
            parts[name] = index[name]
        elif name not in family.modular.optional_parts:
            raise CheckpointError(
                f"{path} has no folder `{name}`, which {family.pipelines[0]} needs; what its index "
                "names elsewhere is not fetched.",
                fix=f"Download that part into the folder, as {path / name}.",
            )
    return parts


def not_fetched(name: str) -> CheckpointError:
    """Return the error for a modular pipeline on the hub."""
    return CheckpointError(
        f"{name} is a modular pipeline, whose parts may come from several repositories; they are "
        "not fetched from here.",
        fix=f"Download it with `hf download {name} --local-dir FOLDER`, and give that folder.",
    )
