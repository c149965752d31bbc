"""`motionmerge measure`: how much any videos move, and how well, without downloading anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.merge import counting_bar
from motionmerge.cli.options import JsonOption, PartOption, destination
from motionmerge.cli.printing import harmless, print_json
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.evaluation.runs import Measured
    from motionmerge.evaluation.sources import VideoSource
    from motionmerge.evaluation.summary import FailWhen, Summary

EXAMPLE = 'Example: motionmerge measure videos --fail-when "motion_degree < 2"'
SUMMARY_FILE = "summary.json"

_MOST_LINES = 200
"""Videos that get a line of their own; all are in the folder's files."""


def measure(
    videos: Annotated[
        list[str],
        typer.Argument(metavar="VIDEOS", help="Videos, GIFs, folders that hold some, or patterns."),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Photos that the videos were made from: a folder with photos of the same names, "
            "or the one photo of all. A manifest beside the videos tells as well.",
        ),
    ] = None,
    shard: PartOption = "1/1",
    efflite0: Annotated[
        bool,
        typer.Option(
            "--efflite0",
            help="Also compare what EfficientNet-Lite0 sees: drift, consistency, likeness to the "
            "photo. Needs the extra eval-features.",
        ),
    ] = False,
    xfeat: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights of XFeat, xfeat.pt: finds large moves of the camera in blurred or dark "
            "videos, where the features that are matched otherwise find none.",
        ),
    ] = None,
    fail_when: Annotated[
        str | None,
        typer.Option(
            "--fail-when",
            metavar="CONDITION",
            help='Exit with 1 if a video meets it, or the set: "motion_degree < 2 or '
            'mean first_frame_psnr < 20".',
        ),
    ] = None,
    output: Annotated[
        Path | None,
        destination(
            metavar="FOLDER",
            help="Folder for the values; those already there are used.",
            show_default="nothing is kept",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure motion, camera, steadiness and fidelity of any videos; nothing is downloaded.

    Lengths are pixels a second in a frame 512 pixels wide. Prompt and seed are read from our own
    videos, from a sidecar or a manifest, or from names as VBench wants them. The exit code is 1 if
    a video cannot be measured or meets --fail-when.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.report.sets import write_list
        from motionmerge.evaluation.row_files import Shard
        from motionmerge.evaluation.runs import Kept, measure_videos
        from motionmerge.evaluation.sources import Photos, find_videos, source_of
        from motionmerge.evaluation.summary import FailWhen, summarise, worst_first
        from motionmerge.io.atomic import prepare_folder, write_whole

    condition = None if fail_when is None else FailWhen.parse(fail_when)
    part = Shard.parse(shard)
    if not part.is_whole and output is None:
        raise ConfigError("A part of the videos is kept nowhere.", fix="Add -o FOLDER.")
    networks: dict[str, str] = {}
    features = None
    if efflite0:
        from motionmerge.evaluation.semantic import SemanticFeatures

        features = SemanticFeatures.load()
        networks["efflite0"] = features.loaded.fingerprint
    matcher = None
    if xfeat is not None:
        from motionmerge.evaluation.backbones.xfeat import XFeat

        matcher = XFeat.load(xfeat)
        networks["xfeat"] = matcher.fingerprint
    photos = Photos.at(images)
    paths = find_videos(videos)
    kept = Kept()
    if output is not None:
        prepare_folder(output)
        kept = Kept.in_folder(output, part)
        (output / SUMMARY_FILE).unlink(missing_ok=True)  # of another set of videos, or of a part
    with counting_bar(len(paths), shown=not as_json) as tell:
        sources = [source_of(path, photos) for path in paths]
        _warn_of_missing_photos(sources, wanted=images)
        if output is not None:
            write_list(output, sources)
        measured = worst_first(
            measure_videos(
                sources,
                kept=kept,
                shard=part,
                features=features,
                xfeat=matcher,
                progress=lambda source: tell(source.path.name[-40:], 1),
            )
        )
    summary = summarise(measured)
    failing = _judge(condition, measured, summary)
    if output is not None and part.is_whole:
        kept_summary = {**summary.to_dict(), "networks": networks}
        write_whole(output / SUMMARY_FILE, json.dumps(kept_summary, indent=2) + "\n")
    if as_json:
        print_json(_result(measured, summary, failing, networks=networks))
    else:
        for name, fingerprint in networks.items():
            typer.echo(f"{name}: {fingerprint}", err=True)
        _print_lines(measured, summary)
        _print_failing(condition, failing)
    if summary.num_failed or failing:
        raise typer.Exit(1)


def _warn_of_missing_photos(sources: Sequence[VideoSource], *, wanted: Path | None) -> None:
    """Print on stderr which videos have no photo, if photos were given."""
    lacking = [source.path.name for source in sources if source.photo is None]
    if wanted is not None and lacking:
        typer.echo(
            f"{len(lacking)} of {len(sources)} videos have no photo in {wanted}, e.g. "
            f"{harmless(lacking[0])}. A photo is named as the video or its prompt; a single one is "
            "for all.",
            err=True,
        )


@contextmanager
def needs_eval_extra() -> Iterator[None]:
    """Name the extra where a package for measuring is missing; measuring needs no torch."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("cv2", "scipy", "av", "PIL"):
            raise
        raise ConfigError(
            f"This needs {package}, which is not installed.",
            fix="Run `pip install 'motionmerge[eval]'`.",
        ) from error


def _judge(
    condition: FailWhen | None, measured: Sequence[Measured], summary: Summary
) -> list[Measured]:
    if condition is None or not summary.num_measured:
        return []
    missing = condition.missing(measured)
    if missing:
        raise ConfigError(
            f"No video has the metric `{missing[0]}`, so `{condition.text}` cannot be judged.",
            fix="Add --images for the first frame, or prompts that name a camera move.",
        )
    return condition.failing(measured, summary)


def _result(
    measured: Sequence[Measured],
    summary: Summary,
    failing: Sequence[Measured],
    *,
    networks: Mapping[str, str],
) -> dict[str, Any]:
    from motionmerge.evaluation.motion import REFERENCE_WIDTH

    return {
        "reference_width": REFERENCE_WIDTH,
        "networks": networks,
        "videos": [
            {
                "path": str(one.source.path),
                "clip": one.clip,
                "prompt": one.source.prompt,
                "photo": None if one.source.photo is None else str(one.source.photo),
                "seed": one.source.seed,
                "failure": one.failure,
                "warnings": list(one.warnings),
                "values": dict(one.values),
            }
            for one in measured
        ],
        "failing": [str(one.source.path) for one in failing],
        "summary": summary.to_dict(),
    }


def _print_lines(measured: Sequence[Measured], summary: Summary) -> None:
    width = min(40, max((len(one.source.path.name) for one in measured), default=0))
    for one in measured[:_MOST_LINES]:
        mark = "!" if one.failure or one.warnings else " "
        print(f"{mark} {_short(one.source.path.name, width)}  {harmless(_line(one))}")
    if len(measured) > _MOST_LINES:
        print(f"  .. and {len(measured) - _MOST_LINES} more")
    print()
    counts = f"{summary.num_measured} measured, {summary.num_failed} cannot be measured"
    print(f"{counts}, {summary.num_warned} with warnings")
    if summary.num_clusters != summary.num_measured:
        # A video of which no prompt is known counts as a prompt of its own.
        prompts = f"{summary.num_clusters} prompt{'s'[: summary.num_clusters != 1]}"
        print(f"intervals are over {prompts}, each with its photo: several seeds count as one")
    if summary.labels:
        print("camera: " + ", ".join(f"{name} {num}" for name, num in summary.labels.items()))
    _print_means(summary)


def _print_means(summary: Summary) -> None:
    from motionmerge.evaluation.metrics import HEADLINES, METRICS

    for name, digits in HEADLINES.items():
        if name in summary.means:
            mean = summary.means[name].text(digits)
            unit = f" {METRICS[name].unit}" if METRICS[name].unit else ""
            print(f"  {name:20}  {mean}{unit}  n={summary.nums[name]}")
    if summary.dynamic_curve:
        curve = (f"{share:.2f} at {pixels:g}" for pixels, share in summary.dynamic_curve.items())
        print(f"  share dynamic, by px: {', '.join(curve)} (VBench's rule, its 6 px at 256)")


def _short(name: str, width: int) -> str:
    name = harmless(name)
    return (name if len(name) <= width else f"{name[: width - 12]}..{name[-10:]}").ljust(width)


def _line(one: Measured) -> str:
    """Describe a video in one line, the most important first."""
    if one.failure is not None:
        return f"cannot be measured: {one.failure.rstrip('.')}"
    parts = list(one.warnings)
    degree, own = one.number("motion_degree"), one.number("object_motion")
    if degree is not None:
        parts.append(f"motion {degree:.1f} px/s ({degree / 5.12:.1f} % of the width)")
    if own is not None:
        parts.append(f"objects {own:.1f} px/s")
    parts.append(_camera(one))
    decibels, alike = one.number("first_frame_psnr"), one.number("first_frame_ssim")
    if decibels is not None and alike is not None:
        parts.append(f"first frame {decibels:.1f} dB, {alike:.3f}")
    error = one.number("warp_error")
    if error is not None:
        parts.append(f"warp error {100 * error:.2f} %")
    return "; ".join(parts)


def _camera(one: Measured) -> str:
    text = f"camera {one.values['camera_label']}"
    amplitude = one.number("camera_amplitude")
    if amplitude is not None and amplitude >= 0.005:
        text += f" {100 * amplitude:.0f} %"
    agreed = one.number("camera_agreement")
    if agreed is not None:
        text += " as asked" if agreed else " (asked for another)"
    return text


def _print_failing(condition: FailWhen | None, failing: Sequence[Measured]) -> None:
    if condition is None:
        return
    names = harmless(", ".join(one.source.path.name for one in failing[:5]))
    more = f" and {len(failing) - 5} more" if len(failing) > 5 else ""
    print(f"fail when {condition.text}: {f'{names}{more}' if failing else 'no video'}")
