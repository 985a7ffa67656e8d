"""Replay of tapes: the very pipeline that runs live, over a throwaway Redis, until all of it is stored.

Exactly once holds as it does live: every worker, and the Redis, may be killed while it runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from shared.bus import Bus
from shared.errors import Unavailable
from shared.keys import TOPICS
from shared.registry import SINKS
from shared.settings import Settings
from shared.sink import store_of
from shared.sink_reader import MODES
from shared.sources import SourceSpec, programs
from shared.stages import readers
from shared.status import Reader
from shared.stores import parse, read_rows
from shared.supervise import Program, redis_program, sink_program, stage_programs
from shared.supervision import Supervision

POLL_SECONDS = 0.1
BIGQUERY_BATCH_MS = 5000
# Any error that a worker reports ends a replay; only what was killed, or found no server (75), is started again.
FINAL = (0, 1, 2, 78)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to replay. `speed`: multiple of market time, `max` for none; `redis`: URL of another server than our own."""

    sources: tuple[SourceSpec, ...]
    state: Path
    speed: str = "max"
    aggregators: int = 1
    frame_records: int | None = None
    redis: str = ""
    namespace: str = "md"


class Progress(msgspec.Struct):
    """Records so far: on the bus, through the stages, and what these made (rows, late trades), of it stored."""

    published: int = 0
    aggregated: int = 0
    made: int = 0
    stored: int = 0
    drained: bool = False


class Summary(msgspec.Struct):
    """What a replay did. `skipped`: reason -> records that were not published. All counts are of records."""

    trades: int = 0
    books: int = 0
    tickers: int = 0
    liquidations: int = 0
    option_summaries: int = 0
    skipped: dict[str, int] = {}
    candles: int = 0
    candles_1m: int = 0
    candles_1s: int = 0
    late: int = 0
    pressure: int = 0
    signals: int = 0
    gaps: int = 0
    dead_letters: int = 0
    seconds: float = 0.0
    trades_per_second: float = 0.0


def settings_of(plan: Plan, settings: Settings) -> Settings:
    """The settings of the replay's own processes."""
    tapeline = msgspec.structs.replace(settings.tapeline, state_dir=str(plan.state), namespace=plan.namespace)
    # Nobody looks back into a throwaway bus: what is consumed may go. Its file need not outlive the machine.
    redis = msgspec.structs.replace(settings.redis, url=plan.redis, port=0, window_seconds=0, fsync="no")
    ingest = settings.ingest
    if plan.frame_records is not None:
        ingest = msgspec.structs.replace(ingest, frame_records=plan.frame_records)
    aggregate = msgspec.structs.replace(settings.aggregate, workers=plan.aggregators)
    # Nobody pays for the time until a batch of this size is old enough.
    bigquery = msgspec.structs.replace(settings.bigquery, batch_ms=min(settings.bigquery.batch_ms, BIGQUERY_BATCH_MS))
    # Downloads outlive the replay.
    kept = settings.tardis.download_dir or str(Path(settings.tapeline.state_dir).absolute() / "tardis")
    tardis = msgspec.structs.replace(settings.tardis, download_dir=kept)
    # Nobody watches workers that end with the tape: they take no ports.
    metrics = msgspec.structs.replace(settings.metrics, port=0)
    return replace(
        settings, tapeline=tapeline, redis=redis, ingest=ingest, aggregate=aggregate, tardis=tardis, bigquery=bigquery,
        metrics=metrics,
    )  # fmt: skip


def programs_of(plan: Plan, settings: Settings) -> list[Program]:
    """Redis (unless another is used), the readers of the sources, the stages, the sink.

    Raises ConfigError for sources that cannot be replayed.
    """
    sink = SINKS[parse(settings.tapeline.store).scheme]
    return [
        *([] if plan.redis else [redis_program()]),
        *(Program(service, (service, *args), final=FINAL) for service, args in programs(plan.sources, plan.speed)),
        *stage_programs(settings, FINAL),
        sink_program(sink, settings, FINAL),
    ]


def run(plan: Plan, settings: Settings, config: str | None, tell: Callable[[Progress], None]) -> Summary:
    """Replay everything into the settings' store; returns when the last row is stored.

    Raises WorkerError with a worker's own error, and leaves nothing behind.
    """
    began = time.monotonic()
    own = settings_of(plan, settings)
    summary = Summary()
    consumer = store_of(own, threading.Event()).name
    with Supervision(own, programs_of(plan, own), config, remove=True) as supervision:
        bus = _wait_for_redis(supervision, consumer)
        try:
            watch = Watch(bus, supervision, own)
            while not watch.look().drained:
                tell(watch.progress)
                time.sleep(POLL_SECONDS)
            tell(watch.progress)
            summary.seconds = round(time.monotonic() - began, 3)
            count(bus, own, summary)
        finally:
            if plan.redis:
                _forget(bus)
            bus.close()
    return summary


