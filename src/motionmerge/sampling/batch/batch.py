"""Thousands of videos from a manifest, whatever happens on the way.

A video is written under a temporary name and renamed, so what is there is whole, and what is there
is not made again. Any number of processes can share a manifest; a killed one is started again.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from motionmerge.errors import ConfigError, DataError, MotionMergeError
from motionmerge.io.atomic import atomic_path, disk_errors
from motionmerge.io.video import read_video_metadata, write_video
from motionmerge.models.video_pipeline import VideoPipeline
from motionmerge.sampling.batch.manifest import PlannedVideo, configuration_name
from motionmerge.sampling.videos.phases import VIDEO_ERRORS, Outcome, make_videos
from motionmerge.sampling.videos.provenance import provenance
from motionmerge.switching.bank import Bank

_TEXT: Any = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}

CONFIGURATION_KEY = "configuration"
"""Where a video's metadata holds the hash of its configuration."""

Item = TypeVar("Item")

_LONGEST_ERROR = 2000
"""Characters; some errors repeat what they were given."""

_DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
"""Full or read-only: no other video could be written either."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A video that could not be made, as a line of `failures.jsonl`."""

    id: str
    line: int
    seed: int
    output: str
    attempts: int
    error: str
    host: str

    @classmethod
    def of(
        cls, video: PlannedVideo, error: str, *, attempts: int, host: str | None = None
    ) -> Failure:
        """Describe why a video was given up, at some length, and where: by default here."""
        job, text = video.job, error[:_LONGEST_ERROR]
        return cls(
            id=job.id,
            line=job.line,
            seed=job.settings.seed,
            output=video.path.name,
            attempts=attempts,
            error=text,
            host=platform.node() if host is None else host,
        )


@dataclass(frozen=True, kw_only=True)
class BatchProgress:
    """How far a batch is.

    Attributes:
        total: Videos to make.
        done, failed: Made, given up.
        last: Name of the video that was made, given up or found last.
        seconds: Since the start.
        found: Made by another batch in the meantime.
    """

    total: int
    done: int
    failed: int
    last: str
    seconds: float
    found: int = 0


