"""`motionmerge export`: a recipe's experts for other tools, which then need nothing of ours."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from motionmerge.cli.flag_groups import with_flags
from motionmerge.cli.help import Verb, VerbGroup
from motionmerge.cli.merge import RecipeFlags, parse_parameters, progress_bar
from motionmerge.cli.options import (
    DtypeOption,
    JsonOption,
    MotionOption,
    OutputOption,
    RecipeArgument,
    ScaledDtypeOption,
    SetOption,
    expert_option,
    model_option,
    output_option,
)
from motionmerge.cli.printing import print_json
from motionmerge.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from motionmerge.exports.files import FileExport
    from motionmerge.exports.loras import LoraExport
    from motionmerge.exports.written import Exports

export_app = typer.Typer(
    help="Write a recipe's experts for other tools: LoRAs, single files, a two-expert folder.",
    epilog="Example: motionmerge export loras wan.yaml --for comfyui -o loras",
    cls=VerbGroup,
    no_args_is_help=True,
)


@export_app.command(
    "two-experts",
    cls=Verb,
    epilog="Example: motionmerge export two-experts wan.yaml --model wan22 -o merged",
)
@with_flags
def two_experts(
    recipe: RecipeArgument,
    model: Annotated[
        Path, model_option(metavar="FOLDER", help="A diffusers folder of the Wan pipeline.")
    ],
    output: OutputOption,
    dtype: DtypeOption = None,
    flags: RecipeFlags = RecipeFlags(),
) -> None:
    """Write one Wan 2.2 folder: `transformer`, `transformer_2` and a `boundary_ratio`."""
    from motionmerge.exports.two_experts import export_two_experts

    with progress_bar("export") as progress:
        written = export_two_experts(
            flags.recipe(recipe),
            model,
            output,
            dtype=dtype,
            progress=progress,
            **flags.options(),
        )
    if flags.as_json:
        print_json(asdict(written))
        return
    for module, expert in written.modules.items():
        share = written.survived.get(module)
        survives = "" if share is None else f", {share:.1%} of the change survives rounding"
        print(f"{module:14} {expert}, {written.tensors[module]:,} tensors{survives}")
    print(f"boundary_ratio {written.boundary_ratio}")
    print(
        "Dry run: nothing was written."
        if flags.dry_run
        else f"Wrote {output}. diffusers loads it: `from_pretrained`."
    )
    _print_kept(written.unmatched)


@export_app.command(
    "loras",
    cls=Verb,
    epilog="Example: motionmerge export loras wan.yaml --for comfyui -o loras",
)
@with_flags
def loras(
    recipe: RecipeArgument,
    output: OutputOption,
    rank: Annotated[int, output_option(metavar="NUMBER", help="Rank of every layer.")] = 64,
    base: Annotated[
        str | None, expert_option(metavar="NAME", help="The recipe's input that the LoRAs are for.")
    ] = None,
    tool: Annotated[
        Literal["comfyui", "diffusers", "wan2gp", "motionmerge"] | None,
        output_option(
            "--for",
            help="The tool that will load the LoRAs. It decides their names, whether each denoiser "
            "of a pair gets a file of its own, and the lines printed to type there.",
        ),
    ] = None,
    keys: Annotated[
        Literal["diffusers", "original"] | None,
        output_option(help="Instead of --for: names of diffusers, or of the original code."),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"], output_option(help="Number format of the LoRAs.")
    ] = "fp32",
    flags: RecipeFlags = RecipeFlags(),
) -> None:
    """Write LoRAs of the experts, how much of the change they hold, and what loads them."""
    from motionmerge.exports.dynamicrafter import lora_names
    from motionmerge.exports.loras import export_loras
    from motionmerge.exports.targets import ORIGINAL

    if tool is not None and keys is not None:
        raise ConfigError("--for and --keys both choose the names.", fix="Leave one of them out.")
    original = keys == "original"
    with progress_bar("export") as progress:
        written = export_loras(
            flags.recipe(recipe),
            output,
            rank=rank,
            base=base,
            target=ORIGINAL if original else tool,
            names=lora_names if original else None,
            dtype=dtype,
            progress=progress,
            **flags.options(),
        )
    _print_files(written, as_json=flags.as_json)


@export_app.command(
    "comfyui",
    cls=Verb,
    epilog="Example: motionmerge export comfyui wan.yaml -o diffusion_models",
)
@with_flags
def comfyui(
    recipe: RecipeArgument,
    output: OutputOption,
    dtype: ScaledDtypeOption = None,
    flags: RecipeFlags = RecipeFlags(),
) -> None:
    """Write each expert as one file with original names, and of a pair one for each denoiser."""
    from motionmerge.exports.files import export_comfyui

    with progress_bar("export") as progress:
        written = export_comfyui(
            flags.recipe(recipe),
            output,
            dtype=dtype,
            progress=progress,
            **flags.options(),
        )
    _print_files(written, as_json=flags.as_json)


@export_app.command(
    "wan2gp",
    cls=Verb,
    epilog="Example: motionmerge export wan2gp lora-rescue --motion 0.5",
)
def wan2gp(
    recipe: RecipeArgument,
    changed: SetOption = None,
    motion: MotionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what to type in Wan2GP for a recipe of LoRAs: multipliers, and where phases change."""
    from motionmerge.exports.wan2gp import wan2gp_settings
    from motionmerge.merging.recipes.recipe import Recipe

    loaded = Recipe.load(recipe).with_parameters(**parse_parameters(changed, motion))
    settings = wan2gp_settings(loaded)
    print(json.dumps(settings.to_dict(), indent=2) if as_json else "\n".join(settings.lines()))


