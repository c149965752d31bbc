"""Thousands of videos from a manifest, whatever happens on the way.

A video is written under a temporary name and renamed, so what is there is whole, and what is there
is not made again. Any number of processes can share a manifest; a killed one is started again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Progress:
    """How far a batch is.

    Attributes:
        total: Videos of this process, those that were there included.
        done, skipped, failed: Made now, found, given up.
        last: Name of the video that was made or given up last.
        seconds: Since the start.
    """

    total: int
    done: int
    skipped: int
    failed: int
    last: str
    seconds: float


@dataclass(frozen=True)
class BatchReport:
    """What a batch did.

    Attributes:
        done: Names of the videos made.
        skipped: Names of those that were there.
        failures: What was given up.
        seconds: How long it took.
    """

    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failures: tuple[Failure, ...]
    seconds: float


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
    planned: Sequence[PlannedVideo],
    *,
    bank: Bank | None = None,
    metadata: Mapping[str, Any] | None = None,
    frame_rate: float = 8,
    videos_per_switch: int = 16,
    retries: int = 1,
    failure_list: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> BatchReport:
    """Make the videos that are missing.

    Args:
        pipeline: A pipeline of one of `VIDEO_FAMILIES`.
        planned: The videos of this process.
        bank: The experts attached to the pipeline; see `phases.make_videos`.
        metadata: Goes into every video, besides its settings.
        frame_rate: Of videos that do not ask for one.
        videos_per_switch: How many videos share a switch of experts; as many may be lost half-done
            when the process is killed.
        retries: How often a video that failed is tried again; not after an error of the user's.
        failure_list: File for those given up, one JSON mapping a line; removed if there are none.
        on_progress: Called after every video.

    Raises:
        ConfigError: A file was made with other settings.
    """
    started = time.monotonic()
    todo = missing(planned)
    todo_paths = {video.path for video in todo}
    skipped = tuple(video.path.name for video in planned if video.path not in todo_paths)
    done: list[str] = []
    failures: list[Failure] = []

    def report(name: str) -> None:
        if on_progress is not None:
            seconds = time.monotonic() - started
            counts = (len(planned), len(done), len(skipped), len(failures))
            on_progress(Progress(*counts, name, seconds))

    for begin in range(0, len(todo), videos_per_switch):
        waiting = todo[begin : begin + videos_per_switch]
        for attempt in range(1, retries + 2):
            again: list[PlannedVideo] = []
            for video, error in _make(pipeline, waiting, bank, metadata or {}, frame_rate):
                if error is None:
                    done.append(video.path.name)
                elif attempt <= retries and not isinstance(error, MotionMergeError):
                    again.append(video)
                    continue
                else:
                    failures.append(_failure(video, error, attempt))
                    _write_failures(failure_list, failures)
                report(video.path.name)
            waiting = again
    _write_failures(failure_list, failures)
    return BatchReport(tuple(done), skipped, tuple(failures), time.monotonic() - started)


def _make(
    pipeline: Any,
    videos: Sequence[PlannedVideo],
    bank: Bank | None,
    metadata: Mapping[str, Any],
    frame_rate: float,
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
        yield video, outcome.error or _write(video, outcome, metadata, frame_rate)


def _write(
    video: PlannedVideo, outcome: Outcome, metadata: Mapping[str, Any], frame_rate: float
) -> BaseException | None:
    settings = video.job.settings
    about = {
        **metadata,
        **{name: value for name, value in asdict(settings).items() if value is not None},
        CONFIGURATION_KEY: video.configuration,
    }
    try:
        assert outcome.video is not None
        write_video(
            video.path, outcome.video, fps=settings.frame_rate or frame_rate, metadata=about
        )
    except VIDEO_ERRORS as error:
        return error
    return None


def _failure(video: PlannedVideo, error: BaseException, attempts: int) -> Failure:
    text = str(error) or type(error).__name__
    job = video.job
    return Failure(job.id, job.line, job.settings.seed, video.path.name, attempts, text)


def _write_failures(path: Path | None, failures: Sequence[Failure]) -> None:
    if path is None:
        return
    if not failures:
        path.unlink(missing_ok=True)
        return
    lines = (json.dumps(asdict(failure), ensure_ascii=False) for failure in failures)
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
