"""Files of results: a JSON line for each, appended as it is measured, read back as a stranger's.

A run that was killed goes on from them, and several parts of a set write a file each. A line is
used again for the same clip (by the SHA-256 of its bytes), metric and configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, Protocol, TypeVar

from motionmerge.errors import ConfigError, DataError
from motionmerge.io.paths import open_plain_file

AGREEMENT = 1e-9

_LONGEST_LINE = 16 << 20
_NO_ROW = (ValueError, TypeError, KeyError, RecursionError)


class KeyedRow(Protocol):
    """What every row has."""

    @property
    def clip(self) -> str:
        """SHA-256 of the clip's file."""
        ...

    @property
    def metric(self) -> str:
        """Name of what was measured."""
        ...

    @property
    def value(self) -> float | str | None:
        """What was found."""
        ...

    @property
    def key(self) -> tuple[str, ...]:
        """Clip, metric, configuration, and what else decides the value."""
        ...

    @property
    def is_fault(self) -> bool:
        """Whether it says why there is no value; such a row may differ from run to run."""
        ...


RowType = TypeVar("RowType")
KeyedType = TypeVar("KeyedType", bound=KeyedRow)


def config_hash(**settings: Any) -> str:
    """Hash the settings that decide a value, besides the clip."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


@dataclass(frozen=True)
class Shard:
    """One of several parts of a set of videos; which part a video is in depends on its bytes alone.

    Args:
        number: From 1.
        total: How many there are.
    """

    number: int = 1
    total: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `K/N`.

        Raises:
            ConfigError: It is something else.
        """
        first, slash, second = text.partition("/")
        is_short = len(text) < 20  # Python refuses to read numbers of thousands of digits
        if slash and is_short and all(one.isascii() and one.isdigit() for one in (first, second)):
            shard = cls(int(first), int(second))
            if 1 <= shard.number <= shard.total:
                return shard
        raise ConfigError(
            f"`{text[:40]}` is not a shard.", fix="Write `K/N` with K from 1 to N, such as 1/4."
        )

    @property
    def is_whole(self) -> bool:
        """Whether this part is all of the set."""
        return self.total == 1

    def file_name(self, stem: str) -> str:
        """Return the file that this part's rows go to, so that no two processes write to one."""
        return f"{stem}.jsonl" if self.is_whole else f"{stem}-{self.number}-of-{self.total}.jsonl"

    def holds(self, clip: str) -> bool:
        """Return whether a clip belongs to this part."""
        return int(clip[:16], 16) % self.total == self.number - 1


WHOLE = Shard()


def read_row_file(
    path: Path,
    row_of: Callable[[Any], RowType],
    *,
    fix: str = "Remove the line; what it stood for is measured again.",
) -> list[RowType]:
    """Read the rows of a file, without a last line that a kill cut off.

    Args:
        path: The file.
        row_of: Builds a row from the JSON of a line, and raises ValueError, TypeError or KeyError
            where no run can have written it.
        fix: What helps where a line is no row.

    Raises:
        DataError: The file cannot be read, or a line is no row.
    """
    rows: list[RowType] = []
    try:
        with open_plain_file(path) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                try:
                    if line.strip():
                        rows.append(row_of(json.loads(line)))
                except _NO_ROW as error:
                    if not line.endswith(b"\n") and len(line) <= _LONGEST_LINE:
                        break
                    raise DataError(
                        f"{path}, line {number} is no result: {str(error)[:200]}",
                        fix=fix,
                    ) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error}", fix="Remove it, or correct it.") from error
    return rows


def read_row_files(folder: Path, stem: str, row_of: Callable[[Any], RowType]) -> list[RowType]:
    """Read the rows of all parts, `STEM.jsonl` and `STEM-K-of-N.jsonl`.

    Raises:
        DataError: As `read_row_file`.
    """
    paths = [folder / f"{stem}.jsonl", *sorted(folder.glob(f"{stem}-*-of-*.jsonl"))]
    return [row for path in paths if path.exists() for row in read_row_file(path, row_of)]


def joined(rows: Iterable[KeyedType]) -> dict[tuple[str, ...], KeyedType]:
    """Join rows by their keys: a value wins over a fault, the last of several faults is kept.

    Raises:
        DataError: Two rows give different values for the same key.
    """
    known: dict[tuple[str, ...], KeyedType] = {}
    for row in rows:
        other = known.setdefault(row.key, row)
        if other.is_fault:
            known[row.key] = row
        elif not row.is_fault and not _agree(row.value, other.value):
            raise DataError(
                f"Two rows give {row.metric} of the clip {row.clip[:12]} as {other.value} and "
                f"{row.value}.",
                fix="Remove the rows of one machine, and measure its videos again.",
            )
    return known


def _agree(first: float | str | None, second: float | str | None) -> bool:
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return abs(first - second) <= AGREEMENT * max(1.0, abs(first))
    return first == second


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows in one write and sync them to disk; a line that a kill cut off is removed.

    Processes that append to one file take turns: what is half written by one looks cut off to
    another.

    Raises:
        DataError: The file cannot be written.
    """
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            open_plain_file(path).close()  # at a pipe we would wait for its reader
        with path.open("ab+") as file:
            _wait_for_turn(file)
            _end_last_line(file)
            file.write("".join(lines).encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(
            f"Cannot write {path}: {error}", fix="Check the folder and its free space."
        ) from error


def _wait_for_turn(file: BufferedRandom) -> None:
    """Lock a file until it is closed, where the machine has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    with suppress(OSError):  # a disk of the network may have none
        fcntl.flock(file, fcntl.LOCK_EX)


def _end_last_line(file: BufferedRandom) -> None:
    """Remove what follows the last newline; complete it if only the newline is missing."""
    end = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail and len(tail) <= _LONGEST_LINE:
        start = max(0, start - (1 << 16))
        file.seek(start)
        tail = file.read(end - start)
    tail = tail[tail.rfind(b"\n") + 1 :]
    if tail:
        try:
            json.loads(tail)
        except _NO_ROW:
            file.truncate(end - len(tail))
        else:
            file.write(b"\n")
