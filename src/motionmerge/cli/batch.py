"""`motionmerge batch`: the videos of a manifest, resumed after any kill, on many processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.generate import (
    POCKET,
    BaseOption,
    BoundaryOption,
    DeviceOption,
    DtypeOption,
    FrameRateOption,
    FramesOption,
    GuidanceOption,
    HeightOption,
    InputOption,
    LegacyOption,
    LoraOption,
    ModelOption,
    MotionOption,
    NegativeOption,
    RecipeOption,
    SizeOption,
    StepsOption,
    VariantOption,
    WeightsOption,
    WidthOption,
    choose_experts,
    choose_model,
    common_settings,
    loaded,
    versions,
)
from motionmerge.cli.merge import parse_inputs

if TYPE_CHECKING:
    from motionmerge.sampling.batch import Progress


class Names(str, Enum):
    """How videos are named."""

    CONFIGURATION = "configuration"
    VBENCH = "vbench"


def batch(
    manifest: Annotated[
        Path,
        typer.Argument(
            help='One JSON mapping a line: {"image": .., "prompt": .., "seed": .., "id": ..} and '
            "any of the settings below."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the videos.")],
    model: ModelOption = POCKET,
    motion: MotionOption = None,
    recipe: RecipeOption = None,
    replaced: InputOption = None,
    base: BaseOption = None,
    lora: LoraOption = None,
    weights: WeightsOption = None,
    boundary: BoundaryOption = None,
    seed: Annotated[int, typer.Option(help="Of lines that have none.")] = 0,
    num_videos: Annotated[
        int, typer.Option(min=1, help="Videos of each line, with seeds from its own on.")
    ] = 1,
    negative_prompt: NegativeOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_frames: FramesOption = None,
    frame_rate: FrameRateOption = None,
    names: Annotated[
        Names,
        typer.Option(help="configuration: ID-seedSEED-HASH.mp4; vbench: PROMPT-NUMBER.mp4."),
    ] = Names.CONFIGURATION,
    videos_per_switch: Annotated[
        int, typer.Option(min=1, help="Videos that share a switch of experts (pocket, ours).")
    ] = 16,
    retries: Annotated[int, typer.Option(min=0, help="More tries of a video that failed.")] = 1,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    variant: VariantOption = None,
    legacy_weights: LegacyOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list what is missing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make the videos of MANIFEST that DIR lacks; several processes share them by RANK/WORLD_SIZE.

    Failed ones are listed in DIR/failures.jsonl (of several processes, failures-RANK.jsonl), and
    the exit code is then 1.
    """
    from motionmerge.sampling.batch import missing, rank_and_world_size, run_batch, shard
    from motionmerge.sampling.manifest import configuration_name, plan, read_manifest, vbench_name

    chosen = choose_model(
        model, weights=weights, dtype=dtype, device=device, variant=variant, legacy=legacy_weights
    )
    experts = choose_experts(
        chosen,
        recipe=recipe,
        inputs=parse_inputs(replaced or []),
        motion=motion,
        base=base,
        lora=lora or [],
        weights=weights,
        boundary=boundary,
    )
    common = common_settings(
        seed=seed,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        size=size,
        height=height,
        width=width,
        num_frames=num_frames,
        frame_rate=frame_rate,
    )
    jobs = read_manifest(manifest, defaults=common, num_videos=num_videos)
    for job in jobs:
        job.check(chosen.family, chosen.limits)
    jobs = [
        replace(job, settings=job.settings.resolved(chosen.family, chosen.limits)) for job in jobs
    ]
    rank, world_size = rank_and_world_size()
    made_of, made_by = chosen.fingerprint(), experts.fingerprint()
    planned = plan(
        shard(jobs, rank, world_size),
        output,
        fingerprint={**made_of, **made_by},
        name_of=vbench_name if names is Names.VBENCH else configuration_name,
    )
    todo = missing(planned)
    if dry_run:
        _print_plan([video.path.name for video in todo], len(planned), as_json)
        return
    failures = "failures.jsonl" if world_size == 1 else f"failures-{rank}.jsonl"
    if not todo:
        (output / failures).unlink(missing_ok=True)
        _print_report({"done": [], "skipped": len(planned), "failures": [], "seconds": 0}, as_json)
        return
    with loaded(chosen, experts) as (pipeline, bank):
        report = run_batch(
            pipeline,
            planned,
            bank=bank,
            metadata={**versions(), "family": chosen.family.name, **made_of, **made_by},
            frame_rate=chosen.limits.frame_rate,
            videos_per_switch=videos_per_switch,
            retries=retries,
            failure_list=output / failures,
            on_progress=_progress_printer(rank, world_size),
        )
    result = {**asdict(report), "skipped": len(report.skipped)}
    _print_report(result, as_json)
    if report.failures:
        raise typer.Exit(1)


def _progress_printer(rank: int, world_size: int) -> Callable[[Progress], None]:
    """Show a line on stderr: redrawn on a terminal, one a video elsewhere."""
    is_terminal = sys.stderr.isatty()
    who = f"[{rank}/{world_size}] " if world_size > 1 else ""

    def show(now: Progress) -> None:
        finished = now.done + now.skipped + now.failed
        each = now.seconds / max(1, now.done + now.failed)
        left = each * (now.total - finished)
        line = f"{who}{finished}/{now.total}, {now.failed} failed, {left:.0f} s left: {now.last}"
        typer.echo(f"\r\x1b[2K{line[:150]}" if is_terminal else line, err=True, nl=not is_terminal)
        if is_terminal and finished == now.total:
            typer.echo(err=True)

    return show


def _print_plan(names: list[str], total: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"missing": names, "total": total}, indent=2))
        return
    for name in names:
        print(name)
    print(f"{len(names)} of {total} videos are missing")


def _print_report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"made {len(result['done'])}, found {result['skipped']}, "
        f"failed {len(result['failures'])}, {result['seconds']:.1f} s"
    )
