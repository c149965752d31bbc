"""Hosts of a Ray cluster: what they are called, and which of them may get workers.

A host that joins again after it was lost or mended is a new node of Ray, and starts afresh.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from motionmerge.sampling.batch.manifest import PlannedVideo
from motionmerge.sampling.batch.ray_cluster import num_places_of

MOST_LACKING = 3
"""How many videos in a row may lack files on a host before it gets no more."""


class Hosts:
    """The machines of a cluster, by the ids that Ray gives its nodes.

    Args:
        nodes: Lists the nodes of the cluster: `ray.nodes`.
        needs: What a worker takes of a machine.
    """

    def __init__(
        self, nodes: Callable[[], Sequence[Mapping[str, Any]]], needs: Mapping[str, int]
    ) -> None:
        self._nodes, self._needs = nodes, needs
        self._closed: set[str] = set()
        self._useless: set[str] = set()
        self._loaded: set[str] = set()
        self._lacking: Counter[str] = Counter()
        self.last_reason = ""

    def name(self, node: str | None) -> str:
        """Describe a host for people: its name, address and node id."""
        if node is None:
            return "an unknown host"
        for known in self._nodes():
            if known["NodeID"] == node:
                where = f"{known['NodeManagerHostname']} ({known['NodeManagerAddress']}"
                return f"{where}, Ray node {node[:12]})"
        return f"Ray node {node[:12]}"

    def num_places(self) -> int:
        """Count the workers for which the hosts that may get some have room, if all is free."""
        return sum(num_places_of(node["Resources"], self._needs) for node in self._open())

    def is_other(self, node: str) -> bool:
        """Check whether another host than this one can be tried."""
        others = [other for other in self._open() if other["NodeID"] != node]
        return any(num_places_of(other["Resources"], self._needs) for other in others)

    def is_end(self) -> bool:
        """Check whether no host is left, and none that once loaded the model may come back."""
        is_lost = bool(self._loaded - self._closed)
        return bool(self._closed) and self.num_places() == 0 and not is_lost

    def loaded(self, node: str) -> None:
        """Remember that a host could load the model."""
        self._loaded.add(node)

    def close(self, node: str, reason: str, *, fix: str) -> None:
        """Start no more workers on a host, and warn that it is so."""
        if node not in self._closed:
            self._closed.add(node)
            self.last_reason = f"The batch gives up the host {self.name(node)}: {reason[:500]}"
            warnings.warn(f"{self.last_reason}\n  Fix: {fix} The others go on.", stacklevel=2)

    def is_useless(self, node: str) -> bool:
        """Check whether a host lacked files so often that its workers get no more videos."""
        return node in self._useless

    def lacks(self, node: str, reason: str) -> None:
        """Count a video for which a host lacked a file; close it after some in a row."""
        self._lacking[node] += 1
        if self._lacking[node] >= MOST_LACKING:
            self.exclude(node, f"{MOST_LACKING} videos in a row failed there. {reason}")

    def exclude(self, node: str, reason: str) -> None:
        """Close a host, and let its workers get no more videos."""
        self._useless.add(node)
        fix = "Make images and output folder the same there, and let it join again."
        self.close(node, reason, fix=fix)

    def made(self, node: str) -> None:
        """Forget what a host lacked, as it has made a video."""
        self._lacking[node] = 0

    def has_made(self, node: str) -> bool:
        """Check whether a host has made a video since one failed there, or is untried."""
        return node in self._lacking and self._lacking[node] == 0

    def strategy(self, avoided: Collection[str]) -> Any:
        """Return where Ray may start a worker: not on hosts that are closed or avoided."""
        from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

        nodes = sorted({*self._closed, *avoided})
        if not nodes:
            return "DEFAULT"
        elsewhere = NotIn(*nodes)  # type: ignore[no-untyped-call]  # Ray's own
        return NodeLabelSchedulingStrategy(hard={"ray.io/node-id": elsewhere})

    def _open(self) -> list[Mapping[str, Any]]:
        return [
            node for node in self._nodes() if node["Alive"] and node["NodeID"] not in self._closed
        ]


def lack_of(video: PlannedVideo) -> str | None:
    """Return which file this machine lacks for a video: its image, or the output folder."""
    folder = video.path.parent
    if not is_here(folder):
        return f"There is no output folder {folder}."
    try:
        with video.job.image.open("rb"):
            return None
    except OSError as error:
        return f"Cannot read the image {video.job.image}: {error.strerror}."


def is_here(path: Path) -> bool:
    """Look for a file of another machine; NFS looks anew when the folder is opened."""
    with suppress(OSError):
        os.scandir(path.parent).close()
        return path.exists()
    return False
