"""Reads what `tapeline top` shows from the bus of one deployment; nothing is changed by looking."""

from __future__ import annotations

import msgspec

from shared.bus import Bus, sound
from shared.errors import TapelineError
from shared.feeds import FeedState
from shared.frames import Frame
from shared.health import verdicts
from shared.settings import Settings
from shared.status import Reader, Status
from shared.supervise import find_bus
from shared.top import Cost, Look
from shared.usage_book import today

# Of a backlog no more is counted: a look must cost little.
COUNT_ENTRIES = 60
# Newest frames of candles that are looked at, of each partition: more the first time.
FIRST_FRAMES, FRAMES = 48, 6


class TopReader:
    """Looks again and again; what fails is connected anew the next time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bus: Bus | None = None
        self._frames = FIRST_FRAMES

    @property
    def where(self) -> str:
        """host:port of Redis, without credentials; empty before it was looked for."""
        return self._bus.where if self._bus is not None else ""

    def open(self) -> Bus:
        """The Redis of the settings, not yet asked anything. Raises ConfigError where there is none to ask."""
        if self._bus is None:
            settings = find_bus(self._settings)
            self._bus = Bus(settings.redis.url, settings.tapeline.namespace, cluster=settings.redis.cluster)
        return self._bus

    def look(self) -> Look:
        """Raises BusUnavailable, ConfigError."""
        bus = self.open()
        try:
            return self._look(bus)
        except TapelineError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the connection."""
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.close()

    def _look(self, bus: Bus) -> Look:
        s = self._settings
        held = bus.call("hget", bus.keys.deployment, "partitions")
        partitions = int(held or s.tapeline.partitions)
        status = Reader(bus, partitions, s.redis.lease_seconds, COUNT_ENTRIES).read()
        feeds = _feed_states(status)
        gaps = max((self._gaps(bus, p) for p in range(partitions)), default=0)
        look = Look(
            status, bus.keys.namespace, s.redis.stream_max_bytes, verdicts(status, feeds, s),
            [frame for p in range(partitions) for frame in self._newest(bus, p)], gaps, _ingest(bus, status),
            [Cost(row.feed, row.day_cost_usd, row.budget_usd, row.state) for row in today(bus, s, status.feeds)],
        )  # fmt: skip
        self._frames = FRAMES
        return look

    def _gaps(self, bus: Bus, partition: int) -> int:
        """Every partition of a feed has its gaps: they are not to be added up."""
        return int(bus.call("hget", bus.keys.info(partition, "candles"), "kind:gap") or 0)

    def _newest(self, bus: Bus, partition: int) -> list[Frame]:
        entries = bus.call("xrevrange", bus.keys.stream(partition, "candles"), count=self._frames)
        return [sound(entry_id, fields) for entry_id, fields in reversed(entries)]


def _feed_states(status: Status) -> dict[str, FeedState]:
    found = {}
    for name, body in status.feeds.items():
        try:
            found[name] = msgspec.convert(body, FeedState)
        except msgspec.ValidationError:
            continue  # somebody else's mistake must not end the looking
    return found


def _ingest(bus: Bus, status: Status) -> dict[str, int]:
    """What ingest counted, over all feeds."""
    total: dict[str, int] = {}
    for feed in status.feeds:
        for reason, records in bus.call("hgetall", bus.keys.ingest_counters(feed)).items():
            if reason != b"usage_bytes":
                total[reason.decode()] = total.get(reason.decode(), 0) + int(records)
    return total