@dataclass(frozen=True)
class BatchReport:
    """What a batch did.

    Attributes:
        done: Names of the videos made.
        failures: What was given up.
        seconds: How long it took.
        found: Names of videos that another batch on the same folder made in the meantime.
    """

    done: tuple[str, ...]
    failures: tuple[Failure, ...]
    seconds: float
    found: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a batch goes about its videos.

    Attributes:
        metadata: Goes into every video, besides its settings.
        frame_rate: Of videos that do not ask for one.
        videos_per_switch: How many videos share a switch of experts; as many may be lost half-done
            when the process is killed.
        retries: How often a video that failed, or could not be written, is tried again; not after
            an error of the user's.
    """

    metadata: dict[str, object] = field(default_factory=dict)
    frame_rate: float = 8
    videos_per_switch: int = 16
    retries: int = 1


class Tally:
    """What became of a batch's videos so far; the failure list grows by a line at every failure.

    Args:
        total: Videos to make.
        failure_list: File for those given up, one JSON mapping a line; removed if there are none.
        on_progress: Called after every video.

    Attributes:
        seconds_loading: How long there was no model with its experts yet, over all sets of experts.
    """

    def __init__(
        self,
        total: int,
        *,
        failure_list: Path | None = None,
        on_progress: Callable[[BatchProgress], None] | None = None,
    ) -> None:
        self._started = time.monotonic()
        self._total, self._path, self._on_progress = total, failure_list, on_progress
        self._done: list[str] = []
        self._failures: list[Failure] = []
        self._found: list[str] = []
        self._loading_since: float | None = None
        self.seconds_loading = 0.0

    def begins_loading(self) -> None:
        """Count the time from now on as that of loading a model and making its experts."""
        self._loading_since = time.monotonic()

    def has_loaded(self) -> None:
        """Count the time from now on as that of videos; what is loaded beside them costs none."""
        if self._loading_since is not None:
            self.seconds_loading += time.monotonic() - self._loading_since
            self._loading_since = None

    def made(self, name: str) -> None:
        """Count a video that was made."""
        self._done.append(name)
        self._report(name)

    def found(self, name: str) -> None:
        """Count a video that another batch made in the meantime."""
        self._found.append(name)
        self._report(name)

    def failed(self, failure: Failure) -> None:
        """Count a video that was given up.

        Raises:
            DataError: The failure list cannot be written.
        """
        self._failures.append(failure)
        if len(self._failures) == 1 or self._path is None:
            _write_failures(self._path, self._failures)
        else:
            with (
                disk_errors(DataError, f"the failure list {self._path}"),
                self._path.open("a", **_TEXT) as file,
            ):
                file.write(_line(failure))
        self._report(failure.output)

    def report(self) -> BatchReport:
        """Count what was made, skipped and given up.

        Raises:
            DataError: The failure list cannot be written.
        """
        _write_failures(self._path, self._failures)
        seconds = time.monotonic() - self._started
        found = tuple(self._found)
        return BatchReport(tuple(self._done), tuple(self._failures), seconds, found)

    def _report(self, name: str) -> None:
        if self._on_progress is not None:
            progress = BatchProgress(
                total=self._total,
                done=len(self._done),
                failed=len(self._failures),
                last=name,
                seconds=time.monotonic() - self._started,
                found=len(self._found),
            )
            self._on_progress(progress)


def shard(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """Take every `world_size`-th item, from `rank` on.

    Raises:
        ConfigError: There is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"Rank {rank} of {world_size} processes does not exist.",
            fix="Set RANK from 0 to WORLD_SIZE - 1.",
        )
    return list(items[rank::world_size])


