"""What `tapeline top` shows: a view of the deployment, made of what was read from the bus. No Redis, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from shared.frames import NS, Frame, Row, iso
from shared.health import Verdict
from shared.records import plain
from shared.registry import SINKS
from shared.status import Consumer, Status, Stream, WorkerState
from shared.timeframes import name_of

# Rates are means over this many looks: one second alone jumps about.
LOOKS = 5
Mask = Callable[[str], str]


class FeedView(msgspec.Struct, frozen=True):
    """A feed. `event_age_seconds`: since its newest event; `seen_seconds`: since ingest last spoke of it;
    `why`: what is wrong with it, empty for a healthy one.
    """

    feed: str
    state: str
    detail: str
    event_age_seconds: float | None
    seen_seconds: float
    published: int
    records_per_second: float | None
    why: str


class ConsumerView(msgspec.Struct, frozen=True):
    """A stage or sink on a topic, over all partitions. `exact`: false when it is behind by at least this much.

    `owners`: worker -> its partitions.
    """

    name: str
    service: str
    records_per_second: float | None
    lag_records: int
    exact: bool
    lag_seconds: float
    owners: dict[str, list[int]]


class StreamView(msgspec.Struct, frozen=True):
    """A topic over all partitions. `full`: the fullest partition's share of its bound, 0 to 1."""

    topic: str
    records: int
    records_per_second: float | None
    entries: int
    bytes: int
    full: float
    consumers: list[ConsumerView]


class WorkerView(msgspec.Struct, frozen=True):
    """A worker; `why` says what is wrong with it, empty for a healthy one."""

    worker: str
    name: str
    service: str
    host: str
    pid: int
    alive: bool
    age_seconds: float
    stalled_seconds: float
    partitions: list[int]
    detail: str
    why: str


class CandleView(msgspec.Struct, frozen=True):
    """The newest candle of a ticker: the last minute, every second, or the shortest fixed one. Undefined is None."""

    ticker: str
    symbol: str
    timeframe: str
    time: str
    close: float | None
    change: float | None
    change_percent: float | None
    volume: float | None
    vd: float | None
    cvd: float | None
    trades: int
    complete: bool


class Cost(msgspec.Struct, frozen=True):
    """What a feed cost this UTC day; `budget_usd` 0 is none."""

    feed: str
    cost_usd: float
    budget_usd: float
    state: str


class Counted(msgspec.Struct, frozen=True):
    """What happened so far. `ingest`: what it counted, as records that it did not publish, and reconnects."""

    gaps: int = 0
    late: int = 0
    dead_letters: int = 0
    ingest: dict[str, int] = {}


class View(msgspec.Struct, frozen=True):
    """All of it. `redis_trouble`: why Redis cannot be read now, and then the rest is as it was `age_seconds` ago."""

    time: str
    version: str
    redis: str
    redis_trouble: str
    age_seconds: float
    namespace: str
    partitions: int
    healthy: bool
    troubles: list[Verdict]
    feeds: list[FeedView] = []
    streams: list[StreamView] = []
    workers: list[WorkerView] = []
    candles: list[CandleView] = []
    counted: Counted = Counted()
    costs: list[Cost] = []


class Look(msgspec.Struct, frozen=True):
    """What was read of the bus at one time (Redis's). `candles`: the newest frames by partition, oldest first."""

    status: Status
    namespace: str
    stream_max_bytes: int
    verdicts: list[Verdict]
    candles: list[Frame]
    gaps: int
    ingest: dict[str, int]
    costs: list[Cost]


