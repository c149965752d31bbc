"""`motionmerge compare`: how two checkpoints differ, group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from motionmerge.cli.options import JsonOption, NonfiniteOption, OverwriteOption, output_option
from motionmerge.cli.printing import harmless_lines, print_json
from motionmerge.errors import ConfigError

EXAMPLE = "Example: motionmerge compare base.safetensors tuned.safetensors"


def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Weights: a file, or a folder.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Weights of the same layout.")],
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Weights that both were fine-tuned from: compare how each differs from them.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        output_option(metavar="FILE", help="Draw the changes: a .png or .svg to write."),
    ] = None,
    as_json: JsonOption = False,
    allow_nan: NonfiniteOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Print relative change and cosine of each parameter group, and which tensors changed."""
    from motionmerge.io.atomic import check_new_file
    from motionmerge.merging.compare import compare as run
    from motionmerge.merging.compare import draw_comparison

    if plot is not None:
        if plot.suffix not in (".png", ".svg"):
            raise ConfigError(f"Cannot draw `{plot.name}`.", fix="End the name with .png or .svg.")
        check_new_file(plot, overwrite=overwrite)
    comparison = run(first, second, base=base, allow_nonfinite=allow_nan)
    if plot is not None:
        draw_comparison(comparison, plot)
    if as_json:
        print_json(comparison.to_dict())
    else:
        print(harmless_lines(str(comparison)))
    if plot is not None and not as_json:
        print(f"Drew {plot}.")
