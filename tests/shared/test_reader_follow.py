"""Following bars over a real Redis, a real store and a real sink: no gap and no double, whatever dies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.sink_sqlite.store import SqliteStore
from services.sink_timescale.store import TimescaleStore
from shared.batches import Item, Source, batch_of
from shared.bus import Bus, Limits
from shared.frames import NS, Frame
from shared.instruments import instrument_id, partition_of
from shared.messages import Instrument
from shared.reader_bars import series_of
from shared.reader_feed import Feed
from shared.reader_follow import Delivered, Following
from shared.reader_store import store_at
from shared.redis_server import EmbeddedRedis
from shared.sink import SinkLoop
from shared.stores import read_rows
from tests.postgres import PostgresServer
from tests.services.sink_sqlite.tape import FIXED_NAMES, T0, Stage, bars, candles, fixed, rows, sinking, without_tail
from tests.shared.following import Follower
from tests.wait import on_disk, until

BOTH = pytest.mark.parametrize("kind", ["sqlite", "postgresql"])


COIN = Instrument(instrument_id(*FIXED_NAMES[0]), *FIXED_NAMES[0], "binance-futures:BTC", "tardis:binance-futures",
                  ticker="binance-futures:BTCUSDT")  # fmt: skip
FRONTS = [Instrument(instrument_id("GLBX.MDP3", s), "GLBX.MDP3", s, s[:2], "databento") for s in ("ESH4", "6EH4")]


def publish(bus: Bus, partition: int, *instruments: Instrument) -> None:
    """As a feed does before their first tick."""
    fields = {str(i.id): msgspec.json.encode(i) for i in instruments}
    bus.call("hset", bus.keys.instruments(partition), mapping=fields)


def deploy(bus: Bus) -> None:
    """One partition, and its instruments but for deribit's."""
    bus.deploy(1)
    publish(bus, 0, COIN, *FRONTS)


class Place:
    """A store and sinks for it."""

    def __init__(self, url: str, path: Path, bus: Bus) -> None:
        self.url, self._path, self._bus = url, path, bus

    def sinking(self, bus: Bus | None = None, **options: Any) -> AbstractContextManager[SinkLoop]:
        store: Any = TimescaleStore(self.url) if self.url.startswith("postgresql") else SqliteStore(self._path, 0.1)
        return sinking(bus or self._bus, self._path, store, **options)

    def stored(self, seq: int, partition: int = 0) -> None:
        """Wait for the store to have a sequence."""

        def newest() -> int:
            found = read_rows(self.url, "sink_cursors", {"topic": "candles", "partition": partition})
            return max((row["seq"] for row in found), default=0)

        until(lambda: newest() == seq, what=f"sequence {seq} in the store")


@pytest.fixture
def store(request: pytest.FixtureRequest, bus: Bus, tmp_path: Path) -> Place:
    """Of the kind that the test is parametrized with; else SQLite."""
    kind = request.node.callspec.params.get("kind", "sqlite") if hasattr(request.node, "callspec") else "sqlite"
    path = tmp_path / "store.db"
    url = request.getfixturevalue("pg_url") if kind == "postgresql" else f"sqlite:///{path}"
    deploy(bus)
    return Place(url, path, bus)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server of the test's own, to be killed and robbed."""
    made = EmbeddedRedis(tmp_path / "redis")
    made.start()
    yield made
    made.stop()


def second(at: int, **values: Any) -> Frame:
    """The rolling rows of one second."""
    return candles(rows(2, at, **values))


