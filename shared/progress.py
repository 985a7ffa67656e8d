"""When the parts of a worker last went on: a worker lives as well as its slowest part does.

A part is whatever could hang by itself: a partition's thread, a sink's writer, the source of a feed. It marks every
turn of its loop, also one that had nothing to do or that waits for a store which does not answer; a part that is over,
or has nothing to do by intent (a closed market), rests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Progress:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}

    def mark(self, part: str = "main") -> None:
        """The part goes on."""
        self._at[part] = time.monotonic()

    def rest(self, part: str = "main") -> None:
        """Nothing is expected of the part until it marks again."""
        self._at.pop(part, None)

    def slowest(self) -> tuple[str, float]:
        """(the part that went on longest ago, seconds since then); ("", 0.0) when nothing is expected of any."""
        at = list(self._at.items())
        if not at:
            return "", 0.0
        part, then = min(at, key=lambda item: item[1])
        return part, max(0.0, time.monotonic() - then)


class Asked(threading.Event):
    """A stop that calls `asked` whenever somebody looks at it: who does so in every turn of a loop goes on."""

    LOOK_SECONDS = 1.0

    def __init__(self, stop: threading.Event, asked: Callable[[], None]) -> None:
        super().__init__()
        self._of, self._asked = stop, asked

    def set(self) -> None:
        self._of.set()

    def is_set(self) -> bool:
        self._asked()
        return self._of.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """As long as asked for; waiting is going on."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = self.LOOK_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                break
            self._of.wait(min(left, self.LOOK_SECONDS))
        return self._of.is_set()
