"""`motionmerge data check`: what is in a folder of training clips, and how much it moves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionmerge.cli.help import Verb, VerbGroup
from motionmerge.cli.measure import needs_eval_extra
from motionmerge.cli.merge import counting_bar
from motionmerge.cli.options import JsonOption, PartOption, destination
from motionmerge.cli.printing import harmless, print_json
from motionmerge.errors import ConfigError, DataError

if TYPE_CHECKING:
    from motionmerge.evaluation.clip_checks import CheckedClip
    from motionmerge.evaluation.clip_checks_page import ShownShot
    from motionmerge.training.clips_folder import FoundClips, LeftOut
    from motionmerge.training.clips_manifest import TrainingClip

SUMMARY = "Look at the clips that a model is to be trained on."
EXAMPLE = "Example: motionmerge data check clips -o checked"
MANIFEST, LEFT_OUT = "clips.jsonl", "left-out.jsonl"
SUMMARY_FILE, PAGE = "summary.json", "index.html"
LEAST_FRAMES = 16

_SLOW = 5.0  # pixels a second
_MOST_REASONS = 12

data_app = typer.Typer(help=SUMMARY, epilog=EXAMPLE, cls=VerbGroup, no_args_is_help=True)


@data_app.callback()
def of_training_clips() -> None:
    """Look at the clips that a model is to be trained on."""


@data_app.command("check", cls=Verb, epilog=EXAMPLE)
def check(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Videos with captions: metadata.csv or .jsonl, texts beside them, WebVid's csv, "
            "UCF101, or webdataset tars.",
        ),
    ],
    num_frames: Annotated[
        int, typer.Option(min=2, metavar="NUMBER", help="Frames that a shot must have to be kept.")
    ] = LEAST_FRAMES,
    caption: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Caption of clips that have none.",
            show_default="they are left out",
        ),
    ] = None,
    shard: PartOption = "1/1",
    output: Annotated[
        Path | None,
        destination(
            metavar="FOLDER",
            help="Folder for the manifest, the page, and what was found; clips that are there "
            "already are not decoded again.",
            show_default="nothing is kept",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find real frames, rates, cuts and motion of training clips, and what cannot be used.

    Every file is decoded once: headers are not believed. A clip is left out if it has no caption or
    two, cannot be read, is there twice, or has no shot that is long enough; each has its reason.
    Motion is that of `measure`, over the middle second of each shot.
    """
    with needs_eval_extra():
        from motionmerge.evaluation.clip_checks import KeptChecks, check_clips
        from motionmerge.evaluation.row_files import Shard
        from motionmerge.io.atomic import prepare_folder
        from motionmerge.training.clips_folder import find_clips

    part = Shard.parse(shard)
    if not part.is_whole and output is None:
        raise ConfigError("A part of the clips is kept nowhere.", fix="Add -o FOLDER.")
    if output is not None and output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            "The results would lie among the clips.", fix="Choose a folder outside it for -o."
        )
    found = find_clips(folder, caption=caption)
    kept = KeptChecks()
    if output is not None:
        prepare_folder(output)
        kept = KeptChecks.in_folder(output, part)
    with counting_bar(len(found.clips), shown=not as_json) as tell:
        checked = check_clips(
            [(clip.name, clip.place) for clip in found.clips],
            num_frames=num_frames,
            kept=kept,
            shard=part,
            progress=lambda name: tell(name[-40:], 1),
        )
    result = _judge(found, checked, num_frames=num_frames, default=caption, is_whole=part.is_whole)
    if output is not None and part.is_whole:
        _write(output, folder, result)
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)
        if output is not None and part.is_whole:
            typer.echo(f"wrote {output / PAGE} to look at, {output / MANIFEST} to train", err=True)
    if not result.clips and part.is_whole:
        raise DataError(f"Nothing in {folder} can be trained on.", fix=_way_out(result))


def _way_out(result: CheckResult) -> str:
    """Return what helps where no clip can be trained on."""
    from motionmerge.training.clips_folder import NO_CAPTION

    if any(one.reason == NO_CAPTION for one in result.left_out):
        return "Write each caption into a text beside its video (a.mp4, a.txt), or pass --caption."
    return "See the reasons above, or `--json`."


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a folder holds.

    Args:
        clips: What is kept.
        left_out: What is not, with reasons.
        notes: What is odd about clips that are kept.
    """

    clips: Sequence[TrainingClip]
    left_out: Sequence[LeftOut]
    notes: Sequence[tuple[str, str]]

    @cached_property
    def shots(self) -> list[ShownShot]:
        """Every shot of the kept clips."""
        from motionmerge.evaluation.clip_checks_page import ShownShot

        return [
            ShownShot(
                name=clip.name,
                place=clip.place,
                times=clip.times,
                first=shot.first,
                end=shot.end,
                motion=shot.motion,
                caption=clip.caption,
            )
            for clip in self.clips
            for shot in clip.shots
        ]

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """Counts, and the distributions of motion, rates and lengths over shots."""
        from motionmerge.evaluation.clip_checks import quantiles

        shots = self.shots
        seconds = [
            float(shot.times.seconds[shot.end - 1] - shot.times.seconds[shot.first])
            for shot in shots
        ]
        motions = [shot.motion for shot in shots if shot.motion is not None]
        return {
            "clips": len(self.clips),
            "shots": len(shots),
            "left_out": len(self.left_out),
            "hours": sum(seconds) / 3600,
            "frames": sum(shot.end - shot.first for shot in shots),
            "motion": quantiles(motions),
            "slow_share": sum(one < _SLOW for one in motions) / len(motions) if motions else None,
            "frame_rate": quantiles([shot.times.rate for shot in shots]),
            "seconds": quantiles(seconds),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything for `--json`."""
        return {
            "summary": self.numbers,
            "clips": [
                {
                    "name": clip.name,
                    "clip": clip.clip,
                    "caption": clip.caption,
                    "size": list(clip.size),
                    "num_frames": clip.times.num_frames,
                    "frame_rate": clip.times.rate,
                    "seconds": clip.times.duration,
                    "shots": [[shot.first, shot.end, shot.motion] for shot in clip.shots],
                }
                for clip in self.clips
            ],
            "left_out": [asdict(one) for one in self.left_out],
            "notes": [list(note) for note in self.notes],
        }