@BOTH
def test_history_and_live_are_one(store: Place, bus: Bus, kind: str) -> None:
    stage = Stage(bus)
    stage.put(*(second(n) for n in range(5)), bars(fixed(10)))
    with store.sinking():
        store.stored(6)
        with (
            Follower(store.url, bus, history=3) as rolling,
            Follower(store.url, bus, since=T0 + NS) as since,
            Follower(store.url, bus, "binance-futures:BTCUSDT", "1m", history=2) as one,
            Follower(store.url, bus, "BTC-PERPETUAL", "60s", history=100) as other,
        ):
            assert rolling.reaches(3) == [(2, 0), (3, 0), (4, 0)]
            assert since.reaches(4) == [(n, 0) for n in range(1, 5)]
            assert len(other.reaches(5)) == 5
            one.reaches(2)
            # New rows, the same again, a correction of an old one and of one from before, an old revision.
            stage.put(second(5), second(4), second(3, revision=1, close=1.0), second(0, revision=7), bars(fixed(2, 5)))
            stage.put(second(3, revision=1, close=1.0), second(4, revision=1))
            stage.put(candles(rows(2, 6), "candle_1s"), second(6))
            new = [(5, 0), (3, 1), (4, 1), (6, 0)]
            assert rolling.reaches(7) == [(2, 0), (3, 0), (4, 0), *new]
            assert since.reaches(8) == [*((n, 0) for n in range(1, 5)), *new]
            assert [bar.symbol for bar in one.bars] == ["BTCUSDT"] * len(one.bars)
            one.reaches(3)
            other.reaches(6)
            store.stored(stage.seq)
        # What came over the bus is what the store tells.
        with Follower(store.url, bus, since=T0 + 2 * NS) as again, Follower(store.url, bus, "BTCUSDT", since=0,
                                                                           timeframe="1m") as bars_again:  # fmt: skip
            again.reaches(5)
            bars_again.reaches(6)
        newest = {bar.end_ns: bar for bar in rolling.bars}
        assert again.bars == [newest[at] for at in sorted(newest)]
        assert again.bars[1].close == 1.0
        assert bars_again.bars[-3:] == one.bars


def test_without_history_it_begins_with_what_is_made_next(store: Place, bus: Bus) -> None:
    stage = Stage(bus)
    stage.put(second(0))
    with store.sinking():
        store.stored(1)
        with Follower(store.url, bus) as follower:
            newest = 0
            while not follower.bars:  # until it has begun
                newest += 1
                stage.put(second(newest))
                store.stored(stage.seq)
            begun = follower.seen[0][0]
            assert begun > 0
            # Of the bar before, which it was not given, it gets the correction; of one before that nothing.
            stage.put(second(begun - 2, revision=1), second(begun - 1, revision=1), second(newest + 1))
            told = follower.reaches(newest - begun + 3)
            assert told == [*((n, 0) for n in range(begun, newest + 1)), (begun - 1, 1), (newest + 1, 0)]


@BOTH
def test_it_goes_on_through_restarts_of_all(
    store: Place, server: EmbeddedRedis, pg_url: str, postgres: PostgresServer, kind: str
) -> None:
    own = Bus(server.url, "chaos")
    deploy(own)
    stage = Stage(own)
    stage.put(*(second(n) for n in range(3)))
    with Follower(store.url, own, history=99) as follower:  # before there is a store at all
        with store.sinking(own):
            follower.reaches(3)
            stage.put(second(3))
            follower.reaches(4)
        stage.put(second(4))  # no sink runs
        follower.reaches(5)
        if kind == "postgresql":
            postgres.kill()
            stage.put(second(5))  # nor does the database
            follower.reaches(6)
            postgres.start()
        else:
            stage.put(second(5))
        on_disk(own.client)
        server.kill()
        follower.gate.clear()
        server.start()
        own.client.connection_pool.disconnect()
        stage.put(second(6), second(7))
        with store.sinking(own):
            store.stored(8)
            follower.gate.set()
            follower.reaches(8)
            server.kill()
            server.start()
            own.client.connection_pool.disconnect()
            stage.put(second(8), second(5, revision=1))
            assert follower.reaches(10) == [*((n, 0) for n in range(9)), (5, 1)]
    own.close()


@BOTH
def test_a_slow_one_goes_through_the_store_where_the_stream_was_trimmed(store: Place, bus: Bus, kind: str) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0, block_ms=50))
    stage = Stage(bus)
    stage.put(second(0))
    with store.sinking(small):
        store.stored(1)
        with Follower(store.url, bus, history=1) as follower:
            follower.reaches(1)
            stage.put(second(1))
            follower.reaches(2)
            follower.gate.clear()
            stage.put(*(second(n) for n in range(2, 4)))
            follower.reaches(3)
            stage.put(*(second(n) for n in range(4, 90)), second(1, revision=1), second(50, revision=2))
            store.stored(stage.seq)
            until(lambda: small.call("xlen", small.keys.stream(0, "candles")) == 16, what="the stream to be trimmed")
            follower.gate.set()
            stage.put(second(90))
            told = follower.reaches(92)
            # Where it had got to, then the store: each at its newest revision.
            assert told[:3] == [(0, 0), (1, 0), (2, 0)]
            assert sorted(told[3:]) == sorted([(1, 1), (50, 2), *((n, 0) for n in range(3, 91) if n != 50)])
            first = [at for at, _ in told if at != 1]
            assert first == sorted(first)
            stage.put(second(91))
            assert follower.reaches(93)[92] == (91, 0)
    small.close()


