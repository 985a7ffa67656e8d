"""What feeds use and what it costs, by UTC day: the sums, without Redis and without a clock.

A budget is a vendor's: the name of a feed before its colon. What is bought of a vendor's archive is the usage of a
feed of its own (HISTORY), and counts towards the same budget.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import msgspec

from shared.frames import NS, iso, ns_of
from shared.messages import Usage
from shared.settings import UsageSettings

DAY_NS = 86_400 * NS
HOUR_SECONDS = 3600.0
MIB = 1 << 20
KEPT_DAYS = 40
HISTORY = "databento:history"
RUNNING, STOPPED = "running", "stopped"
# Seconds by which the wall clock of accounting and market hours is moved: so that a test sees midnight.
OFFSET = "TAPELINE_TEST_NOW_OFFSET_SECONDS"


def now_ns() -> int:
    """The wall clock, ns UTC."""
    return time.time_ns() + int(float(os.environ.get(OFFSET, "0")) * NS)


def day_of(at_ns: int) -> str:
    """The UTC day of an instant (`2026-08-01`)."""
    return iso(at_ns)[:10]


def day_end(at_ns: int) -> int:
    """The next 00:00 UTC."""
    return (at_ns // DAY_NS + 1) * DAY_NS


def vendor(feed: str) -> str:
    """Whose budget a feed draws on."""
    return feed.partition(":")[0]


def priced(feed: str, settings: UsageSettings) -> bool:
    """Whether bytes and hours of a feed cost."""
    return feed in settings.priced_feeds or vendor(feed) in settings.priced_feeds


def stop_usd(settings: UsageSettings) -> float:
    """The cost of a day at which a priced feed is stopped; infinite without a budget."""
    return settings.stop_at * settings.daily_usd if settings.daily_usd > 0 else float("inf")


class Totals(msgspec.Struct, frozen=True):
    """What was used. All of it only ever grows, so of two accounts of one day the larger numbers are right."""

    events: int = 0
    bytes: int = 0
    connected_seconds: float = 0.0
    cost_usd: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(_numbers(self), _numbers(other), strict=True)))

    def __sub__(self, other: Totals) -> Totals:
        """What came on top of `other`; never below 0."""
        return Totals(*(max(a - b, 0) for a, b in zip(_numbers(self), _numbers(other), strict=True)))

    def join(self, other: Totals) -> Totals:
        """Two accounts of the same, neither of them complete for certain."""
        return Totals(*map(max, _numbers(self), _numbers(other)))


def _numbers(totals: Totals) -> tuple[Any, ...]:
    return msgspec.structs.astuple(totals)


NOTHING = Totals()


class Row(Usage, frozen=True, tag="usage"):
    """Usage as it is kept on the bus. The interval is what no frame has told yet.

    `skipped`: why the feed was disconnected on purpose, until it goes on (see `services.ingest.usage`).
    """

    skipped: str = ""


def totals_of(row: Usage) -> Totals:
    """A day's totals."""
    return Totals(row.day_events, row.day_bytes, row.day_connected_seconds, row.day_cost_usd)


class Meter:
    """The account of one feed, safe from any thread. `days`: totals by UTC day, `told`: how much was published."""

    def __init__(self, feed: str, settings: UsageSettings, at_ns: int) -> None:
        self.feed = feed
        self.priced = priced(feed, settings)
        self.budget_usd = settings.daily_usd if self.priced or feed == HISTORY else 0.0
        self.day, self.at_ns = day_of(at_ns), at_ns
        self.days: dict[str, Totals] = {self.day: NOTHING}
        self.told: dict[str, Totals] = {}
        self._settings = settings
        self._connected = False
        self._states = {self.day: RUNNING}
        self._lock = threading.RLock()

    @property
    def state(self) -> str:
        """RUNNING or STOPPED, now."""
        return self._states[self.day]

    @state.setter
    def state(self, state: str) -> None:
        with self._lock:
            self._states[self.day] = state

    @property
    def today(self) -> Totals:
        """Of the running day."""
        with self._lock:
            return self.days[self.day]

    @property
    def connected(self) -> bool:
        """Whether connected time runs."""
        return self._connected

    def connect(self, connected: bool) -> None:
        """Connected time runs from here on, or stops."""
        with self._lock:
            self._connected = connected

    def advance(self, at_ns: int, elapsed_ns: int) -> None:
        """It is `at_ns` now, `elapsed_ns` after the last time: connected time runs, each part of it in its day.

        A wall clock that is set back does not bring back a day.
        """
        with self._lock:
            at_ns = max(at_ns, self.at_ns)
            day = day_of(at_ns)
            if day != self.day:
                here = min(elapsed_ns, day_end(self.at_ns) - self.at_ns)
                self._run(here)
                self._states[day] = self.state
                self.day, elapsed_ns = day, min(elapsed_ns - here, at_ns % DAY_NS)
                self.days.setdefault(day, NOTHING)
            self._run(elapsed_ns)
            self.at_ns = at_ns

    def _run(self, elapsed_ns: int) -> None:
        if self._connected and elapsed_ns > 0:
            seconds = elapsed_ns / NS
            price = self._settings.usd_per_hour if self.priced else 0.0
            self.add(Totals(connected_seconds=seconds, cost_usd=seconds / HOUR_SECONDS * price))

    def receive(self, events: int, nbytes: int) -> None:
        """Records that came, and their bytes."""
        price = self._settings.usd_per_mib if self.priced else 0.0
        self.add(Totals(events, nbytes, 0.0, nbytes / MIB * price))

    def add(self, more: Totals) -> None:
        """On the running day."""
        with self._lock:
            self.days[self.day] = self.days[self.day] + more

    def join(self, day: str, totals: Totals, told: Totals, state: str = "") -> None:
        """What is known of a day elsewhere."""
        with self._lock:
            self.days[day] = self.days.get(day, NOTHING).join(totals)
            self.told[day] = told
            if state:
                self._states[day] = state

    def rows(self, skipped: str = "") -> list[Row]:
        """Each day as it stands, oldest first; a day that is over until all of it was told."""
        with self._lock:
            left = [d for d in sorted(self.days) if d == self.day or self.days[d] != self.told.get(d, NOTHING)]
            return [self._row(day, skipped) for day in left]

    def _row(self, day: str, skipped: str) -> Row:
        total = self.days[day]
        more = total - self.told.get(day, NOTHING)
        at_ns = self.at_ns if day == self.day else ns_of(day) + DAY_NS - 1
        return Row(
            self.feed, day, at_ns, more.events, more.bytes, more.connected_seconds, more.cost_usd,
            total.events, total.bytes, total.connected_seconds, total.cost_usd, self.budget_usd,
            self._states.get(day, RUNNING), skipped,
        )  # fmt: skip

    def tell(self, rows: list[Row]) -> None:
        """These were published."""
        with self._lock:
            for row in rows:
                self.told[row.day] = totals_of(row)
            for day in [d for d in self.days if d != self.day and self.days[d] == self.told.get(d, NOTHING)]:
                del self.days[day]
                self._states.pop(day, None)
            for day in sorted(self.told)[:-2]:
                del self.told[day]
