"""`motionmerge evaluate vbench`, `check` and `total`: VBench-I2V of any videos."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from motionmerge.cli.merge import counting_bar, parse_inputs
from motionmerge.cli.options import (
    JsonOption,
    PartOption,
    ResultsOption,
    model_option,
    output_option,
)
from motionmerge.cli.printing import FEW, aligned, harmless, print_first, print_json, quoted
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.evaluation.vbench.check import Checked
    from motionmerge.evaluation.vbench.results import Score
    from motionmerge.evaluation.vbench.suite import Entry

_RESULTS, _SUMMARY_FILE = "motionmerge", "summary.json"


FolderArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder of the videos, PROMPT-NUMBER.mp4.")
]
SuiteOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="VBench's list of prompts, vbench2_i2v_full_info.json.",
        show_default="every video, its prompt its name",
    ),
]
ImagesOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder of the first images.")
]


def vbench(
    folder: FolderArgument,
    suite: SuiteOption = None,
    images: ImagesOption = None,
    dimension: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Measure this only; repeatable.", show_default="all"),
    ] = None,
    weights: Annotated[
        list[str] | None,
        model_option(
            metavar="NAME=PATH",
            help="A network's weights, or a plugin's Python file, e.g. raft=raft-things.pth; "
            "repeatable. Names that are missing are printed.",
        ),
    ] = None,
    old_resize: Annotated[
        bool,
        typer.Option(
            "--old-resize",
            help="Resize as torchvision did before 0.17, for numbers of before 2024.",
        ),
    ] = False,
    device: Annotated[
        Literal["cpu", "cuda"],
        model_option(help="Where the networks compute; plugins choose for themselves."),
    ] = "cpu",
    shard: PartOption = "1/1",
    dry_run: Annotated[
        bool, output_option("--dry-run", help="Show what is on and the time it takes.")
    ] = False,
    output: ResultsOption = Path("evaluation-vbench"),
    as_json: JsonOption = False,
) -> None:
    """Measure VBench-I2V's dimensions, all those whose networks are given."""
    from motionmerge.evaluation.row_files import Shard
    from motionmerge.evaluation.vbench.check import check as check_videos
    from motionmerge.evaluation.vbench.frames import ERAS
    from motionmerge.evaluation.vbench.results import aggregate, vbench_json, write_vbench
    from motionmerge.evaluation.vbench.run import estimate_seconds, missing_files, plan, run
    from motionmerge.evaluation.vbench.sources import Networks
    from motionmerge.evaluation.vbench.total import DIMENSIONS
    from motionmerge.io.atomic import check_folder, write_whole

    wanted = _known(dimension) if dimension else DIMENSIONS
    part = Shard.parse(shard)
    given = parse_inputs(weights or (), flag="--weights")
    networks = Networks({name: Path(path) for name, path in given.items()}, {}, device)
    era = ERAS[1] if old_resize else ERAS[0]
    checked = check_videos(folder, entries=_entries(suite), images=images)
    check_folder(output)
    off = missing_files(networks, wanted)
    hashes = {
        source: digest
        for name in wanted
        if name not in off
        for source, digest in networks.hashes(name).items()
    }
    jobs = plan(checked.clips, networks, era=era, dimensions=wanted, shard=part)
    seconds = estimate_seconds(
        jobs, num_frames=checked.num_frames, height=checked.height, width=checked.width
    )
    if not as_json:
        _print_before(checked, hashes, off, num_jobs=len(jobs), seconds=seconds)
    facts = {
        "resize": era,
        "device": device,
        "networks": hashes,
        "off": off,
        "shard": shard,
        "estimated_seconds": round(seconds, 1),
    }
    if dry_run:
        if as_json:
            print_json({**facts, "faults": [vars(fault) for fault in checked.faults]})
        return
    _remove_results(output)
    with counting_bar(len(jobs), shown=not as_json) as tell:
        rows = run(
            jobs,
            networks,
            era=era,
            folder=output,
            shard=part,
            progress=lambda name: tell(name, 1),
        )
    scores = aggregate(rows)
    summary = {**facts, **_summary(scores)}
    written = []
    if part.is_whole:
        written = write_vbench(output, _RESULTS, vbench_json(scores, checked.clips))
        write_whole(output / _SUMMARY_FILE, json.dumps(summary, indent=2))
    if as_json:
        print_json(summary)
        return
    _print_scores(scores)
    _print_totals(summary)
    if not part.is_whole:
        typer.echo(f"part {shard} alone; run the verb without --shard for the whole", err=True)
    for path in written:
        typer.echo(f"wrote {path}", err=True)


