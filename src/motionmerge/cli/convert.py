"""`motionmerge convert`: official DynamiCrafter or VideoCrafter file to a folder, and back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from motionmerge.cli.options import JsonOption, OverwriteOption, destination, output_option
from motionmerge.cli.printing import print_json
from motionmerge.errors import ConfigError

EXAMPLE = "Example: motionmerge convert model.ckpt --tokenizer clip -o dynamicrafter"

if TYPE_CHECKING:
    from motionmerge.models.dynamicrafter.checkpoint_folder import ConversionReport


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Official checkpoint (.ckpt, .safetensors); or a folder."
        ),
    ],
    output: Annotated[
        Path | None,
        destination(metavar="PATH", help="Folder to write; with --to-official the file."),
    ] = None,
    to_official: Annotated[
        bool, typer.Option("--to-official", help="Turn a diffusers folder into an official file.")
    ] = False,
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        output_option(help="Number format of the weights.", show_default="that of the checkpoint"),
    ] = None,
    add_adapter: Annotated[
        bool, typer.Option("--add-adapter", help="Add a temporal adapter that changes nothing yet.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="CLIP's tokenizer: its folder, or open_clip's .txt.gz."),
    ] = None,
    dry_run: Annotated[
        bool, output_option("--dry-run", help="Only print what the checkpoint holds.")
    ] = False,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Convert a checkpoint of DynamiCrafter or VideoCrafter1 (image to video) to a folder."""
    from motionmerge.io.atomic import check_folder, check_new_file, check_new_folder

    if to_official:
        if output is None or dtype or add_adapter or tokenizer or dry_run:
            raise ConfigError(
                "--to-official writes what the folder holds into one file.",
                fix="Name the file with `-o` and leave out the other options.",
            )
        check_new_file(output, overwrite=overwrite)
    elif output is None and not dry_run:
        raise ConfigError(
            "Nowhere to write to.", fix="Name the folder with `-o`, or use --dry-run."
        )

    from motionmerge.models.dynamicrafter import checkpoint_folder
    from motionmerge.tensors import parse_dtype

    if to_official and output is not None:
        count = checkpoint_folder.to_official(source, output)
        if as_json:
            print_json({"tensors": count, "output": str(output)})
        else:
            print(f"Wrote {count:,} tensors to {output}.")
        return
    if output is not None:
        check_folder(output)
        if dry_run:  # a run looks itself
            check_new_folder(output, overwrite=overwrite, marker="model_index.json", keep=[source])
    if dry_run or output is None:
        report = checkpoint_folder.inspect_checkpoint(source)
    else:
        report = checkpoint_folder.convert_checkpoint(
            source,
            output,
            dtype=parse_dtype(dtype).torch if dtype else None,
            tokenizer=tokenizer,
            add_adapter=add_adapter,
            overwrite=overwrite,
        )
    if as_json:
        print_json(asdict(report))
        return
    _print_report(report)
    print("Nothing was written (dry run)." if dry_run else f"Wrote {output}.")
    if not dry_run and not report.has_tokenizer:
        print(
            "There is no tokenizer in it: official checkpoints have none. Convert with "
            "--tokenizer FOLDER (of any CLIP or Stable Diffusion model), or pass the pipeline one."
        )


def _print_report(report: ConversionReport) -> None:
    print(f"pipeline        {report.pipeline}")
    for name, count in report.parameters.items():
        print(f"{name:16}{report.tensors[name]:6,} tensors {count / 1e6:10,.1f} M parameters")
    adapter = "with" if report.has_adapter else "without"
    print(f"{'unused':16}{report.unused:6,} tensors; the U-Net is {adapter} temporal adapter")
    for name, value in report.scheduler.items():
        print(f"scheduler       {name}: {value}")
