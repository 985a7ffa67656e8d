"""What the pipeline does now: `/health`, `/api/v1/pipeline`, `/api/v1/meta`, the channel `pipeline`, and the metrics.

Redis and the store are looked at by turns, each in a thread of its own, so that one that does not answer holds up
neither the other nor the server; what cannot be known now is said in the answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from importlib.metadata import version
from typing import Any, NamedTuple

from fastapi import APIRouter
from redis.cluster import RedisCluster
from redis.exceptions import ResponseError
from starlette.requests import Request

from services.web.context import web_of
from services.web.problems import Json
from services.web.threads import Look
from shared import metrics
from shared.bus import Bus
from shared.errors import TapelineError
from shared.feeds import FeedState, silent, states
from shared.frames import FEATURE_COLUMNS, NS, iso
from shared.health import unhealthy, verdicts
from shared.log import Masker
from shared.reader_bars import ROLLING, SECONDS
from shared.settings import Settings
from shared.status import Reader, Status, Stream
from shared.stores import parse, read_rows
from shared.timeframes import name_of, seconds_of
from shared.usage_book import today

log = logging.getLogger(__name__)

BUS_SECONDS, STORE_SECONDS = 1.0, 5.0
# How long an answer waits for a look; after that it says what was known before.
PATIENCE_SECONDS = 1.5
# How long a scrape waits for one: Prometheus has more time than a reader of the page.
SCRAPE_SECONDS = 4.0
HOUR_NS = 3600 * NS
MOST_COUNTED = 10_000
Answer = dict[str, Any]

router = APIRouter(tags=["pipeline"])


class Seen(NamedTuple):
    """A look at Redis as it was: `answer` is made of `status`.

    `memory`: bytes used and their limit (0: none), if told.
    """

    status: Status
    answer: Answer
    memory: tuple[int, int] | None


@router.get("/health", summary="Whether this server, Redis and the store answer", response_model=None)
async def health(request: Request) -> Json:
    """Always 200 while the server lives: `status` is `degraded` when Redis or the store does not answer."""
    return Json(await web_of(request).pipeline.health())


@router.get("/api/v1/pipeline", summary="Feeds, workers, streams, lag, gaps and cost as they are now",
            response_model=None)  # fmt: skip
async def pipeline(request: Request) -> Json:
    """Made about once a second. What does not answer is said in `redis` or `store`, and its parts are empty then."""
    return Json(await web_of(request).pipeline.read())


@router.get("/api/v1/meta", summary="What this server has: timeframes, columns, limits", response_model=None)
async def meta(request: Request) -> Json:
    """What a page or a program needs to know before it asks for anything else."""
    return Json(await web_of(request).pipeline.meta())


class Pipeline:
    """One deployment, looked at when somebody asks."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._mask = settings, Masker(settings)
        self._bus = BusLook(settings)
        self._store = StoreLook(settings)
        self._redis_look = Look(self._bus.look, BUS_SECONDS, "web-redis")
        self._store_look = Look(self._store.look, STORE_SECONDS, "web-store")

    async def start(self) -> None:
        """Begins to look, and waits for nothing."""
        await self._redis_look.get(0)
        await self._store_look.get(0)

    async def close(self) -> None:
        self._bus.close()

    async def read(self) -> Answer:
        """The object of `/api/v1/pipeline`; never raises for what does not answer."""
        bus, store = await self._looks()
        return {"time": iso(time.time_ns())[:19] + "Z", **bus, **{k: v for k, v in store.items() if k != "tickers"}}

    async def health(self) -> Answer:
        bus, store = await self._looks()
        fine = bus["redis"] == "ok" and store["store"] == "ok"
        return {
            "status": "ok" if fine else "degraded", "version": version("tapeline"), "redis": bus["redis"],
            "store": store["store"], "behind_seconds": bus["lag_seconds"],
        }  # fmt: skip

    async def meta(self) -> Answer:
        _, store = await self._looks()
        s = self._settings
        return {
            "version": version("tapeline"),
            "timeframes": [ROLLING, SECONDS, *(name_of(seconds_of(t)) for t in s.aggregate.timeframes)],
            "default_symbol": _default(s, store["tickers"]),
            "pressure_window_seconds": s.pressure.window_seconds,
            "features": list(FEATURE_COLUMNS),
            "limits": {
                "max_rows": s.web.max_rows, "max_export_rows": s.web.max_export_rows,
                "requests_per_second": s.web.requests_per_second,
            },
            "store": parse(s.tapeline.store).scheme,
        }  # fmt: skip

    async def seen(self) -> tuple[Seen | None, Answer | None]:
        """What was found in Redis and in the store; None for one that does not answer now."""
        await asyncio.gather(self._redis_look.get(SCRAPE_SECONDS), self._store_look.get(SCRAPE_SECONDS))
        store = self._store_look.found
        bus = None if self._redis_look.waiting >= SCRAPE_SECONDS else self._bus.seen
        fine = self._store_look.waiting < SCRAPE_SECONDS and store is not None and store["store"] == "ok"
        return bus, store if fine else None

    async def _looks(self) -> tuple[Answer, Answer]:
        bus = await self._redis_look.get(PATIENCE_SECONDS)
        # What is a little old is told at once, and looked at again meanwhile.
        store = await self._store_look.get(0 if self._store_look.age < 3 * STORE_SECONDS else PATIENCE_SECONDS)
        if bus is None or self._redis_look.waiting > 2 * PATIENCE_SECONDS:
            bus = _no_bus(f"Redis has not answered for {max(1, round(self._redis_look.waiting))} s")
        if store is None:
            store = _no_store("the store has not answered yet")
        return bus, store


