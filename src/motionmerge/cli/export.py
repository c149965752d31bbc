"""`motionmerge export`: a recipe's experts for other tools, which then need nothing of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motionmerge.cli.merge import (
    DtypeOption,
    JsonOption,
    MissingOption,
    OutputOption,
    checked_missing,
    parse_inputs,
)
from motionmerge.cli.outputs import OverwriteOption, check_output_file, check_output_folder
from motionmerge.errors import CheckpointError

if TYPE_CHECKING:
    from motionmerge.merge.lora_layout import StoredLayer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", help="NAME=PATH, instead of the recipe's input; repeatable."),
]


class OfficialFormat(str, Enum):
    """Endings of an official DynamiCrafter file."""

    CKPT = "ckpt"
    SAFETENSORS = "safetensors"


class LoraKeys(str, Enum):
    """Styles of the keys of a LoRA."""

    DIFFUSERS = "diffusers"
    ORIGINAL = "original"


export_app = typer.Typer(
    help="Write a recipe's experts for other tools: a two-expert folder, LoRAs, original files.",
    no_args_is_help=True,
)


@export_app.command("two-experts")
def two_experts(
    recipe: RecipeArgument,
    pipeline: Annotated[Path, typer.Option(help="A diffusers folder of the Wan pipeline.")],
    output: OutputOption,
    replaced: InputOption = None,
    dtype: DtypeOption = None,
    missing: MissingOption = "error",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write one Wan 2.2 folder: `transformer`, `transformer_2` and a `boundary_ratio`."""
    from motionmerge.merge.export import export_two_experts

    check_output_folder(output.parent)
    written = export_two_experts(
        recipe,
        pipeline,
        output,
        inputs=parse_inputs(replaced or []),
        missing=checked_missing(missing),
        dtype=dtype,
        overwrite=overwrite,
    )
    if as_json:
        print(json.dumps(asdict(written), indent=2))
        return
    for module, expert in written.modules.items():
        print(f"{module:14} {expert}, {written.tensors[module]:,} tensors")
    print(f"boundary_ratio {written.boundary_ratio}")
    print(f"Wrote {output}. Load it with diffusers' `from_pretrained`.")


@export_app.command("loras")
def loras(
    recipe: RecipeArgument,
    output: OutputOption,
    rank: Annotated[int, typer.Option(help="Rank of every layer.")] = 64,
    base: Annotated[
        str | None, typer.Option(help="The recipe's input that the LoRAs are for.")
    ] = None,
    keys: Annotated[
        LoraKeys, typer.Option(help="Names of diffusers, or of the family's original code.")
    ] = LoraKeys.DIFFUSERS,
    replaced: InputOption = None,
    dtype: DtypeOption = None,
    missing: MissingOption = "error",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write one LoRA per expert, and how much of the change it holds."""
    from motionmerge.merge.lora_export import export_loras
    from motionmerge.merge.lora_layout import diffusers_layout

    check_output_folder(output)
    written = export_loras(
        recipe,
        output,
        rank=rank,
        base=base,
        layout=diffusers_layout if keys is LoraKeys.DIFFUSERS else _original_layout,
        inputs=parse_inputs(replaced or []),
        missing=checked_missing(missing),
        dtype=dtype or "fp32",
        overwrite=overwrite,
    )
    if as_json:
        print(json.dumps({name: found.to_dict() for name, found in written.items()}, indent=2))
        return
    for name, found in written.items():
        print(f"{name} = {found}")


@export_app.command("original")
def original(
    recipe: RecipeArgument,
    folder: Annotated[Path, typer.Option(help="DynamiCrafter as `motionmerge convert` wrote it.")],
    output: OutputOption,
    file_format: Annotated[
        OfficialFormat, typer.Option("--format", help="Kind of file.")
    ] = OfficialFormat.CKPT,
    replaced: InputOption = None,
    dtype: DtypeOption = None,
    missing: MissingOption = "error",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write each expert as one DynamiCrafter file in the official layout."""
    from motionmerge.io.atomic import prepare_folder, scratch_folder
    from motionmerge.merge.export import export_folder
    from motionmerge.merge.recipe import Recipe
    from motionmerge.models.dynamicrafter.checkpoint_folder import to_official

    loaded = Recipe.load(recipe)
    modules = [name for name in ("unet", "image_projector") if (folder / name).is_dir()]
    if not modules:
        raise CheckpointError(
            f"{folder} has no `unet`.", fix="Give the folder that `motionmerge convert` wrote."
        )
    paths = {expert: output / f"{expert}.{file_format.value}" for expert in loaded.experts}
    for path in paths.values():
        check_output_file(path, overwrite=overwrite)
    prepare_folder(output)
    counts = {}
    with scratch_folder(output) as scratch:
        for expert, path in paths.items():
            export_folder(
                loaded,
                folder,
                scratch / "folder",
                modules=dict.fromkeys(modules, expert),
                inputs=parse_inputs(replaced or []),
                missing=checked_missing(missing),
                dtype=dtype,
                overwrite=True,
            )
            counts[str(path)] = to_official(scratch / "folder", scratch / path.name)
        for path in paths.values():  # all experts, or none of them
            (scratch / path.name).replace(path)
    if as_json:
        print(json.dumps(counts, indent=2))
        return
    for written, count in counts.items():
        print(f"Wrote {count:,} tensors to {written}.")


def _original_layout(shapes: Mapping[str, tuple[int, ...]]) -> list[StoredLayer]:
    """Name a LoRA's layers as the original code does; DynamiCrafter's names are its key maps'."""
    from motionmerge.merge.lora_layout import StoredLayer, matrices, original_layout
    from motionmerge.models.dynamicrafter.conversion import COMPONENTS

    if not any("down_stages." in name for name in shapes):
        return original_layout(shapes)
    layers = []
    prefixed = any(name.startswith("unet.") for name in shapes)
    for component in COMPONENTS:
        if not prefixed and component.name != "unet":
            continue
        prefix = f"{component.name}." if prefixed else ""
        own = {
            name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }
        can_change = set(matrices(own))
        pairs, _ = component.our_map(own).pair_ours(own) if own else ([], [])
        layers += [
            StoredLayer(
                component.long_name(pair.official).removeprefix("model.").removesuffix(".weight"),
                tuple(f"{prefix}{name}" for name in pair.ours),
                pair.unit_dims,
            )
            for pair in pairs
            if can_change.issuperset(pair.ours)
        ]
    return layers
