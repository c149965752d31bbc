"""The manifest of a training folder: a JSON line for each clip that may be trained on.

`motionmerge data check` writes it, and training reads it instead of decoding every file again:

    {"name": "a.mp4", "file": "a.mp4", "clip": SHA-256, "num_bytes": 9, "caption": "..",
     "size": [height, width], "times": {..}, "shots": [[first, end, motion], ..]}

`times` are those of `io.clips.FrameTimes`; `end` is the frame after a shot's last; `motion` is
`motion_degree` of `motionmerge measure`, null where it is not known. A member of a tar has the tar
as its `file`, and `offset`. Files are relative to the folder, which the reader has to name: a
manifest may come from a stranger.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from motionmerge.errors import DataError
from motionmerge.io.atomic import write_whole
from motionmerge.io.clips import FrameTimes
from motionmerge.io.decoding import MAX_PIXELS, ClipPlace, Size
from motionmerge.io.paths import is_plain_file, open_plain_file
from motionmerge.training.caption_tables import LONGEST_CAPTION, MOST_ROWS

_LONGEST_LINE = 4 << 20
_DIGEST = re.compile("[0-9a-f]{64}")
_CHECK_ANEW = "Write it anew with `motionmerge data check`."


@dataclass(frozen=True)
class ClipShot:
    """A part of a clip without a cut.

    Args:
        first: Its first frame.
        end: The frame after its last.
        motion: Pixels a second in a frame 512 wide; None where it is not known.
    """

    first: int
    end: int
    motion: float | None

    @property
    def num_frames(self) -> int:
        """How many it has."""
        return self.end - self.first


@dataclass(frozen=True, kw_only=True)
class TrainingClip:
    """A file that may be trained on.

    Args:
        name: In the folder; see `FoundClip`.
        place: Where its bytes are.
        clip: Their SHA-256.
        num_bytes: How many they are.
        caption: What it shows.
        size: Height and width of its frames as shown.
        times: Of its frames.
        shots: Those that are long enough.
    """

    name: str
    place: ClipPlace
    clip: str
    num_bytes: int
    caption: str
    size: Size
    times: FrameTimes
    shots: tuple[ClipShot, ...]


def write_clips_manifest(path: Path, clips: Sequence[TrainingClip], *, folder: Path) -> None:
    """Write clips in their order; the file appears only when it is whole.

    Raises:
        DataError: It cannot be written.
    """
    lines = [json.dumps(_to_json(clip, folder), ensure_ascii=False) + "\n" for clip in clips]
    write_whole(path, "".join(lines))


def _to_json(clip: TrainingClip, folder: Path) -> dict[str, Any]:
    offset = {} if clip.place.is_whole_file else {"offset": clip.place.offset}
    return {
        "name": clip.name,
        "file": clip.place.path.relative_to(folder).as_posix(),
        **offset,
        "clip": clip.clip,
        "num_bytes": clip.num_bytes,
        "caption": clip.caption,
        "size": list(clip.size),
        "times": clip.times.to_json(),
        "shots": [[shot.first, shot.end, shot.motion] for shot in clip.shots],
    }


def read_clips_manifest(path: Path, *, folder: Path) -> list[TrainingClip]:
    """Read a manifest; files of the folder must be there, and as long as they were.

    Raises:
        DataError: It cannot be read, a line is none of a manifest's or leads out of the folder, a
            file is missing or was changed, or there is no clip.
    """
    clips: list[TrainingClip] = []
    try:
        with open_plain_file(path) as file:
            while line := file.readline(_LONGEST_LINE + 1):
                if len(clips) >= MOST_ROWS:
                    raise DataError(f"{path} has more than {MOST_ROWS:,} lines.", fix="Cut it.")
                clips.append(_from_line(line, folder, f"{path}, line {len(clips) + 1}"))
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror or error}.", fix="Check the path."
        ) from error
    if not clips:
        raise DataError(f"{path} lists no clip.", fix=_CHECK_ANEW)
    return clips


def _from_line(line: bytes, folder: Path, where: str) -> TrainingClip:
    try:
        clip = _from_json(json.loads(line), folder)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise DataError(
            f"{where} is no clip of a manifest: {str(error)[:200]}", fix=_CHECK_ANEW
        ) from error
    place = clip.place
    num_bytes = place.path.stat().st_size if is_plain_file(place.path) else None
    is_changed = num_bytes != clip.num_bytes if place.is_whole_file else num_bytes is None
    if is_changed:
        state = "is not there" if num_bytes is None else f"has {num_bytes} bytes by now"
        raise DataError(f"{where}: {place.path} {state}.", fix=_CHECK_ANEW)
    return clip


def _from_json(row: Mapping[str, Any], folder: Path) -> TrainingClip:
    """Build a clip from what a line holds, checking types and ranges."""
    file = PurePosixPath(_text(row, "file", 4096))
    if file.is_absolute() or ".." in file.parts or "\0" in str(file) or "\\" in str(file):
        raise ValueError(f"`{str(file)[:100]}` leads out of the folder")
    digest = _text(row, "clip", 64)
    if not _DIGEST.fullmatch(digest):
        raise ValueError("`clip` is no SHA-256")
    num_bytes = _whole(row["num_bytes"], 1, 2**60)
    offset = None if "offset" not in row else _whole(row["offset"], 0, 2**60)
    place = ClipPlace(folder / file)
    if offset is not None:
        place = ClipPlace(folder / file, offset, num_bytes)
    height, width = (_whole(side, 1, MAX_PIXELS) for side in row["size"])
    times = FrameTimes.from_json(row["times"])
    shots = tuple(_shot(one, times.num_frames) for one in row["shots"])
    if not shots:
        raise ValueError("it has no shot")
    return TrainingClip(
        name=_text(row, "name", 8192),
        place=place,
        clip=digest,
        num_bytes=num_bytes,
        caption=_text(row, "caption", LONGEST_CAPTION),
        size=(height, width),
        times=times,
        shots=shots,
    )


def _shot(content: Sequence[Any], num_frames: int) -> ClipShot:
    first, end, motion = content
    first, end = _whole(first, 0, num_frames - 1), _whole(end, 1, num_frames)
    is_number = isinstance(motion, (int, float)) and math.isfinite(motion) and motion >= 0
    if first >= end or not (motion is None or is_number):
        raise ValueError(f"{content} is no shot")
    return ClipShot(first, end, motion)


def _text(row: Mapping[str, Any], name: str, longest: int) -> str:
    value = row[name]
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f"`{name}` is no text of at most {longest} characters")
    return value


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{str(value)[:40]} is no number from {least} to {most}")
    return value