def _judge(
    found: FoundClips,
    checked: Sequence[CheckedClip],
    *,
    num_frames: int,
    default: str | None,
    is_whole: bool,
) -> CheckResult:
    """Decide what is kept; of a part of the clips, its own alone."""
    from motionmerge.training.clips_folder import LeftOut
    from motionmerge.training.clips_manifest import ClipShot, TrainingClip

    captions = {clip.name: clip.caption for clip in found.clips}
    left_out = list(found.left_out) if is_whole else []
    clips: list[TrainingClip] = []
    notes: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    # Of two files with the same bytes the one with a caption of its own is kept.
    for one in sorted(checked, key=lambda one: captions[one.name] == default):
        if one.survey is None or one.clip is None:
            left_out.append(LeftOut(one.name, one.failure or "It cannot be read."))
            continue
        first = seen.setdefault(one.clip, one.name)
        if first != one.name:
            left_out.append(LeftOut(one.name, f"It has the same bytes as {first}."))
            continue
        shots = []
        for (start, end), motion in zip(one.survey.shots, one.motions, strict=True):
            if end - start >= num_frames:
                shots.append(ClipShot(start, end, motion))
                continue
            where = f"{one.name}, frames {start} to {end - 1}"
            left_out.append(LeftOut(where, f"The shot has fewer than {num_frames} frames."))
        notes.extend((one.name, note) for note in one.survey.notes)
        if shots:
            clips.append(
                TrainingClip(
                    name=one.name,
                    place=one.place,
                    clip=one.clip,
                    num_bytes=one.num_bytes,
                    caption=captions[one.name],
                    size=one.survey.size,
                    times=one.survey.times,
                    shots=tuple(shots),
                )
            )
    clips.sort(key=lambda clip: clip.name)
    return CheckResult(clips=clips, left_out=left_out, notes=notes)


def _write(output: Path, folder: Path, result: CheckResult) -> None:
    """Write the manifest, what is left out, the numbers and the page."""
    from motionmerge.evaluation.clip_checks_page import write_checks_page
    from motionmerge.io.atomic import write_whole
    from motionmerge.training.clips_manifest import write_clips_manifest

    write_clips_manifest(output / MANIFEST, result.clips, folder=folder)
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in result.left_out]
    write_whole(output / LEFT_OUT, "".join(lines))
    write_whole(output / SUMMARY_FILE, json.dumps(result.numbers, indent=2) + "\n")
    write_checks_page(
        output / PAGE,
        result.shots,
        title=f"Training clips of {folder.absolute().name}",
        facts=_facts(result),
        notes=result.notes,
        left_out=[(one.name, one.reason) for one in result.left_out],
    )


def _facts(result: CheckResult) -> dict[str, str]:
    """Describe the numbers in words, by name."""
    numbers = result.numbers
    facts = {
        "kept": f"{numbers['clips']:,} clips, {numbers['shots']:,} shots, "
        f"{numbers['frames']:,} frames, {numbers['hours']:.2f} h",
        "left out": f"{numbers['left_out']:,}",
    }
    for name, label, unit in (
        ("motion", "motion", "px/s"),
        ("frame_rate", "frame rate", "frames/s"),
        ("seconds", "length of shots", "s"),
    ):
        if found := numbers[name]:
            shares = ", ".join(share.removesuffix(" %") for share in found)
            values = ", ".join(f"{value:.3g}" for value in found.values())
            facts[label] = f"{values} {unit} ({shares} % of the shots are below)"
    if numbers["slow_share"] is not None:
        facts["slow"] = f"{numbers['slow_share']:.0%} of the shots move less than {_SLOW:g} px/s"
    return facts


def _print(result: CheckResult) -> None:
    for name, text in _facts(result).items():
        print(f"{name:16} {text}")
    kinds = Counter(_kind(one.reason) for one in result.left_out)
    examples = {_kind(one.reason): one for one in reversed(result.left_out)}
    for kind, num in kinds.most_common(_MOST_REASONS):
        example = examples[kind]
        print(f"  {num:6,}  {harmless(f'{example.name}: {example.reason}'[:160])}")
    if len(kinds) > _MOST_REASONS:
        print(f"          and {len(kinds) - _MOST_REASONS} more reasons (--json lists all)")
    for name, note in result.notes[:_MOST_REASONS]:
        print(f"  note    {harmless(f'{name}: {note}'[:160])}")


def _kind(reason: str) -> str:
    """Return what reasons of one kind share: their first words."""
    return " ".join(reason.split()[:4])
