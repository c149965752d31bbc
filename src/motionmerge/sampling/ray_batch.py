"""A batch on many machines: workers of a Ray cluster, each with the model loaded once.

The driver hands the next few videos to whichever worker is ready. What a dead worker did not finish
goes to the others; a new one takes its place. Videos are files, written whole, so that nothing else
has to be remembered: the output folder must be the same for all machines.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from motionmerge.errors import ConfigError, MotionMergeError
from motionmerge.sampling.batch import (
    BatchOptions,
    BatchReport,
    Failure,
    Tally,
    missing,
    run_batch,
)
from motionmerge.sampling.expert_choice import ExpertChoice
from motionmerge.sampling.manifest import PlannedVideo
from motionmerge.sampling.model_choice import ModelChoice
from motionmerge.sampling.phases import can_be_cut

_OBJECT_STORE_BYTES = 200_000_000
"""Videos do not pass through Ray, so the store of a cluster that we start can be small."""


class Worker:
    """What lives in a process of the cluster: a pipeline with its experts.

    Args:
        model, experts, options: How the videos are made.
        num_threads: Of torch, on which the last bit of a sum can depend.
    """

    def __init__(
        self, model: ModelChoice, experts: ExpertChoice, options: BatchOptions, num_threads: int
    ) -> None:
        self._model, self._experts, self._options = model, experts, options
        self._num_threads = num_threads
        self._attached = ExitStack()

    def load(self) -> int:
        """Load the model; give how many videos the worker wants at a time."""
        from diffusers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(self._num_threads)
        self._pipeline, _ = self._model.load()
        self._pipeline.set_progress_bar_config(disable=True)
        self._bank = self._attached.enter_context(self._experts.attach(self._pipeline))
        shares_switches = self._bank is not None and can_be_cut(self._pipeline)
        return self._options.videos_per_switch if shares_switches else 1

    def make(self, videos: Sequence[PlannedVideo]) -> BatchReport:
        """Make some videos."""
        return run_batch(self._pipeline, videos, self._options, bank=self._bank)


def cluster_device() -> str:
    """Join the cluster, or start one on this machine; give where its workers compute.

    It is the cluster of `RAY_ADDRESS`, or one that runs on this machine.

    Raises:
        ConfigError: Ray is not installed.
    """
    return "cuda" if _joined().cluster_resources().get("GPU", 0) else "cpu"


def run_on_ray(
    model: ModelChoice,
    experts: ExpertChoice,
    videos: Sequence[PlannedVideo],
    options: BatchOptions,
    *,
    num_workers: int | None = None,
    tally: Tally | None = None,
) -> BatchReport:
    """Make videos on a Ray cluster.

    Args:
        model, experts: What makes them; every machine finds the files at the same paths.
        videos: What to make: those that are `missing`.
        options: How. A video with which a worker dies alone is retried as one that failed.
        num_workers: By default one for each GPU; on CPUs one for as many cores as torch uses here.
        tally: Counts the videos.

    Raises:
        ConfigError: Ray is not installed, the cluster has no such device, or workers die before
            they have loaded the model.
        MotionMergeError: As loading the model and attaching the experts.
    """
    ray = _joined()
    tally = tally or Tally(len(videos))
    threads = torch.get_num_threads()
    on_gpu = model.device.type == "cuda"
    needs = {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_gpus": 0, "num_cpus": threads}
    if num_workers is None:
        available = ray.cluster_resources()
        num_workers = int(available.get("GPU", 0) if on_gpu else available["CPU"] // threads)
        if num_workers == 0:
            raise ConfigError(
                f"The cluster offers {available.get('GPU', 0):g} GPUs and {available['CPU']:g} "
                f"CPU cores; a worker takes {needs}.",
                fix="use --device cpu, or add machines.",
            )
    actor_class = ray.remote(**needs, max_restarts=0)(Worker)
    arguments = (model, experts, options, threads)
    driver = _Driver(
        ray,
        lambda: actor_class.remote(*arguments),
        deque(videos),
        retries=options.retries,
        tally=tally,
        num_workers=min(num_workers, len(videos)),
    )
    return driver.run()


@dataclass
class _Driver:
    """Hands out videos, and takes back those of dead workers.

    Attributes:
        ray: The module.
        new_worker: Starts a worker somewhere.
        waiting: Videos that nobody has.
        retries: How many deaths of a worker a video survives.
        tally: Counts the videos.
        num_workers: How many to keep alive.
    """

    ray: Any
    new_worker: Any
    waiting: deque[PlannedVideo]
    retries: int
    tally: Tally
    num_workers: int
    _workers: list[Any] = field(default_factory=list)
    _running: dict[Any, tuple[Any, list[PlannedVideo]]] = field(default_factory=dict)
    _idle: list[Any] = field(default_factory=list)
    _wants: dict[Any, int] = field(default_factory=dict)
    _deaths: Counter[Path] = field(default_factory=Counter)
    _suspects: set[Path] = field(default_factory=set)
    _deaths_at_start: int = 0

    def run(self) -> BatchReport:
        """Make all videos."""
        try:
            for _ in range(self.num_workers):
                self._start_worker()
            while self.waiting or any(videos for _, videos in self._running.values()):
                (done, *_), _ = self.ray.wait(list(self._running), num_returns=1)
                worker, videos = self._running.pop(done)
                try:
                    result = self.ray.get(done)
                except self.ray.exceptions.RayActorError as error:
                    self.ray.kill(worker)  # it may only be out of reach
                    self._take_back(videos, str(error))
                    while self._idle and self.waiting:
                        self._hand_out(self._idle.pop())
                    if self.waiting:
                        self._start_worker()
                except self.ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, MotionMergeError):
                        raise error.cause from None
                    raise
                else:
                    self._receive(worker, result)
                    self._hand_out(worker)
        finally:
            for worker in self._workers:
                self.ray.kill(worker)
        return self.tally.report()

    def _start_worker(self) -> None:
        worker = self.new_worker()
        self._workers.append(worker)
        self._running[worker.load.remote()] = (worker, [])

    def _receive(self, worker: Any, result: int | BatchReport) -> None:
        if isinstance(result, int):
            self._wants[worker] = result
            self._deaths_at_start = 0
            return
        for name in result.done:
            self.tally.made(name)
        for failure in result.failures:
            self.tally.failed(failure)

    def _hand_out(self, worker: Any) -> None:
        """Give a worker its next videos: fewer towards the end, and suspects one by one."""
        if not self.waiting:
            self._idle.append(worker)
            return
        size = min(self._wants[worker], math.ceil(len(self.waiting) / self.num_workers))
        videos = [self.waiting.popleft()]
        while (
            len(videos) < size
            and self.waiting
            and not self._suspects & {videos[0].path, self.waiting[0].path}
        ):
            videos.append(self.waiting.popleft())
        self._running[worker.make.remote(videos)] = (worker, videos)

    def _take_back(self, videos: list[PlannedVideo], error: str) -> None:
        """Put what a dead worker left undone back in the queue; give up what killed too many."""
        if not videos:
            self._deaths_at_start += 1
            if self._deaths_at_start > self.retries + self.num_workers:
                raise ConfigError(
                    f"Workers die before the model is loaded; the last one: {error[:300]}",
                    fix="see that the model fits into their memory, or use fewer --workers.",
                )
        undone = missing(videos)
        for name in sorted({video.path.name for video in videos} - _names(undone)):
            self.tally.made(name)
        for video in reversed(undone):
            if len(videos) == 1:
                self._deaths[video.path] += 1
            self._suspects.add(video.path)
            if self._deaths[video.path] <= self.retries:
                self.waiting.appendleft(video)
            else:
                deaths = self._deaths[video.path]
                text = f"The worker died while it made this video: {error[:300]}"
                self.tally.failed(Failure.of(video, text, attempts=deaths))


def _names(videos: Sequence[PlannedVideo]) -> set[str]:
    return {video.path.name for video in videos}


def _joined() -> Any:
    """Give the module `ray`, connected to a cluster: a running one, or else a new one here."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed.", fix="pip install 'motionmerge[ray]'.") from error
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    return ray
