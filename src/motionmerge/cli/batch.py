"""`motionmerge batch`: the videos of a manifest, resumed after any kill, on many processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from motionmerge.cli.flag_groups import with_flags
from motionmerge.cli.options import (
    JsonOption,
    OverwriteOption,
    RayOption,
    WorkersOption,
    destination,
    output_option,
    work_option,
)
from motionmerge.cli.printing import print_json
from motionmerge.cli.video_flags import (
    StepPlanner,
    VideoFlags,
    loaded,
)
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.sampling.batch.batch import BatchOptions, BatchProgress, BatchReport, Tally
    from motionmerge.sampling.batch.manifest import PlannedVideo
    from motionmerge.sampling.request.experts import ExpertChoice
    from motionmerge.sampling.request.model import ModelChoice


EXAMPLE = "Example: motionmerge batch videos.jsonl -o videos"


@with_flags
def batch(
    manifest: Annotated[
        Path,
        typer.Argument(
            metavar="MANIFEST",
            help='A file with one JSON mapping a line: {"image": .., "prompt": .., "seed": .., '
            '"id": ..} and any of the settings below, by their names in Python: '
            "num_inference_steps, guidance_scale.",
        ),
    ],
    output: Annotated[Path, destination(metavar="FOLDER", help="Folder for the videos.")],
    flags: VideoFlags = VideoFlags(),
    videos_per_switch: Annotated[
        int,
        work_option(
            min=1, metavar="NUMBER", help="Videos that share a switch of experts (pocket, ours)."
        ),
    ] = 16,
    retries: Annotated[
        int,
        work_option(min=0, metavar="NUMBER", help="How often a video that failed is tried again."),
    ] = 1,
    ray: RayOption = False,
    workers: WorkersOption = None,
    names: Annotated[
        Literal["configuration", "vbench"],
        output_option(help="configuration: ID-seedSEED-HASH.mp4; vbench: PROMPT-NUMBER.mp4."),
    ] = "configuration",
    dry_run: Annotated[
        bool,
        output_option("--dry-run", help="Check everything and list the videos that are missing."),
    ] = False,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Make the videos of MANIFEST that are not in OUTPUT yet, on one machine or many.

    Several processes share them by RANK and WORLD_SIZE, or the workers of a Ray cluster take the
    next ones as they are ready. Failed videos are listed in OUTPUT/failures.jsonl, and the exit
    code is then 1. With several processes each lists its own in OUTPUT/failures-RANK.jsonl, and
    the exit code stays 0, because torchrun would stop the others.
    """
    from motionmerge.io.atomic import check_folder, prepare_folder
    from motionmerge.io.video import load_image
    from motionmerge.sampling.batch.batch import (
        BatchOptions,
        Tally,
        failure_list,
        missing,
        rank_and_world_size,
        remove_stale_lists,
        shard,
    )
    from motionmerge.sampling.batch.manifest import (
        configuration_name,
        plan,
        read_manifest,
        vbench_name,
    )
    from motionmerge.sampling.videos.provenance import made_with

    rank, world_size = rank_and_world_size()
    _check_sharing(ray, workers, world_size)
    chosen = flags.request.open_model(cluster_device=cluster_device_of_ray() if ray else None)
    experts = flags.chosen_experts(chosen)
    jobs = read_manifest(manifest, defaults=flags.settings(), num_videos=flags.num_videos)
    for job in jobs:
        job.check(chosen.family, chosen.limits)
    jobs = [
        replace(job, settings=job.settings.resolved(chosen.family, chosen.limits)) for job in jobs
    ]
    planner = StepPlanner(chosen, experts)
    for job in jobs:
        with job.named_errors():
            planner.add(job.settings)
    made_of, made_by = chosen.fingerprint(), experts.fingerprint()
    all_planned = plan(
        jobs,
        output,
        fingerprint={**made_of, **made_by},
        name_of=vbench_name if names == "vbench" else configuration_name,
    )
    planned = shard(all_planned, rank, world_size)
    todo = missing(planned, overwrite=overwrite)
    planner.show()
    if dry_run:
        if todo:
            check_folder(output)
        for video in todo:
            with video.job.named_errors():
                chosen.check_prompt(video.job.settings.prompt or "")
        for image in dict.fromkeys(video.job.image for video in todo):
            load_image(image)  # a run would list each that cannot be read as a failure
        _print_plan([video.path.name for video in todo], len(planned), as_json)
        return
    found = len(planned) - len(todo)
    show = progress_printer(rank, world_size, found)
    failures = failure_list(output, rank, world_size)
    tally = Tally(len(todo), failure_list=failures, on_progress=show)
    if not todo:
        report = tally.report()
        remove_stale_lists(output, world_size)
        _print_report(report, found, as_json)
        return
    prepare_folder(output)
    options = BatchOptions(
        metadata=made_with(chosen.family.name, made_of, made_by),
        frame_rate=chosen.limits.frame_rate,
        videos_per_switch=videos_per_switch,
        retries=retries,
    )
    report = make_videos(
        chosen, experts, todo, options, tally=tally, uses_ray=ray, num_workers=workers
    )
    remove_stale_lists(output, world_size)
    _print_report(report, found, as_json)
    if report.failures and world_size == 1:
        raise typer.Exit(1)


