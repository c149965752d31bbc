"""`motionmerge sweep`: a recipe's numbers over a grid, on the same photos, measured and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.batch import progress_printer
from motionmerge.cli.bench import (
    SceneFlags,
    VariantBuilder,
    open_model,
    own_recipe,
    variant_maker,
)
from motionmerge.cli.flag_groups import with_flags
from motionmerge.cli.measure import needs_eval_extra
from motionmerge.cli.merge import counting_bar
from motionmerge.cli.options import (
    JsonOption,
    PlanOption,
    RayOption,
    RecipeArgument,
    ResultsOption,
    WorkersOption,
    expert_option,
)
from motionmerge.cli.printing import print_json
from motionmerge.cli.video_flags import (
    StepPlanner,
    VideoFlags,
    without_left_out,
)
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.evaluation.sweeps.grid import Point
    from motionmerge.evaluation.sweeps.pace import Pace
    from motionmerge.evaluation.sweeps.results import PointResult
    from motionmerge.sampling.batch.batch import Failure
    from motionmerge.sampling.batch.manifest import VideoJob
    from motionmerge.sampling.batch.variants import PlannedVariant, VariantMaker
    from motionmerge.sampling.request.model import ModelChoice

EXAMPLE = "Example: motionmerge sweep pocket --over motion=0,1 --manifest a.jsonl -o out"

_STRATEGIES = "dynamics-first, consistency-first, dynamics-alone, consistency-alone, averaged"
_TITLES = {"front": "Motion against fidelity; full dots are beaten by no other"}
_MOST_SHEETS = 3


@with_flags
def sweep(
    recipe: RecipeArgument,
    output: ResultsOption,
    over: Annotated[
        list[str] | None,
        expert_option(
            metavar="NAME=VALUES",
            help="A parameter of the recipe, or boundary, and its values: FROM:TO:COUNT or A,B,C; "
            "repeatable, for every combination.",
        ),
    ] = None,
    strategy: Annotated[
        str,
        expert_option(
            metavar="NAMES",
            help=f"How the two experts are used, with commas between: {_STRATEGIES}.",
        ),
    ] = "dynamics-first",
    scenes: SceneFlags = SceneFlags(),
    flags: VideoFlags = VideoFlags(),
    ray: RayOption = False,
    workers: WorkersOption = None,
    dry_run: PlanOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make the same videos at every point of a grid of a recipe's numbers, and measure them.

    Photos, prompts and seeds are the same at all points. Writes a page with the best points side by
    side, curves with 95 % bands, the front of motion against fidelity and obedience, sheets of
    frames, and all values as JSON and CSV. The same command goes on after a kill.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.sweeps.grid import Axis, points_of

    if flags.boundary is not None:
        raise ConfigError("--boundary is one value.", fix="Write --over boundary=0.5,0.64,0.9.")
    axes = [Axis.parse(text) for text in over or ()]
    strategies = list(dict.fromkeys(name.strip() for name in strategy.split(",")))
    if not axes and len(strategies) == 1:
        raise ConfigError(
            "There is nothing to sweep.", fix="Add e.g. --over motion=-0.5:1:7, or strategies."
        )
    chosen = own_recipe(flags, recipe)
    model = open_model(flags, scenes, ray=ray, workers=workers)
    points = points_of(chosen, axes, strategies=strategies)
    run_points(
        points,
        flags,
        model=model,
        read_jobs=lambda: scenes.jobs(flags, model),
        output=output,
        page=SweepPage(recipe, title=f"Sweep of {recipe}"),
        ray=ray,
        workers=workers,
        dry_run=dry_run,
        as_json=as_json,
    )


@dataclass(frozen=True)
class SweepPage:
    """How results are presented.

    Attributes:
        subject: What the points are of, as the values' file calls it.
        title: Of the page.
        left_out: Why points are missing that one may look for, by name.
        most: How many points it shows.
    """

    subject: str
    title: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    most: int = 8


def run_points(
    points: Sequence[Point],
    flags: VideoFlags,
    *,
    model: ModelChoice,
    read_jobs: Callable[[], Sequence[VideoJob]],
    output: Path,
    page: SweepPage,
    ray: bool = False,
    workers: int | None = None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make the videos of points that are missing, measure them, write page, charts and values.

    Args:
        points: Each with its recipe; the others are compared with the first.
        flags: What else decides the weights and the videos.
        model: What makes them.
        read_jobs: Lists the videos of each point.
        output: Where everything goes.
        page: How it is presented.
        ray, workers, dry_run, as_json: As the flags of these names.

    Raises:
        MotionMergeError: A video cannot be made with this model.
        typer.Exit: Some videos failed.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.row_files import WHOLE
        from motionmerge.evaluation.runs import Kept
        from motionmerge.evaluation.sweeps.pace import Pace, duration, work_of
        from motionmerge.evaluation.sweeps.results import results_of
        from motionmerge.evaluation.sweeps.videos import measure_planned
    from motionmerge.io.atomic import check_folder, prepare_folder
    from motionmerge.sampling.batch.variants import missing_of

    check_folder(output)
    jobs = read_jobs()
    maker = variant_maker(model, output / "videos", ray=ray, workers=workers)
    planned = _plan(points, flags, maker, jobs, to_stderr=as_json)
    left_of = missing_of(planned)
    left = [video.job for videos in left_of for video in videos]
    pace = Pace(output, maker.kind)
    seconds = pace.seconds(work_of(left), loads=sum(map(bool, left_of)))
    if not as_json:
        size = f"{len(points)} points of {len(jobs)} videos each"
        print(f"{size}, {len(left)} to make: {duration(seconds)}")
    if dry_run:
        if as_json:
            plan = {"points": [one.name for one in points], "missing": len(left)}
            print_json({**plan, "seconds": seconds, **_left_out(page)})
        return
    prepare_folder(output / "videos")
    failures = _make(planned, maker, pace)
    num_videos = len({video.path for one in planned for video in one.videos})
    with counting_bar(num_videos, shown=not as_json) as tell:
        kept = Kept.in_folder(output, WHOLE)
        measured = measure_planned(planned, kept, progress=lambda name: tell(name[-40:], 1))
    results = results_of(measured, points)
    _write(results, output, page=page)
    if as_json:
        print((output / "sweep.json").read_text(encoding="utf-8"))
    else:
        _print_results(results, output)
    if failures:
        typer.echo(f"{len(failures)} videos failed, e.g. {failures[0].error}", err=True)
        raise typer.Exit(1)


def _left_out(page: SweepPage) -> dict[str, Mapping[str, str]]:
    """Return what a page leaves out, as the values' file has it."""
    return {"left_out": page.left_out} if page.left_out else {}