def rank_and_world_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Read which of how many processes this is, as torchrun, accelerate and srun tell.

    Raises:
        ConfigError: A variable is no whole number.
    """
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in environment and size in environment:
            return _whole_number(environment, rank), _whole_number(environment, size)
    return 0, 1


def _whole_number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise ConfigError(
            f"The environment variable {name} is {environment[name]!r}, which is no whole number.",
            fix="Set it as torchrun and srun do, or unset it for a single process.",
        ) from error


def failure_list(folder: Path, rank: int, world_size: int) -> Path:
    """Name the file for what a process gives up."""
    return folder / ("failures.jsonl" if world_size == 1 else f"failures-{rank}.jsonl")


def remove_stale_lists(folder: Path, world_size: int) -> None:
    """Remove the failure lists of processes that take no part any more.

    Those of all `world_size` processes stay: each writes its own, perhaps at this moment.

    Raises:
        DataError: A list cannot be removed.
    """
    current = {failure_list(folder, rank, world_size) for rank in range(world_size)}
    for path in folder.glob("failures*.jsonl"):
        if path not in current and re.fullmatch(r"failures(-\d+)?\.jsonl", path.name):
            with disk_errors(DataError, f"the failure list {path}"):
                path.unlink(missing_ok=True)


def missing(planned: Sequence[PlannedVideo], *, overwrite: bool = False) -> list[PlannedVideo]:
    """List the videos that are not there yet, or damaged, e.g. by a power cut.

    Args:
        planned: What is to be there.
        overwrite: Also list those in whose place there is a file that was made in another way.

    Raises:
        ConfigError: A file of that name was made in another way, or cannot be looked at.
    """
    todo = []
    for video in planned:
        try:
            is_there = video.path.exists()
        except OSError as error:
            raise ConfigError(
                f"Cannot look for {video.path}: {error}", fix="Choose another folder."
            ) from error
        if not is_there or not _is_made(video, overwrite=overwrite):
            todo.append(video)
    return todo


def _is_made(video: PlannedVideo, *, overwrite: bool) -> bool:
    """Check whether a file is the video that is planned; if it is another, it may be replaced."""
    try:
        configuration = read_video_metadata(video.path).get(CONFIGURATION_KEY)
    except DataError as error:
        if video.path.name == configuration_name(video.job, video.configuration):
            return False  # nobody else gives this name
        if overwrite:
            return False
        raise ConfigError(
            error.message, fix="Choose another folder, or pass `overwrite=True`."
        ) from error
    if configuration != video.configuration and not overwrite:
        raise ConfigError(
            f"{video.path} was made with other settings.",
            fix="Choose another folder, or pass `overwrite=True`.",
        )
    return configuration == video.configuration


class _Found(Exception):
    """Another batch made the video in the meantime."""


def run_batch(
    pipeline: VideoPipeline,
    videos: Sequence[PlannedVideo],
    options: BatchOptions | None = None,
    *,
    bank: Bank | None = None,
    tally: Tally | None = None,
) -> BatchReport:
    """Make videos in this process.

    Args:
        pipeline: A pipeline of one of `VIDEO_FAMILIES`.
        videos: What to make: those that are `missing`.
        options: How.
        bank: The experts attached to the pipeline; see `phases.make_videos`.
        tally: Counts them.

    Raises:
        DataError: The disk is full or read-only, or the failure list cannot be written.
    """
    options, tally = options or BatchOptions(), tally or Tally(len(videos))
    for begin in range(0, len(videos), options.videos_per_switch):
        waiting = list(videos[begin : begin + options.videos_per_switch])
        for attempt in range(1, options.retries + 2):
            again: list[PlannedVideo] = []
            for video, error in _make(pipeline, waiting, bank, options):
                if error is None:
                    tally.made(video.path.name)
                elif isinstance(error, _Found):
                    tally.found(video.path.name)
                elif isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                    raise DataError(
                        f"The batch stops at {video.path}: {error}",
                        fix="Make room on the disk, or make it writable; the same command goes on.",
                    ) from error
                elif attempt <= options.retries and not isinstance(error, MotionMergeError):
                    again.append(video)
                else:
                    text = str(error) or type(error).__name__
                    tally.failed(Failure.of(video, text, attempts=attempt))
            waiting = again
    return tally.report()


def _make(
    pipeline: VideoPipeline,
    videos: Sequence[PlannedVideo],
    bank: Bank | None,
    options: BatchOptions,
) -> Iterator[tuple[PlannedVideo, BaseException | None]]:
    """Make and write videos; give each with the error that it failed with, if it did."""
    readable, requests = [], []
    for video in videos:
        try:
            requests.append(video.job.request())
            readable.append(video)
        except VIDEO_ERRORS as error:
            yield video, error
    for outcome in make_videos(pipeline, requests, bank):
        video = readable[outcome.index]
        yield video, outcome.error or _write(video, outcome, options)


def _write(video: PlannedVideo, outcome: Outcome, options: BatchOptions) -> BaseException | None:
    settings = video.job.settings
    about = {**provenance(options.metadata, settings), CONFIGURATION_KEY: video.configuration}
    try:
        assert outcome.video is not None
        if not missing([video], overwrite=True):
            return _Found()
        write_video(
            video.path, outcome.video, fps=settings.frame_rate or options.frame_rate, metadata=about
        )
    except VIDEO_ERRORS as error:
        return error.__cause__ or error  # what the disk said is no error of the user's
    return None


def _write_failures(path: Path | None, failures: Sequence[Failure]) -> None:
    if path is None:
        return
    with disk_errors(DataError, f"the failure list {path}"):
        if not failures:
            path.unlink(missing_ok=True)
            return
        with atomic_path(path) as temporary, temporary.open("w", **_TEXT) as file:
            file.writelines(map(_line, failures))


def _line(failure: Failure) -> str:
    return json.dumps(asdict(failure), ensure_ascii=False) + "\n"
