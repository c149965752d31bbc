"""Find the videos that are to be measured, and what is known of each: prompt, photo and seed.

In this order: the metadata that our own videos carry, a sidecar (`video.json` or `video.txt` beside
`video.mp4`), a manifest (`*.jsonl` in the same folder, as for `motionmerge batch`), and the
file's name, where it is VBench's `PROMPT-NUMBER.mp4`.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from motionmerge.errors import DataError
from motionmerge.evaluation.clips import read_comment
from motionmerge.evaluation.vbench.suite import CAMERA_MOVES, IMAGE_SUFFIXES
from motionmerge.io.decoding import SUFFIXES
from motionmerge.io.paths import exists, is_folder, is_link, is_plain_file, open_plain_file, path_of
from motionmerge.text import lines_of

MOST_VIDEOS = 100_000

_OURS = re.compile(r"(?P<id>.+)-seed(?P<seed>-?\d+)-[0-9a-f]{16}")
_NUMBERED = re.compile(r"(?P<prompt>.+)-\d+")
_CAMERA = re.compile(f", ({'|'.join(CAMERA_MOVES)})$")
_MAX_SIDECAR = 1 << 20
_MAX_MANIFEST = 64 << 20


@dataclass(frozen=True)
class VideoSource:
    """A video and what is known of it.

    Args:
        path: The file.
        prompt: What was asked for.
        photo: The file of its first frame.
        seed: Of its noise.
    """

    path: Path
    prompt: str | None = None
    photo: Path | None = None
    seed: int | None = None

    @property
    def cluster(self) -> tuple[str, ...] | None:
        """What videos of one prompt and photo share; None where neither is known."""
        if self.prompt is None and self.photo is None:
            return None
        return self.prompt or "", str(self.photo or "")


def find_videos(names: Sequence[str | Path]) -> list[Path]:
    """List the videos of files, folders (with those inside) and glob patterns, each once.

    Raises:
        DataError: A name leads nowhere, there is no video at all, or too many.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = path_of(name)
        if is_folder(path):
            found |= dict.fromkeys(_inside(path))
        elif exists(path) or is_link(path):
            found[path] = None
        else:
            # Path.glob takes no absolute pattern.
            matches = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
            if not matches:
                raise DataError(f"There is no video at {str(name)[:200]}.", fix="Check the path.")
            for match in matches:
                found |= dict.fromkeys(_inside(match) if match.is_dir() else [match])
    if not found:
        raise DataError(
            f"There is no video in {', '.join(map(str, names))}.",
            fix=f"Give videos, or a folder that holds some: {' '.join(SUFFIXES)}.",
        )
    if len(found) > MOST_VIDEOS:
        raise DataError(
            f"There are {len(found):,} videos; one call measures {MOST_VIDEOS:,} at most.",
            fix="Share them between several calls.",
        )
    return list(found)


def _inside(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and is_plain_file(path):
            yield path


@dataclass(frozen=True)
class Photos:
    """Where photos are looked for.

    Args:
        one: The photo of all videos.
        by_name: Photos of a folder by their names without suffix.
    """

    one: Path | None = None
    by_name: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path | None) -> Photos:
        """Look at a file or a folder.

        Raises:
            DataError: There is nothing.
        """
        if path is None:
            return cls()
        if is_plain_file(path):
            return cls(one=path)
        if not is_folder(path):
            raise DataError(
                f"There are no photos at {str(path)[:200]}.", fix="Give a photo or a folder."
            )
        return cls(by_name={one.stem: one for one in reversed(photos_in(path))})

    def of(self, names: Sequence[str | None]) -> Path | None:
        """Return the photo of the first name that has one."""
        known = (self.by_name[name] for name in names if name is not None and name in self.by_name)
        return self.one or next(known, None)