def _plan(
    points: Sequence[Point],
    flags: VideoFlags,
    maker: VariantMaker,
    jobs: Sequence[VideoJob],
    *,
    to_stderr: bool,
) -> list[PlannedVariant]:
    """Find the weights of every point, and name its videos; equal points share theirs.

    Prints every point with what denoises which of its steps, once its weights are found.
    """
    from motionmerge.sampling.batch.manifest import check_number

    check_number(len(points) * len(jobs), source="the sweep")
    build = VariantBuilder(flags, maker.model)
    planned = []
    for number, point in enumerate(points, start=1):
        variant = build(point.name, point.recipe, boundary=point.boundary)
        planner = StepPlanner(maker.model, variant.experts)
        planner.add(jobs[0].settings)
        about = ": ".join([f"{number:3}  {point.name}", *planner.lines()])
        typer.echo(about, err=to_stderr)
        planner.warn()
        planned.append(maker.plan(variant, jobs))
    return planned


def _make(planned: Sequence[PlannedVariant], maker: VariantMaker, pace: Pace) -> Sequence[Failure]:
    """Make the videos that are missing, point by point."""
    from motionmerge.evaluation.sweeps.pace import work_of
    from motionmerge.sampling.batch.batch import Tally
    from motionmerge.sampling.batch.variants import missing_of

    left = missing_of(planned)
    todo = [video for videos in left for video in videos]
    if not todo:
        return ()
    found = len({video.path for one in planned for video in one.videos}) - len(todo)
    maker.prepare()
    tally = Tally(len(todo), on_progress=progress_printer(0, 1, found))
    try:
        with without_left_out():
            for one, videos in zip(planned, left, strict=True):
                maker.make(one, videos, tally=tally)
    finally:  # Ctrl-C too: the same command then says how long the rest takes
        tally.has_loaded()
        report, loading = tally.report(), tally.seconds_loading
        made = [[video.job for video in videos if video.path.exists()] for videos in left]
        if any(made) and not report.failures:
            pace.add(
                sum(map(work_of, made)),
                report.seconds - loading,
                loads=sum(map(bool, made)),
                loading=loading,
            )
    return report.failures


