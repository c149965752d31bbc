"""A batch on many machines: workers of a Ray cluster, each with the model loaded once.

The driver hands the next few videos to whichever worker is ready. What a dead worker did not finish
goes to the others; a new one takes its place. Videos are files, written whole, so that nothing else
has to be remembered: the output folder must be the same for all machines. Their processes run in
folders of their own, so what they are sent has absolute paths.
"""

from __future__ import annotations

import math
import os
import pickle
import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from motionmerge.errors import ConfigError, MotionMergeError
from motionmerge.merging.recipes.functions import called_functions, register_missing
from motionmerge.sampling.batch.batch import (
    BatchOptions,
    BatchReport,
    Failure,
    Tally,
    missing,
    run_batch,
)
from motionmerge.sampling.batch.manifest import PlannedVideo
from motionmerge.sampling.batch.ray_cluster import joined_cluster, num_places, words
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.loading import show_progress
from motionmerge.sampling.request.model import FolderModel, ModelChoice, ShippedModel
from motionmerge.sampling.videos.phases import can_be_cut

_SECONDS_UNTIL_A_WARNING = 30.0
"""How long no worker may have begun anything before we say that there may be no place for one."""

_MOST_IDLE_DEATHS = 20
"""How often each worker may die before it begins anything; machines come and go."""


