"""`motionmerge report`: sets of videos compared, or a training run, on a page to send on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from motionmerge.cli.measure import needs_eval_extra
from motionmerge.cli.merge import counting_bar
from motionmerge.cli.options import JsonOption, OverwriteOption, destination, output_option
from motionmerge.cli.printing import harmless, print_json
from motionmerge.errors import ConfigError

EXAMPLE = "Example: motionmerge report base=videos/base full=videos/full -o report.html"


def report(
    sets: Annotated[
        list[str],
        typer.Argument(
            metavar="SETS",
            help="Sets of videos: folders that hold some or that `measure -o` wrote to, or "
            "patterns; NAME=PATH names one. Or the folder of one training run.",
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The set that the others are compared to.",
            show_default="the first",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Photos that the videos were made from, as for `measure`."
        ),
    ] = None,
    vbench: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="VBench's result files of the set NAME, or a folder of such; repeatable.",
        ),
    ] = None,
    title: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Of the page.", show_default="what it is about"),
    ] = None,
    max_mb: Annotated[
        float,
        output_option(
            "--max-mb",
            metavar="NUMBER",
            min=0,
            help="About how large the page may get; videos beyond it are left out.",
        ),
    ] = 40,
    output: Annotated[
        Path,
        destination(
            metavar="FILE", help="The page; its table goes beside it as .csv, .json and .tex."
        ),
    ] = Path("report.html"),
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare sets of videos on one page: numbers with intervals, and the videos side by side.

    The page needs no other file and asks for none. Videos of the same prompt, photo and seed are
    paired. What `measure -o` kept in a folder is used; other videos are measured first.

    Of a training run the page shows losses, how much held-out videos move beside the base's, and
    these videos, step beside step.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.report.page import write_report
        from motionmerge.evaluation.report.sets import check_sets, read_set, split_name
        from motionmerge.evaluation.sources import Photos
        from motionmerge.evaluation.vbench.results import read_scores
        from motionmerge.io.atomic import check_new_file

    named = [split_name(text) for text in sets]
    if any(_is_run(path) for _, path in named):
        _refuse_for_a_run(named, {"baseline": baseline, "images": images, "vbench": vbench})
        check_new_file(output, overwrite=overwrite)
        ((name, folder),) = named
        title = f"Training run {name}" if title is None else title
        _report_run(folder, output, title=title, max_mb=max_mb, as_json=as_json)
        return
    title = "Videos compared" if title is None else title
    for suffix in (output.suffix, ".csv", ".json", ".tex"):
        check_new_file(output.with_suffix(suffix), overwrite=overwrite)
    scores = {
        name: read_scores(paths)
        for name, paths in _vbench_files(vbench or (), [name for name, _ in named]).items()
    }
    photos = Photos.at(images)
    found = []
    with counting_bar(len(named), shown=not as_json) as tell:
        for name, path in named:
            found.append(read_set(name, path, photos=photos, vbench=scores.get(name)))
            tell(name[-40:], 1)
    check_sets(found, baseline)
    written = write_report(found, to=output, title=title, baseline=baseline, max_megabytes=max_mb)
    if as_json:
        result = {
            "page": str(written.page),
            "tables": [str(path) for path in written.tables],
            "num_shown": written.num_shown,
            "num_left_out": written.num_left_out,
        }
        print_json(result)
        return
    scenes = "1 scene" if written.num_shown == 1 else f"{written.num_shown} scenes"
    print(f"Wrote {harmless(str(written.page))} with {scenes} side by side.")
    if not written.num_shown and len(found) > 1:
        print("No prompt, photo and seed is in two sets, so that nothing was paired.")
    if written.num_left_out:
        print(f"{written.num_left_out} more scenes had no room; allow them with --max-mb.")
    print(f"The table: {', '.join(harmless(path.name) for path in written.tables)}")


def _is_run(folder: Path) -> bool:
    return (folder / "log.jsonl").is_file() or (folder / "validation.jsonl").is_file()


def _refuse_for_a_run(named: Sequence[tuple[str, Path]], options: Mapping[str, object]) -> None:
    """Refuse what is for sets of videos alone."""
    run = next(path for _, path in named if _is_run(path))
    if len(named) > 1:
        raise ConfigError(
            f"{run} is a training run, which has a page of its own.",
            fix=f"Give it alone; or compare videos of its steps: {run}/videos/step-000000 and so "
            "on.",
        )
    for option, value in options.items():
        if value is not None and value != []:
            raise ConfigError(
                f"{run} is a training run; --{option} is for sets of videos.",
                fix=f"Leave --{option} out.",
            )


def _report_run(folder: Path, output: Path, *, title: str, max_mb: float, as_json: bool) -> None:
    with needs_eval_extra():
        from motionmerge.evaluation.report.training_page import write_training_page
        from motionmerge.evaluation.report.training_run import TrainingRun
    from motionmerge.training.run_log import LOG, VALIDATION_LOG, read_log

    run = TrainingRun.read(folder, read_log(folder / LOG), read_log(folder / VALIDATION_LOG))
    shown, left_out = write_training_page(run, to=output, title=title, max_megabytes=max_mb)
    if as_json:
        print_json({"page": str(output), "num_shown": shown, "num_left_out": left_out})
        return
    clips = "1 clip" if shown == 1 else f"{shown} clips"
    print(f"Wrote {harmless(str(output))} with the videos of {clips}, step beside step.")
    if left_out:
        print(f"{left_out} more had no room; allow them with --max-mb.")


def _vbench_files(given: Sequence[str], names: Sequence[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in names or not path:
            raise ConfigError(
                f"`{text}` names no set; there are {', '.join(names)}.",
                fix=f"Write --vbench {names[0]}=PATH.",
            )
        found.setdefault(name, []).append(Path(path).expanduser())
    return found
