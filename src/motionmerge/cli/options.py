"""Options that several verbs share, and the panels that `--help` shows them in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from motionmerge.version import __version__

MODEL = "Model"
EXPERTS = "Experts"
VIDEO = "Video"
OUTPUT = "Output"
WORK = "Work"


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
    typer.Option(
        "--input",
        metavar="NAME=PATH",
        help="Use these weights as the recipe's input NAME; repeatable.",
        rich_help_panel=EXPERTS,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=NUMBER",
        help="Another value of a recipe's parameter; repeatable.",
        rich_help_panel=EXPERTS,
    ),
]
MotionOption = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        help="The same as --set motion=NUMBER: how far to extrapolate away from the fine-tuned "
        "weights. 0 is the base's motion, -1 that of the fine-tuned weights.",
        show_default="the recipe's own",
        rich_help_panel=EXPERTS,
    ),
]
MissingOption = Annotated[
    Literal["error", "keep"],
    typer.Option(
        help="What happens to layers or tensors that only some inputs have: error stops, keep goes "
        "on without them.",
        rich_help_panel=EXPERTS,
    ),
]
NonfiniteOption = Annotated[
    bool,
    typer.Option("--allow-nan", help="Accept NaN in the inputs.", rich_help_panel=EXPERTS),
]

OutputOption = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="FOLDER", help="Folder to write to.", rich_help_panel=OUTPUT
    ),
]
ResultsOption = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Folder for the results; those already there are used.",
        rich_help_panel=OUTPUT,
    ),
]
Dtype = Literal["fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2"]
ScaledDtype = Literal["fp32", "fp16", "bf16", "fp8_scaled", "fp8_e4m3fn", "fp8_e5m2"]
_THAT_OF_THE_INPUTS = "that of the inputs"
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="Number format of the weights. Neither fp8 has scales here.",
        show_default=_THAT_OF_THE_INPUTS,
        rich_help_panel=OUTPUT,
    ),
]
ScaledDtypeOption = Annotated[
    ScaledDtype | None,
    typer.Option(
        help="Number format of the weights. fp8_scaled writes a scale for each weight; the other "
        "two fp8 have none.",
        show_default=_THAT_OF_THE_INPUTS,
        rich_help_panel=OUTPUT,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check and report; write nothing. Of checkpoints only headers are read: NaN in them "
        "is found without this flag.",
        rich_help_panel=OUTPUT,
    ),
]
PlanOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything; print what would be made, and about how long it takes.",
        rich_help_panel=OUTPUT,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)
]
PhotosOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="A photo, or a folder of some; each gets every prompt of --prompts.",
        rich_help_panel=WORK,
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text file with one prompt a line.", rich_help_panel=WORK),
]
ManifestOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="In place of both: pairs of photo and prompt, as for batch.",
        rich_help_panel=WORK,
    ),
]
ClipsOption = Annotated[
    int | None,
    typer.Option(
        "--clips",
        min=2,
        max=10_000,
        metavar="NUMBER",
        help="Videos for a full measurement.",
        show_default="all; of the pocket model's own prompts 48",
        rich_help_panel=WORK,
    ),
]
RayOption = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="Share the videos between workers of a Ray cluster.",
        rich_help_panel=WORK,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="NUMBER",
        help="How many workers, for --ray.",
        show_default="as many as it has GPUs",
        rich_help_panel=WORK,
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
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace existing files.", rich_help_panel=OUTPUT)
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="E.g. 5GB: write OUTPUT/EXPERT/ in shards.",
        rich_help_panel=OUTPUT,
    ),
]
LayoutOption = Annotated[
    Literal["weights", "pipeline"],
    typer.Option(
        help="weights: a file for each expert. pipeline: whole diffusers folders OUTPUT/EXPERT/, "
        "in which the weights of all other parts are hard links.",
        rich_help_panel=OUTPUT,
    ),
]
StochasticOption = Annotated[
    int | None,
    typer.Option(
        "--stochastic-rounding",
        metavar="SEED",
        help="Round up or down at random, so that small changes survive in 16 bits.",
        rich_help_panel=OUTPUT,
    ),
]
