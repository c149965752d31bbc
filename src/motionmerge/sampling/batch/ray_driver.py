"""The driver of a batch on a Ray cluster: starts workers, and keeps each of them busy."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from motionmerge.errors import ConfigError, MotionMergeError
from motionmerge.sampling.batch.batch import BatchReport
from motionmerge.sampling.batch.manifest import PlannedVideo
from motionmerge.sampling.batch.ray_cluster import words
from motionmerge.sampling.batch.ray_hosts import Hosts
from motionmerge.sampling.batch.ray_queue import VideoQueue

_SECONDS_UNTIL_A_WARNING = 30.0
"""How long no worker may have begun anything before we say that there may be no place for one."""

_SECONDS_BETWEEN_LOOKS = 5.0
"""How often we look for hosts that have joined."""

_MOST_IDLE_DEATHS = 20
"""How often each worker may die before it begins anything; machines come and go."""


@dataclass(frozen=True)
class _Call:
    """What a worker was told to do.

    Attributes:
        worker: Number of the worker.
        answer: Of the worker, before it begins: the id of its node.
        videos: What to make; none while it loads the model.
    """

    worker: int
    answer: Any
    videos: Sequence[PlannedVideo] = ()


@dataclass(kw_only=True)
class RayDriver:
    """Starts workers where hosts have room, hands videos to them, and replaces the dead.

    Attributes:
        ray: The module.
        new_worker: Starts a worker where a scheduling strategy says.
        hosts: Which hosts may get workers.
        needs: What it takes of a machine.
        free: What of that the cluster had left when we came.
        queue: The videos that nobody has.
        num_workers: How many to keep alive; None for as many as there are places.
    """

    ray: Any
    new_worker: Any
    hosts: Hosts
    needs: Mapping[str, int]
    free: Mapping[str, float]
    queue: VideoQueue
    num_workers: int | None
    _workers: dict[int, Any] = field(default_factory=dict)
    _num_started: int = 0
    _nodes: dict[int, str] = field(default_factory=dict)
    _running: dict[Any, _Call] = field(default_factory=dict)
    _idle: list[int] = field(default_factory=list)
    _wants: dict[int, int] = field(default_factory=dict)
    _deaths_at_start: int = 0
    _idle_deaths: int = 0
    _last_look: float = -math.inf
    _has_warned: bool = False

    def run(self) -> BatchReport:
        """Make all videos."""
        try:
            while self.queue.waiting or any(call.videos for call in self._running.values()):
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
            for worker in self._workers.values():
                self.ray.kill(worker)
        return self.queue.tally.report()

    def _fill(self) -> None:
        """Start workers while there is room for more of them, one at least.

        Raises:
            ConfigError: Every host was given up.
        """
        if not self.queue.waiting:
            return
        now = time.monotonic()
        if self._workers and now - self._last_look < _SECONDS_BETWEEN_LOOKS:
            return
        self._last_look = now
        if self.hosts.is_end():
            if not self._workers:
                self.queue.fail_the_lacking()
                raise ConfigError(
                    f"No host of the cluster is left. {self.hosts.last_reason}",
                    fix="Make images and output folder the same on all hosts and here; the same "
                    "command goes on.",
                )
            return
        wanted = self.hosts.num_places() if self.num_workers is None else self.num_workers
        # Workers that still load the model have no videos yet: the waiting ones are theirs.
        num_loading = sum(not call.videos for call in self._running.values())
        wanted = min(wanted, len(self._workers) - num_loading + len(self.queue.waiting))
        for _ in range(max(wanted - len(self._workers), 0 if self._running else 1)):
            self._start_worker()

    def _start_worker(self) -> None:
        is_for_all = any(video.path not in self.queue.lacked for video in self.queue.waiting)
        avoided = () if is_for_all else (self.queue.lacked[self.queue.waiting[0].path][0],)
        self._num_started += 1
        number = self._num_started
        self._workers[number] = self.new_worker(self.hosts.strategy(avoided))
        answer = self._workers[number].answer.remote()
        self._running[self._workers[number].load.remote()] = _Call(number, answer)

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
            self.queue.tally.has_loaded()
            return
        self.queue.receive(call.videos, *result, node=node)

    def _serve_idle(self) -> None:
        """Hand idle workers something to do; move them if what is left must go elsewhere."""
        for worker in list(self._idle):
            self._idle.remove(worker)
            self._hand_out(worker)
        if self._running or not self.queue.waiting:
            return
        self.queue.fail_the_lacking()  # all workers are where these failed
        while self._idle and self.queue.waiting:
            self._dismiss(self._idle.pop())

    def _hand_out(self, worker: int) -> None:
        """Hand a worker its next videos: fewer towards the end, and suspects one by one."""
        node = self._nodes.get(worker)
        if node is not None and self.hosts.is_useless(node):
            self._dismiss(worker)
            return
        share = math.ceil(len(self.queue.waiting) / max(1, len(self._workers)))
        size = min(self._wants[worker], share)
        if node is not None and not self.hosts.has_made(node):
            size = 1  # until it has shown that its files are there
        videos = self.queue.take(node, size)
        if not videos:
            self._idle.append(worker)
            return
        answer = self._workers[worker].answer.remote()
        self._running[self._workers[worker].make.remote(videos)] = _Call(worker, answer, videos)

    def _node(self, call: _Call) -> str | None:
        """Return where a worker is, or None if it never said."""
        if call.worker not in self._nodes:
            with suppress(self.ray.exceptions.RayError):
                self._nodes[call.worker] = self.ray.get(call.answer, timeout=1)
        return self._nodes.get(call.worker)

    def _dismiss(self, worker: int) -> None:
        """End a worker, and make room for another."""
        self.ray.kill(self._workers.pop(worker))  # it may only be out of reach
        self._nodes.pop(worker, None)
        self._wants.pop(worker, None)
        self._last_look = -math.inf

    def _give_up(self, call: _Call, error: Any) -> None:
        """End a worker that raised an error, with its host; end the batch if no host is left."""
        node = self._node(call)
        cause = error.cause if isinstance(error.cause, Exception) else error
        name = self.hosts.name(node)
        self._dismiss(call.worker)
        self.queue.waiting.extendleft(reversed(call.videos))
        if node is not None:
            message = cause.message if isinstance(cause, MotionMergeError) else str(cause)
            fix = getattr(cause, "fix", None) or "See the message."
            if call.videos:
                self.hosts.exclude(node, message)
            else:
                self.hosts.close(node, f"it could not load the model. {message}", fix=fix)
        if node is None or (not self._workers and self.hosts.is_end()):
            if isinstance(cause, MotionMergeError):
                raise type(cause)(f"{cause.message} (on {name})", fix=cause.fix) from None
            raise error

    def _replace(self, call: _Call, error: str) -> None:
        """Return a dead worker's videos to the queue, for idle workers or a new one."""
        node = self._node(call)
        has_begun = self._has_begun(call)
        self._dismiss(call.worker)
        error = f"{error[:300]} (on {self.hosts.name(node)})"
        if not call.videos:
            self._count_death_at_start(error)
        elif has_begun:
            self.queue.take_back(call.videos, error, node)
        else:  # it died while it was idle
            self._count_idle_death(error)
            self.queue.waiting.extendleft(reversed(call.videos))

    def _has_begun(self, call: _Call) -> bool:
        try:
            self.ray.get(call.answer, timeout=1)
        except self.ray.exceptions.RayError:
            return False
        return True

    def _count_death_at_start(self, error: str) -> None:
        self._deaths_at_start += 1
        if self._deaths_at_start > self.queue.retries + max(1, len(self._workers)):
            raise ConfigError(
                f"Workers die before the model is loaded; the last one: {error}",
                fix="See that the model fits into their memory, or lower `num_workers`.",
            )

    def _count_idle_death(self, error: str) -> None:
        self._idle_deaths += 1
        if self._idle_deaths > _MOST_IDLE_DEATHS * max(1, len(self._workers)):
            raise ConfigError(
                f"Workers die before they begin a video; the last one: {error}",
                fix="Look for what ends them in Ray's logs; the same command goes on.",
            )
