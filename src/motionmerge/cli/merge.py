"""`motionmerge merge`: carry out a recipe and write its experts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.parameters import MotionOption, SetOption, load_recipe
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.merging.inputs.coverage import Missing
    from motionmerge.merging.merge import Progress
    from motionmerge.merging.recipes.recipe import Recipe

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="fp32, fp16, bf16, fp8_scaled (with a scale for each weight), fp8_e4m3fn or fp8_e5m2; "
        "the inputs' own by default."
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check and report; write nothing. Of checkpoints only headers are read: NaN in them "
        "is found without this flag.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
MissingOption = Annotated[
    str,
    typer.Option(
        help="What happens to layers or tensors that only some inputs have: error, or keep (go on "
        "without them)."
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option("--max-shard-size", help="E.g. 5GB: write OUTPUT/EXPERT/ in shards."),
]
LayoutOption = Annotated[
    str,
    typer.Option(
        help="weights, or pipeline: whole diffusers folders OUTPUT/EXPERT/, in which the weights "
        "of all other parts are hard links."
    ),
]
StochasticOption = Annotated[
    int | None,
    typer.Option(
        "--stochastic-rounding",
        help="Seed: round up or down at random, so that small changes survive in 16 bits.",
    ),
]
NonfiniteOption = Annotated[bool, typer.Option("--allow-nan", help="Accept NaN in the inputs.")]


def checked_missing(missing: str) -> Missing:
    """Read --missing.

    Raises:
        ConfigError: It is neither `error` nor `keep`.
    """
    from motionmerge.merging.inputs.coverage import check_missing

    check_missing(missing)
    return "keep" if missing == "keep" else "error"


def merge(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    output: OutputOption,
    replaced: Annotated[
        list[str] | None,
        typer.Option("--input", help="NAME=PATH, instead of the recipe's input; repeatable."),
    ] = None,
    changed: SetOption = None,
    motion: MotionOption = None,
    dtype: DtypeOption = None,
    missing: MissingOption = "error",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
    allow_nan: NonfiniteOption = False,
    max_shard_size: ShardOption = None,
    layout: LayoutOption = "weights",
    stochastic_rounding: StochasticOption = None,
) -> None:
    """Write the experts of a recipe, each to OUTPUT/EXPERT.safetensors."""
    carry_out(
        load_recipe(recipe, changed, motion),
        output,
        as_json=as_json,
        inputs=parse_inputs(replaced or []),
        dtype=dtype,
        missing=missing,
        dry_run=dry_run,
        overwrite=overwrite,
        allow_nonfinite=allow_nan,
        max_shard_size=max_shard_size,
        layout=layout,
        stochastic_rounding=stochastic_rounding,
    )


def carry_out(recipe: Recipe, output: Path, *, as_json: bool, **options: Any) -> None:
    """Merge with a progress bar on stderr and the report on stdout."""
    from motionmerge.io.atomic import check_folder
    from motionmerge.merging.merge import merge as run

    check_folder(output)
    with progress_bar("merge") as progress:
        report = run(recipe, output, progress=progress, **options)
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)


def parse_inputs(pairs: Iterable[str], *, flag: str = "--input") -> dict[str, str]:
    """Read `NAME=PATH` options of a flag.

    Raises:
        ConfigError: One of them has no `=`.
    """
    parsed = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ConfigError(
                f"{flag} {pair} is not NAME=PATH.", fix=f"Write e.g. `{flag} base=FILE`."
            )
        parsed[name] = path
    return parsed


@contextmanager
def progress_bar(task_name: str) -> Iterator[Progress | None]:
    """Show bytes, rate and time left; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(task_name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
