"""Tables that name videos and their captions: `metadata.csv`, `metadata.jsonl`, WebVid's csv.

Columns have several usual names; of those that are there, the first of `FILE_COLUMNS` and the first
of `CAPTION_COLUMNS` count.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionmerge.errors import DataError
from motionmerge.io.paths import open_plain_file

FILE_COLUMNS = (
    *("file_name", "filename", "file", "file_path", "filepath", "video", "video_path"),
    *("media_path", "path", "clip", "clip_path"),
)
CAPTION_COLUMNS = ("caption", "text", "prompt", "description", "video_caption")

MOST_ROWS = 1_000_000
LONGEST_CAPTION = 10_000
"""Characters."""

_MOST_BYTES = 1 << 30
_LONGEST_LINE = 1 << 20
_WEBVID = {"videoid", "name"}


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row of a table.

    Args:
        origin: Table and line, for messages.
        names: Where the video may be, relative to the table's folder; the first that is there.
        caption: None where the row has none.
        fault: Why the row cannot be used; None if it can.
    """

    origin: str
    names: tuple[str, ...] = ()
    caption: str | None = None
    fault: str | None = None


def read_table(path: Path, *, must_have_columns: bool) -> Iterator[TableRow]:
    """Read a csv or jsonl file row by row.

    Args:
        path: The table.
        must_have_columns: A csv without columns for files and captions is refused; otherwise it is
            taken for a table of something else, without rows.

    Raises:
        DataError: It cannot be read, is no UTF-8, is too long, or lacks the columns.
    """
    rows = _json_rows if path.suffix.lower() == ".jsonl" else _csv_rows
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(
                f"{path} has more than {_MOST_BYTES:,} bytes.", fix="Cut it into several."
            )
        with open_plain_file(path) as file:
            for number, row in enumerate(rows(file, path, must_have_columns), start=1):
                if number > MOST_ROWS:
                    raise DataError(
                        f"{path} has more than {MOST_ROWS:,} rows.", fix="Cut it into several."
                    )
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"Cannot read {path}: {str(error)[:200]}", fix="Save it as UTF-8 text, or remove it."
        ) from error


def _csv_rows(file: io.BufferedReader, path: Path, must_have_columns: bool) -> Iterator[TableRow]:
    reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    columns = [name.strip().lower() for name in reader.fieldnames or () if name]
    if not _has_columns(columns):
        if must_have_columns:
            raise DataError(
                f"{path} has the columns {', '.join(columns)[:200]}, of which none names files or "
                "none is a caption.",
                fix=f"Name them {FILE_COLUMNS[0]} and {CAPTION_COLUMNS[0]}.",
            )
        return
    for content in reader:
        row = {str(name).strip().lower(): value for name, value in content.items()}
        yield _row_of(row, f"{path.name}, line {reader.line_num}")


def _has_columns(columns: Iterable[str]) -> bool:
    known = set(columns)
    has_both = known & set(FILE_COLUMNS) and known & set(CAPTION_COLUMNS)
    return bool(has_both) or known >= _WEBVID


def _json_rows(file: io.BufferedReader, path: Path, must_have_columns: bool) -> Iterator[TableRow]:
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        origin = f"{path.name}, line {number}"
        if len(line) > _LONGEST_LINE:
            raise DataError(
                f"{path}, line {number} has more than {_LONGEST_LINE:,} bytes.",
                fix="Write one mapping a line.",
            )
        if not line.strip():
            continue
        try:
            content = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            row = {str(name).lower(): value for name, value in content.items()}
            if must_have_columns or _has_columns(row):
                yield _row_of(row, origin)
        elif must_have_columns:
            yield TableRow(origin=origin, fault="It is no JSON mapping.")


def _row_of(row: Mapping[str, Any], origin: str) -> TableRow:
    if row.keys() >= _WEBVID and not row.keys() & set(FILE_COLUMNS):
        return _webvid_row(row, origin)
    name = next((row[one] for one in FILE_COLUMNS if row.get(one)), None)
    if isinstance(name, Mapping):  # as `datasets` writes a video
        name = name.get("path")
    if not isinstance(name, str) or not name.strip():
        return TableRow(origin=origin, fault="It names no file.")
    return _captioned(origin, (name.strip(),), caption_in(row))


def _webvid_row(row: Mapping[str, Any], origin: str) -> TableRow:
    video, page, caption = row["videoid"], row.get("page_dir"), row["name"]
    if not isinstance(video, (str, int)) or not str(video).strip():
        return TableRow(origin=origin, fault="It names no file.")
    folders = (f"{page}/", f"videos/{page}/") if page else ()
    names = tuple(f"{folder}{str(video).strip()}.mp4" for folder in (*folders, "", "videos/"))
    return _captioned(origin, names, caption)


def caption_in(row: Mapping[str, Any]) -> Any:
    """Return what is in the first caption column that has something."""
    return next((row[one] for one in CAPTION_COLUMNS if row.get(one)), None)


def _captioned(origin: str, names: tuple[str, ...], caption: Any) -> TableRow:
    try:
        return TableRow(origin=origin, names=names, caption=checked_caption(caption))
    except DataError as error:
        return TableRow(origin=origin, names=names, fault=error.message)


def checked_caption(caption: Any) -> str | None:
    """Return a caption without space around it; None for none.

    Raises:
        DataError: It is no text, several texts, or too long.
    """
    if isinstance(caption, list) and len(caption) == 1:
        caption = caption[0]
    if isinstance(caption, list) and caption:
        raise DataError(f"It has {len(caption)} captions.", fix="Keep one.")
    if not caption:
        return None
    if not isinstance(caption, str):
        raise DataError("Its caption is no text.", fix="Write a text.")
    text = " ".join(caption.encode(errors="replace").decode().split())
    if len(text) > LONGEST_CAPTION:
        raise DataError(
            f"Its caption has more than {LONGEST_CAPTION:,} characters.", fix="Shorten it."
        )
    return text or None
