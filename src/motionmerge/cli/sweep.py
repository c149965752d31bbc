"""`motionmerge sweep`: a recipe's numbers over a grid, on the same photos, measured and drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.batch import (
    check_workers,
    cluster_device_of_ray,
    make_videos,
    progress_printer,
)
from motionmerge.cli.measure import needs_eval_extra
from motionmerge.cli.merge import counting_bar
from motionmerge.cli.options import (
    EXPERTS,
    OUTPUT,
    WORK,
    JsonOption,
    RayOption,
    RecipeArgument,
    WorkersOption,
)
from motionmerge.cli.video_flags import StepPlanner, VideoFlags, with_video_flags
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.evaluation.runs import Measured
    from motionmerge.evaluation.sweeps.grid import Point
    from motionmerge.evaluation.sweeps.results import PointResult
    from motionmerge.sampling.batch.batch import Failure
    from motionmerge.sampling.batch.manifest import PlannedVideo, VideoJob
    from motionmerge.sampling.request.experts import ExpertChoice
    from motionmerge.sampling.request.model import ModelChoice

EXAMPLE = "Example: motionmerge sweep pocket --over motion=0,1 --manifest a.jsonl -o out"

_STRATEGIES = "dynamics-first, consistency-first, dynamics-alone, consistency-alone, averaged"
_TITLES = {"front": "Motion against fidelity; full dots are beaten by no other"}
_MOST_SHEETS = 3
_MOST_ON_THE_PAGE = 8  # points


@with_video_flags
def sweep(
    recipe: RecipeArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for videos, values and charts; what is there already is used.",
            rich_help_panel=OUTPUT,
        ),
    ],
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="A parameter of the recipe, or boundary, and its values: FROM:TO:COUNT or A,B,C; "
            "repeatable, for every combination.",
            rich_help_panel=EXPERTS,
        ),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help=f"How the two experts are used, with commas between: {_STRATEGIES}.",
            rich_help_panel=EXPERTS,
        ),
    ] = "dynamics-first",
    photos: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A photo, or a folder of some; each gets every prompt of --prompts.",
            rich_help_panel=WORK,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text file with one prompt a line.", rich_help_panel=WORK
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="In place of both: pairs of photo and prompt, as for batch.",
            rich_help_panel=WORK,
        ),
    ] = None,
    flags: VideoFlags = VideoFlags(),
    ray: RayOption = False,
    workers: WorkersOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, and list the points and how many videos are missing.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the same videos at every point of a grid of a recipe's numbers, and measure them.

    Photos, prompts and seeds are the same at all points. Writes a page with the best points side by
    side, curves with 95 % bands, the front of motion against fidelity and obedience, sheets of
    frames, and all values as JSON and CSV. The same command goes on after a kill.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.sweeps.grid import Axis, points_of
        from motionmerge.evaluation.sweeps.results import results_of
    from motionmerge.io.atomic import check_folder, prepare_folder
    from motionmerge.merging.recipes.recipe import Recipe

    _check_flags(flags, ray=ray, workers=workers)
    axes = [Axis.parse(text) for text in over or ()]
    strategies = list(dict.fromkeys(name.strip() for name in strategy.split(",")))
    if not axes and len(strategies) == 1:
        raise ConfigError(
            "There is nothing to sweep.", fix="Add e.g. --over motion=-0.5:1:7, or strategies."
        )
    request = flags.request
    model = request.open_model(cluster_device=cluster_device_of_ray() if ray else None)
    own = {**request.parameters, **({} if request.motion is None else {"motion": request.motion})}
    points = points_of(Recipe.load(recipe).with_parameters(**own), axes, strategies=strategies)
    check_folder(output)
    jobs = _jobs(flags, model, photos=photos, prompts=prompts, manifest=manifest)
    planned = _plan(points, flags, model, jobs, output / "videos")
    left = {v.path for one in planned for v in one.videos if not v.path.exists()}
    _print_plan(points, num_each=len(jobs), num_left=len(left), quiet=as_json)
    if dry_run:
        if as_json:
            print(json.dumps({"points": [one.name for one in points], "missing": len(left)}))
        return
    prepare_folder(output / "videos")
    failures = _make(planned, model, ray=ray, workers=workers)
    measured = _measure(planned, output, quiet=as_json)
    results = results_of(measured, points)
    _write(results, output, title=recipe)
    if as_json:
        print((output / "sweep.json").read_text(encoding="utf-8"))
    else:
        _print_results(results, output)
    if failures:
        typer.echo(f"{len(failures)} videos failed, e.g. {failures[0].error}", err=True)
        raise typer.Exit(1)


@dataclass(frozen=True)
class _PlannedPoint:
    """A point with its weights and its videos, in the order of the jobs."""

    experts: ExpertChoice
    metadata: dict[str, object]
    videos: Sequence[PlannedVideo]


def _check_flags(flags: VideoFlags, *, ray: bool, workers: int | None) -> None:
    from motionmerge.sampling.batch.batch import rank_and_world_size

    for name in ("weights", "lora", "base"):
        if getattr(flags, name):
            raise ConfigError(
                f"--{name} is not for sweeps, whose recipe is the argument.",
                fix="Leave it out; --input NAME=PATH replaces an input of the recipe.",
            )
    if flags.boundary is not None:
        raise ConfigError("--boundary is one value.", fix="Write --over boundary=0.5,0.64,0.9.")
    if rank_and_world_size()[1] > 1:
        raise ConfigError(
            "A sweep was started as one of several processes.",
            fix="Start one process; --ray shares the videos between machines.",
        )
    check_workers(ray, workers)


def _jobs(
    flags: VideoFlags,
    model: ModelChoice,
    *,
    photos: Path | None,
    prompts: Path | None,
    manifest: Path | None,
) -> list[VideoJob]:
    """Read the videos to make, of a manifest or of all photos with all prompts, and check them."""
    from motionmerge.sampling.batch.manifest import parse_manifest, read_manifest

    defaults, num_videos = flags.settings(), flags.num_videos
    if manifest is not None and photos is None and prompts is None:
        jobs = read_manifest(manifest, defaults=defaults, num_videos=num_videos)
    elif manifest is not None or photos is None or prompts is None:
        raise ConfigError(
            "A sweep needs photos and prompts.", fix="Give --photos and --prompts, or --manifest."
        )
    else:
        jobs = parse_manifest(
            "\n".join(_lines(photos, prompts)),
            source="all photos with all prompts",
            folder=Path(),
            defaults=defaults,
            num_videos=num_videos,
        )
    for job in jobs:
        job.check(model.family, model.limits)
        with job.named_errors():
            model.check_prompt(job.settings.prompt or "")
    return [
        replace(job, settings=job.settings.resolved(model.family, model.limits)) for job in jobs
    ]


def _lines(photos: Path, prompts: Path) -> Iterator[str]:
    """Yield the lines of a manifest of all photos with all prompts."""
    from motionmerge.evaluation.sources import photos_in
    from motionmerge.sampling.batch.manifest import read_list, read_prompts

    texts = read_prompts(read_list(prompts), source=str(prompts))
    for photo in photos_in(photos):
        name, image = _id_of(photo), str(photo.absolute())
        for number, text in enumerate(texts, start=1):
            row = {"image": image, "prompt": text, "id": f"{name}-{number:03}"}
            yield json.dumps(row, ensure_ascii=False)


def _id_of(photo: Path) -> str:
    """Name a photo in the letters of ids; its bytes tell photos of one name apart, wherever."""
    from motionmerge.io.hashing import hash_file

    plain = re.sub(r"[^A-Za-z0-9._]+", "_", photo.stem)[:40]
    return f"{plain}-{hash_file(photo)[:6]}"


def _plan(
    points: Sequence[Point],
    flags: VideoFlags,
    model: ModelChoice,
    jobs: Sequence[VideoJob],
    folder: Path,
) -> list[_PlannedPoint]:
    """Find the weights of every point, and name its videos; equal points share theirs."""
    from motionmerge.sampling.batch.manifest import check_number, plan
    from motionmerge.sampling.videos.provenance import made_with

    check_number(len(points) * len(jobs), source="the sweep")
    planned = []
    fingerprint = model.fingerprint()
    for point in points:
        request = replace(
            flags.request, recipe=point.recipe, parameters={}, motion=None, boundary=point.boundary
        )
        experts = request.open_experts(model)
        planner = StepPlanner(model, experts)
        planner.add(jobs[0].settings)
        typer.echo(f"{point.name}:", err=True)
        planner.show()
        made_by = experts.fingerprint()
        metadata = made_with(model.family.name, fingerprint, made_by)
        videos = plan(jobs, folder, fingerprint={**fingerprint, **made_by})
        planned.append(_PlannedPoint(experts, metadata, videos))
    return planned


def _print_plan(points: Sequence[Point], *, num_each: int, num_left: int, quiet: bool) -> None:
    if quiet:
        return
    for number, point in enumerate(points, start=1):
        print(f"{number:3}  {point.name}")
    print(f"{len(points)} points of {num_each} videos each, {num_left} to make")


def _make(
    planned: Sequence[_PlannedPoint], model: ModelChoice, *, ray: bool, workers: int | None
) -> list[Failure]:
    """Make the videos that are missing, point by point."""
    from motionmerge.sampling.batch.batch import BatchOptions, Tally, missing

    failures: list[Failure] = []
    for number, one in enumerate(planned, start=1):
        todo = missing(one.videos, overwrite=False)
        if not todo:
            continue
        typer.echo(f"point {number} of {len(planned)}", err=True)
        options = BatchOptions(metadata=one.metadata, frame_rate=model.limits.frame_rate)
        tally = Tally(len(todo), on_progress=progress_printer(0, 1, len(one.videos) - len(todo)))
        report = make_videos(
            model, one.experts, todo, options, tally=tally, uses_ray=ray, num_workers=workers
        )
        failures += report.failures
    return failures


def _measure(
    planned: Sequence[_PlannedPoint], output: Path, *, quiet: bool
) -> list[list[Measured]]:
    """Measure every video once, and sort the results by point."""
    from motionmerge.evaluation.row_files import WHOLE
    from motionmerge.evaluation.runs import Kept, measure_videos
    from motionmerge.evaluation.sources import VideoSource

    sources: dict[Path, VideoSource] = {
        video.path: VideoSource(
            video.path, video.job.settings.prompt, video.job.image, video.job.settings.seed
        )
        for one in planned
        for video in one.videos
    }
    with counting_bar(len(sources), shown=not quiet) as tell:
        found = measure_videos(
            sources.values(),
            kept=Kept.in_folder(output, WHOLE),
            progress=lambda source: tell(source.path.name[-40:], 1),
        )
    by_path = {one.source.path: one for one in found}
    return [[by_path[video.path] for video in one.videos] for one in planned]


def _write(results: Sequence[PointResult], output: Path, *, title: str) -> None:
    """Write values, charts and sheets, each whole or not at all."""
    from motionmerge.evaluation.figures import to_png
    from motionmerge.evaluation.sweeps.results import to_table
    from motionmerge.evaluation.tables import csv_text
    from motionmerge.io.atomic import write_whole

    files: dict[str, str | bytes] = {}
    table = to_table(results)
    for row, result in zip(table, results, strict=True):
        row["recipe"] = result.point.recipe.print()
        row["boundary_of_schedule"] = result.point.boundary
        row["videos"] = [one.source.path.name for one in result.measured]
    found = {"recipe": title, "points": table}
    files["sweep.json"] = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    files["sweep.csv"] = csv_text(to_table(results))
    charts = dict(_charts(results))
    files |= {f"{name}.png": to_png(figure) for name, figure in charts.items()}
    for name, content in files.items():
        write_whole(output / name, content)
    _write_sheets(results, output)
    _write_report(results, charts, output, title=title)


def _write_report(
    results: Sequence[PointResult], charts: Mapping[str, Any], output: Path, *, title: str
) -> None:
    """Compare the first point and the best ones side by side on one page, with the charts."""
    from motionmerge.evaluation.figures import to_svg
    from motionmerge.evaluation.report.page import write_report
    from motionmerge.evaluation.report.sets import Figure, ReportSet

    best = [one for one in results[1:] if one.is_on_front]
    others = [one for one in results[1:] if not one.is_on_front]
    shown = [results[0], *best, *others][:_MOST_ON_THE_PAGE]
    write_report(
        [
            ReportSet(
                name=one.point.name,
                measured=one.measured,
                about={"on the front": "yes" if one.is_on_front else "no"},
            )
            for one in shown
        ],
        to=output / "report.html",
        title=f"Sweep of {title}",
        figures=[
            Figure(_TITLES.get(name, f"Along {name.partition('-')[2]}"), to_svg(chart))
            for name, chart in charts.items()
        ],
    )


def _charts(results: Sequence[PointResult]) -> Iterator[tuple[str, Any]]:
    from motionmerge.evaluation.sweeps.charts import curves_chart, front_chart

    yield "front", front_chart(results)
    for axis in results[0].point.values:
        if len({one.point.values[axis] for one in results}) > 1:
            yield f"curves-{axis}", curves_chart(results, axis=axis)


def _write_sheets(results: Sequence[PointResult], output: Path) -> None:
    """Draw the first videos' frames, a row for each point."""
    from motionmerge.io.video import contact_sheet, read_frames, spread_frames

    for number in range(min(_MOST_SHEETS, len(results[0].measured))):
        shown = [one for one in results if one.measured[number].failure is None]
        if not shown:
            continue
        videos = [read_frames(one.measured[number].source.path)[0] for one in shown]
        contact_sheet(
            [spread_frames(video) for video in videos],
            labels=[one.point.name for one in shown],
            path=output / f"sheet-{number + 1}.png",
        )


def _print_results(results: Sequence[PointResult], output: Path) -> None:
    from motionmerge.evaluation.metrics import HEADLINES
    from motionmerge.evaluation.sweeps.results import WANTED_HIGH

    for number, one in enumerate(results, start=1):
        parts = [
            f"{metric} {mean.text(HEADLINES[metric])}"
            for metric in WANTED_HIGH
            if (mean := one.mean(metric)) is not None
        ]
        if one.summary.num_warned:
            parts.append(f"{one.summary.num_warned} of {one.summary.num_measured} with warnings")
        mark = "*" if one.is_on_front else " "
        print(f"{mark}{number:3}  {one.point.name}: {'; '.join(parts) or 'nothing measured'}")
    print("* no other point has more of all: motion, fidelity to the photo, obedience")
    typer.echo(f"wrote {output / 'report.html'}; values, charts and sheets beside it", err=True)
