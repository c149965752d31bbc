"""Options that several verbs share, and the panels that `--help` shows them in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from motionmerge.version import __version__

model_option = partial(typer.Option, rich_help_panel="Model")
expert_option = partial(typer.Option, rich_help_panel="Experts")
video_option = partial(typer.Option, rich_help_panel="Video")
work_option = partial(typer.Option, rich_help_panel="Work")
output_option = partial(typer.Option, rich_help_panel="Output")
destination = partial(output_option, "--output", "-o")


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, for shell completion; imports nothing slow."""
    folder = Path(__file__).parents[1] / "recipes"
    return sorted(path.stem for path in folder.glob("*.yaml"))


def print_version(wanted: bool) -> None:
    """Print the version and end, if that is wanted."""
    if wanted:
        print(f"motionmerge {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True),
]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped recipe; `motionmerge recipes` lists them.",
        autocompletion=recipe_names,
    ),
]
InputOption = Annotated[
    list[str] | None,
    expert_option(
        "--input",
        metavar="NAME=PATH",
        help="Use these weights as the recipe's input NAME; repeatable.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    expert_option(
        "--set", metavar="NAME=NUMBER", help="Another value of a recipe's parameter; repeatable."
    ),
]
MotionOption = Annotated[
    float | None,
    expert_option(
        metavar="NUMBER",
        help="The same as --set motion=NUMBER: how far to extrapolate away from the fine-tuned "
        "weights. 0 is the base's motion, -1 that of the fine-tuned weights.",
        show_default="the recipe's own",
    ),
]
MissingOption = Annotated[
    Literal["error", "keep"],
    expert_option(
        help="What happens to layers or tensors that only some inputs have: error stops, keep goes "
        "on without them."
    ),
]
NonfiniteOption = Annotated[bool, expert_option("--allow-nan", help="Accept NaN in the inputs.")]

OutputOption = Annotated[Path, destination(metavar="FOLDER", help="Folder to write to.")]
ResultsOption = Annotated[
    Path,
    destination(metavar="FOLDER", help="Folder for the results; those already there are used."),
]
Dtype = Literal["fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2"]
ScaledDtype = Literal["fp32", "fp16", "bf16", "fp8_scaled", "fp8_e4m3fn", "fp8_e5m2"]
_THAT_OF_THE_INPUTS = "that of the inputs"
DtypeOption = Annotated[
    Dtype | None,
    output_option(
        help="Number format of the weights. Neither fp8 has scales here.",
        show_default=_THAT_OF_THE_INPUTS,
    ),
]
ScaledDtypeOption = Annotated[
    ScaledDtype | None,
    output_option(
        help="Number format of the weights. fp8_scaled writes a scale for each weight; the other "
        "two fp8 have none.",
        show_default=_THAT_OF_THE_INPUTS,
    ),
]
DryRunOption = Annotated[
    bool,
    output_option(
        "--dry-run",
        help="Check and report; write nothing. Of checkpoints only headers are read: NaN in them "
        "is found without this flag.",
    ),
]
PlanOption = Annotated[
    bool,
    output_option(
        "--dry-run", help="Check everything; print what would be made, and about how long it takes."
    ),
]
JsonOption = Annotated[bool, output_option("--json", help="Print the result as JSON.")]
PhotosOption = Annotated[
    Path | None,
    work_option(
        metavar="PATH", help="A photo, or a folder of some; each gets every prompt of --prompts."
    ),
]
PromptsOption = Annotated[
    Path | None, work_option(metavar="FILE", help="Text file with one prompt a line.")
]
ManifestOption = Annotated[
    Path | None,
    work_option(metavar="FILE", help="In place of both: pairs of photo and prompt, as for batch."),
]
ClipsOption = Annotated[
    int | None,
    work_option(
        "--clips",
        min=2,
        max=10_000,
        metavar="NUMBER",
        help="Videos for a full measurement.",
        show_default="all; of the pocket model's own prompts 48",
    ),
]
RayOption = Annotated[
    bool, work_option("--ray", help="Share the videos between workers of a Ray cluster.")
]
WorkersOption = Annotated[
    int | None,
    work_option(
        min=1,
        metavar="NUMBER",
        help="How many workers, for --ray.",
        show_default="as many as it has GPUs",
    ),
]
PartOption = Annotated[
    str,
    typer.Option(
        "--shard",
        metavar="K/N",
        help="Measure the K-th of N parts, K from 1; run the verb without it for the whole.",
    ),
]
OverwriteOption = Annotated[bool, output_option("--overwrite", help="Replace existing files.")]
ShardOption = Annotated[
    str | None,
    output_option(
        "--max-shard-size", metavar="SIZE", help="E.g. 5GB: write OUTPUT/EXPERT/ in shards."
    ),
]
LayoutOption = Annotated[
    Literal["weights", "pipeline"],
    output_option(
        help="weights: a file for each expert. pipeline: whole diffusers folders OUTPUT/EXPERT/, "
        "in which the weights of all other parts are hard links."
    ),
]
StochasticOption = Annotated[
    int | None,
    output_option(
        "--stochastic-rounding",
        metavar="SEED",
        help="Round up or down at random, so that small changes survive in 16 bits.",
    ),
]