def make_videos(
    model: ModelChoice,
    experts: ExpertChoice,
    videos: Sequence[PlannedVideo],
    options: BatchOptions,
    *,
    tally: Tally,
    uses_ray: bool,
    num_workers: int | None,
) -> BatchReport:
    """Make videos in this process, or on a Ray cluster."""
    if uses_ray:
        from motionmerge.sampling.batch.ray_batch import run_on_ray

        return run_on_ray(model, experts, videos, options, num_workers=num_workers, tally=tally)
    from motionmerge.sampling.batch.batch import run_batch

    with loaded(model, experts) as (pipeline, bank):
        return run_batch(pipeline, videos, options, bank=bank, tally=tally)


def _check_sharing(ray: bool, workers: int | None, world_size: int) -> None:
    if ray and world_size > 1:
        raise ConfigError(
            f"--ray was given to one of {world_size} processes that share the videos already.",
            fix="Start one process, without torchrun or srun, or leave --ray out.",
        )
    check_workers(ray, workers)


def check_workers(ray: bool, workers: int | None) -> None:
    """Refuse a number of workers without a cluster.

    Raises:
        ConfigError: It is so.
    """
    if workers is not None and not ray:
        raise ConfigError("--workers is for --ray.", fix="Add --ray, or leave it out.")


def cluster_device_of_ray() -> str:
    """Return the device that the machines of the Ray cluster have."""
    from motionmerge.sampling.batch.ray_cluster import cluster_device

    return cluster_device()


def progress_printer(rank: int, world_size: int, found: int) -> Callable[[BatchProgress], None]:
    """Show a line on stderr: redrawn on a terminal, one a video elsewhere."""
    is_terminal = sys.stderr.isatty()
    who = f"[{rank}/{world_size}] " if world_size > 1 else ""

    def show(now: BatchProgress) -> None:
        finished = now.done + now.failed + now.found
        left = now.seconds / max(1, finished) * (now.total - finished)
        line = f"{who}{found + finished}/{found + now.total}, {now.failed} failed, "
        line += f"{left:.0f} s left: {now.last}"
        typer.echo(f"\r\x1b[2K{line[:150]}" if is_terminal else line, err=True, nl=not is_terminal)
        if is_terminal and finished == now.total:
            typer.echo(err=True)

    return show


def _print_plan(names: list[str], total: int, as_json: bool) -> None:
    if as_json:
        print_json({"missing": names, "total": total})
        return
    for name in names:
        print(name)
    print(f"{len(names)} of {total} videos are missing")


def _print_report(report: BatchReport, found: int, as_json: bool) -> None:
    """Print what was done; what was found before or in the meantime is one number."""
    skipped = found + len(report.found)
    if as_json:
        values = {**asdict(report), "skipped": skipped}
        del values["found"]
        print_json(values)
        return
    print(
        f"made {len(report.done)}, found {skipped}, failed {len(report.failures)}, "
        f"{report.seconds:.1f} s"
    )
