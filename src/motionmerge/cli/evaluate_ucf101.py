"""`motionmerge evaluate ucf101`: choose the clips that a method is measured on."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from motionmerge.cli.merge import counting_bar
from motionmerge.cli.options import JsonOption, OutputOption, output_option
from motionmerge.cli.printing import harmless, print_first, print_json
from motionmerge.errors import ConfigError


def ucf101(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="UCF101: v_CLASS_g01_c01.avi, in class folders."),
    ],
    output: OutputOption,
    prompt: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="How a class becomes a prompt: class-name, or a text with {class} in it. Papers "
            "do not say.",
        ),
    ],
    stride: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            metavar="NUMBER",
            help="Frames of the video from one frame of a clip to the next; moves FVD by half. "
            "DynamiCrafter's authors took 3.",
        ),
    ],
    num: Annotated[int, typer.Option(min=1, max=100_000, metavar="NUMBER", help="Clips.")] = 2048,
    frames: Annotated[
        int, typer.Option(min=1, max=1024, metavar="NUMBER", help="Frames of each clip.")
    ] = 16,
    seed: Annotated[
        int, typer.Option(min=0, metavar="NUMBER", help="Of the choice of videos and frames.")
    ] = 0,
    split: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take the videos of this list only, such as testlist01.txt.",
            show_default="all videos",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="Scale and cut photos and clips to this, e.g. 320x512.",
            show_default="as they are",
        ),
    ] = None,
    dry_run: Annotated[
        bool, output_option("--dry-run", help="Read the videos and count; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose clips of UCF101: first frames, a manifest for batch, real clips, and the protocol.

    The same seed gives the same clips on every machine; a second run goes on from the first.
    """
    from motionmerge.evaluation.ucf101 import MANIFEST, REAL, ClipProtocol, select_clips
    from motionmerge.io.atomic import check_folder

    protocol = ClipProtocol(
        prompt=prompt,
        stride=stride,
        num=num,
        seed=seed,
        frames=frames,
        size=None if size is None else _size(size),
        split=split,
    )
    check_folder(output)
    with counting_bar(num, shown=not as_json) as tell:
        found = select_clips(
            folder,
            protocol,
            folder=None if dry_run else output,
            progress=partial(tell, "clips", 1),
        )
    if as_json:
        print_json(found.as_json())
        return
    settings = found.settings
    print(
        f"{len(found.clips)} clips of {frames} frames, stride {stride}, seed {seed}; split: "
        f"{harmless(settings['split'])}, {settings['num_listed']} videos; prompt: "
        f"{harmless(prompt)}; size: {size or 'as they are'}"
    )
    print(f"{len(found.dropped)} videos dropped on the way")
    print_first([f"{one.id}: {one.dropped}" for one in found.dropped])
    if not dry_run:
        print(f"motionmerge batch {output / MANIFEST} -o VIDEOS, then")
        print(f"motionmerge evaluate fvd {output / REAL} VIDEOS --network FILE")


def _size(text: str) -> tuple[int, int]:
    """Read `HEIGHTxWIDTH`.

    Raises:
        ConfigError: It is something else, or too small or large.
    """
    found = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", text, re.ASCII)
    if found is None or not all(16 <= int(side) <= 4096 for side in found.groups()):
        raise ConfigError(
            f"{text[:80]!r} is no size.", fix="Give --size HEIGHTxWIDTH, e.g. 320x512."
        )
    return int(found[1]), int(found[2])
