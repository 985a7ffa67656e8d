"""What ingest tells operators: connection state, counters, a heartbeat. None of it may stop the feed."""

from __future__ import annotations

import logging
import threading
import time

import msgspec

from shared import feeds
from shared.bus import Bus
from shared.errors import BusUnavailable
from shared.heartbeat import beat, leave, redis_now_ms
from shared.progress import Progress

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
COUNT_SECONDS = 1.0


class FeedState(msgspec.Struct, frozen=True):
    """A feed as its ingest last saw it. `at_ms` is Redis's time, `published` trades since this process began.

    `heard_ms`: when the feed last brought data, or began to be expected to (shared.feeds).
    """

    state: str
    detail: str
    at_ms: int
    last_event_ns: int
    published: int
    worker: str = ""
    heard_ms: int = 0


class Status:
    """Collects in memory and writes at most once a second; safe from any thread.

    `progress`: of the source, which goes on when it pushes into its Output, and when it looks whether it must stop.
    """

    def __init__(self, bus: Bus, feed: str, worker: str) -> None:
        self.bus, self.feed, self.worker = bus, feed, worker
        self.trades = 0
        self.last_event_ns = 0
        self.state, self.detail = "starting", ""
        self.progress = Progress()
        self.beat_seconds = BEAT_SECONDS
        self._heard, self._heard_ms = False, 0
        self._why_waiting = ""
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._beat_at = self._count_at = 0.0
        self._told = False

    def published(self, trades: int, last_ns: int) -> None:
        """Trades that reached the bus."""
        self.trades += trades
        self.last_event_ns = max(self.last_event_ns, last_ns)

    def went_on(self) -> None:
        """The source works, whether or not its feed has anything to say."""
        self.progress.mark("the source")

    def heard(self) -> None:
        """The feed brought data."""
        self._heard = True

    def count(self, reason: str, records: int, usage_bytes: int = 0) -> None:
        """Add to the feed's counters."""
        with self._lock:
            if records:
                self._counts[reason] = self._counts.get(reason, 0) + records
            if usage_bytes:
                self._counts["usage_bytes"] = self._counts.get("usage_bytes", 0) + usage_bytes

    def connection(self, state: str, detail: str) -> None:
        """The source's word on its connection."""
        if (state, detail) != (self.state, self.detail):
            log.info("%s is %s%s", self.feed, state, f": {detail}" if detail else "")
        self.state, self.detail = state, detail
        self.write()

    def waits(self, why: str) -> None:
        """Publishing is held back (a full stream, no Redis), or goes on again (empty)."""
        self._why_waiting = why
        self.write()

    def tick(self) -> None:
        """Write what is due: called a few times a second."""
        now = time.monotonic()
        if now - self._beat_at >= self.beat_seconds or (self._counts and now - self._count_at >= COUNT_SECONDS):
            self.write()

    def write(self) -> None:
        """Heartbeat, state and counters, now; without Redis they wait for the next time."""
        with self._lock:
            try:
                now_ms = beat(
                    self.bus,
                    self.worker,
                    f"ingest-{self.feed}",
                    detail=self._why_waiting or self.state,
                    progress=self.progress,
                )
                self._state(now_ms)
                self._beat_at = self._count_at = time.monotonic()
                for reason, records in list(self._counts.items()):
                    self.bus.call("hincrby", self.bus.keys.ingest_counters(self.feed), reason, records)
                    del self._counts[reason]
            except BusUnavailable as error:
                log.debug("status of %s waits: %s", self.feed, error)
                self._beat_at = self._count_at = time.monotonic()

    def _state(self, now_ms: int) -> None:
        state, detail = ("waiting", self._why_waiting) if self._why_waiting else (self.state, self.detail)
        if self._heard or self.state in feeds.RESTING:
            self._heard, self._heard_ms = False, now_ms
        elif not self._heard_ms:
            self._heard_ms = self._former_heard_ms() or now_ms
        body = FeedState(state, detail, now_ms, self.last_event_ns, self.trades, self.worker, self._heard_ms)
        self.bus.note(self.bus.keys.feeds, self.feed, msgspec.json.encode(body))

    def _former_heard_ms(self) -> int:
        """As the process before this one told it: one that begins again and again brings nothing either."""
        body = self.bus.call("hget", self.bus.keys.feeds, self.feed)
        try:
            former = msgspec.json.decode(body or b"{}", type=feeds.FeedState)
        except msgspec.DecodeError:
            return 0
        return 0 if feeds.rests(former) else former.heard_ms

    def leave(self) -> None:
        """Write the last state and take the heartbeat back."""
        self.write()
        try:
            leave(self.bus, self.worker)
        except BusUnavailable as error:
            log.info("could not say goodbye: %s", error)

    def rival(self, partition: int, within_ms: int = 10_000) -> bool:
        """Whether the process that owns this feed now (and is not this one) shows signs of life."""
        owner = self.bus.call("hget", self.bus.keys.producers(partition), f"{self.feed}:owner")
        if owner is None or owner.decode() == self.worker:
            return False
        body = self.bus.call("hget", self.bus.keys.workers, owner)
        return body is not None and redis_now_ms(self.bus) - int(msgspec.json.decode(body)["at_ms"]) <= within_ms
