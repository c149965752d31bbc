"""Videos in tars, as webdataset packs them: `KEY.mp4` with `KEY.txt` or `KEY.json` beside it.

A tar is not unpacked: its members are read where they lie.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from motionmerge.errors import DataError
from motionmerge.io.decoding import SUFFIXES, ClipPlace
from motionmerge.io.paths import open_plain_file
from motionmerge.training.caption_tables import MOST_ROWS, caption_in, checked_caption

_MOST_TEXT = 1 << 20
_MOST_HEADER = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TarClip:
    """A video of a tar.

    Args:
        name: Of the member.
        place: Where its bytes are.
        caption: None where it has none.
        fault: Why it cannot be used; None if it can.
    """

    name: str
    place: ClipPlace
    caption: str | None = None
    fault: str | None = None


class _Bounded:
    """A file that refuses to read much at once: a header that says it is large fills no memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def read_tar(path: Path) -> Iterator[TarClip]:
    """List the videos of a tar in its order.

    Raises:
        DataError: It cannot be read, is compressed, or has too many members.
    """
    try:
        with open_plain_file(path) as file:
            videos, texts = _members(file, path)
            for name, member in videos.items():
                place = ClipPlace(path, member.offset_data, member.size)
                try:
                    found = [_caption_of(file, one) for one in texts.get(_key(name), ())]
                except DataError as error:
                    yield TarClip(name=name, place=place, fault=error.message)
                    continue
                captions = {one for one in found if one is not None}
                fault = f"It has {len(captions)} captions." if len(captions) > 1 else None
                caption = next(iter(captions), None)
                yield TarClip(name=name, place=place, caption=caption, fault=fault)
    except (OSError, tarfile.TarError, ValueError, RecursionError) as error:
        raise DataError(
            f"Cannot read {path}: {str(error)[:200]}.", fix="Pack it again, without compression."
        ) from error


def _members(
    file: BinaryIO, path: Path
) -> tuple[dict[str, tarfile.TarInfo], dict[str, list[tarfile.TarInfo]]]:
    """Read the headers: videos by name, and captions by the key that they share with a video."""
    videos: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, list[tarfile.TarInfo]] = {}
    bounded: Any = _Bounded(file)
    with tarfile.open(fileobj=bounded, mode="r:") as tar:
        for number, member in enumerate(tar):
            if number >= MOST_ROWS:
                raise DataError(f"{path} has more than {MOST_ROWS:,} members.", fix="Cut it.")
            if not member.isreg() or member.issparse():
                continue
            suffix = Path(member.name).suffix.lower()
            if suffix in SUFFIXES:
                if member.name in videos:
                    raise DataError(
                        f"{path} holds `{member.name[:80]}` twice.", fix="Pack it again."
                    )
                videos[member.name] = member
            elif suffix in (".txt", ".json"):
                texts.setdefault(_key(member.name), []).append(member)
    return videos, texts


def _key(name: str) -> str:
    """Return what the files of one sample share: the name up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _caption_of(file: BinaryIO, member: tarfile.TarInfo) -> str | None:
    """Read the caption of a text or of a mapping's usual keys.

    Raises:
        DataError: It is too long or no text.
    """
    if member.size > _MOST_TEXT:
        raise DataError(f"Its text has {member.size:,} bytes.", fix="Shorten it.")
    file.seek(member.offset_data)
    content = file.read(member.size).decode(errors="replace")
    if not member.name.lower().endswith(".json"):
        return checked_caption(content)
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError("Its JSON cannot be read.", fix="Write it again.") from error
    return checked_caption(caption_in(row)) if isinstance(row, dict) else None