class BusLook:
    """Everything of the answer that Redis knows. `seen`: what the last look found, None if it found nothing."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._mask = settings, Masker(settings)
        self._bus: Bus | None = None
        self.seen: Seen | None = None
        self._since: dict[str, tuple[str, int]] = {}  # feed -> (state, since when)
        self._counted: dict[str, tuple[int, int]] = {}  # topic -> (records, at ms)
        self._wrong = ""

    def close(self) -> None:
        """Also ends a look that waits for Redis."""
        if self._bus is not None:
            self._bus.close()

    def look(self) -> Answer:
        found: Seen | None = None
        try:
            found, self._wrong = self._look(), ""
            return found.answer
        except TapelineError as error:
            return _no_bus(" ".join(self._mask(str(error)).split()))
        except Exception as error:  # what another program wrote must not end the looking
            wrong = f"what is in Redis cannot be read ({type(error).__name__})"
            if wrong != self._wrong:
                log.exception("the state of the pipeline is not known")
                metrics.fault("web.pipeline")
            self._wrong = wrong
            return _no_bus(wrong)
        finally:
            self.seen = found

    def _look(self) -> Seen:
        s = self._settings
        if self._bus is None:
            self._bus = Bus(s.redis.url, s.tapeline.namespace, cluster=s.redis.cluster)
        held = self._bus.call("hget", self._bus.keys.deployment, "partitions")
        partitions = int(held or s.tapeline.partitions)
        status = Reader(self._bus, partitions, s.redis.lease_seconds).read()
        feeds, streams = states(self._bus), self._streams(status)
        wrong = {v.name: v.why for v in unhealthy(verdicts(status, feeds, s)) if v.kind == "worker"}
        lags = [stream["lag_seconds"] for stream in streams]
        answer = {
            "redis": "ok",
            "feeds": self._feeds(feeds, status.now_ms),
            "workers": [
                {"worker": w.worker, "service": w.service, "alive": w.alive, "healthy": w.worker not in wrong,
                 "why": wrong.get(w.worker, ""), "age_seconds": round(w.age_seconds, 1), "partitions": w.partitions,
                 "detail": self._mask(w.detail)}
                for w in status.workers
            ],
            "streams": streams,
            "lag_seconds": max(lags, default=0.0),
            "counters": status.counters,
            "usage": self._usage(self._bus, status.feeds),
        }  # fmt: skip
        return Seen(status, answer, _memory(self._bus))

    def _feeds(self, known: dict[str, FeedState], now_ms: int) -> list[Answer]:
        quiet = {found.feed: found for found in silent(known, self._settings, now_ms)}
        found = []
        for name, feed in sorted(known.items()):
            state, since = self._since.get(name, ("", 0))
            if state != feed.state:
                # At the first look nobody knows since when; ingest last said so then.
                since = min(feed.at_ms, now_ms) if not state else now_ms
                self._since[name] = (feed.state, since)
            newest = feed.last_event_ns
            why = quiet.get(name)
            found.append({
                "feed": name, "state": feed.state, "since": _instant(since),
                "detail": self._mask("; ".join(filter(None, (feed.detail, why.why if why else "")))),
                "watermark": _instant(newest // 1_000_000) if newest else None,
                "watermark_age_seconds": round(max(0.0, now_ms / 1000 - newest / NS), 1) if newest else None,
                "silent": why is not None,
            })  # fmt: skip
        return found

    def _streams(self, status: Status) -> list[Answer]:
        by_topic: dict[str, list[Stream]] = {}
        for stream in status.streams:
            by_topic.setdefault(stream.topic, []).append(stream)
        found = []
        for topic, streams in by_topic.items():
            records = sum(s.records for s in streams)
            before, at = self._counted.get(topic, (0, 0))
            rate = (records - before) * 1000 / (status.now_ms - at) if at and status.now_ms > at else None
            self._counted[topic] = (records, status.now_ms)
            consumers = [c for s in streams for c in s.consumers]
            worst = max(consumers, key=lambda c: (c.behind_seconds, c.behind_records), default=None)
            behind: dict[str, int] = {}
            for c in consumers:
                behind[c.name] = behind.get(c.name, 0) + c.behind_records
            late = worst is not None and worst.behind_records > 0
            found.append({
                "topic": topic, "entries": sum(s.entries for s in streams), "bytes": sum(s.bytes for s in streams),
                "records": records, "records_per_second": None if rate is None else round(max(0.0, rate), 1),
                "lag_seconds": round(worst.behind_seconds, 3) if worst else 0.0,
                "lag_records": max(behind.values(), default=0), "slowest": worst.name if worst and late else None,
            })  # fmt: skip
        return found

    def _usage(self, bus: Bus, feeds: dict[str, Any]) -> list[Answer]:
        return [
            {"feed": row.feed, "day": row.day, "cost_usd": row.day_cost_usd, "budget_usd": row.budget_usd,
             "state": row.state, "bytes": row.day_bytes}
            for row in today(bus, self._settings, feeds)
        ]  # fmt: skip


class StoreLook:
    """Everything of the answer that the store knows. BigQuery is not asked: each look would cost."""

    def __init__(self, settings: Settings) -> None:
        self._url, self._mask = settings.tapeline.store, Masker(settings)

    def look(self) -> Answer:
        if parse(self._url).scheme == "bigquery":
            return _no_store("ok")
        try:
            return self._look()
        except TapelineError as error:
            return _no_store(" ".join(self._mask(str(error)).split()))

    def _look(self) -> Answer:
        since = iso(time.time_ns() - HOUR_NS)[:19] + "Z"
        newest = read_rows(self._url, "gaps", last=1)
        rolling = read_rows(self._url, "candles_1m", last=64, columns=("time", "ticker"))
        fixed = read_rows(self._url, "candles", last=64, columns=("timestamp_in", "exchange", "symbol"))
        times = [*(row["time"] for row in rolling), *(row["timestamp_in"] for row in fixed)]
        return {
            "store": "ok",
            "gaps": {
                "last_hour": len(read_rows(self._url, "gaps", since=since, last=MOST_COUNTED, columns=("feed",))),
                "newest": newest[0] if newest else None,
            },
            "newest": max(times, default=None),
            "dead_letters": len(read_rows(self._url, "dead_letters", last=MOST_COUNTED, columns=("at",))),
            "tickers": list(dict.fromkeys(
                [row["ticker"] for row in rolling] or [f"{row['exchange']}:{row['symbol']}" for row in fixed]
            )),
        }  # fmt: skip


def _memory(bus: Bus) -> tuple[int, int] | None:
    """Bytes that Redis uses and may use, of a cluster all masters together; None where it does not tell us."""
    try:
        if bus.cluster:
            told = list(bus.call("info", "memory", target_nodes=RedisCluster.PRIMARIES).values())
        else:
            told = [bus.call("info", "memory")]
        return sum(int(node["used_memory"]) for node in told), sum(int(node["maxmemory"]) for node in told)
    except (ResponseError, KeyError):  # a user without the right to ask; a server that is like Redis
        return None


def _no_bus(why: str) -> Answer:
    return {"redis": why, "feeds": [], "workers": [], "streams": [], "lag_seconds": None, "counters": {}, "usage": []}


def _no_store(why: str) -> Answer:
    return {
        "store": why, "gaps": {"last_hour": None, "newest": None}, "newest": None, "dead_letters": None, "tickers": [],
    }  # fmt: skip


def _default(s: Settings, tickers: list[str]) -> str | None:
    """What a page shows first: the first symbol of the feeds that the store has; else whatever it has."""
    wanted: list[str] = []
    for feed in s.tapeline.feeds:
        if feed == "databento":
            wanted += [symbol.partition(".")[0] for symbol in s.databento.symbols]
        elif feed == "tardis":
            wanted += s.tardis.symbols
        elif feed == "synthetic":
            wanted += s.synthetic.roots
    return next((name for name in wanted if name in tickers), min(tickers, default=None)) or next(iter(wanted), None)


def _instant(ms: int) -> str:
    return iso(ms * 1_000_000)[:19] + "Z"
