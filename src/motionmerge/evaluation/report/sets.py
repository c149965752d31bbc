"""Sets of measured videos, as a report compares them: how they are found, named and paired."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from motionmerge.errors import ConfigError, DataError
from motionmerge.evaluation.clips import read_comment
from motionmerge.evaluation.row_files import WHOLE
from motionmerge.evaluation.runs import Kept, Measured, measure_videos
from motionmerge.evaluation.sources import Photos, VideoSource, find_videos, id_in_name, source_of
from motionmerge.io.atomic import write_whole
from motionmerge.io.hashing import hash_file
from motionmerge.io.json_file import load_json
from motionmerge.io.paths import is_plain_file

Key = tuple[str, str, str]
"""Prompt, photo and seed or number: what videos share that are compared.

The photo is the SHA-256 of its file, or, where that is unknown, the id in our own videos' names.
"""

_NUMBER = re.compile(r"-(\d+)$")
_SHOWN = (
    *("family", "height", "width", "num_frames", "num_inference_steps", "guidance_scale"),
    *("boundary", "motionmerge"),
)


@dataclass(frozen=True, kw_only=True)
class ReportSet:
    """The videos of one model or setting, measured.

    Args:
        name: As the page calls it.
        measured: Its videos, also the ones that cannot be measured.
        about: What made it, such as preset and weight hash, by name.
        vbench: Raw scores of VBench-I2V in 0..1 by dimension, where there are some.
    """

    name: str
    measured: Sequence[Measured]
    about: Mapping[str, str] = field(default_factory=dict)
    vbench: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def by_key(self) -> Mapping[Key, Sequence[Measured]]:
        """The videos by what they can be paired by."""
        found: dict[Key, list[Measured]] = {}
        for one in self.measured:
            found.setdefault(pairing_key(one.source), []).append(one)
        return found


@dataclass(frozen=True)
class Figure:
    """A chart on the page.

    Args:
        title: Above it.
        svg: An `<svg>` element: trusted markup, with `currentColor` as its ink.
        caption: Below it.
    """

    title: str
    svg: str
    caption: str = ""


def pairing_key(source: VideoSource) -> Key:
    """Return what a video shares with those of other sets; its file's name if nothing is known."""
    number = _NUMBER.search(source.path.stem)
    take = str(source.seed) if source.seed is not None else number[1] if number else ""
    if source.prompt is None and source.photo is None:
        return "", "", source.path.stem
    try:
        photo = id_in_name(source.path) if source.photo is None else hash_file(source.photo)
    except OSError:  # it was there when it was found
        photo = str(source.photo)
    return source.prompt or "", photo or "", take


def check_sets(sets: Sequence[ReportSet], baseline: str | None) -> str:
    """Return the name of the baseline, by default the first set's.

    Raises:
        ConfigError: There is no set, two have one name, or none is called so.
    """
    names = [one.name for one in sets]
    if not names:
        raise ConfigError("There is no set of videos.", fix="Give at least one.")
    twice = [name for name, num in Counter(names).items() if num > 1]
    if twice:
        raise ConfigError(
            f"Two sets are called `{twice[0]}`.", fix="Give another name: `NAME=PATH`."
        )
    if baseline is not None and baseline not in names:
        raise ConfigError(
            f"`baseline` is `{baseline}`, and the sets are {', '.join(names)}.",
            fix="Name one of them.",
        )
    return baseline or names[0]


def split_name(text: str) -> tuple[str, Path]:
    """Read `NAME=PATH`, or a path that gives the name; a path that is there is taken as it is."""
    path = Path(text).expanduser()
    name, sign, rest = text.partition("=")
    if sign and name and rest and not path.exists():
        return name, Path(rest).expanduser()
    return path.resolve().name or str(path), path


def read_set(
    name: str,
    path: Path,
    *,
    photos: Photos | None = None,
    vbench: Mapping[str, float] | None = None,
    progress: Callable[[VideoSource], None] | None = None,
) -> ReportSet:
    """Read a set: videos are measured, except those of which `measure` kept rows in the folder.

    Args:
        name: See `ReportSet`.
        path: A folder of videos, a pattern, or the folder that `measure` wrote to.
        photos: Where photos are looked for, if `measure` has not found them.
        vbench: See `ReportSet`.
        progress: Called after each video.

    Raises:
        DataError: There is no video, or the rows contradict each other.
    """
    sources = sources_at(path, photos or Photos())
    kept = replace(Kept.in_folder(path, WHOLE), path=None) if path.is_dir() else Kept()
    measured = measure_videos(sources, kept=kept, progress=progress)
    return ReportSet(name=name, measured=measured, about=made_by(sources), vbench=vbench or {})


def sources_at(path: Path, photos: Photos) -> list[VideoSource]:
    """Find the videos of a folder or pattern, or those that `measure` listed in its folder.

    Raises:
        DataError: There is none, or the list is damaged.
    """
    return read_list(path) or [source_of(one, photos) for one in find_videos([path])]


LIST_FILE = "videos.json"
_MOST_BYTES = 256 << 20


def write_list(folder: Path, sources: Iterable[VideoSource]) -> None:
    """Write which videos the rows of a folder are of, for `read_list`.

    Raises:
        DataError: The file cannot be written.
    """
    rows = [
        {
            "path": str(one.path.resolve()),
            "prompt": one.prompt,
            "photo": None if one.photo is None else str(one.photo.resolve()),
            "seed": one.seed,
        }
        for one in sources
    ]
    write_whole(folder / LIST_FILE, json.dumps(rows, indent=1, ensure_ascii=False))


def read_list(folder: Path) -> list[VideoSource]:
    """Read which videos were measured into a folder; [] where that was not written.

    Raises:
        DataError: The file is damaged.
    """
    path = folder / LIST_FILE
    if not is_plain_file(path):
        return []
    try:
        return [
            VideoSource(
                Path(row["path"]),
                None if row["prompt"] is None else str(row["prompt"]),
                None if row["photo"] is None else Path(row["photo"]),
                row["seed"] if type(row["seed"]) is int else None,
            )
            for row in load_json(path, most_bytes=_MOST_BYTES)
        ]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path} is no list of videos: {str(error)[:200]}", fix="Measure the videos again."
        ) from error


def made_by(sources: Sequence[VideoSource]) -> dict[str, str]:
    """Return what our own videos of a set say of how they were made, where all say the same."""
    texts = [read_comment(one.path) for one in sources[:_MOST_READ] if one.path.is_file()]
    found = [_about(text) for text in texts]
    if not found or not all(found):
        return {}
    about = {}
    for name in dict.fromkeys(name for one in found for name in one):
        values = {one.get(name, "none") for one in found}
        about[name] = values.pop() if len(values) == 1 else f"{len(values)} different ones"
    return about


_MOST_READ = 200  # videos
_MOST_FILES = 6
_SHORT_HASH = len("sha256:") + 12


def _about(text: str) -> dict[str, str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    about = {name: str(value[name])[:80] for name in _SHOWN if value.get(name) is not None}
    weights = value.get("weights")
    if isinstance(weights, (str, list)):
        hashes = [weights] if isinstance(weights, str) else weights[:_MOST_FILES]
        about["weights"] = ", ".join(str(one)[:_SHORT_HASH] for one in hashes)
    recipe = value.get("recipe")
    if recipe is not None:
        about["recipe"] = str(recipe)[:2000]
    return about
