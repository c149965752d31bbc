"""A batch on many machines: workers of a Ray cluster, each with the model loaded once.

The driver hands the next few videos to whichever worker is ready. What a dead worker did not finish
goes to the others; a new one takes its place. Videos are files, written whole, so that nothing else
has to be remembered: the output folder must be the same for all machines. Their processes run in
folders of their own, so what they are sent has absolute paths.
"""

from __future__ import annotations

import math
import pickle
import random
import time
import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from motionmerge.errors import ConfigError, MotionMergeError
from motionmerge.io.atomic import prepare_folder
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
from motionmerge.sampling.batch.ray_hosts import Hosts, is_here, lack_of
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.loading import show_progress
from motionmerge.sampling.request.model import FolderModel, ModelChoice, ShippedModel
from motionmerge.sampling.videos.phases import can_be_cut

_SECONDS_UNTIL_A_WARNING = 30.0
"""How long no worker may have begun anything before we say that there may be no place for one."""

_SECONDS_BETWEEN_LOOKS = 5.0
"""How often we look for hosts that have joined."""

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

    def answer(self) -> str:
        """Return the node's id: a worker that answered has begun what it was given next."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

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

    def make(self, videos: Sequence[PlannedVideo]) -> tuple[BatchReport, dict[str, str]]:
        """Make some videos; return also which could not be begun, and what the host lacks."""
        lacks = {video.path.name: lack for video in videos if (lack := lack_of(video))}
        possible = [video for video in videos if video.path.name not in lacks]
        return run_batch(self._pipeline, possible, self._options, bank=self._bank), lacks


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
        num_workers: By default one for each GPU; on CPUs one for as many cores as torch uses here;
            also of hosts that join later.
        tally: Counts the videos.

    Warns:
        UserWarning: For a while no worker has started, perhaps as all places are taken; or a host
            is given up, as it could not load the model, or lacked files several times in a row.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be joined or has no machine for a
            worker, workers die before they have loaded the model, a function that a user
            registered cannot be sent to them, or the folder cannot be made.
        MotionMergeError: As loading the model and attaching the experts, if no host is left.
    """
    ray = joined_cluster()
    functions = sent_functions(experts)
    model, experts, videos = with_absolute_paths(model, experts, videos)
    threads = torch.get_num_threads()
    needs = {"GPU": 1, "CPU": 1} if model.device.type == "cuda" else {"CPU": threads}
    num_places(ray, needs)
    for folder in {video.path.parent for video in videos}:
        prepare_folder(folder)
    options_of_ray = {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0), "max_restarts": 0}
    actor_class = ray.remote(**options_of_ray)(Worker)
    driver = _Driver(
        ray=ray,
        new_worker=lambda where: actor_class.options(scheduling_strategy=where).remote(
            model, experts, options, threads, functions
        ),
        hosts=Hosts(ray, needs),
        needs=needs,
        free={name: ray.available_resources().get(name, 0) for name in needs},
        waiting=deque(videos),
        retries=options.retries,
        tally=tally or Tally(len(videos)),
        num_workers=num_workers,
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
        answer: Of the worker, before it begins: the id of its node.
        videos: What to make; none while it loads the model.
    """

    worker: Any
    answer: Any
    videos: Sequence[PlannedVideo] = ()


@dataclass(kw_only=True)
class _Driver:
    """Hands out videos, and takes back those of dead workers and of hosts that lack files.

    Attributes:
        ray: The module.
        new_worker: Starts a worker where a scheduling strategy says.
        hosts: Which hosts may get workers.
        needs: What it takes of a machine.
        free: What of that the cluster had left when we came.
        waiting: Videos that nobody has.
        retries: How many deaths of a worker a video survives.
        tally: Counts the videos.
        num_workers: How many to keep alive; None for as many as there are places.
    """

    ray: Any
    new_worker: Any
    hosts: Hosts
    needs: Mapping[str, int]
    free: Mapping[str, float]
    waiting: deque[PlannedVideo]
    retries: int
    tally: Tally
    num_workers: int | None
    _nodes: dict[Any, str | None] = field(default_factory=dict)
    _running: dict[Any, _Call] = field(default_factory=dict)
    _idle: list[Any] = field(default_factory=list)
    _wants: dict[Any, int] = field(default_factory=dict)
    _deaths: Counter[Path] = field(default_factory=Counter)
    _suspects: set[Path] = field(default_factory=set)
    _lacked: dict[Path, tuple[str, Failure]] = field(default_factory=dict)
    _deaths_at_start: int = 0
    _idle_deaths: int = 0
    _last_look: float = -math.inf
    _has_warned: bool = False

    def run(self) -> BatchReport:
        """Make all videos."""
        try:
            while self.waiting or any(call.videos for call in self._running.values()):
                self._serve_idle()
                self._fill()
                if not self._running:  # others made what was left
                    continue
                done = self._next_done()
                call = self._running.pop(done)
                try:
                    result = self.ray.get(done)
                except self.ray.exceptions.RayTaskError as error:
                    self._give_up(call, error)
                except self.ray.exceptions.RayError as error:  # killed, out of memory or of reach
                    self._replace(call, str(error))
                else:
                    self._receive(call, result)
                    self._idle.append(call.worker)
        finally:
            for worker in list(self._nodes):
                self.ray.kill(worker)
        return self.tally.report()

    def _fill(self) -> None:
        """Start workers while there is room for more of them, one at least.

        Raises:
            ConfigError: Every host was given up.
        """
        if not self.waiting:
            return
        now = time.monotonic()
        if self._nodes and now - self._last_look < _SECONDS_BETWEEN_LOOKS:
            return
        self._last_look = now
        if self.hosts.is_end():
            if not self._nodes:
                self._fail_the_lacking()
                raise ConfigError(
                    f"No host of the cluster is left. {self.hosts.last_reason}",
                    fix="Make images and output folder the same on all hosts and here; the same "
                    "command goes on.",
                )
            return
        wanted = self.hosts.num_places() if self.num_workers is None else self.num_workers
        wanted = min(wanted, len(self._nodes) + len(self.waiting))
        for _ in range(max(wanted - len(self._nodes), 0 if self._running else 1)):
            self._start_worker()

    def _start_worker(self) -> None:
        is_for_all = any(video.path not in self._lacked for video in self.waiting)
        avoided = () if is_for_all else (self._lacked[self.waiting[0].path][0],)
        worker = self.new_worker(self.hosts.strategy(avoided))
        self._nodes[worker] = None
        answer = worker.answer.remote()
        self._running[worker.load.remote()] = _Call(worker, answer)

    def _next_done(self) -> Any:
        """Wait until a call is over or it is time to look for new hosts.

        Warns once if for a while no worker has begun anything.
        """
        deadline = time.monotonic() + _SECONDS_UNTIL_A_WARNING
        while True:
            calls = list(self._running)
            rest = max(0.0, deadline - time.monotonic())
            done, _ = self.ray.wait(calls, num_returns=1, timeout=min(rest, _SECONDS_BETWEEN_LOOKS))
            if done:
                return done[0]
            self._fill()
            answers = [call.answer for call in self._running.values()]
            begun, _ = self.ray.wait(answers, num_returns=1, timeout=0)
            if begun or self._has_warned:
                deadline = time.monotonic() + _SECONDS_UNTIL_A_WARNING
            elif time.monotonic() >= deadline:
                self._has_warned = True
                warnings.warn(
                    f"No worker has started for {_SECONDS_UNTIL_A_WARNING:g} s. One needs "
                    f"{words(self.needs)} of a machine; before, {words(self.free)} were free on "
                    "the whole cluster. It starts as soon as there is a place.",
                    stacklevel=2,
                )

    def _receive(self, call: _Call, result: int | tuple[BatchReport, dict[str, str]]) -> None:
        node = self._node(call)
        if isinstance(result, int):
            self._wants[call.worker] = result
            self._deaths_at_start = 0
            self.hosts.loaded(node or "")
            return
        report, lacks = result
        videos = {video.path.name: video for video in call.videos}
        for name, reason in lacks.items():
            self._take_elsewhere(videos[name], node, reason, is_own=lack_of(videos[name]) is None)
        for name in (*report.done, *report.found):
            path = videos[name].path
            if not is_here(path):
                text = (
                    f"A worker made this video, but here there is no {path}: the folder "
                    "is not the same on all machines."
                )
                self._take_elsewhere(videos[name], node, text, is_own=True)
                continue
            self.hosts.made(node or "")
            self._lacked.pop(videos[name].path, None)
            if name in report.found:
                self._found(videos[name])
            else:
                self.tally.made(name)
        for failure in report.failures:
            self.tally.failed(replace(failure, host=self.hosts.name(node)))

    def _take_elsewhere(
        self, video: PlannedVideo, node: str | None, reason: str, *, is_own: bool
    ) -> None:
        """Try a video once on another host, if it failed for what this one lacks."""
        name = self.hosts.name(node)
        before = self._lacked.pop(video.path, None)
        text = f"{reason} (on {name})"
        if before is not None:
            text += f" Before, on another host: {before[1].error}"
        attempts = 1 if before is None else 2
        failure = Failure.of(video, text, attempts=attempts, host=name)
        if is_own and node is not None:
            self.hosts.lacks(node, reason)
        if not is_own or node is None or before is not None or not self.hosts.is_other(node):
            self.tally.failed(failure)
            return
        self._lacked[video.path] = (node, failure)
        self.waiting.append(video)

    def _found(self, video: PlannedVideo) -> None:
        """Count what another batch made, and go on in another order than it does."""
        self.tally.found(video.path.name)
        random.SystemRandom().shuffle(self.waiting)

    def _serve_idle(self) -> None:
        """Give idle workers something to do; move them if what is left must go elsewhere."""
        for worker in list(self._idle):
            self._idle.remove(worker)
            self._hand_out(worker)
        if self._running or not self.waiting:
            return
        self._fail_the_lacking()  # all workers are where these failed
        while self._idle and self.waiting:
            self._dismiss(self._idle.pop())

    def _fail_the_lacking(self) -> None:
        """List the videos that failed on one host and for which there is no other."""
        for video in list(self.waiting):
            if video.path in self._lacked:
                node, failure = self._lacked[video.path]
                if not self.hosts.is_other(node):
                    self.waiting.remove(video)
                    self.tally.failed(failure)

    def _hand_out(self, worker: Any) -> None:
        """Give a worker its next videos: fewer towards the end, and suspects one by one."""
        node = self._nodes[worker]
        if node is not None and self.hosts.is_useless(node):
            self._dismiss(worker)
            return
        size = min(self._wants[worker], math.ceil(len(self.waiting) / max(1, len(self._nodes))))
        if node is not None and not self.hosts.has_made(node):
            size = 1  # until it has shown that its files are there
        videos = self._take(node, size)
        if not videos:
            self._idle.append(worker)
            return
        answer = worker.answer.remote()
        self._running[worker.make.remote(videos)] = _Call(worker, answer, videos)

    def _take(self, node: str | None, size: int) -> list[PlannedVideo]:
        """Take videos for a host from the queue that nobody else has made in the meantime."""
        taken: list[PlannedVideo] = []
        passed: list[PlannedVideo] = []
        while self.waiting and len(taken) < size:
            video = self.waiting.popleft()
            if video.path in self._lacked and self._lacked[video.path][0] == node:
                passed.append(video)
            elif not missing([video], overwrite=True):
                self._lacked.pop(video.path, None)
                self._found(video)
            elif taken and self._suspects & {taken[0].path, video.path}:
                self.waiting.appendleft(video)
                break
            else:
                taken.append(video)
        self.waiting.extend(passed)
        return taken

    def _node(self, call: _Call) -> str | None:
        """Return where a worker is, or None if it never said."""
        if self._nodes.get(call.worker) is None:
            try:
                self._nodes[call.worker] = self.ray.get(call.answer, timeout=1)
            except self.ray.exceptions.RayError:
                return None
        return self._nodes[call.worker]

    def _dismiss(self, worker: Any) -> None:
        """End a worker, and make room for another."""
        self.ray.kill(worker)  # it may only be out of reach
        self._nodes.pop(worker, None)
        self._wants.pop(worker, None)
        self._last_look = -math.inf

    def _give_up(self, call: _Call, error: Any) -> None:
        """End a worker that raised an error, with its host; end the batch if no host is left."""
        node = self._node(call)
        cause = error.cause if isinstance(error.cause, Exception) else error
        name = self.hosts.name(node)
        self._dismiss(call.worker)
        self.waiting.extendleft(reversed(call.videos))
        if node is not None:
            message = cause.message if isinstance(cause, MotionMergeError) else str(cause)
            fix = getattr(cause, "fix", None) or "See the message."
            if call.videos:
                self.hosts.exclude(node, message)
            else:
                self.hosts.close(node, f"it could not load the model. {message}", fix=fix)
        if node is None or (not self._nodes and self.hosts.is_end()):
            if isinstance(cause, MotionMergeError):
                raise type(cause)(f"{cause.message} (on {name})", fix=cause.fix) from None
            raise error

    def _replace(self, call: _Call, error: str) -> None:
        """Give what a dead worker had to others: to those that are idle, or to a new one."""
        node = self._node(call)
        has_begun = self._has_begun(call)
        self._dismiss(call.worker)
        error = f"{error[:300]} (on {self.hosts.name(node)})"
        if not call.videos:
            self._count_death_at_start(error)
        elif has_begun:
            self._take_back(call.videos, error, node)
        else:  # it died while it was idle
            self._count_idle_death(error)
            self.waiting.extendleft(reversed(call.videos))

    def _has_begun(self, call: _Call) -> bool:
        try:
            self.ray.get(call.answer, timeout=1)
        except self.ray.exceptions.RayError:
            return False
        return True

    def _count_death_at_start(self, error: str) -> None:
        self._deaths_at_start += 1
        if self._deaths_at_start > self.retries + max(1, len(self._nodes)):
            raise ConfigError(
                f"Workers die before the model is loaded; the last one: {error}",
                fix="See that the model fits into their memory, or lower `num_workers`.",
            )

    def _count_idle_death(self, error: str) -> None:
        self._idle_deaths += 1
        if self._idle_deaths > _MOST_IDLE_DEATHS * max(1, len(self._nodes)):
            raise ConfigError(
                f"Workers die before they begin a video; the last one: {error}",
                fix="Look for what ends them in Ray's logs; the same command goes on.",
            )

    def _take_back(self, videos: Sequence[PlannedVideo], error: str, node: str | None) -> None:
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
                text = f"The worker died while it made this video: {error}"
                host = self.hosts.name(node)
                self.tally.failed(Failure.of(video, text, attempts=deaths, host=host))


def _names(videos: Sequence[PlannedVideo]) -> set[str]:
    return {video.path.name for video in videos}
