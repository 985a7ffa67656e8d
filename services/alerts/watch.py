"""What is wrong with the operation, read from the bus alone: workers, silent feeds, gaps, budgets, backlogs, dead
letters.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from services.alerts.core import Count, Seen
from services.alerts.rules import Event
from shared.bus import Bus
from shared.feeds import FeedState, silent, states
from shared.health import unhealthy, verdicts
from shared.heartbeat import Beat
from shared.keys import TOPICS
from shared.messages import Usage
from shared.settings import Settings
from shared.status import Reader
from shared.usage import HISTORY, STOPPED, day_of, priced, stop_usd, vendor

NAME = "alerts"
T = TypeVar("T")
DAY_MS = 86_400_000
# Of the cost at which a vendor's feeds are stopped: from here on it is near.
NEAR = 0.8
# A worker that is restarted, and a partition that is taken over, is back within this time.
GRACE_SECONDS = 10.0


class Watch:
    """Looks at one deployment again and again; what was seen is kept in memory only."""

    def __init__(self, bus: Bus, settings: Settings) -> None:
        self.bus, self.settings = bus, settings
        self._reader = Reader(bus, settings.tapeline.partitions, settings.redis.lease_seconds)

    def look(self, now_ms: int) -> Seen:
        """Raises BusUnavailable."""
        feeds = states(self.bus)
        conditions = [
            *self._workers(),
            *self._silent(feeds, now_ms),
            *self._budgets(sorted({*feeds, HISTORY, *self.settings.usage.priced_feeds}), now_ms),
            *self._backlogs(now_ms),
        ]
        return Seen(tuple(conditions), (*self._gaps(), *self._dead_letters()))

    def _workers(self) -> list[Event]:
        """Workers and stages that have been unhealthy for a while; those of one name fold, however often it begins."""
        grace_ms = (self.settings.redis.lease_seconds + GRACE_SECONDS) * 1000
        status, found = self._reader.brief(), list[Event]()
        for v in unhealthy(verdicts(status, {}, self.settings)):
            if status.now_ms - v.since_ms > grace_ms:
                key = f"{v.process} on {v.host}" if v.process else f"{v.kind} {v.name}"
                found.append(Event("worker", key, v.since_ms, f"{v.what} is unhealthy", v.why))
        return found

    def _silent(self, feeds: dict[str, FeedState], now_ms: int) -> list[Event]:
        found = []
        for name, since, why in silent(feeds, self.settings, now_ms):
            feed = feeds[name]
            said = feed.state + (f" ({feed.detail})" if feed.detail else "")
            found.append(Event("feed_silent", name, since, f"feed {name} is silent", f"{why}; it is {said}"))
        return found

    def _budgets(self, feeds: list[str], now_ms: int) -> list[Event]:
        """Feeds that are stopped, and vendors whose feeds (with what was bought) are near the limit together."""
        settings = self.settings.usage
        limit, since = stop_usd(settings), now_ms - now_ms % DAY_MS
        found: list[Event] = []
        spent: dict[tuple[str, str], float] = {}
        stopped: set[tuple[str, str]] = set()
        for feed in feeds:
            used = self._usage(feed, day_of(now_ms * 1_000_000))
            if used is None or not (priced(feed, settings) or used.state == STOPPED):
                continue
            account = (vendor(feed), used.day)
            spent[account] = spent.get(account, 0.0) + used.day_cost_usd
            if used.state == STOPPED:
                stopped.add(account)
                text = f"{used.day_cost_usd:.2f} USD used on {used.day}; it goes on at 00:00 UTC"
                title = f"feed {feed} is stopped at its budget"
                found.append(Event("budget", f"{feed} stopped {used.day}", since, title, text))
        for (name, day), cost in spent.items():
            if (name, day) not in stopped and cost >= NEAR * limit:
                text = f"{cost:.2f} USD used on {day}; its feeds stop at {limit:.2f}"
                found.append(Event("budget", f"{name} near {day}", since, f"{name} is near its budget", text))
        return found

    def _usage(self, feed: str, today: str) -> Usage | None:
        """Of the newest day that the feed knows, unless that is over."""
        key = self.bus.keys.usage(feed)
        day = max((name.decode() for name in self.bus.call("hkeys", key)), default="")
        return _read(self.bus.call("hget", key, day), Usage) if day >= today else None

    def _backlogs(self, now_ms: int) -> list[Event]:
        """By the age on the bus of the oldest entry that a consumer is not done with."""
        patience = self.settings.alerts.backlog_seconds * 1000
        behind: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for topic in TOPICS:
            for partition in range(self.settings.tapeline.partitions):
                for name, oldest in self._waiting(partition, topic).items():
                    if now_ms - oldest > patience:
                        behind.setdefault((name, topic), []).append((oldest, partition))
        found = []
        for (name, topic), late in sorted(behind.items()):
            oldest, partition = min(late)
            text = f"{(now_ms - oldest) / 1000:.0f} s in partition {partition}, {len(late)} partitions in all"
            found.append(Event("backlog", f"{name} {topic}", oldest, f"{name} is behind on {topic}", text))
        return found

    def _waiting(self, partition: int, topic: str) -> dict[str, int]:
        """Consumer -> time (ms) of the oldest entry that it is not done with, of those that are behind."""
        positions = self.bus.call("hgetall", self.bus.keys.consumers(partition, topic))
        found = {}
        oldest: dict[bytes, int | None] = {}
        for name, position in positions.items():
            if name.decode() == NAME:
                continue
            if position not in oldest:
                stream = self.bus.keys.stream(partition, topic)
                entries = self.bus.call("xrange", stream, min=f"({position.decode()}", count=1)
                oldest[position] = int(entries[0][0].partition(b"-")[0]) if entries else None
            at = oldest[position]
            if at is not None:
                found[name.decode()] = at
        return found

    def _gaps(self) -> list[Count]:
        found = []
        for partition in range(self.settings.tapeline.partitions):
            held = self.bus.call("hget", self.bus.keys.info(partition, "candles"), "kind:gap")
            text = "gaps in the tape; `tapeline tail gaps --from start` shows them"
            found.append(Count(f"gap {partition}", "gap", "candles", int(held or 0), text))
        return found

    def _dead_letters(self) -> list[Count]:
        found = []
        for body in self.bus.call("hvals", self.bus.keys.workers):
            beat = _read(body, Beat)
            if beat is not None and "dead_letters" in beat.counters:
                text = f"dead letters of {beat.service}; its table dead_letters has them with the reason"
                value = beat.counters["dead_letters"]
                found.append(Count(f"dead_letters {beat.worker}", "dead_letters", beat.service, value, text))
        return found


def _read(body: bytes | None, kind: type[T]) -> T | None:
    """None for nothing, and for what is no such message: somebody else's mistake must not end the watch."""
    try:
        return msgspec.json.decode(body, type=kind) if body else None
    except msgspec.DecodeError:
        return None
