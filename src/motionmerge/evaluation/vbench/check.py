"""Find the files in a folder that VBench-I2V would miscount, before anything is measured.

VBench itself only warns: a set numbered 1 to 5 loses a fifth of its clips, a stray file in front
hides all, and the mean is over what is left.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av

from motionmerge.evaluation.vbench.suite import (
    NUM_SAMPLES,
    Entry,
    SuiteClip,
    clips_of_folder,
    clips_of_suite,
    videos_in,
)
from motionmerge.io.video import SAFE_OPTIONS

LONG_SECONDS = 5.0
"""From here on a clip belongs to VBench-Long."""

_MAX_NAME_BYTES = 240
_NUMBERED = re.compile(r"(.+?)[-_ ]+(?:sample[-_ ]?)?(\d+)", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """Something that VBench would count wrongly, or not at all.

    Attributes:
        kind: One word, for scripts.
        name: The file or prompt.
        message: What is wrong with it.
    """

    kind: str
    name: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a check found.

    Attributes:
        clips: The clips that would be measured.
        faults: What is wrong.
        renames: New names of files that are only named wrongly, in an order that overwrites none.
        num_frames: Frames of most clips; 0 if none can be read.
        height: Of most clips.
        width: Of most clips.
    """

    clips: Sequence[SuiteClip]
    faults: Sequence[Fault]
    renames: Mapping[str, str]
    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class _Format:
    num_frames: int
    height: int
    width: int
    fps: float


def check(
    folder: Path, *, entries: Sequence[Entry] | None = None, images: Path | None = None
) -> Checked:
    """Check a folder's names, counts, sizes, rates and lengths.

    Args:
        folder: Where the videos are.
        entries: VBench's list; None takes every video for what its name says.
        images: Folder of the first images.

    Raises:
        DataError: A folder cannot be listed.
    """
    videos = videos_in(folder)
    faults = list(_strays(folder))
    renames: dict[str, str] = {}
    if entries is None:
        clips = clips_of_folder(folder, images=images)
    else:
        renames, named = _names(videos, entries)
        faults += named
        clips = clips_of_suite(entries, folder, images=images)
        faults += _missing(videos, entries, renames)
    faults += _images(clips, wanted=images is not None)
    formats = {}
    for path in videos:
        found = _format(path)
        if isinstance(found, Fault):
            faults.append(found)
        else:
            formats[path.name] = found
            faults += _lengths(path.name, found)
    faults += _unequal(formats)
    most = Counter(formats.values()).most_common(1)
    usual = most[0][0] if most else _Format(0, 0, 0, 0)
    return Checked(
        clips=clips,
        faults=faults,
        renames=renames,
        num_frames=usual.num_frames,
        height=usual.height,
        width=usual.width,
    )


def _strays(folder: Path) -> Iterator[Fault]:
    videos = {path.name for path in videos_in(folder)}
    for path in sorted(folder.iterdir()):
        if path.name not in videos:
            message = "is no video; VBench takes the ending of all names from the first entry"
            yield Fault("stray", path.name, message)
    suffixes = sorted({Path(name).suffix for name in videos})
    if len(suffixes) > 1:
        yield Fault("ending", ", ".join(suffixes), "are endings of one set; VBench sees only one")


