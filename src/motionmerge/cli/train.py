"""`motionmerge train`: the runs that made the pocket model's weights, to repeat or to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from motionmerge.cli.merge import OverwriteOption

train_app = typer.Typer(
    help="Train the pocket model: towers, decoder, base, stage 1 and its controls. A run that was "
    "killed goes on where it stopped. The video runs use a GPU if there is one (base: 4 minutes "
    "on an H200). On several cores: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m "
    "motionmerge.cli train pocket-base --precision no --batch-size 16",
    no_args_is_help=True,
)

OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Weights file to write.", show_default="RUN-FOLDER.safetensors"
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option("--run-folder", help="State and log.", show_default="runs/pocket-NAME"),
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Samples a step.")]
RateOption = Annotated[float | None, typer.Option(min=0, help="Highest learning rate.")]
PrecisionOption = Annotated[
    Literal["bf16", "no"] | None,
    typer.Option(help="`no`: fp32, several times faster on processors that emulate bf16."),
]
SeedOption = Annotated[int | None, typer.Option(help="Seeds data, noise and weights.")]
TowersOption = Annotated[Path | None, typer.Option(help="Towers, if not the shipped ones.")]
BaseOption = Annotated[Path | None, typer.Option(help="Base weights, if not the shipped ones.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the settings; train nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _add(verb: str, name: str, help_text: str) -> None:
    def command(
        output: OutputOption = None,
        run_folder: FolderOption = None,
        steps: StepsOption = None,
        batch_size: BatchOption = None,
        learning_rate: RateOption = None,
        precision: PrecisionOption = None,
        seed: SeedOption = None,
        towers: TowersOption = None,
        base: BaseOption = None,
        dry_run: DryRunOption = False,
        as_json: JsonOption = False,
        overwrite: OverwriteOption = False,
    ) -> None:
        changes = {
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "precision": precision,
            "seed": seed,
        }
        folder = run_folder or Path("runs") / verb
        _train(
            name,
            output or folder.with_suffix(".safetensors"),
            folder,
            changes={key: value for key, value in changes.items() if value is not None},
            inputs={"towers": towers, "base": base},
            dry_run=dry_run,
            as_json=as_json,
            overwrite=overwrite,
        )

    train_app.command(verb, help=help_text)(command)


def _train(
    name: str,
    output: Path,
    folder: Path,
    *,
    changes: dict[str, Any],
    inputs: dict[str, Path | None],
    dry_run: bool,
    as_json: bool,
    overwrite: bool,
) -> None:
    from dataclasses import asdict, replace

    from motionmerge.io.atomic import check_folder, check_new_file
    from motionmerge.training.pocket.runs import RUNS, RunInputs, run
    from motionmerge.training.trainer import Progress

    check_new_file(output, overwrite=overwrite)
    check_folder(folder)
    settings = replace(RUNS[name].settings, **changes)
    if dry_run:
        plan = {"run": name, "output": str(output), "settings": asdict(settings)}
        print(json.dumps(plan, indent=None if as_json else 2))
        return

    def report(progress: Progress) -> None:
        left = progress.seconds / progress.step * (progress.steps - progress.step)
        typer.echo(
            f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f}  "
            f"{progress.seconds:.0f} s, {max(left, 0):.0f} s left",
            err=True,
        )

    result = run(
        name,
        output,
        folder=folder,
        inputs=RunInputs(**inputs),
        changes=changes,
        on_progress=report,
    )
    if not result.is_main_process:
        return
    if as_json:
        print(json.dumps({"output": str(output), **asdict(result)}))
    else:
        print(
            f"wrote {output}: loss {result.loss:.4f}, {result.steps} steps, {result.seconds:.0f} s"
        )


_add("pocket-towers", "towers", "Train text and image tower: read captions and pictures.")
_add("pocket-decoder", "decoder", "Train the autoencoder's decoder: warp the photo.")
_add("pocket-base", "base", "Train the base: rich motion, weakly coupled to the prompt.")
_add("pocket-adapter", "tuned", "Stage 1: adapter and U-Net, right captions, mostly slow clips.")
_add("pocket-naive", "naive", "Control: the U-Net on the same clips, without adapter.")
_add("pocket-equal", "equal", "Control: stage 1 on clips as fast as the base's.")
_add("pocket-temporal", "temporal", "Stage 1 on the temporal half alone: adapter, temporal blocks.")
_add("pocket-temporal-naive", "temporal-naive", "Its control: temporal blocks without adapter.")
