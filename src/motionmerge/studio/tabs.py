"""What the page's tabs make, each in a thread that tells what it does and can be stopped."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from motionmerge.errors import MotionMergeError
from motionmerge.evaluation.runs import UNFORESEEN
from motionmerge.studio.making import Maker
from motionmerge.studio.turns import Stopped
from motionmerge.studio.wishes import Wish
from motionmerge.studio.works import Exported, Work, Works

Told = tuple[str, float] | Work | Exported | BaseException
"""What is being done and which share of it is done; at last what was made, or what went wrong."""


@dataclass
class Studio:
    """What all tabs share, and what each is doing.

    Args:
        maker: Makes one work at a time.
        stops: Set to stop what a tab is making or waits for, by the tab's name.
    """

    maker: Maker
    stops: dict[str, list[threading.Event]] = field(default_factory=dict)

    @property
    def works(self) -> Works:
        """What was made."""
        return self.maker.works

    def run(self, wish: Wish, tab: str) -> Iterator[Told]:
        """Make a wish in a thread, and yield what it tells; it is stopped where nobody listens."""
        told: queue.Queue[Told] = queue.Queue()
        stop = threading.Event()
        self.stops.setdefault(tab, []).append(stop)
        make = self.maker.export if wish.kind == "export" else self.maker.make

        def work() -> None:
            try:
                told.put(make(wish, tell=lambda *said: told.put(said), stop=stop))
            except (Stopped, MotionMergeError, *UNFORESEEN) as error:
                told.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            is_over = False
            while not is_over:
                said = told.get()
                is_over = not isinstance(said, tuple)
                yield said
        finally:  # also if the tab was closed
            stop.set()
            thread.join()
            self.stops[tab].remove(stop)
            if not self.stops[tab]:
                del self.stops[tab]

    def num_making(self, tab: str) -> int:
        """Count what a tab is making or waits for."""
        return len(self.stops.get(tab, ()))

    def stop(self, tab: str) -> bool:
        """Stop what a tab is making after its current step; return whether it makes something."""
        for stop in self.stops.get(tab, ()):
            stop.set()
        return tab in self.stops