@BOTH
def test_another_bus_in_the_same_place(store: Place, bus: Bus, kind: str) -> None:
    stage = Stage(bus)
    stage.put(*(second(n) for n in range(6)))
    with store.sinking():
        store.stored(6)
        with Follower(store.url, bus, history=2) as follower:
            follower.reaches(2)
            # Emptied under way; the tape begins again, from where the feed can go back to.
            for key in list(bus.client.scan_iter(f"{bus.keys.namespace}:*")):
                bus.client.delete(key)
            deploy(bus)
            again = Stage(bus)
            again.put(*(second(n) for n in range(3, 9)))
            assert follower.reaches(5) == [(4, 0), (5, 0), (6, 0), (7, 0), (8, 0)]
            again.put(second(8), second(9))
            assert follower.reaches(6)[5] == (9, 0)


def test_a_tail_that_redis_lost_comes_again_once(store: Place, server: EmbeddedRedis) -> None:
    own = Bus(server.url, "lost")
    deploy(own)
    stage = Stage(own)
    stage.put(*(second(n) for n in range(4)))
    with store.sinking(own):
        store.stored(4)
        with Follower(store.url, own, history=1) as follower:
            follower.reaches(1)
            with without_tail(server, own):
                stage.put(second(4), second(5))
                store.stored(6)
                follower.reaches(3)
            again = Stage(own)
            assert again.seq == 4
            again.put(second(4), second(5), second(6))
            assert follower.reaches(4) == [(3, 0), (4, 0), (5, 0), (6, 0)]
            again.put(second(7))
            assert follower.reaches(5)[4] == (7, 0)
    own.close()


def test_a_store_that_is_behind_is_waited_for(store: Place, bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0))
    stage = Stage(bus)
    stage.put(second(0))
    with store.sinking():
        store.stored(1)
    # Another store's sink has all, this one's is dropped: what the stream holds begins behind this store's place.
    bus.client.delete(bus.keys.consumers(0, "candles"))
    stage.put(*(second(n) for n in range(1, 60)))
    bus.done_with(0, "candles", "another", bus.last_id(0, "candles"))
    small.trim(0, "candles")
    with Follower(store.url, bus, history=1) as follower:
        until(lambda: "the store is behind the bus" in caplog.text, what="that to be said")
        assert follower.seen == [(0, 0)]
        with store.sinking():
            store.stored(60)
            # What neither had is missing in the store, too; with the store it goes on.
            assert follower.reaches(17) == [(0, 0), *((n, 0) for n in range(44, 60))]
    small.close()


def test_everybody_reads_his_own_partition(store: Place, bus: Bus) -> None:
    bus.client.delete(bus.keys.deployment, bus.keys.instruments(0))
    bus.deploy(4)
    crypto = partition_of("binance-futures:BTC", 4)
    stages = {p: Stage(bus, p) for p in range(4)}
    es = stages[partition_of("ES", 4)]
    contracts = [("GLBX.MDP3", "ESH4"), ("GLBX.MDP3", "ES")]
    with (
        store.sinking(partitions=4),
        Follower(store.url, bus, "ES", history=9) as ticker,  # nothing of it is published yet: the name decides
        Follower(store.url, bus, "binance-futures:BTCUSDT", "1m", history=9) as unknown,
        Follower(store.url, bus, "ESH4", "1m", history=9) as contract,
        Follower(store.url, bus, "GLBX.MDP3:ES", "1m", history=9) as continuous,
    ):
        es.put(second(0))
        ticker.reaches(1)
        publish(bus, es.partition, FRONTS[0])
        publish(bus, crypto, COIN)
        es.put(candles(fixed(4), "candle", contracts), second(1))
        stages[crypto].put(bars(fixed(4)))
        for follower, symbol in ((unknown, "BTCUSDT"), (contract, "ESH4"), (continuous, "ES")):
            follower.reaches(2)
            assert {bar.symbol for bar in follower.bars} == {symbol}
        assert ticker.reaches(2) == [(0, 0), (1, 0)]


