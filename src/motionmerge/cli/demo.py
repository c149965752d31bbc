"""`motionmerge demo`: bundled photos through every stage of the method, on one page."""

from __future__ import annotations

import time
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from motionmerge.cli.options import OverwriteOption, destination, output_option

EXAMPLE = "Example: motionmerge demo --num-prompts 3 --open"


def demo(
    output: Annotated[
        Path, destination(metavar="FOLDER", help="Folder for the page and its videos.")
    ] = Path("motionmerge-demo"),
    num_prompts: Annotated[
        int, typer.Option(metavar="NUMBER", help="How many photos, 1 to 9.")
    ] = 6,
    seed: Annotated[int, typer.Option(metavar="NUMBER", help="Seed of the noise.")] = 0,
    open_page: Annotated[
        bool, output_option("--open/--no-open", help="Show the page in the browser.")
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Animate bundled photos with every stage of the method and show them side by side."""
    from motionmerge.io.atomic import check_new_file

    check_new_file(output / "index.html", overwrite=overwrite)

    from rich.console import Console

    from motionmerge.evaluation.pocket.demo import NUM_TABLE_PROMPTS, run_demo
    from motionmerge.sampling.pipelines.pocket import load_pocket
    from motionmerge.sampling.request.loading import hide_loading_bars

    hide_loading_bars()
    started = time.monotonic()
    with Console(stderr=True).status("loading the pocket model") as status:
        page = run_demo(
            load_pocket("base"),
            folder=output,
            num_prompts=num_prompts,
            seed=seed,
            progress=lambda doing: status.update(doing),
        )
    took = time.monotonic() - started
    print(
        f"{num_prompts} prompts under 6 conditions and {NUM_TABLE_PROMPTS} measured prompts each, "
        f"in {took:.0f} s.\nThe page: {page.resolve()}"
    )
    if open_page:
        webbrowser.open(page.resolve().as_uri())