def _names(videos: Sequence[Path], entries: Sequence[Entry]) -> tuple[dict[str, str], list[Fault]]:
    """Match files with prompts; near misses get new names, all others are faults."""
    faults, near = [], {_plain(entry.prompt): entry.prompt for entry in entries}
    exact = {entry.prompt for entry in entries}
    for prompt in sorted(exact):
        if {"/", "\0"} & set(prompt) or len(prompt.encode()) > _MAX_NAME_BYTES:
            faults.append(Fault("prompt", prompt, "cannot be a file's name"))
    groups: dict[str, list[tuple[int, Path]]] = {}
    for path in videos:
        found = _NUMBERED.fullmatch(path.stem)
        text = found[1] if found else path.stem
        matched = text if text in exact else near.get(_plain(text))
        if matched is None:
            faults.append(Fault("unknown", path.name, "belongs to no prompt of the suite"))
        else:
            groups.setdefault(matched, []).append((int(found[2]) if found else 0, path))
    renames: dict[str, str] = {}
    for prompt, group in groups.items():
        group.sort(key=lambda pair: (pair[0], pair[1].name))
        numbers = [number for number, _ in group]
        fit = max(numbers) < NUM_SAMPLES and len(set(numbers)) == len(numbers)
        for order, (number, path) in enumerate(group):
            target = number if fit else order
            name = f"{prompt}-{target}{path.suffix}"
            if target >= NUM_SAMPLES:
                faults.append(Fault("extra", path.name, f"is sample {order + 1} of {NUM_SAMPLES}"))
            elif name != path.name:
                renames[path.name] = name
                faults.append(Fault("name", path.name, f"is looked for as {name}"))
    return _ordered(renames, {path.name for path in videos}), faults


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[_\s]+", " ", text).casefold().split()).rstrip(".")


def _ordered(renames: Mapping[str, str], present: set[str]) -> dict[str, str]:
    """Order renames so that none overwrites a file; leave out renames that form a ring."""
    waiting, there, ordered = dict(renames), set(present), {}
    while ready := [old for old, new in waiting.items() if new not in there]:
        for old in ready:
            if waiting[old] not in there:
                ordered[old] = waiting.pop(old)
                there = there - {old} | {ordered[old]}
    return ordered


def _missing(
    videos: Sequence[Path], entries: Sequence[Entry], renames: Mapping[str, str]
) -> Iterator[Fault]:
    stems = {Path(renames.get(path.name, path.name)).stem for path in videos}
    for entry in entries:
        lacking = [n for n in range(NUM_SAMPLES) if f"{entry.prompt}-{n}" not in stems]
        if lacking:
            numbers = ", ".join(map(str, lacking))
            yield Fault("missing", entry.prompt, f"has no sample {numbers} of 0 to 4")


def _images(clips: Sequence[SuiteClip], *, wanted: bool) -> Iterator[Fault]:
    if wanted:
        for prompt in sorted({clip.prompt for clip in clips if clip.image is None}):
            yield Fault("image", prompt, "has no first image")


def _format(path: Path) -> _Format | Fault:
    try:
        with av.open(f"file:{path}", options=SAFE_OPTIONS) as container:
            if not container.streams.video:
                return Fault("unreadable", path.name, "holds no video")
            stream = container.streams.video[0]
            num = stream.frames or sum(1 for _ in container.decode(stream))
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            found = _Format(num, stream.height, stream.width, rate)
    except (OSError, av.error.FFmpegError) as error:
        return Fault("unreadable", path.name, f"cannot be read: {error}")
    return found if num else Fault("unreadable", path.name, "holds no frame")


def _lengths(name: str, found: _Format) -> Iterator[Fault]:
    if found.num_frames == 1:
        yield Fault("one-frame", name, "has one frame: it ends a run of VBench with an error")
    elif found.num_frames == 2:
        yield Fault("two-frames", name, "has two frames: it is dynamic whatever it shows")
    if not found.fps:
        yield Fault("rate", name, "has no frame rate")
    elif (seconds := found.num_frames / found.fps) >= LONG_SECONDS:
        message = f"lasts {seconds:.2f} s; from {LONG_SECONDS} s on it belongs to VBench-Long"
        yield Fault("long", name, message)


def _unequal(formats: Mapping[str, _Format]) -> Iterator[Fault]:
    """Name the clips that differ from most others in size, rate or length."""
    views = {
        "size": lambda one: f"{one.width} x {one.height} pixels",
        "rate": lambda one: f"{one.fps:g} frames a second",
        "length": lambda one: f"{one.num_frames} frames",
    }
    for kind, view in views.items():
        texts = {name: view(one) for name, one in formats.items()}
        ((usual, _),) = Counter(texts.values()).most_common(1) or (("", 0),)
        for name, text in texts.items():
            if text != usual:
                yield Fault(kind, name, f"has {text}, most have {usual}")
