"""What a running Tapeline does, read from the bus alone; nothing is changed by looking."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import msgspec

from shared.bus import Bus
from shared.heartbeat import Beat, redis_now_ms
from shared.keys import TOPICS
from shared.stages import STAGES

COUNT_ENTRIES = 500


class Consumer(msgspec.Struct, frozen=True):
    """A stage or sink on one stream. `exact`: false when the backlog is at least this much.

    `behind_seconds`: how long the oldest entry that it has not taken has been waiting, by Redis's clock.
    """

    name: str
    position: str
    behind_records: int
    behind_entries: int
    behind_seconds: float
    exact: bool
    last_event: str
    owner: str
    holds_trimming: bool


class Stream(msgspec.Struct, frozen=True):
    """One stream of one partition. `records`: ever added; `entries`, `bytes`: held now."""

    partition: int
    topic: str
    newest: str
    entries: int
    bytes: int
    records: int
    frames: int
    last_event_ns: int
    consumers: list[Consumer]


class WorkerState(msgspec.Struct, frozen=True):
    """A worker as its heartbeat tells; dead when the heartbeat is older than a lease.

    `stalled_seconds`: how long its slowest `part` has not gone on; `counters`: since its start. See
    shared.heartbeat.Beat for `name`, `metrics`.
    """

    worker: str
    service: str
    host: str
    pid: int
    alive: bool
    age_seconds: float
    partitions: list[int]
    detail: str
    name: str
    stalled_seconds: float
    part: str
    metrics: str
    counters: dict[str, int]


class Lease(msgspec.Struct, frozen=True):
    """Who owns a stage's partition, empty for nobody.

    `free_seconds`: how long nobody has; if nobody ever had it, how long the oldest entry for it has been there.
    """

    stage: str
    partition: int
    owner: str
    free_seconds: float


class Status(msgspec.Struct, frozen=True):
    """All of it. `feeds`: feed -> what its ingest last said; `counters`: stage -> reason -> records."""

    redis: str
    now_ms: int
    partitions: int
    streams: list[Stream]
    workers: list[WorkerState]
    feeds: dict[str, Any]
    counters: dict[str, dict[str, int]]
    leases: list[Lease]


class Reader:
    """Reads the status of one deployment, again and again if wanted."""

    def __init__(self, bus: Bus, partitions: int, lease_seconds: float, count_entries: int = COUNT_ENTRIES) -> None:
        self.bus, self.partitions, self.lease_ms = bus, partitions, int(lease_seconds * 1000)
        self._limit = count_entries
        self._script = (files("shared") / "scripts" / "backlog.lua").read_text()

    def brief(self, *, leases: bool = True) -> Status:
        """Without streams and counters, which take longer to read. Raises BusUnavailable."""
        return self._status(redis_now_ms(self.bus), [], {}, leases=leases)

    def read(self) -> Status:
        """Raises BusUnavailable."""
        now = redis_now_ms(self.bus)
        streams = [
            found
            for partition in range(self.partitions)
            for topic in TOPICS
            if (found := self.stream(partition, topic, now)) is not None
        ]
        return self._status(now, streams, self.counters(), leases=True)

    def _status(self, now: int, streams: list[Stream], counters: dict[str, dict[str, int]], *, leases: bool) -> Status:
        return Status(
            self.bus.where, now, self.partitions, streams, self._workers(now), self.feeds(), counters,
            [self._lease(p, stage, now) for stage in STAGES for p in range(self.partitions) if leases],
        )  # fmt: skip

    def stream(self, partition: int, topic: str, now_ms: int) -> Stream | None:
        """One stream with its consumers; None when nothing was ever added to it."""
        keys, call = self.bus.keys, self.bus.call
        info = {k.decode(): int(v) for k, v in call("hgetall", keys.info(partition, topic)).items()}
        if not info:
            return None
        positions = {k.decode(): v.decode() for k, v in call("hgetall", keys.consumers(partition, topic)).items()}
        names = sorted(positions)
        reply = call(
            "eval", self._script, 1, keys.stream(partition, topic), self._limit, *(positions[name] for name in names)
        )
        newest = reply[0].decode()
        lowest = min((_order(p) for p in positions.values()), default=(0, 0))
        consumers = []
        for name, (records, entries, exact, last, first) in zip(names, reply[2:], strict=True):
            position = positions[name]
            behind = max(0.0, (now_ms - _order(first.decode())[0]) / 1000) if first else 0.0
            owner, _ = self._owner(partition, name, now_ms)
            holds = position != newest and _order(position) == lowest
            consumers.append(
                Consumer(name, position, records, entries, behind, bool(exact), last.decode(), owner, holds)
            )
        return Stream(
            partition, topic, newest, int(reply[1]), info.get("bytes", 0), info.get("records", 0),
            info.get("frames", 0), info.get("last_ns", 0), consumers,
        )  # fmt: skip

    def _owner(self, partition: int, stage: str, now_ms: int) -> tuple[str, int]:
        """(living owner or empty, when its lease ends or ended: 0 not known)."""
        owner, expires = self.bus.call("hmget", self.bus.keys.lease(partition, stage), "owner", "expires_ms")
        ends = int(expires or 0)
        return owner.decode() if owner and ends > now_ms else "", ends

    def _lease(self, partition: int, stage: str, now_ms: int) -> Lease:
        owner, since = self._owner(partition, stage, now_ms)
        if not owner and not since:
            stream = self.bus.keys.stream(partition, STAGES[stage].reads)
            oldest = self.bus.call("xrange", stream, count=1)
            since = _order(oldest[0][0].decode())[0] if oldest else now_ms
        return Lease(stage, partition, owner, 0.0 if owner else max(0, now_ms - since) / 1000)

    def _workers(self, now_ms: int) -> list[WorkerState]:
        out = []
        for body in self.bus.call("hgetall", self.bus.keys.workers).values():
            try:
                b = msgspec.json.decode(body, type=Beat)
            except msgspec.DecodeError:
                continue  # somebody else's mistake must not end a watch
            age = max(0, now_ms - b.at_ms)
            alive = age <= self.lease_ms
            out.append(
                WorkerState(
                    b.worker, b.service, b.host, b.pid, alive, age / 1000, b.partitions, b.detail, b.name,
                    (age + b.stalled_ms) / 1000 if b.part or not alive else 0.0, b.part, b.metrics,
                    b.counters,
                )
            )  # fmt: skip
        return sorted(out, key=lambda w: (w.service, w.worker))

    def counters(self) -> dict[str, dict[str, int]]:
        """What each stage counted over all partitions: records taken, and those not, by reason."""
        out: dict[str, dict[str, int]] = {}
        for stage in STAGES:
            total: dict[str, int] = {}
            for partition in range(self.partitions):
                body = self.bus.call("hget", self.bus.keys.state(partition, stage), "counters")
                for name, value in msgspec.json.decode(body or b"{}", type=dict[str, int]).items():
                    total[name] = total.get(name, 0) + value
            out[stage] = {name: value for name, value in total.items() if value}
        return out

    def feeds(self) -> dict[str, Any]:
        """Connection state per feed, as ingest last published it."""
        found = self.bus.call("hgetall", self.bus.keys.feeds)
        return {name.decode(): msgspec.json.decode(body) for name, body in sorted(found.items())}


def _order(entry_id: str) -> tuple[int, int]:
    ms, _, sequence = entry_id.partition("-")
    return int(ms), int(sequence or 0)
