"""Find the clips of a folder and their captions, in the layouts in which people keep them.

Tables (`metadata.csv`, `metadata.jsonl`, WebVid's csv), a text beside each video, UCF101's names,
and webdataset tars; several may be mixed. Whatever is left out has a reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from motionmerge.errors import DataError
from motionmerge.io.decoding import SUFFIXES, ClipPlace
from motionmerge.io.paths import behind_links, is_folder, is_plain_file, open_plain_file
from motionmerge.io.ucf101_names import class_in_name, words_of_class
from motionmerge.training.caption_tables import MOST_ROWS, checked_caption, read_table
from motionmerge.training.clip_tars import read_tar

_TABLES = (".csv", ".jsonl")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".parquet")
_MOST_SIDECAR = 1 << 20
_LONGEST_NAME = 1000

NO_CAPTION = "It has no caption."
"""Why a clip is left out to which neither a file nor its name gives words."""


@dataclass(frozen=True, kw_only=True)
class FoundClip:
    """A video with its caption.

    Args:
        name: Path in the folder with `/`; of a tar's member, the tar's and its own.
        place: Where its bytes are.
        caption: What it shows.
    """

    name: str
    place: ClipPlace
    caption: str


@dataclass(frozen=True)
class LeftOut:
    """Something that is not trained on.

    Args:
        name: Path in the folder, or table and line.
        reason: A sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class FoundClips:
    """What is in a folder: `clips` by name, and what is `left_out` with reasons."""

    clips: tuple[FoundClip, ...]
    left_out: tuple[LeftOut, ...]


@dataclass
class _Captions:
    """Captions by the names of videos, each with where it is from."""

    by_name: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: list[LeftOut] = field(default_factory=list)
    unusable: set[str] = field(default_factory=set)

    def add(self, name: str, caption: str, origin: str) -> None:
        self.by_name.setdefault(name, {}).setdefault(caption, origin)

    def refuse(self, name: str, reason: str) -> None:
        self.unusable.add(name)
        self.faults.append(LeftOut(name, reason))


def find_clips(folder: Path, *, caption: str | None = None) -> FoundClips:
    """List the videos of a folder that have one caption.

    Args:
        folder: With folders inside; hidden ones and links to folders are not entered.
        caption: Of clips that have none; by default they are left out.

    Raises:
        DataError: It is no folder, holds no video, too many, or a table that cannot be read; or
            `caption` is too long.
    """
    if not is_folder(folder):
        raise DataError(f"{folder} is no folder.", fix="Give a folder of videos.")
    if caption:
        caption = checked_caption(caption)
    videos: dict[str, ClipPlace] = {}
    captions = _Captions()
    tables: list[Path] = []
    for path in _files_in(folder):
        name = path.relative_to(folder).as_posix()
        suffix = path.suffix.lower()
        if not is_plain_file(path):
            if suffix in (*SUFFIXES, ".tar"):
                captions.refuse(name, "It is no file, or a link that leads nowhere.")
        elif suffix in (*SUFFIXES, ".tar") and not _is_inside(path, folder):
            captions.refuse(name, "It is a link that leads out of the folder.")
        elif suffix in SUFFIXES:
            videos[name] = ClipPlace(path)
            _add_sidecar(captions, name, path)
        elif suffix == ".tar":
            _add_tar(captions, videos, name, path)
        elif suffix in _TABLES and (path.parent == folder or path.stem == "metadata"):
            tables.append(path)
        elif name.lower().endswith(_COMPRESSED):
            captions.refuse(name, "It cannot be read as it is: unpack it.")
        if len(videos) > MOST_ROWS:
            raise DataError(
                f"{folder} holds more than {MOST_ROWS:,} videos.", fix="Share them between folders."
            )
    for table in tables:
        _add_table(captions, videos, table, folder)
    return _combined(folder, videos, captions, caption)


def _files_in(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent) / name


def _is_inside(path: Path, folder: Path) -> bool:
    """Check that a file lies in the folder also behind links; the hub's cache has blobs aside."""
    root = behind_links(folder)
    if root.parent.name == "snapshots":
        root = root.parent.parent
    return behind_links(path).is_relative_to(root)


def _add_sidecar(captions: _Captions, name: str, path: Path) -> None:
    text = path.with_suffix(".txt")
    if not is_plain_file(text):
        return
    try:
        with open_plain_file(text) as file:
            content = file.read(_MOST_SIDECAR + 1).decode("utf-8-sig")
        caption = checked_caption(content)
    except (OSError, UnicodeDecodeError) as error:
        captions.refuse(name, f"The text beside it cannot be read: {str(error)[:200]}.")
    except DataError as error:
        captions.refuse(name, error.message)
    else:
        if caption is not None:
            captions.add(name, caption, text.name)


def _add_tar(captions: _Captions, videos: dict[str, ClipPlace], name: str, path: Path) -> None:
    try:
        for clip in read_tar(path):
            member = f"{name}/{clip.name}"
            videos[member] = clip.place
            if clip.fault is not None:
                captions.refuse(member, clip.fault)
            elif clip.caption is not None:
                captions.add(member, clip.caption, name)
    except DataError as error:
        captions.refuse(name, error.message)


def _add_table(
    captions: _Captions, videos: dict[str, ClipPlace], table: Path, folder: Path
) -> None:
    base = PurePosixPath(table.parent.relative_to(folder).as_posix())
    for row in read_table(table, must_have_columns=table.stem == "metadata"):
        names = [_joined(base, name) for name in row.names]
        if None in names:
            captions.faults.append(
                LeftOut(row.origin, f"It leads out of the folder: {row.names[0][:100]!r}.")
            )
            continue
        known = next((name for name in names if name in videos), None)
        if known is None:
            reason = row.fault or f"There is no video {row.names[0][:200]}."
            if names and names[0] in captions.unusable:
                continue  # its reason is there already
            captions.faults.append(LeftOut(row.origin, reason))
        elif row.fault is not None:
            captions.refuse(known, f"{row.origin}: {row.fault}")
        elif row.caption is not None:
            captions.add(known, row.caption, row.origin)


def _joined(base: PurePosixPath, name: str) -> str | None:
    """Return a name relative to the whole folder; None if it leads out of it, or is no name."""
    path = PurePosixPath(name)
    is_odd = "\0" in name or "\\" in name or len(name) > _LONGEST_NAME
    if is_odd or path.is_absolute() or ".." in path.parts or name[1:2] == ":":
        return None
    return (base / path).as_posix()


def _combined(
    folder: Path, videos: dict[str, ClipPlace], captions: _Captions, default: str | None
) -> FoundClips:
    clips, left_out = [], list(captions.faults)
    for name, place in sorted(videos.items()):
        if name in captions.unusable:
            continue
        found = captions.by_name.get(name, {})
        if len(found) > 1:
            those = " and ".join(f"{text[:60]!r} ({origin})" for text, origin in found.items())
            left_out.append(LeftOut(name, f"It has {len(found)} captions: {those}."))
            continue
        text = next(iter(found), None) or _class_words(name)
        text = default if text is None else text
        if text is None:
            left_out.append(LeftOut(name, NO_CAPTION))
            continue
        clips.append(FoundClip(name=name, place=place, caption=text))
    if not clips and not left_out:
        raise DataError(
            f"{folder} holds no video.", fix=f"Give a folder with some: {' '.join(SUFFIXES)}."
        )
    return FoundClips(tuple(clips), tuple(left_out))


def _class_words(name: str) -> str | None:
    """Return the words of UCF101's class in a file's name."""
    found = class_in_name(PurePosixPath(name).stem)
    return None if found is None else words_of_class(found)