def photos_in(path: Path) -> list[Path]:
    """List the photos of a folder, sorted, or the one at a path.

    Raises:
        DataError: There is none.
    """
    if is_plain_file(path):
        return [path]
    photos = [
        one
        for one in sorted(path.rglob("*"))
        if one.suffix.lower() in IMAGE_SUFFIXES and is_plain_file(one)
    ]
    if not photos:
        raise DataError(f"There is no photo in {path}.", fix="Give a folder that holds some.")
    return photos


def source_of(path: Path, photos: Photos) -> VideoSource:
    """Find out what is known of a video; nothing is guessed from likeness."""
    ours, numbered = _OURS.fullmatch(path.stem), _NUMBERED.fullmatch(path.stem)
    about = {**_in_name(numbered), **_in_manifest(path, ours), **_beside(path), **_inside_of(path)}
    prompt, seed, image = about.get("prompt"), about.get("seed"), about.get("image")
    prompt = _writable(prompt) if isinstance(prompt, str) and prompt else None
    names = [
        ours["id"] if ours else None,
        path.stem,
        numbered["prompt"] if numbered else None,
        _CAMERA.sub("", numbered["prompt"]) if numbered else None,
    ]
    photo = photos.of(names)
    if photo is None and isinstance(image, Path) and is_plain_file(image):
        photo = image
    return VideoSource(path, prompt, photo, seed if type(seed) is int else None)


def id_in_name(path: Path) -> str | None:
    """Return the id that `batch` put into a video's name: by default its photo's name."""
    ours = _OURS.fullmatch(path.stem)
    return ours["id"] if ours else None


def _writable(text: str) -> str:
    """Replace halves of characters, which JSON can hold and no file."""
    return text.encode(errors="replace").decode()


def _in_name(numbered: re.Match[str] | None) -> dict[str, Any]:
    """Read VBench's names; a prompt has several words."""
    if numbered is None or " " not in numbered["prompt"]:
        return {}
    return {"prompt": numbered["prompt"]}


def _in_manifest(path: Path, ours: re.Match[str] | None) -> dict[str, Any]:
    if ours is None:
        return {}
    rows = _manifest_rows(path.parent)
    return rows.get(ours["id"], {}) | {"seed": int(ours["seed"])}


@lru_cache(maxsize=64)
def _manifest_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the manifests of a folder: prompt and image by id, where an id has one line."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in lines_of(_text_of(path, most_bytes=_MAX_MANIFEST)):
            row = _mapping(line)
            image = row.get("image")
            if isinstance(image, str):
                known = {"image": folder / image, "prompt": row.get("prompt")}
                rows.setdefault(str(row.get("id") or Path(image).stem), []).append(known)
    return {
        name: {key: one[0][key] for key in one[0] if all(row[key] == one[0][key] for row in one)}
        for name, one in rows.items()
    }


def _beside(path: Path) -> dict[str, Any]:
    """Read a sidecar: JSON with `prompt`, `seed`, `image`, or a text that is the prompt."""
    for suffix in (".json", ".txt"):
        text = _text_of(path.with_suffix(suffix), most_bytes=_MAX_SIDECAR)
        if not text:
            continue
        if suffix == ".txt":
            return {"prompt": text.strip()}
        about = _mapping(text)
        if isinstance(about.get("image"), str):
            about["image"] = path.parent / about["image"]
        return about
    return {}


def _text_of(path: Path, *, most_bytes: int) -> str:
    """Read a file that may lie beside a video; "" if it cannot be read or is too long."""
    try:
        with open_plain_file(path) as file:
            content = file.read(most_bytes + 1)
    except (OSError, ValueError):
        return ""
    return content.decode(errors="replace") if len(content) <= most_bytes else ""


def _inside_of(path: Path) -> dict[str, Any]:
    """Read our own metadata: prompt and seed."""
    about = _mapping(read_comment(path) if is_plain_file(path) else "")
    return {key: about[key] for key in ("prompt", "seed") if about.get(key) is not None}


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
