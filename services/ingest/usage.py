"""What a feed uses, counted while it runs: kept on the bus each second, told about once a minute.

All of it happens on a thread of its own, which also watches whether the feed may stay connected: neither Redis nor
the store can hold the feed up. What cannot be told waits in memory and goes out in one piece.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from services.ingest.gate import BUDGET, CLOSED, Gate, Shut
from services.ingest.source import Stop
from shared import metrics
from shared.bus import Bus
from shared.errors import BusUnavailable, Fenced, TapelineError
from shared.settings import Settings
from shared.usage import RUNNING, STOPPED, Meter, Totals, now_ns, stop_usd
from shared.usage_book import Book, spent_by_others

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
KEEP_SECONDS = 1.0
TELL_SECONDS = 60.0
OTHERS_SECONDS = 5.0
# Why a feed was disconnected on purpose: what it misses then is a Gap of this reason and is not asked for again, ...
STOPPED_AT_BUDGET = "stopped at the budget"
# ... or is nothing, because the session had ended at the instant (ns) that follows.
SESSION_ENDED = "session ended "


# Day, state, what is skipped, and the day's totals.
_Here = tuple[str, str, str, Totals]


class Account:
    """Usage, budget and market hours of one feed.

    `attach`, `open` and `over` are for the thread of the source. Why a feed is disconnected on purpose outlives the
    process, until its source has gone on from there.
    """

    def __init__(
        self,
        bus: Bus,
        feed: str,
        owner: str,
        settings: Settings,
        gate: Gate,
        *,
        clock: Callable[[], int] = now_ns,
        stopwatch: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.feed, self.gate = feed, gate
        self.fenced: Fenced | None = None
        self._bus, self._settings = bus, settings
        self._clock, self._stopwatch = clock, stopwatch
        self._meter = Meter(feed, settings.usage, clock())
        self._book = Book(bus, self._meter, owner, settings.tapeline.partitions, settings.tapeline.store)
        self._counted_at = stopwatch()
        self._run: Stop | None = None
        self._shut: Shut | None = None  # why the run was stopped
        self._was_connected = False
        self._others_usd, self._others_day = 0.0, ""
        self._kept_at = self._told_at = self._others_at = float("-inf")
        self._kept: _Here | None = None
        self._told: _Here | None = None
        self._io = threading.Lock()
        self._counting = threading.Lock()
        self._gating = threading.Lock()  # a run that is stopped has not gone on
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    # -- life --------------------------------------------------------------------------------

    def attach(self) -> None:
        """Own the account and know what was used before. Raises BusUnavailable."""
        self.connection(False)
        self._advance()
        with self._io:
            self._book.attach()
            self.fenced = None
            self._look_at_others()
        if self._thread is None:
            self._thread = threading.Thread(target=self._tend, name=f"usage-{self.feed}", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """The last word."""
        self.connection(False)
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
            if not self._thread.is_alive():
                self._write(tell=True)
        self._bus.close()

    # -- what the feed does ------------------------------------------------------------------

    def received(self, events: int, nbytes: int) -> None:
        """Records that came over the wire."""
        self._meter.receive(events, nbytes)

    def spend(self, bought: Totals) -> None:
        """Something was bought for this feed."""
        self._meter.add(bought)

    def connection(self, connected: bool) -> None:
        """The connection stands from here on, or does not."""
        self._advance()
        self._meter.connect(connected)

    def went_on(self) -> None:
        """The source published from where it went on: nothing is skipped any more."""
        if self._book.skipped:
            with self._gating:
                if self._run is not None and not self._run.is_set():
                    self._book.skipped = ""

    # -- the gate ----------------------------------------------------------------------------

    @property
    def now_ns(self) -> int:
        """The wall clock."""
        return self._clock()

    @property
    def session_ended_ns(self) -> int:
        """The end of the session that was seen to its end, until the next one is watched; 0 if there is none."""
        head, _, at = self._book.skipped.partition(SESSION_ENDED)
        return int(at) if at and not head else 0

    def skipping(self) -> tuple[str, int | None]:
        """How to go on: the reason for which all that was missed is given up; from when on nothing may be missed."""
        if self._book.skipped == STOPPED_AT_BUDGET:
            return STOPPED_AT_BUDGET, None
        return "", self.gate.opens_ns(self.session_ended_ns) if self.session_ended_ns else None

    def spent_usd(self) -> float:
        """What the vendor's feeds cost today."""
        others = self._others_usd if self._others_day == self._meter.day else 0.0
        return self._meter.today.cost_usd + others

    def left_usd(self) -> float:
        """What may still be spent today before the feed is stopped; infinite without a budget."""
        return max(0.0, stop_usd(self._settings.usage) - self.spent_usd())

    def shut(self) -> Shut | None:
        """Why the feed must not connect now. Raises Fenced once another process has the account."""
        if self.fenced is not None:
            raise self.fenced
        self._advance()
        shut = self.gate.until(self._clock(), self.spent_usd(), running=self._run is not None)
        stopped = shut is not None and shut.state == BUDGET
        if stopped:
            self._book.skipped = STOPPED_AT_BUDGET
        self._meter.state = STOPPED if stopped else RUNNING
        return shut

    def open(self, stop: threading.Event) -> Stop:
        """A run of the source begins: it must end when this is set."""
        self._shut, self._run = None, Stop(stop)
        return self._run

    def over(self, reached_ns: int) -> Shut | None:
        """The run is over; why, if it was stopped. `reached_ns`: the market is known up to there, 0 if it is not."""
        shut, self._run, self._shut = self._shut, None, None
        if shut is not None and shut.state == CLOSED and self._was_connected and reached_ns >= shut.ended_ns > 0:
            self._book.skipped = f"{SESSION_ENDED}{shut.ended_ns}"
        return shut

    # -- the thread --------------------------------------------------------------------------

    def _advance(self) -> None:
        with self._counting:
            now = self._stopwatch()
            self._meter.advance(self._clock(), now - self._counted_at)
            self._counted_at = now

    def _tend(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            self._watch()
            self._write()

    def _watch(self) -> None:
        """Stop the run when the gate shuts."""
        run = self._run
        if run is None or self.fenced is not None:
            self._advance()
            return
        with self._gating:
            shut = self.shut()
            if shut is not None and not run.is_set():
                self._shut, self._was_connected = shut, self._meter.connected
                run.set()

    def _write(self, tell: bool = False) -> None:
        """What is due. Whatever goes wrong, it is tried again."""
        if self.fenced is not None:
            return
        try:
            with self._io:
                self._due(tell)
        except Fenced as error:
            self.fenced = error
        except BusUnavailable as error:
            log.debug("usage of %s waits: %s", self.feed, error)
        except TapelineError as error:
            log.warning("usage of %s is not told: %s", self.feed, error)
        except Exception:
            log.exception("usage of %s is not told", self.feed)
            metrics.fault("ingest.usage")

    def _due(self, tell: bool) -> None:
        now, meter = time.monotonic(), self._meter
        if now - self._others_at >= OTHERS_SECONDS:
            self._look_at_others()
        here = (meter.day, meter.state, self._book.skipped, meter.today)
        changed = self._told is None or here[:3] != self._told[:3]
        if here != self._told and (tell or changed or now - self._told_at >= TELL_SECONDS):
            self._told_at = now
            if self._book.publish():
                self._told = self._kept = here
        if here != self._kept and (tell or changed or now - self._kept_at >= KEEP_SECONDS):
            self._kept_at = now
            self._book.keep()
            self._kept = here

    def _look_at_others(self) -> None:
        self._others_at, day = time.monotonic(), self._meter.day
        self._others_usd = spent_by_others(self._bus, self.feed, day, self._settings.tapeline.state_dir)
        self._others_day = day
