"""Event time at a chosen speed, on the monotonic clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shared.frames import NS

LONGEST_WAIT = 0.25
SHORTEST_WAIT = 0.001


class Pacer:
    """`speed` seconds of event time pass in a second, beginning when the first event is asked for."""

    def __init__(self, speed: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.speed = speed
        self._clock = clock
        self._began: tuple[float, int] | None = None

    def anchor(self, event_ns: int) -> None:
        """Event time is `event_ns` now."""
        self._began = (self._clock(), event_ns)

    def now(self) -> int:
        """Event time, ns; call `anchor` or `due` first."""
        began, event_ns = self._began or (self._clock(), 0)
        return event_ns + int((self._clock() - began) * self.speed * NS)

    def due(self, next_ns: int, stop: threading.Event) -> int:
        """Event time, after waiting a while for `next_ns` (a moment only: look at `stop` between calls)."""
        if self._began is None:
            self.anchor(next_ns)
        ahead = next_ns - self.now()
        if ahead > 0:
            stop.wait(min(LONGEST_WAIT, max(SHORTEST_WAIT, ahead / NS / self.speed)))
        return self.now()