def _write(results: Sequence[PointResult], output: Path, *, page: SweepPage) -> None:
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
    found = {"recipe": page.subject, **_left_out(page), "points": table}
    files["sweep.json"] = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    files["sweep.csv"] = csv_text(to_table(results))
    shown = _shown(results)[: page.most]
    charts = dict(_charts(results, shown=shown))
    files |= {f"{name}.png": to_png(figure) for name, figure in charts.items()}
    for name, content in files.items():
        write_whole(output / name, content)
    _write_sheets(results, output)
    _write_report(shown, charts, output, page=page)


def _shown(results: Sequence[PointResult]) -> list[PointResult]:
    """Order points for a page: the first, those of the front, the others."""
    return [results[0], *sorted(results[1:], key=lambda one: not one.is_on_front)]


def _write_report(
    shown: Sequence[PointResult], charts: Mapping[str, Any], output: Path, *, page: SweepPage
) -> None:
    """Compare the first point and the best ones side by side on one page, with the charts.

    Points whose videos are the same, as some value changes nothing there, are on it once.
    """
    from motionmerge.evaluation.figures import to_svg
    from motionmerge.evaluation.report.page import write_report
    from motionmerge.evaluation.report.sets import Figure, ReportSet, made_by

    about = ["beside each point its number in sweep.csv, and how often the camera went as told"]
    about += [f"without {name}: {why}" for name, why in page.left_out.items()]
    write_report(
        [
            ReportSet(
                name=one.point.name,
                measured=one.measured,
                about={
                    "on the front": "yes" if one.is_on_front else "no",
                    **made_by([video.source for video in one.measured]),
                },
            )
            for one in _each_once(shown)
        ],
        to=output / "report.html",
        title=page.title,
        figures=[
            Figure(_TITLES[name], to_svg(chart), caption="; ".join(about))
            if name in _TITLES
            else Figure(f"Along {name.partition('-')[2]}", to_svg(chart))
            for name, chart in charts.items()
        ],
    )


def _each_once(results: Sequence[PointResult]) -> list[PointResult]:
    """Leave out points whose videos are those of an earlier one."""
    found: dict[tuple[Path, ...], PointResult] = {}
    for one in results:
        found.setdefault(tuple(video.source.path for video in one.measured), one)
    return list(found.values())


def _charts(
    results: Sequence[PointResult], *, shown: Sequence[PointResult]
) -> Iterator[tuple[str, Any]]:
    from motionmerge.evaluation.sweeps.charts import curves_chart, front_chart

    yield "front", front_chart(results, first=shown)
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
    from motionmerge.evaluation.metrics import HEADLINES, METRICS
    from motionmerge.evaluation.sweeps.results import WANTED_HIGH

    for number, one in enumerate(results, start=1):
        parts = [
            f"{metric} {mean.text(HEADLINES[metric])} {METRICS[metric].unit}".rstrip()
            for metric in WANTED_HIGH
            if (mean := one.mean(metric)) is not None
        ]
        if one.summary.num_warned:
            parts.append(f"{one.summary.num_warned} of {one.summary.num_measured} with warnings")
        mark = "*" if one.is_on_front else " "
        print(f"{mark}{number:3}  {one.point.name}: {'; '.join(parts) or 'nothing measured'}")
    print("* no other point has more of all: motion, fidelity to the photo, obedience")
    typer.echo(f"wrote {output / 'report.html'}; values, charts and sheets beside it", err=True)