def check(
    folder: FolderArgument,
    suite: SuiteOption = None,
    images: ImagesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find what VBench-I2V would miscount in a folder of videos; end with 1 if there is any."""
    from motionmerge.evaluation.vbench.check import check as check_videos

    checked = check_videos(folder, entries=_entries(suite), images=images)
    if as_json:
        faults = [vars(fault) for fault in checked.faults]
        print_json({"clips": len(checked.clips), "faults": faults, "renames": checked.renames})
    else:
        print(f"{len(checked.clips)} clips, {len(checked.faults)} faults")
        _print_faults(checked)
        for old, new in checked.renames.items():
            old_path, new_path = (quoted(folder / name) for name in (old, new))
            print(f"mv -n -- {old_path} {new_path}")
    if checked.faults:
        raise typer.Exit(1)


def total(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES",
            help="Result files of VBench or FastVideo, of one method; or a folder of such for "
            "each method.",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Compute VBench-I2V's Quality, I2V and Total scores; several folders stand side by side."""
    from motionmerge.evaluation.vbench.results import read_scores

    if len(files) > 1 and all(path.is_dir() for path in files):
        _print_beside(files, as_json=as_json)
        return
    scores = read_scores(files)
    found = _totals(scores)
    if as_json:
        print_json({"scores": scores, **found})
        return
    for name, score in scores.items():
        print(f"{name:<24}{100 * score:7.2f} %")
    _print_totals(found)


def _print_beside(folders: Sequence[Path], *, as_json: bool) -> None:
    """Print a column for each method; what a total lacks is in the method's own."""
    from motionmerge.evaluation.vbench.results import read_scores
    from motionmerge.evaluation.vbench.total import DIMENSIONS

    scores = {path.name: read_scores([path]) for path in folders}
    if len(scores) < len(folders):
        scores = {str(path): read_scores([path]) for path in folders}
    found = {name: {"scores": own, **_totals(own)} for name, own in scores.items()}
    if as_json:
        print_json(found)
        return
    rows = [["%", *map(harmless, scores)]]
    for name in DIMENSIONS:
        if any(name in own for own in scores.values()):
            rows.append([name, *(_percent(own.get(name)) for own in scores.values())])
    for name in ("quality", "i2v", "total"):
        rows.append([name, *(_percent(own.get(name)) for own in found.values())])
    print("\n".join(aligned(rows, numbers=True)))


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.2f}"


def _entries(suite: Path | None) -> list[Entry] | None:
    from motionmerge.evaluation.vbench.suite import read_suite

    return None if suite is None else read_suite(suite)


def _known(names: Iterable[str]) -> tuple[str, ...]:
    from motionmerge.evaluation.vbench.total import DIMENSIONS

    wanted = set(names)
    if unknown := sorted(wanted - set(DIMENSIONS)):
        raise ConfigError(
            f"`{unknown[0]}` is no dimension of VBench-I2V.", fix=f"Use {', '.join(DIMENSIONS)}."
        )
    return tuple(name for name in DIMENSIONS if name in wanted)


def _print_before(
    checked: Checked,
    hashes: Mapping[str, str],
    off: Mapping[str, Mapping[str, str]],
    *,
    num_jobs: int,
    seconds: float,
) -> None:
    """Print what is off, what would switch it on, what is wrong with the clips, and the time."""
    for dimension, files in off.items():
        typer.echo(f"off: {dimension}", err=True)
        for name, what in files.items():
            typer.echo(f"    --weights {name}=PATH  {what}", err=True)
    if checked.faults:
        typer.echo(
            f"{len(checked.faults)} faults of names, counts or lengths; "
            "`motionmerge evaluate check` lists them.",
            err=True,
        )
    for name, digest in hashes.items():
        typer.echo(f"{name}: {digest}", err=True)
    typer.echo(
        f"{len(checked.clips)} clips, {num_jobs} values to measure: about {_duration(seconds)} on "
        "one CPU core, less what is already there.",
        err=True,
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print_faults(checked: Checked) -> None:
    kinds: dict[str, list[str]] = {}
    for fault in checked.faults:
        kinds.setdefault(fault.kind, []).append(f"{fault.name} {fault.message}")
    for kind, texts in kinds.items():
        print(f"{kind}: {len(texts)}")
        print_first(texts)


def _summary(scores: Mapping[str, Score]) -> dict[str, Any]:
    raw = {name: score.score for name, score in scores.items() if score.score is not None}
    dimensions = {
        name: {"score": score.score, "n": len(score.rows), "faults": dict(score.faults)}
        for name, score in scores.items()
    }
    return {"dimensions": dimensions, **_totals(raw)}


def _totals(raw: Mapping[str, float]) -> dict[str, Any]:
    """Return the totals that all needed dimensions are there for, and what the others lack."""
    from motionmerge.evaluation.vbench.total import I2V, QUALITY, mean_of

    found: dict[str, Any] = {}
    for name, dimensions in (("quality", QUALITY), ("i2v", I2V), ("total", QUALITY + I2V)):
        lacking = [dimension for dimension in dimensions if dimension not in raw]
        if lacking:
            found.setdefault("missing", {})[name] = lacking
        elif name == "total":
            found[name] = (found["quality"] + found["i2v"]) / 2
        else:
            found[name] = mean_of(dimensions, raw)
    return found


def _print_scores(scores: Mapping[str, Score]) -> None:
    for name, score in scores.items():
        value = "      -  " if score.score is None else f"{100 * score.score:7.2f} %"
        print(f"{name:<24}{value}  n = {len(score.rows)}")
        for video, why in list(score.faults.items())[:FEW]:
            print(f"    not counted: {harmless(video)}: {harmless(why)}")


def _print_totals(found: Mapping[str, Any]) -> None:
    missing: Mapping[str, Sequence[str]] = found.get("missing", {})
    for name in ("quality", "i2v", "total"):
        if name in found:
            print(f"{name:<24}{100 * found[name]:7.2f} %")
        else:
            print(f"{name:<24}      -    without {', '.join(missing[name])}")


def _remove_results(folder: Path) -> None:
    """Remove results of another run, so that they do not lie beside the rows of a part."""
    from motionmerge.evaluation.vbench.results import results_in

    for path in (folder / _SUMMARY_FILE, *results_in(folder, _RESULTS)):
        path.unlink(missing_ok=True)
