"""The reader's queries on real stores, its cache, and the snapshots that following rests on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.sink_sqlite.store import SqliteStore
from services.sink_timescale.store import TimescaleStore
from shared.batches import Cursor, Item, Source, batch_of
from shared.bus import Bus, Limits
from shared.errors import BusUnavailable, ConfigError, StoreUnavailable
from shared.frames import NS, Frame
from shared.reader import CacheStats, FixedBar, MarketReader, RollingBar
from shared.reader_bars import Bar, bars_of_frame, series_of
from shared.reader_cache import BarCache
from shared.reader_feed import Feed
from shared.reader_store import Ask, store_at
from shared.tables import TABLES
from tests.postgres import PostgresServer, free_port
from tests.services.sink_sqlite.tape import FIXED_NAMES, T0, Stage, bars, candles, fixed, rows

BOTH = pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
CONTRACTS = [("GLBX.MDP3", "ES"), ("GLBX.MDP3", "ESH4")]


@dataclass
class Clock:
    """A clock that stands until it is moved."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Written:
    """A store of either kind."""

    url: str
    made: Any
    seq: int = field(default=0)

    def put(self, *frames: Frame) -> None:
        """Write frames in one batch."""
        items = []
        for frame in frames:
            self.seq += 1
            items.append(Item(Source("a", "candles", 0, self.seq, f"{self.seq}-0"), frame))
        self.made.write(batch_of(items))


@pytest.fixture
def store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    path = tmp_path / "store.db"
    url = request.getfixturevalue("pg_url") if kind == "postgresql" else f"sqlite:///{path}"
    made: Any = TimescaleStore(url) if kind == "postgresql" else SqliteStore(path)
    yield Written(url, made)
    made.close()


def reading(url: str, work: Callable[[MarketReader], Awaitable[Any]], **options: Any) -> Any:
    """What `work` gives with a reader of this store."""

    async def inside() -> Any:
        async with MarketReader(url, **options) as reader:
            return await work(reader)

    return asyncio.run(inside())


def test_a_bar_has_every_column_of_its_table() -> None:
    for made, kind in ((FixedBar, "candle"), (RollingBar, "candle_1m")):
        table = TABLES[kind]
        beside = {f"{table.time}_ns", "timestamp_out_ns"}
        assert set(made.__struct_fields__) == {*table.columns, *beside}


