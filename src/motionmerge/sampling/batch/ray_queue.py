"""The videos of a batch on a Ray cluster that nobody has, and what befell them on hosts so far."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from motionmerge.sampling.batch.batch import BatchReport, Failure, Tally, missing
from motionmerge.sampling.batch.manifest import PlannedVideo
from motionmerge.sampling.batch.ray_hosts import Hosts, is_here, lack_of


class VideoQueue:
    """Hands out videos, and takes back those of dead workers and of hosts that lack files.

    Args:
        videos: What to make.
        hosts: Which hosts may get workers.
        retries: How many deaths of a worker a video survives.
        tally: Counts the videos.

    Attributes:
        waiting: Videos that nobody has.
        retries, tally: As given.
        lacked: The node where a video failed for what the host lacks, and that failure.
    """

    def __init__(
        self, videos: Sequence[PlannedVideo], *, hosts: Hosts, retries: int, tally: Tally
    ) -> None:
        self.waiting = deque(videos)
        self.lacked: dict[Path, tuple[str, Failure]] = {}
        self.retries, self.tally = retries, tally
        self._hosts = hosts
        self._deaths: Counter[Path] = Counter()
        self._suspects: set[Path] = set()

    def take(self, node: str | None, size: int) -> list[PlannedVideo]:
        """Return videos for a host; a video that another batch made meanwhile counts as found."""
        taken: list[PlannedVideo] = []
        passed: list[PlannedVideo] = []
        while self.waiting and len(taken) < size:
            video = self.waiting.popleft()
            if video.path in self.lacked and self.lacked[video.path][0] == node:
                passed.append(video)
            elif not missing([video], overwrite=True):
                self.lacked.pop(video.path, None)
                self.found(video)
            elif taken and self._suspects & {taken[0].path, video.path}:
                self.waiting.appendleft(video)
                break
            else:
                taken.append(video)
        self.waiting.extend(passed)
        return taken

    def found(self, video: PlannedVideo) -> None:
        """Count what another batch made, and go on in another order than it does."""
        self.tally.found(video.path.name)
        random.SystemRandom().shuffle(self.waiting)

    def receive(
        self,
        videos: Sequence[PlannedVideo],
        report: BatchReport,
        lacks: Mapping[str, str],
        *,
        node: str | None,
    ) -> None:
        """Count what a worker made of its videos, and take back what its host lacks files for.

        Args:
            videos: What the worker was given.
            report: What it did.
            lacks: What the host lacks for a video, by the video's name.
            node: Where the worker is.
        """
        by_name = {video.path.name: video for video in videos}
        for name, reason in lacks.items():
            is_own = lack_of(by_name[name]) is None  # this machine has it, so the host is at fault
            self._take_elsewhere(by_name[name], node, reason, is_own=is_own)
        for name in (*report.done, *report.found):
            video = by_name[name]
            if not is_here(video.path):
                text = (
                    f"A worker made this video, but here there is no {video.path}: the folder "
                    "is not the same on all machines."
                )
                self._take_elsewhere(video, node, text, is_own=True)
                continue
            self._hosts.made(node or "")
            self.lacked.pop(video.path, None)
            if name in report.found:
                self.found(video)
            else:
                self.tally.made(name)
        for failure in report.failures:
            self.tally.failed(replace(failure, host=self._hosts.name(node)))

    def _take_elsewhere(
        self, video: PlannedVideo, node: str | None, reason: str, *, is_own: bool
    ) -> None:
        """Try a video once on another host, if it failed for what this one lacks."""
        name = self._hosts.name(node)
        before = self.lacked.pop(video.path, None)
        text = f"{reason} (on {name})"
        if before is not None:
            text += f" Before, on another host: {before[1].error}"
        attempts = 1 if before is None else 2
        failure = Failure.of(video, text, attempts=attempts, host=name)
        if is_own and node is not None:
            self._hosts.lacks(node, reason)
        if not is_own or node is None or before is not None or not self._hosts.is_other(node):
            self.tally.failed(failure)
            return
        self.lacked[video.path] = (node, failure)
        self.waiting.append(video)

    def fail_the_lacking(self) -> None:
        """List the videos that failed on one host and for which there is no other."""
        for video in list(self.waiting):
            if video.path in self.lacked:
                node, failure = self.lacked[video.path]
                if not self._hosts.is_other(node):
                    self.waiting.remove(video)
                    self.tally.failed(failure)

    def take_back(self, videos: Sequence[PlannedVideo], error: str, node: str | None) -> None:
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
                host = self._hosts.name(node)
                self.tally.failed(Failure.of(video, text, attempts=deaths, host=host))


def _names(videos: Sequence[PlannedVideo]) -> set[str]:
    return {video.path.name for video in videos}