def test_many_follow_and_none_stays_behind(store: Place, bus: Bus, pg_url: str, postgres: PostgresServer) -> None:
    stage = Stage(bus)
    stage.put(second(0))
    place = Place(pg_url, Path(), bus)
    before = {thread.name for thread in threading.enumerate()}
    database = pg_url.rpartition("/")[2]
    with place.sinking():
        place.stored(1)
        with Follower(pg_url, bus, history=1) as first:
            readers = [Follower(pg_url, bus, ("ES", "6E")[n % 2], history=1) for n in range(4)]
            for each in readers:
                each.__enter__()
                each.reaches(1)
            stage.put(second(1), second(2))
            for each in (first, *readers):
                assert each.reaches(3) == [(0, 0), (1, 0), (2, 0)]
                assert len({bar.symbol for bar in each.bars}) == 1
            for each in readers:
                each.__exit__(None, None, None)
    until(
        lambda: postgres.sql(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'") in ("0", "1"),
        what="connections to be gone",
    )
    assert {thread.name for thread in threading.enumerate()} - before <= {"postgres"}


def test_rows_of_an_old_bus_that_are_stored_late_are_not_passed_over(store: Place, bus: Bus) -> None:
    """Step by step, for a sink writes what it has read of the old bus at any moment after Redis was replaced."""
    lite = SqliteStore(Path(store.url.removeprefix("sqlite:///")))
    lite.open()

    def stores(frame: Frame, seq: int, entry: str) -> None:
        lite.write(batch_of([Item(Source(bus.identity(), "candles", 0, seq, entry), frame)]))

    def replace() -> None:
        for key in list(bus.client.scan_iter(f"{bus.keys.namespace}:*")):
            bus.client.delete(key)
        deploy(bus)

    async def steps() -> list[int]:
        feed, bars = Feed(bus.url, bus.keys.namespace), await store_at(store.url, 1)
        follow = Following(
            bars, feed, series_of("ES", "rolling"), history=5, since_ns=None, closing=asyncio.Event()
        )  # fmt: skip
        got: list[int] = []

        async def more(times: int) -> None:
            for _ in range(times):
                got.extend((bar.end_ns - T0) // NS for bar in await follow.more())

        async def until_got(count: int) -> None:
            while len(got) < count:
                await asyncio.wait_for(more(1), 5)

        bus.identity()
        await more(2)  # nothing is stored, nothing is on the bus: it stands at the stream's start
        stores(second(0), 1, "1-0")
        replace()
        Stage(bus).put(second(1))
        stores(second(1), 1, bus.last_id(0, "candles"))
        await until_got(2)
        assert got == [0, 1]
        old = bus.identity()
        replace()
        stage = Stage(bus)
        stage.put(second(3))
        bus.identity()
        await more(5)  # the new stream is whole, but the sink may still hold rows of the old one
        lite.write(batch_of([Item(Source(old, "candles", 0, 2, "9-0"), second(2))]))
        stores(second(3), 1, bus.last_id(0, "candles"))
        await until_got(4)
        stage.put(second(4))
        await until_got(5)
        await feed.close()
        await bars.close()
        return got

    assert asyncio.run(steps()) == [0, 1, 2, 3, 4]
    lite.close()


def test_what_was_delivered_is_remembered_within_bounds() -> None:
    held = Delivered(5, remembered=10)
    assert not held.take(4, 9)
    assert held.take(5, 0)
    assert not held.take(5, 0)
    assert held.take(5, 2)
    assert not held.take(5, 1)
    assert all(held.take(at, 0) for at in range(6, 200))
    assert len(held._revisions) <= 20
    assert held.floor_ns > 5
    assert not held.take(5, 3)  # too old to know
    assert not held.take(199, 0)
    assert held.take(199, 1)