class Rates:
    """Per second, of counts that only grow."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[tuple[int, int]]] = {}

    def take(self, counts: dict[str, tuple[int, int]]) -> dict[str, float]:
        """The rate of each count, given as (when in ms, count), over what is remembered of it; none at first."""
        found = {}
        for name, (at, count) in counts.items():
            seen = self._seen.setdefault(name, deque(maxlen=LOOKS))
            if seen and (at < seen[-1][0] or count < seen[-1][1]):
                seen.clear()  # what counts has begun anew
            if not seen or at > seen[-1][0]:
                seen.append((at, count))
            if len(seen) > 1:
                found[name] = (seen[-1][1] - seen[0][1]) * 1000 / (seen[-1][0] - seen[0][0])
        return found


class Top:
    """Makes views of looks, one after another. `mask` hides secrets in what workers wrote."""

    def __init__(self, version: str, redis: str, mask: Mask = str) -> None:
        self._version, self._redis, self._mask = version, redis, mask
        self._rates, self._candles = Rates(), Candles()
        self._last: View | None = None
        self._last_ms = 0

    def view(self, look: Look) -> View:
        """The view of a look."""
        s = look.status
        counts = {f"feed {name}": (_int(feed, "at_ms"), _int(feed, "published")) for name, feed in s.feeds.items()}
        by_topic: dict[str, list[Stream]] = {}
        for stream in s.streams:
            by_topic.setdefault(stream.topic, []).append(stream)
        for topic, streams in by_topic.items():
            records = sum(stream.records for stream in streams)
            counts[topic] = (s.now_ms, records)
            for name, held in _consumers(streams).items():
                if all(c.exact for c in held):
                    counts[f"{topic} {name}"] = (s.now_ms, records - sum(c.behind_records for c in held))
        rates = self._rates.take(counts)
        troubles = [msgspec.structs.replace(v, why=self._mask(v.why)) for v in look.verdicts if not v.healthy]
        whys = {(v.kind, v.name): v.why for v in troubles}
        late = s.counters.get("aggregate", {}).get("late", 0)
        dead = sum(w.counters.get("dead_letters", 0) for w in s.workers)
        self._candles.take(look.candles)
        view = View(
            _time(s.now_ms), self._version, self._redis, "", 0.0, look.namespace, s.partitions, not troubles, troubles,
            [self._feed(name, feed, s.now_ms, rates, whys.get(("feed", name), "")) for name, feed in s.feeds.items()],
            [_stream(topic, streams, look.stream_max_bytes, rates, s.workers) for topic, streams in by_topic.items()],
            [self._worker(w, whys.get(("worker", w.worker), "")) for w in s.workers],
            self._candles.newest(),
            Counted(look.gaps, late, dead, look.ingest),
            look.costs,
        )  # fmt: skip
        self._last, self._last_ms = view, s.now_ms
        return view

    def away(self, why: str, now_ms: int) -> View:
        """Redis does not answer: what was known last, and that it is old."""
        trouble = Verdict("redis", self._redis, "redis", "", healthy=False, why=self._mask(why))
        if self._last is None:
            return View(_time(now_ms), self._version, self._redis, trouble.why, 0.0, "", 0, False, [trouble])
        return msgspec.structs.replace(
            self._last, time=_time(now_ms), redis_trouble=trouble.why, healthy=False, troubles=[trouble],
            age_seconds=max(0.0, (now_ms - self._last_ms) / 1000),
        )  # fmt: skip

    def _feed(self, name: str, feed: dict[str, Any], now_ms: int, rates: dict[str, float], why: str) -> FeedView:
        newest = _int(feed, "last_event_ns")
        return FeedView(
            name, str(feed.get("state") or "?"), self._mask(str(feed.get("detail") or "")),
            max(0.0, now_ms / 1000 - newest / NS) if newest else None,
            max(0.0, (now_ms - _int(feed, "at_ms")) / 1000),
            _int(feed, "published"), rates.get(f"feed {name}"), why,
        )  # fmt: skip

    def _worker(self, w: WorkerState, why: str) -> WorkerView:
        return WorkerView(
            w.worker, short(w), w.service, w.host, w.pid, w.alive, w.age_seconds, w.stalled_seconds, w.partitions,
            self._mask(w.detail), why,
        )  # fmt: skip


def short(w: WorkerState) -> str:
    """What people call a worker: its supervisor's name for it, else service@host:pid."""
    return w.name or w.worker.rsplit(":", 1)[0]


def _int(feed: dict[str, Any], name: str) -> int:
    return int(feed.get(name) or 0)


