"""Thousands of videos from a manifest, whatever happens on the way.

A video is written under a temporary name and renamed, so what is there is whole, and what is there
is not made again. Any number of processes can share a manifest; a killed one is started again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from motionmerge.errors import ConfigError, MotionMergeError
from motionmerge.io.atomic import atomic_path
from motionmerge.io.video import read_video_metadata, write_video
from motionmerge.sampling.manifest import PlannedVideo
from motionmerge.sampling.phases import VIDEO_ERRORS, Outcome, make_videos
from motionmerge.sampling.switching import Bank

CONFIGURATION_KEY = "configuration"
"""Where a video's metadata holds the hash of its configuration."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Failure:
    """A video that could not be made, as a line of `failures.jsonl`."""

    id: str
    line: int
    seed: int
    output: str
    attempts: int
    error: str

    @classmethod
    def of(cls, video: PlannedVideo, error: str, *, attempts: int) -> Failure:
        """Say why a video was given up."""
        job = video.job
        return cls(job.id, job.line, job.settings.seed, video.path.name, attempts, error)


@dataclass(frozen=True)
class Progress:
    """How far a batch is.

    Attributes:
        total: Videos to make.
        done, failed: Made, given up.
        last: Name of the video that was made or given up last.
        seconds: Since the start.
    """

    total: int
    done: int
    failed: int
    last: str
    seconds: float


@dataclass(frozen=True)
class BatchReport:
    """What a batch did.

    Attributes:
        done: Names of the videos made.
        failures: What was given up.
        seconds: How long it took.
    """

    done: tuple[str, ...]
    failures: tuple[Failure, ...]
    seconds: float


@dataclass(frozen=True)
class BatchOptions:
    """How a batch goes about its videos.

    Attributes:
        metadata: Goes into every video, besides its settings.
        frame_rate: Of videos that do not ask for one.
        videos_per_switch: How many videos share a switch of experts; as many may be lost half-done
            when the process is killed.
        retries: How often a video that failed is tried again; not after an error of the user's.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    frame_rate: float = 8
    videos_per_switch: int = 16
    retries: int = 1


class Tally:
    """What became of a batch's videos so far; the failure list is written at every failure.

    Args:
        total: Videos to make.
        failure_list: File for those given up, one JSON mapping a line; removed if there are none.
        on_progress: Called after every video.
    """

    def __init__(
        self,
        total: int,
        *,
        failure_list: Path | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._started = time.monotonic()
        self._total, self._path, self._on_progress = total, failure_list, on_progress
        self._done: list[str] = []
        self._failures: list[Failure] = []

    def made(self, name: str) -> None:
        """Count a video that was made."""
        self._done.append(name)
        self._report(name)

    def failed(self, failure: Failure) -> None:
        """Count a video that was given up."""
        self._failures.append(failure)
        _write_failures(self._path, self._failures)
        self._report(failure.output)

    def report(self) -> BatchReport:
        """Sum up."""
        _write_failures(self._path, self._failures)
        seconds = time.monotonic() - self._started
        return BatchReport(tuple(self._done), tuple(self._failures), seconds)

    def _report(self, name: str) -> None:
        if self._on_progress is not None:
            seconds = time.monotonic() - self._started
            counts = (self._total, len(self._done), len(self._failures))
            self._on_progress(Progress(*counts, name, seconds))


def shard(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """Take every `world_size`-th item, from `rank` on.

    Raises:
        ConfigError: There is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"Rank {rank} of {world_size} processes does not exist.",
            fix="set RANK from 0 to WORLD_SIZE - 1.",
        )
    return list(items[rank::world_size])


def rank_and_world_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Read which of how many processes this is, as torchrun, accelerate and srun tell."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 1


def missing(planned: Sequence[PlannedVideo]) -> list[PlannedVideo]:
    """List the videos that are not there yet.

    Raises:
        ConfigError: A file of that name was made in another way.
    """
    todo = []
    for video in planned:
        if not video.path.exists():
            todo.append(video)
        elif read_video_metadata(video.path).get(CONFIGURATION_KEY) != video.configuration:
            raise ConfigError(
                f"{video.path} was made with other settings.",
                fix="choose another folder, or remove the file.",
            )
    return todo


def run_batch(
    pipeline: Any,
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
    """
    options, tally = options or BatchOptions(), tally or Tally(len(videos))
    for begin in range(0, len(videos), options.videos_per_switch):
        waiting = list(videos[begin : begin + options.videos_per_switch])
        for attempt in range(1, options.retries + 2):
            again: list[PlannedVideo] = []
            for video, error in _make(pipeline, waiting, bank, options):
                if error is None:
                    tally.made(video.path.name)
                elif attempt <= options.retries and not isinstance(error, MotionMergeError):
                    again.append(video)
                else:
                    text = str(error) or type(error).__name__
                    tally.failed(Failure.of(video, text, attempts=attempt))
            waiting = again
    return tally.report()


def _make(
    pipeline: Any,
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
    about = {
        **options.metadata,
        **settings.model_dump(exclude_none=True),
        CONFIGURATION_KEY: video.configuration,
    }
    try:
        assert outcome.video is not None
        write_video(
            video.path, outcome.video, fps=settings.frame_rate or options.frame_rate, metadata=about
        )
    except VIDEO_ERRORS as error:
        return error
    return None


def _write_failures(path: Path | None, failures: Sequence[Failure]) -> None:
    if path is None:
        return
    if not failures:
        path.unlink(missing_ok=True)
        return
    lines = (json.dumps(asdict(failure), ensure_ascii=False) for failure in failures)
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
