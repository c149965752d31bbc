"""`motionmerge train`: the runs that made the pocket model's weights, to repeat or to change."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from motionmerge.cli.options import (
    JsonOption,
    OverwriteOption,
    destination,
    model_option,
    output_option,
)

EXAMPLE = "Example: motionmerge train pocket-base --steps 2000 -o base.safetensors"
of_the_run = partial(typer.Option, show_default="that of the run", rich_help_panel="Training")
starting_weights = partial(model_option, metavar="FILE", show_default="the shipped ones")
PREFIX = "pocket-"

Run = Literal[
    "pocket-towers",
    "pocket-decoder",
    "pocket-base",
    "pocket-tuned",
    "pocket-naive",
    "pocket-equal",
    "pocket-temporal",
    "pocket-temporal-naive",
]


def train(
    run: Annotated[
        Run,
        typer.Argument(metavar="RUN", show_choices=False, help="The run: one of the names above."),
    ],
    output: Annotated[
        Path | None,
        destination(
            metavar="FILE", help="Weights file to write.", show_default="RUN-FOLDER.safetensors"
        ),
    ] = None,
    run_folder: Annotated[
        Path | None,
        output_option(
            "--run-folder",
            metavar="FOLDER",
            help="State and log. A run that was killed goes on from there.",
            show_default="runs/RUN",
        ),
    ] = None,
    steps: Annotated[
        int | None, of_the_run(min=1, metavar="NUMBER", help="Optimizer steps.")
    ] = None,
    batch_size: Annotated[
        int | None, of_the_run(min=1, metavar="NUMBER", help="Samples a step.")
    ] = None,
    learning_rate: Annotated[
        float | None, of_the_run(min=0, metavar="NUMBER", help="Highest learning rate.")
    ] = None,
    precision: Annotated[
        Literal["bf16", "no"] | None,
        of_the_run(help="no: fp32, several times faster on processors that emulate bf16."),
    ] = None,
    seed: Annotated[
        int | None, of_the_run(metavar="NUMBER", help="Seeds data, noise and weights.")
    ] = None,
    towers: Annotated[Path | None, starting_weights(help="Towers to start from.")] = None,
    base: Annotated[Path | None, starting_weights(help="Base weights to start from.")] = None,
    dry_run: Annotated[
        bool, output_option("--dry-run", help="Show the settings; train nothing.")
    ] = False,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a part of the pocket model, from its towers to stage 1 and its controls.

    pocket-towers          Text and image tower, without video.
    pocket-decoder         The autoencoder's decoder.
    pocket-base            The base: rich motion, weakly coupled to the prompt.
    pocket-tuned           Stage 1: adapter and U-Net, mostly slow clips.
    pocket-naive           Control of tuned: the U-Net, without adapter.
    pocket-equal           Control of tuned: clips as fast as those of the base.
    pocket-temporal        Stage 1 for the adapter and the temporal blocks alone.
    pocket-temporal-naive  Control of temporal: without adapter.

    The video runs use a GPU if there is one (the base takes 4 minutes on an H200). On several
    cores: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m motionmerge.cli train pocket-base
    --precision no --batch-size 16
    """
    from dataclasses import asdict, replace

    from motionmerge.io.atomic import check_folder, check_new_file
    from motionmerge.training.pocket.runs import RUNS, RunInputs
    from motionmerge.training.pocket.runs import run as train_run
    from motionmerge.training.settings import RunStopped, TrainingProgress

    changes: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision,
        "seed": seed,
    }
    given = {key: value for key, value in changes.items() if value is not None}
    name, folder = run.removeprefix(PREFIX), run_folder or Path("runs") / run
    output = output or folder.with_suffix(".safetensors")
    check_new_file(output, overwrite=overwrite)
    check_folder(folder)
    settings = replace(RUNS[name].settings, **given)
    if dry_run:
        plan = {"run": name, "output": str(output), "settings": asdict(settings)}
        print(json.dumps(plan, indent=None if as_json else 2))
        return

    def report(progress: TrainingProgress) -> None:
        left = progress.seconds / progress.step * (progress.steps - progress.step)
        typer.echo(
            f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f}  "
            f"{progress.seconds:.0f} s, {max(left, 0):.0f} s left",
            err=True,
        )

    try:
        result = train_run(
            name,
            output,
            folder=folder,
            inputs=RunInputs(towers=towers, base=base),
            changes=given,
            on_progress=report,
        )
    except RunStopped as stopped:
        typer.echo(
            f"stopped after step {stopped.step}, the state is in {stopped.folder}: "
            "the same command goes on",
            err=True,
        )
        raise
    if not result.is_main_process:
        return
    if as_json:
        print(json.dumps({"output": str(output), **asdict(result)}))
    else:
        print(
            f"wrote {output}: loss {result.loss:.4f}, {result.steps} steps, {result.seconds:.0f} s"
        )
