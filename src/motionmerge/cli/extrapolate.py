"""`motionmerge extrapolate`: stage 2 in one line, a shortcut for a recipe that it prints."""

from __future__ import annotations

from typing import Annotated

import typer

from motionmerge.cli.merge import carry_out
from motionmerge.cli.options import (
    DryRunOption,
    JsonOption,
    MissingOption,
    NonfiniteOption,
    OutputOption,
    OverwriteOption,
    ScaledDtypeOption,
    StochasticOption,
    expert_option,
)
from motionmerge.errors import ConfigError

EXAMPLE = "Example: motionmerge extrapolate base.safetensors tuned.safetensors -o experts"


def extrapolate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Weights before fine-tuning.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Weights after fine-tuning.")],
    output: OutputOption,
    motion: Annotated[
        float,
        expert_option(
            metavar="NUMBER",
            help="How far to go away from TUNED; a negative number goes towards it.",
        ),
    ] = 0.25,
    dtype: ScaledDtypeOption = None,
    missing: MissingOption = "error",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
    allow_nan: NonfiniteOption = False,
    stochastic_rounding: StochasticOption = None,
) -> None:
    """Write BASE - MOTION * (TUNED - BASE), which moves more than BASE."""
    from motionmerge.io.atomic import check_folder
    from motionmerge.merging.recipes.recipe import Recipe

    if output.suffix == ".safetensors":
        raise ConfigError(
            f"{output} looks like a file; the output is a folder.",
            fix=f"Use `-o {output.with_suffix('')}`.",
        )
    check_folder(output)  # before the recipe is printed
    inputs = {"base": base, "tuned": tuned}
    recipe = Recipe.shipped_for("motion-only", inputs, motion=motion)
    if not as_json:
        print(recipe.print())
    carry_out(
        recipe,
        output,
        as_json=as_json,
        dtype=dtype,
        missing=missing,
        dry_run=dry_run,
        overwrite=overwrite,
        allow_nonfinite=allow_nan,
        stochastic_rounding=stochastic_rounding,
    )