@export_app.command(
    "original",
    cls=Verb,
    epilog="Example: motionmerge export original edg-official --model folder -o merged",
)
@with_flags
def original(
    recipe: RecipeArgument,
    model: Annotated[
        Path,
        model_option(metavar="FOLDER", help="DynamiCrafter as `motionmerge convert` wrote it."),
    ],
    output: OutputOption,
    file_format: Annotated[
        Literal["ckpt", "safetensors"], output_option("--format", help="Kind of file.")
    ] = "ckpt",
    dtype: DtypeOption = None,
    flags: RecipeFlags = RecipeFlags(),
) -> None:
    """Write each expert as one DynamiCrafter file in the official layout."""
    from motionmerge.exports.dynamicrafter import official_file, official_names
    from motionmerge.exports.files import export_files
    from motionmerge.exports.targets import own_model
    from motionmerge.models.dynamicrafter.checkpoint_folder import official_tensors

    loaded, options = flags.recipe(recipe), flags.options()
    if not (model / "unet").is_dir():
        raise CheckpointError(
            f"{model} has no `unet`.", fix="Give the folder that `motionmerge convert` wrote."
        )
    options["inputs"] = own_model(loaded, model, options["inputs"])
    with progress_bar("export") as progress:
        written = export_files(
            loaded,
            output,
            names=official_names,
            ending=f".{file_format}",
            opener=official_file(model),
            dtype=dtype,
            progress=progress,
            **options,
        )
    with official_tensors(model) as tensors:
        counts = {str(found.path or name): len(tensors) for name, found in written.items()}
    if flags.as_json:
        print_json(counts)
        return
    for name, found in written.items():
        print(f"{name} = {found}")
    for path, count in counts.items():
        print(f"{'Would write' if flags.dry_run else 'Wrote'} {count:,} tensors to {path}.")
    for line in written.usage:
        print(line)
    _print_kept(written.unmatched)


def _print_files(written: Exports[LoraExport] | Exports[FileExport], *, as_json: bool) -> None:
    """Print what was written and which tools load it, or one JSON object of the files."""
    if as_json:
        print_json({name: found.to_dict() for name, found in written.items()})
        return
    for name, found in written.items():
        print(f"{name} = {found}")
    for line in written.usage:
        print(line)
    _print_kept(written.unmatched)


def _print_kept(unmatched: Collection[str]) -> None:
    """Print which tensors some inputs lack, as `merge` does."""
    from motionmerge.merging.report import kept_tensors

    if unmatched:
        print(f"Warning: {kept_tensors(unmatched)}")