class Worker:
    """What lives in a process of the cluster: a pipeline with its experts.

    Args:
        model, experts, options: How the videos are made.
        num_threads: Of torch, on which the last bit of a sum can depend.
        functions: Functions of the recipe language that users registered in the driver.
    """

    def __init__(
        self,
        model: ModelChoice,
        experts: ExpertChoice,
        options: BatchOptions,
        num_threads: int,
        functions: Mapping[str, Mapping[str, Any]],
    ) -> None:
        register_missing(functions)
        self._model, self._experts, self._options = model, experts, options
        self._num_threads = num_threads
        self._attached = ExitStack()

    def answer(self) -> None:
        """Do nothing: a worker that answered has begun what it was given next."""

    def load(self) -> int:
        """Load the model; give how many videos the worker wants at a time."""
        from diffusers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(self._num_threads)
        self._pipeline, _ = self._model.load()
        show_progress(self._pipeline, is_quiet=True)
        self._bank = self._attached.enter_context(self._experts.attach(self._pipeline))
        shares_switches = self._bank is not None and can_be_cut(self._pipeline)
        return self._options.videos_per_switch if shares_switches else 1

    def make(self, videos: Sequence[PlannedVideo]) -> BatchReport:
        """Make some videos."""
        return run_batch(self._pipeline, videos, self._options, bank=self._bank)


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
        videos: What to make: those that are `missing`. One that a worker made counts only if its
            file is there for this process as well.
        options: How. A video with which a worker dies alone is retried as one that failed.
        num_workers: By default one for each GPU; on CPUs one for as many cores as torch uses here.
        tally: Counts the videos.

    Warns:
        UserWarning: For a while no worker has started, perhaps as all places are taken.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be joined or has no machine for a
            worker, workers die before they have loaded the model, or a function that a user
            registered cannot be sent to them.
        MotionMergeError: As loading the model and attaching the experts.
    """
    ray = joined_cluster()
    functions = sent_functions(experts)
    model, experts, videos = with_absolute_paths(model, experts, videos)
    threads = torch.get_num_threads()
    needs = {"GPU": 1, "CPU": 1} if model.device.type == "cuda" else {"CPU": threads}
    places = num_places(ray, needs)
    options_of_ray = {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0), "max_restarts": 0}
    actor_class = ray.remote(**options_of_ray)(Worker)
    driver = _Driver(
        ray=ray,
        new_worker=lambda: actor_class.remote(model, experts, options, threads, functions),
        needs=needs,
        free={name: ray.available_resources().get(name, 0) for name in needs},
        waiting=deque(videos),
        retries=options.retries,
        tally=tally or Tally(len(videos)),
        num_workers=min(places if num_workers is None else num_workers, len(videos)),
    )
    return driver.run()


def sent_functions(experts: ExpertChoice) -> dict[str, Mapping[str, Any]]:
    """Return the functions of users that a recipe calls, for the processes of workers.

    Raises:
        ConfigError: Names one that cannot be sent to another process.
    """
    from ray import cloudpickle

    functions = {} if experts.recipe is None else called_functions(experts.recipe.experts.values())
    for name, registered in functions.items():
        try:
            cloudpickle.dumps(registered)  # type: ignore[no-untyped-call]  # Ray's own
        except (TypeError, ValueError, pickle.PicklingError) as error:
            raise ConfigError(
                f"The registered function `{name}` cannot be sent to the workers of a cluster: "
                f"{error}.",
                fix="Let it use plain values alone, no open files or locks; or merge the experts "
                "first with `motionmerge.merge`, and give the workers the merged files.",
            ) from error
    return functions


def with_absolute_paths(
    model: ModelChoice, experts: ExpertChoice, videos: Sequence[PlannedVideo]
) -> tuple[ModelChoice, ExpertChoice, list[PlannedVideo]]:
    """Make every path mean the same in a process with another working folder."""
    if isinstance(model, ShippedModel) and Path(model.weights).suffix:
        model = replace(model, weights=str(Path(model.weights).absolute()))
    elif isinstance(model, FolderModel):
        folder = model.folder
        weights = {part: _absolute(files) for part, files in folder.weights.items()}
        others = _absolute(folder.others)
        path = folder.path.absolute()
        model = replace(model, folder=replace(folder, path=path, weights=weights, others=others))
    if experts.recipe is not None:
        folder_of_recipe = (experts.recipe.folder or Path()).absolute()
        experts = replace(experts, recipe=replace(experts.recipe, folder=folder_of_recipe))
    return model, experts, [_absolute_video(video) for video in videos]


def _absolute(paths: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(path.absolute() for path in paths)


def _absolute_video(video: PlannedVideo) -> PlannedVideo:
    job = replace(video.job, image=video.job.image.absolute())
    return replace(video, job=job, path=video.path.absolute())


@dataclass(frozen=True)
class _Call:
    """What a worker was told to do.

    Attributes:
        worker: Who.
        answer: Of the worker, before it begins.
        videos: What to make; none while it loads the model.
    """

    worker: Any
    answer: Any
    videos: Sequence[PlannedVideo] = ()


@dataclass(kw_only=True)
class _Driver:
    """Hands out videos, and takes back those of dead workers.

    Attributes:
        ray: The module.
        new_worker: Starts a worker somewhere.
        needs: What it takes of a machine.
        free: What of that the cluster had left when we came.
        waiting: Videos that nobody has.
        retries: How many deaths of a worker a video survives.
        tally: Counts the videos.
        num_workers: How many to keep alive.
    """

    ray: Any
    new_worker: Any
    needs: Mapping[str, int]
    free: Mapping[str, float]
    waiting: deque[PlannedVideo]
    retries: int
    tally: Tally
    num_workers: int
    _workers: list[Any] = field(default_factory=list)
    _running: dict[Any, _Call] = field(default_factory=dict)
    _idle: list[Any] = field(default_factory=list)
    _wants: dict[Any, int] = field(default_factory=dict)
    _deaths: Counter[Path] = field(default_factory=Counter)
    _suspects: set[Path] = field(default_factory=set)
    _deaths_at_start: int = 0
    _idle_deaths: int = 0
    _has_warned: bool = False

    def run(self) -> BatchReport:
        """Make all videos."""
        try:
            for _ in range(self.num_workers):
                self._start_worker()
            while self.waiting or any(call.videos for call in self._running.values()):
                done = self._next_done()
                call = self._running.pop(done)
                try:
                    result = self.ray.get(done)
                except self.ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, MotionMergeError):
                        raise error.cause from None
                    raise
                except self.ray.exceptions.RayError as error:  # killed, out of memory or of reach
                    self._replace(call, str(error))
                else:
                    self._receive(call, result)
                    self._hand_out(call.worker)
        finally:
            for worker in self._workers:
                self.ray.kill(worker)
        return self.tally.report()

    def _start_worker(self) -> None:
        worker = self.new_worker()
        self._workers.append(worker)
        answer = worker.answer.remote()
        self._running[worker.load.remote()] = _Call(worker, answer)

    def _next_done(self) -> Any:
        """Wait until a call is over; say so, once, if for a while no worker has begun anything."""
        while True:
            calls = list(self._running)
            done, _ = self.ray.wait(calls, num_returns=1, timeout=_SECONDS_UNTIL_A_WARNING)
            if done:
                return done[0]
            answers = [call.answer for call in self._running.values()]
            begun, _ = self.ray.wait(answers, num_returns=1, timeout=0)
            if not begun and not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"No worker has started for {_SECONDS_UNTIL_A_WARNING:g} s. One needs "
                    f"{words(self.needs)} of a machine; before, {words(self.free)} were free on "
                    "the whole cluster. It starts as soon as there is a place.",
                    stacklevel=2,
                )

    def _receive(self, call: _Call, result: int | BatchReport) -> None:
        if isinstance(result, int):
            self._wants[call.worker] = result
            self._deaths_at_start = 0
            return
        paths = {video.path.name: video for video in call.videos}
        for name in result.done:
            if _is_here(paths[name].path):
                self.tally.made(name)
                continue
            text = (
                f"A worker made this video, but here there is no {paths[name].path}: the folder "
                "is not the same on all machines."
            )
            self.tally.failed(Failure.of(paths[name], text, attempts=1))
        for failure in result.failures:
            self.tally.failed(failure)

    def _hand_out(self, worker: Any) -> None:
        """Send a worker its next videos: fewer towards the end, and suspects one by one."""
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
        answer = worker.answer.remote()
        self._running[worker.make.remote(videos)] = _Call(worker, answer, videos)

    def _replace(self, call: _Call, error: str) -> None:
        """Send a dead worker's videos to others: to idle ones, or to a new one."""
        self.ray.kill(call.worker)  # it may only be out of reach
        if not call.videos:
            self._count_death_at_start(error)
        elif self._has_begun(call):
            self._take_back(call.videos, error)
        else:  # it died while it was idle
            self._count_idle_death(error)
            self.waiting.extendleft(reversed(call.videos))
        while self._idle and self.waiting:
            self._hand_out(self._idle.pop())
        if self.waiting:
            self._start_worker()

    def _has_begun(self, call: _Call) -> bool:
        try:
            self.ray.get(call.answer, timeout=1)
        except self.ray.exceptions.RayError:
            return False
        return True

    def _count_death_at_start(self, error: str) -> None:
        self._deaths_at_start += 1
        if self._deaths_at_start > self.retries + self.num_workers:
            raise ConfigError(
                f"Workers die before the model is loaded; the last one: {error[:300]}",
                fix="See that the model fits into their memory, or lower `num_workers`.",
            )

    def _count_idle_death(self, error: str) -> None:
        self._idle_deaths += 1
        if self._idle_deaths > _MOST_IDLE_DEATHS * self.num_workers:
            raise ConfigError(
                f"Workers die before they begin a video; the last one: {error[:300]}",
                fix="Look for what ends them in Ray's logs; the same command goes on.",
            )

    def _take_back(self, videos: Sequence[PlannedVideo], error: str) -> None:
        """Return what a dead worker left undone to the queue; give up what killed too many."""
        undone = missing(videos, overwrite=True)
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


def _is_here(path: Path) -> bool:
    """Look for a file of another machine; NFS looks anew when the folder is opened."""
    with suppress(OSError):
        os.scandir(path.parent).close()
    return path.exists()
