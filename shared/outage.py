"""Log lines that would repeat: one when something begins not to answer and one when it answers again, not one a try."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from shared.errors import BusUnavailable, Unavailable

SELDOM_SECONDS = 30.0
# Such a line is about no partition, whichever one's thread writes it.
ALL = {"partition": None}


@dataclass(slots=True)
class _Down:
    """Since when, for whom, and whether it has answered one of them since."""

    since: float = field(default_factory=time.monotonic)
    whom: set[Hashable] = field(default_factory=set)
    answered: bool = False


class Outage:
    """What the parts of one worker (partitions, readers) meet together; safe from any thread."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._lock = log, threading.Lock()
        self._down: dict[str, _Down] = {}  # by what does not answer

    def fails(self, who: Hashable, error: Unavailable) -> None:
        """A part got no answer; it tries again."""
        what = "Redis" if isinstance(error, BusUnavailable) else "the store"
        with self._lock:
            if what not in self._down:
                self._log.warning("%s; trying again", error, extra=ALL)
                self._down[what] = _Down()
            self._down[what].whom.add(who)

    def works(self, who: Hashable) -> None:
        """A part got all the answers that it needs."""
        if not self._down:
            return
        with self._lock:
            for down in self._down.values():
                down.answered |= who in down.whom
            self._without(who)

    def leaves(self, who: Hashable) -> None:
        """A part is over, whether or not it got an answer."""
        with self._lock:
            self._without(who)

    def _without(self, who: Hashable) -> None:
        for what, down in list(self._down.items()):
            down.whom.discard(who)
            if not down.whom:
                del self._down[what]
                if down.answered:
                    self._log.info("%s answers again, after %.1f s", what, time.monotonic() - down.since, extra=ALL)


class Seldom:
    """Adds up what could be told many times a second, and says when to: at once, then every `seconds` at most."""

    def __init__(self, seconds: float = SELDOM_SECONDS) -> None:
        self._seconds, self._held, self._at = seconds, 0, 0.0

    def add(self, count: int = 1) -> int:
        """All that is to be told now, 0 for nothing."""
        self._held += count
        now = time.monotonic()
        if not self._held or (self._at and now - self._at < self._seconds):
            return 0
        self._at, told, self._held = now, self._held, 0
        return told