@BOTH
def test_the_newest_and_a_range(store: Written, kind: str) -> None:
    async def work(reader: MarketReader) -> None:
        assert await reader.latest("ES", "rolling", n=3) == []  # there is no store yet
        assert await reader.latest("ES", "1m") == []
        await asyncio.to_thread(store.made.open)
        await asyncio.to_thread(
            store.put, candles(rows(20)), candles(fixed(10), "candle", CONTRACTS), bars(fixed(20, seconds=15)),
            candles(rows(2, 3, revision=2, close=7.0)),
        )  # fmt: skip
        newest = await reader.latest("ES", "rolling", n=3)
        assert [(bar.end_ns - T0) // NS for bar in newest] == [7, 8, 9]
        bar = newest[0]
        assert isinstance(bar, RollingBar)
        assert bar.time == bar.end == datetime(2023, 12, 25, 23, 1, 7, tzinfo=UTC)
        assert (bar.time_ns, bar.start_ns) == (T0 + 7 * NS, T0 - 53 * NS)
        assert (bar.ticker, bar.symbol, bar.close, bar.trades, bar.complete) == ("ES", "ESH4", 5003.5, 4, True)
        assert bar.timestamp_out == datetime(2023, 12, 25, 23, 1, 0, 500123, tzinfo=UTC)
        assert bar.timestamp_out_ns == T0 + 500_123_000
        with pytest.raises(AttributeError):
            bar.close = 1.0  # type: ignore[misc]
        (one,) = await reader.latest("ES", "60s")
        assert isinstance(one, FixedBar)
        assert (one.exchange, one.symbol, one.timeframe) == ("GLBX.MDP3", "ES", "1m")
        assert (one.start_ns, one.end_ns) == (T0 + 240 * NS, T0 + 300 * NS)
        assert one.vwap is not None
        (named,) = await reader.latest("GLBX.MDP3:ES", "1m")
        assert named == one
        assert await reader.latest("GLBX.MDP3:NQ", "1m") == await reader.latest("NQ", "1m") == []
        since = datetime(2023, 12, 25, 18, 1, 2, tzinfo=timezone(timedelta(hours=-5)))
        some = await reader.bars("ES", "rolling", since, "2023-12-25T23:01:05Z")
        assert [((b.end_ns - T0) // NS, b.revision, b.close) for b in some] == [
            (2, 0, 5001.0),
            (3, 2, 7.0),
            (4, 0, 5002.0),
        ]
        assert await reader.bars("ES", "rolling", T0 + 2 * NS, T0 + 5 * NS) == some
        quarters = await reader.bars("BTCUSDT", "15s", until=T0 + 60 * NS)
        assert [(b.start_ns - T0) // NS for b in quarters] == [0, 15, 30, 45]
        assert [b.vwap is None for b in quarters] == [True, False, False, True]

    reading(store.url, work, cache_seconds=0.0)


@BOTH
def test_a_symbol_of_several_exchanges_wants_its_exchange(store: Written, kind: str) -> None:
    store.made.open()
    store.put(candles(fixed(4), "candle", [("binance", "BTCUSDT"), ("bybit", "BTCUSDT")]))

    async def work(reader: MarketReader) -> None:
        with pytest.raises(ConfigError, match="BTCUSDT is on binance, bybit: write exchange:BTCUSDT"):
            await reader.latest("BTCUSDT", "1m")
        assert len(await reader.latest("bybit:BTCUSDT", "1m", n=9)) == 2
        assert await reader.latest("BTCUSDT", "5m") == []

    reading(store.url, work)


@BOTH
def test_a_snapshot_holds_what_its_cursor_says(store: Written, kind: str) -> None:
    store.made.open()
    store.put(candles(rows(2)))
    done = threading.Event()

    def write() -> None:
        for n in range(1, 150):
            store.put(candles(rows(2, n)))
        done.set()

    async def work() -> list[int]:
        bars = await store_at(store.url, 2)
        writer = threading.Thread(target=write)
        writer.start()
        told = []
        while not done.is_set():
            snapshot = await bars.snapshot(Ask(series_of("ES", "rolling")))
            cursor = snapshot.cursors["a", "candles", 0]
            assert (cursor.seq, cursor.stream_id) == (len(snapshot.bars), f"{len(snapshot.bars)}-0")
            told.append(cursor.seq)
        writer.join()
        await bars.close()
        return told

    told = asyncio.run(work())
    assert len(set(told)) > 3
    assert told == sorted(told)


def test_rows_of_the_bus_are_those_that_the_store_would_have() -> None:
    made = rows(8)
    made["name"][4] = 9  # no such name: a dead letter
    made["complete"][2] = 0
    got = bars_of_frame(candles(made), series_of("ES", "rolling"))
    assert [((bar.end_ns - T0) // NS, bar.complete) for bar in got] == [(0, True), (1, False), (3, True)]
    assert bars_of_frame(candles(made, "candle_1s"), series_of("ES", "rolling")) == []
    torn = candles(made)
    torn.body = torn.body[:-3]
    assert bars_of_frame(torn, series_of("ES", "rolling")) == []
    assert bars_of_frame(bars(fixed(8)), series_of("deribit:BTCUSDT", "1m")) == []
    assert len(bars_of_frame(bars(fixed(8)), series_of("BTCUSDT", "1m"))) == 4
    assert bars_of_frame(bars(fixed(8)), series_of("BTCUSDT", "5m")) == []
    some = bars_of_frame(bars(fixed(2)), series_of(":".join(FIXED_NAMES[0]), "1m"))
    assert msgspec.to_builtins(some[0])["timestamp_in"] == "2023-12-25T23:01:00Z"


# -- the cache --------------------------------------------------------------------------------


def bar(at: int) -> Bar:
    return bars_of_frame(candles(rows(2, at)), series_of("ES", "rolling"))[0]


@dataclass
class Loads:
    """Counts loads; each answers once it is let go."""

    answer: list[Bar]
    count: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self) -> list[Bar]:
        self.count += 1
        await self.gate.wait()
        return self.answer


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_nothing_is_served_beyond_its_time() -> None:
    async def work() -> None:
        clock = Clock()
        cache = BarCache(100, 2.0, clock)
        load = Loads([bar(1)])
        load.gate.set()
        first = await cache.get("a", load)
        clock.now += 1.999
        second = await cache.get("a", load)
        assert first == second
        assert first is not second  # a caller may do with its list what it likes
        clock.now += 0.001
        await cache.get("a", load)
        assert (cache.hits, cache.misses, load.count) == (1, 2, 2)
        # The time counts from when the store was asked, not from when it answered.
        slow = Loads([bar(2)])
        waiting = asyncio.ensure_future(cache.get("b", slow))
        await asyncio.sleep(0)
        clock.now += 3
        late = asyncio.ensure_future(cache.get("b", slow))
        await asyncio.sleep(0)
        slow.gate.set()
        await asyncio.gather(waiting, late)
        assert slow.count == 2  # what had been on its way for so long was too old for a new caller
        assert len(cache) == 1
        never = BarCache(100, 0.0, clock)
        await asyncio.gather(*(never.get("a", load) for _ in range(3)))
        assert (never.hits, len(never)) == (0, 0)

    run(work())


def test_the_same_question_at_once_is_asked_once() -> None:
    async def work() -> None:
        cache = BarCache(100, 2.0, Clock())
        load = Loads([bar(1)])
        callers = [asyncio.ensure_future(cache.get("a", load)) for _ in range(5)]
        await asyncio.sleep(0)
        callers[0].cancel()  # the one who asked
        load.gate.set()
        answers = await asyncio.gather(*callers, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert answers[1:] == [load.answer] * 4
        assert (load.count, cache.hits, cache.misses) == (1, 4, 1)

        async def fails() -> list[Bar]:
            raise StoreUnavailable("down")

        told = await asyncio.gather(*(cache.get("b", fails) for _ in range(2)), return_exceptions=True)
        assert [str(error) for error in told] == ["down", "down"]
        assert await cache.get("b", load) == load.answer  # an error is not kept

    run(work())


def test_the_cache_is_bounded_in_bars() -> None:
    async def work() -> None:
        cache = BarCache(10, 60.0, Clock())
        counts: dict[str, int] = {}

        async def ask(key: str, size: int) -> None:
            async def load() -> list[Bar]:
                counts[key] = counts.get(key, 0) + 1
                return [bar(n) for n in range(size)]

            await cache.get(key, load)
            assert len(cache) <= 10

        for key in ("a", "b", "c"):
            await ask(key, 3)
        await ask("a", 3)
        await ask("d", 4)  # b goes, which was used least recently
        await ask("a", 3)
        assert counts == {"a": 1, "b": 1, "c": 1, "d": 1}
        await ask("b", 3)
        assert counts["b"] == 2
        await ask("huge", 11)
        await ask("huge", 11)
        assert counts["huge"] == 2
        for n in range(30):
            await ask(f"empty {n}", 0)
        await cache.close()
        assert len(cache) == 0

    run(work())


@BOTH
def test_the_reader_answers_from_its_cache(store: Written, kind: str) -> None:
    store.made.open()
    store.put(candles(rows(20)))
    clock = Clock()

    async def work(reader: MarketReader) -> None:
        first = await asyncio.gather(*(reader.latest("ES", "rolling", n=4) for _ in range(5)))
        assert reader.stats == CacheStats(4, 1, 4)
        await asyncio.to_thread(store.put, candles(rows(2, 10)))
        assert await reader.latest("ES", "rolling", n=4) == first[0]
        assert len(await reader.latest("ES", "rolling", n=5)) == 5  # another question
        clock.now += 1.5
        newest = await reader.latest("ES", "rolling", n=4)
        assert [(b.end_ns - T0) // NS for b in newest] == [7, 8, 9, 10]
        assert reader.stats == CacheStats(5, 3, 4)

    reading(store.url, work, cache_seconds=1.5, clock=clock)


# -- errors, and the end ----------------------------------------------------------------------


def test_what_is_asked_wrongly_is_said(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    with pytest.raises(ConfigError, match="not a store URL"):
        MarketReader("tape.db")
    with pytest.raises(ConfigError, match=r"bars are read from sqlite:/// and postgresql:// stores"):
        reading("bigquery://p/d", lambda reader: reader.latest("ES"))
    with pytest.raises(ConfigError, match="the reader is not open"):
        asyncio.run(MarketReader(url).latest("ES"))

    async def work(reader: MarketReader) -> None:
        for wrong in (reader.latest("ES", "2w"), reader.latest("", "1m"), reader.latest("a:", "1m"),
                      reader.latest("ES", n=0), reader.bars("ES", since="yesterday"),
                      reader.bars("ES", since=datetime(2023, 1, 1)), anext(reader.follow("ES")),
                      anext(reader.follow("ES", history=1, since=T0))):  # fmt: skip
            with pytest.raises(ConfigError) as error:
                await wrong
            assert "\n" not in str(error.value)

    reading(url, work)


def test_a_server_that_is_down_and_one_that_refuses(postgres: PostgresServer, tmp_path: Path) -> None:
    async def work(reader: MarketReader) -> None:
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await reader.latest("ES", "rolling")

    reading(f"postgresql://u:s3cret@127.0.0.1:{free_port()}/x", work)

    async def nothing(reader: MarketReader) -> None:
        assert await reader.latest("ES", "1m") == await reader.latest("ES", "rolling") == []

    reading(postgres.url("nowhere"), nothing)

    async def dies(reader: MarketReader) -> None:
        assert await reader.latest("ES", "rolling") == []
        postgres.kill()
        with pytest.raises(StoreUnavailable):
            await reader.latest("ES", "rolling", n=2)
        postgres.start()
        assert await reader.latest("ES", "rolling", n=3) == []

    reading(postgres.url(), dies)

    async def refused() -> None:
        feed = Feed("redis://127.0.0.1:1", "md")
        with pytest.raises(BusUnavailable, match=r"Redis at 127.0.0.1:1 does not answer"):
            await feed.deployment()
        await feed.close()
        with pytest.raises(ConfigError, match="is not a Redis URL"):
            Feed("http://bob:s3cret@h", "md")

    run(refused())


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = threading.active_count()

    async def work() -> None:
        store = SqliteStore(tmp_path / "s.db")
        store.open()
        store.close()
        async with MarketReader(f"sqlite:///{tmp_path}/s.db") as reader:
            await asyncio.gather(*(reader.latest("ES", "rolling", n=n) for n in range(1, 9)))
            assert threading.active_count() > before
            unfinished = asyncio.ensure_future(reader.latest("ES", "1m"))
            await asyncio.sleep(0)
        assert threading.active_count() == before
        await asyncio.gather(unfinished, return_exceptions=True)
        await reader.close()  # again
        assert len(asyncio.all_tasks()) == 1

    run(work())


def test_when_a_stream_holds_all_behind_a_place(bus: Bus) -> None:
    stage = Stage(bus)
    stage.put(*(candles(rows(2, n)) for n in range(40)))
    ids = [entry.decode() for entry, _ in bus.client.xrange(bus.keys.stream(0, "candles"))]

    async def holds(seq: int, at: str) -> bool:
        feed = Feed(bus.url, bus.keys.namespace)
        try:
            return await feed.holds(0, Cursor(seq, at))
        finally:
            await feed.close()

    def told(seq: int, at: str) -> bool:
        return asyncio.run(holds(seq, at))

    assert told(0, "0-0")
    assert told(10, ids[9])
    assert told(40, ids[39])
    assert not told(12, f"{ids[9]}7")  # an entry that is not (any more) of this stream
    bus.done_with(0, "candles", "x", bus.last_id(0, "candles"))
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0))
    assert small.trim(0, "candles") == 24
    small.close()
    assert not told(0, "0-0")
    assert not told(10, ids[9])
    assert told(24, ids[23])  # gone itself, but what follows is there
    assert told(25, ids[24])
    assert told(40, ids[39])
    assert not told(41, f"{ids[39]}1")