def _time(ms: int) -> str:
    return iso(ms * 1_000_000)[:19] + "Z"


def _consumers(streams: list[Stream]) -> dict[str, list[Consumer]]:
    found: dict[str, list[Consumer]] = {}
    for stream in streams:
        for consumer in stream.consumers:
            found.setdefault(consumer.name, []).append(consumer)
    return found


def _stream(
    topic: str, streams: list[Stream], bound: int, rates: dict[str, float], workers: list[WorkerState]
) -> StreamView:
    names = {w.worker: short(w) for w in workers}
    consumers = []
    for name, held in sorted(_consumers(streams).items()):
        owners: dict[str, list[int]] = {}
        for stream in streams:
            for c in stream.consumers:
                if c.name == name and c.owner:
                    owners.setdefault(names.get(c.owner, c.owner.rsplit(":", 1)[0]), []).append(stream.partition)
        if not owners:
            owners = _alone(name, [s.partition for s in streams], workers)
        consumers.append(
            ConsumerView(
                name, name.partition(":")[0], rates.get(f"{topic} {name}"), sum(c.behind_records for c in held),
                all(c.exact for c in held), round(max(c.behind_seconds for c in held), 3), owners,
            )
        )  # fmt: skip
    return StreamView(
        topic, sum(s.records for s in streams), rates.get(topic), sum(s.entries for s in streams),
        sum(s.bytes for s in streams), max(s.bytes for s in streams) / bound if bound else 0.0, consumers,
    )  # fmt: skip


def _alone(consumer: str, partitions: list[int], workers: list[WorkerState]) -> dict[str, list[int]]:
    """The sink of a store that only one writes, and that so needs no lease; none where it is not clear who."""
    service = SINKS.get(consumer.partition(":")[0])
    found = [w for w in workers if w.service == service and w.alive]
    return {short(found[0]): [p for p in partitions if p in found[0].partitions]} if len(found) == 1 else {}


class Candles:
    """The newest candle of each ticker, of the frames that came by."""

    def __init__(self) -> None:
        self._rolling: dict[str, CandleView] = {}
        self._fixed: dict[tuple[str, str], tuple[int, int, CandleView]] = {}

    def take(self, frames: Iterable[Frame]) -> None:
        """Frames of `candles`, of each partition oldest first."""
        for frame in frames:
            if frame.kind not in ("candle_1m", "candle"):
                continue
            for row in frame.rows():
                of, symbol = frame.names[int(row["name"])]
                time_ns = int(row["time_ns"])
                if frame.kind == "candle_1m":
                    found = _candle(of, symbol, "1m", row)
                    held = self._rolling.get(of)
                    if held is None or held.time <= found.time:
                        self._rolling[of] = found
                    continue
                seconds, known = int(row["timeframe_sec"]), self._fixed.get((of, symbol))
                if known is None or (seconds, -time_ns) <= (known[0], -known[1]):
                    candle = _candle(f"{of}:{symbol}", symbol, name_of(seconds), row)
                    self._fixed[of, symbol] = (seconds, time_ns, candle)

    def newest(self) -> list[CandleView]:
        """By ticker. Fixed ones only of exchanges whose symbols have no rolling candle."""
        rolled = {
            exchange for exchange, symbol in self._fixed if {symbol, f"{exchange}:{symbol}"} & self._rolling.keys()
        }
        fixed = [candle for (exchange, _), (*_, candle) in self._fixed.items() if exchange not in rolled]
        return sorted([*self._rolling.values(), *fixed], key=lambda c: c.ticker)


def _candle(ticker: str, symbol: str, timeframe: str, row: Row) -> CandleView:
    opened, close = plain(row["open"]), plain(row["close"])
    change = close - opened if opened is not None and close is not None else None
    return CandleView(
        ticker, symbol, timeframe, _time(int(row["time_ns"]) // 1_000_000), close, change,
        100 * change / opened if change is not None and opened else None, plain(row["volume"]), plain(row["vd"]),
        plain(row["cvd_close"]), int(row["trades"]), bool(row["complete"]),
    )  # fmt: skip