def _wait_for_redis(supervision: Supervision, consumer: str) -> Bus:
    """The bus, on which all is held for the sink."""
    s = supervision.settings
    bus = Bus(s.redis.url, s.tapeline.namespace, cluster=s.redis.cluster)
    while True:
        supervision.check()
        try:
            bus.ping()
            _hold(bus, s, consumer)
        except Unavailable:
            time.sleep(0.05)
        else:
            return bus


def _hold(bus: Bus, settings: Settings, consumer: str) -> None:
    """Nothing is trimmed before the sink has it, which may take longer to start than a stage takes to be done."""
    for topic in (topic for mode in settings.sink.modes for topic in MODES[mode]):
        for partition in range(settings.tapeline.partitions):
            bus.register(partition, topic, consumer)


class Watch:
    """Follows a running replay."""

    def __init__(self, bus: Bus, supervision: Supervision, settings: Settings) -> None:
        self._bus, self._supervision = bus, supervision
        self._reader = Reader(bus, settings.tapeline.partitions, settings.redis.lease_seconds, count_entries=200)
        self._settings = settings
        self.progress = Progress()

    def look(self) -> Progress:
        """One look; raises WorkerError. A Redis that is just starting again is waited for."""
        processes = self._supervision.check()
        try:
            readers = [p for p in processes if p.name.startswith("ingest-")]
            left = bool(readers) and all(p.state == "EXITED" for p in readers)
            self.progress = self._look(left or self._feeds_ended(len(readers)))
        except Unavailable:
            self.progress.drained = False
        return self.progress

    def _look(self, ended: bool) -> Progress:
        status = self._reader.read()
        p = Progress(drained=ended)
        for stream in status.streams:
            behind = max((c.behind_records for c in stream.consumers), default=stream.records)
            if stream.topic == "ticks":
                p.published += stream.records
                p.aggregated += stream.records - min(behind, stream.records)
            else:
                p.made += stream.records
                p.stored += stream.records - min(behind, stream.records)
            if not stream.consumers or any(c.position != stream.newest for c in stream.consumers):
                p.drained = False
            # A sink may be there before a stage that has to read the stream, too.
            if not {c.name for c in stream.consumers}.issuperset(readers(stream.topic, self._settings)):
                p.drained = False
        return p

    def _feeds_ended(self, readers: int) -> bool:
        """Whether each reader has told of its feed, and each feed has ended."""
        states = [feed.get("state") for feed in self._reader.feeds().values() if isinstance(feed, dict)]
        return len(states) >= readers > 0 and all(state == "ended" for state in states)


def count(bus: Bus, settings: Settings, summary: Summary) -> None:
    """Fill the summary's counts from the bus: each record once, whatever was killed on the way."""
    kinds: dict[str, int] = {}
    for partition in range(settings.tapeline.partitions):
        for topic in TOPICS:
            for name, value in bus.call("hgetall", bus.keys.info(partition, topic)).items():
                key = f"{topic}:{name.decode().removeprefix('kind:')}"
                kinds[key] = kinds.get(key, 0) + int(value)
    summary.dead_letters = len(read_rows(settings.tapeline.store, "dead_letters", {"bus": bus.identity()}))
    summary.trades = kinds.get("ticks:trade", 0)
    summary.books, summary.tickers = kinds.get("ticks:book", 0), kinds.get("ticks:ticker", 0)
    summary.liquidations = kinds.get("ticks:liquidation", 0)
    summary.option_summaries = kinds.get("ticks:option_summary", 0)
    summary.candles = kinds.get("candles:candle", 0)
    summary.candles_1m, summary.candles_1s = kinds.get("candles:candle_1m", 0), kinds.get("candles:candle_1s", 0)
    summary.late, summary.gaps = kinds.get("late:late_trade", 0), kinds.get("candles:gap", 0)
    summary.pressure, summary.signals = kinds.get("pressure:pressure", 0), kinds.get("signals:signal", 0)
    for feed in bus.call("hkeys", bus.keys.feeds):
        for name, value in bus.call("hgetall", bus.keys.ingest_counters(feed.decode())).items():
            reason = name.decode()
            if reason != "usage_bytes":
                summary.skipped[reason] = summary.skipped.get(reason, 0) + int(value)
    counted = Reader(bus, settings.tapeline.partitions, settings.redis.lease_seconds).counters()["aggregate"]
    for reason in ("outside_hours", "unknown_instrument", "not_candled"):
        if counted.get(reason):
            summary.skipped[reason] = summary.skipped.get(reason, 0) + counted[reason]
    summary.trades_per_second = round(summary.trades / summary.seconds, 1) if summary.seconds else 0.0


def _forget(bus: Bus) -> None:
    """Remove the replay's namespace from a server that is not its own."""
    client: Any = bus.client
    for key in list(client.scan_iter(match=f"{bus.keys.namespace}:*", count=1000)):
        bus.call("delete", key)
