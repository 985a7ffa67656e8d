"""The sink on the `ticks` topic, whose producers each count for themselves: places are entry ids, never sequences."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.sink_sqlite.store import SqliteStore
from shared.bus import Bus, Limits
from shared.frames import TRADE, Frame
from shared.messages import encode
from shared.redis_server import EmbeddedRedis
from shared.sink_tail import Entry, lost_entries
from shared.tables import TICK_TABLES
from tests.services.sink_sqlite.tape import (
    ETHER,
    INSTRUMENTS,
    T0,
    Feed,
    Stage,
    candles,
    gap,
    late,
    mixed,
    query,
    rows,
    sinking,
    start_sink,
    stored_id,
    stored_seq,
    ticks,
    without_tail,
)
from tests.wait import until

NAMES = [table.name for table in TICK_TABLES.values()]
TICKS = ("ticks",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server of the test's own, to be robbed of its tail."""
    made = EmbeddedRedis(tmp_path / "redis")
    made.start()
    yield made
    made.stop()


def caught_up(path: Path, entry: str, partition: int = 0) -> None:
    until(lambda: stored_id(path, "ticks", partition) == entry, what=f"entry {entry} in the store")


def times(path: Path, name: str = "ticks_trades") -> list[int]:
    """Each record's number on its tape, in order."""
    return [int(t - T0 - 7) // 1000 for (t,) in query(path, f"SELECT timestamp_ns FROM {name} ORDER BY 1")]


def test_ticks_of_several_producers_and_partitions_reach_the_store(bus: Bus, path: Path) -> None:
    with sinking(bus, path, partitions=2, modes=TICKS) as loop:
        for p in range(2):
            feeds = [Feed(bus, name, p) for name in ("tardis:deribit", "tardis-files", "glbx")]
            for feed, start in zip(feeds, (0, 10, 20), strict=True):
                feed.put(mixed(start), ticks(TRADE, 5, start + 1))
            last = feeds[0].put(gap(T0 + p))
            caught_up(path, last, p)
        until(lambda: loop.counters["rows"] == 62, what="the counter of rows")
    assert [query(path, f"SELECT count(*) FROM {name}")[0][0] for name in NAMES] == [36, 6, 6, 6, 6]
    assert query(path, "SELECT count(*) FROM gaps") == [(2,)]
    assert not query(path, "SELECT * FROM dead_letters")
    assert loop.counters["sequence_steps_back"] == loop.counters["rewinds"] == 0


def test_only_the_topics_of_the_modes_are_read_and_held(bus: Bus, path: Path) -> None:
    consumer = SqliteStore(path).name

    def held() -> list[str]:
        return [t for t in ("ticks", "candles", "late") if bus.call("hexists", bus.keys.consumers(0, t), consumer)]

    stage, feed = Stage(bus), Feed(bus)
    first = feed.put(mixed())
    stage.put(candles(rows(4)), late(1))
    with sinking(bus, path, modes=TICKS):
        caught_up(path, first)
        assert held() == ["ticks"]
    assert not query(path, "SELECT * FROM candles_1m")
    with sinking(bus, path, modes=("candles", "ticks")):
        until(lambda: stored_seq(path) == 1 and stored_seq(path, "late") == 2, what="candles in the store")
        assert held() == ["ticks", "candles", "late"]
    # A mode that is no longer wanted must not fill the bus.
    second = feed.put(mixed(1))
    with sinking(bus, path):
        until(lambda: held() == ["candles", "late"], what="the ticks to be let go")
        stage.put(candles(rows(4, 4)))
        until(lambda: stored_seq(path) == 3, what="candles in the store")
    assert stored_id(path) == first
    with sinking(bus, path, modes=TICKS) as loop:
        caught_up(path, second)
        until(lambda: loop.counters["rows"] == 5, what="the counter of rows")
    assert times(path) == [0, 1]


def test_trimming_waits_for_the_ticks_of_the_store(bus: Bus, path: Path) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0, block_ms=50))
    feed = Feed(bus)
    last = feed.put(*(ticks(TRADE, 2, 2 * i) for i in range(40)))
    with sinking(small, path, modes=TICKS):
        caught_up(path, last)
        until(lambda: small.call("xlen", small.keys.stream(0, "ticks")) == 16, what="the stream to be trimmed")
    last = feed.put(*(ticks(TRADE, 2, 80 + 2 * i) for i in range(40)))
    small.trim(0, "ticks")
    assert small.call("xlen", small.keys.stream(0, "ticks")) == 40
    with sinking(small, path, modes=TICKS) as loop:
        caught_up(path, last)
    assert times(path) == list(range(160))
    assert loop.counters["rewinds"] == loop.counters["missing"] == 0
    small.close()


def test_instruments_are_learned_from_the_stream_and_looked_up(bus: Bus, path: Path) -> None:
    feed = Feed(bus, known=False)
    defined = Frame("instrument", 1, 0, 0, "x", encode([INSTRUMENTS[ETHER]]))
    with sinking(bus, path, modes=TICKS):
        caught_up(path, feed.put(ticks(TRADE, 1, instrument=ETHER)))  # known to nobody
        caught_up(path, feed.put(defined, ticks(TRADE, 1, 1, instrument=ETHER)))  # said on the stream
        caught_up(path, feed.put(ticks(TRADE, 1, 2)))
        Feed(bus, "other")  # and now the bus knows all
        caught_up(path, feed.put(ticks(TRADE, 1, 3)))
    got = query(path, "SELECT symbol, timestamp_ns FROM ticks_trades ORDER BY 2")
    assert [r[0] for r in got] == ["ETH-PERPETUAL", "BTC-PERPETUAL"]
    assert times(path) == [1, 3]
    reasons = query(path, "SELECT table_name, row_number, reason FROM dead_letters")
    assert reasons == [("ticks_trades", 0, "an unknown instrument")] * 2


def test_garbage_on_the_stream(bus: Bus, path: Path) -> None:
    feed = Feed(bus)
    with sinking(bus, path, modes=TICKS):
        feed.put(mixed())
        stream = bus.keys.stream(0, "ticks")
        bus.call("xadd", stream, {"hello": "world"})
        for seq in (0, -5, 1 << 70):
            bus.call("execute_command", "XADD", stream, "*", *candles(rows(1)).fields(seq))
        bus.call("hset", bus.keys.instruments(0), "5", b"no instrument")
        no_text = Frame("instrument", 1, 0, 0, "x", b'[{"type":"instrument","venue":"\xff"}]')
        last = feed.put(ticks(TRADE, 1, 1, instrument=5), Frame("trade", 1, 0, 0, "x", b"short"), no_text, mixed(2))
        caught_up(path, last)
    assert times(path) == [0, 2]
    assert query(path, "SELECT count(*) FROM dead_letters") == [(7,)]


@pytest.mark.parametrize("fault", ["sink:before-commit:3", "sink:after-commit:3"])
def test_kill_9_around_a_commit(bus: Bus, path: Path, fault: str) -> None:
    feeds = [Feed(bus, "one"), Feed(bus, "two")]
    last = ""
    for i in range(8):
        last = feeds[i % 2].put(mixed(i))
    url = f"sqlite:///{path}"
    with start_sink(bus, url, fault, modes="ticks") as first:
        assert first.wait(timeout=20) == -signal.SIGKILL
    assert stored_id(path) not in ("", last)
    with start_sink(bus, url, modes="ticks") as second:
        caught_up(path, last)
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=10) == 0
    for name in NAMES:
        assert times(path, name) == list(range(8))
    assert not query(path, "SELECT * FROM dead_letters")


@pytest.mark.parametrize(
    ("running", "kept"),
    [(True, 2), (True, 0), (False, 2), (False, 0)],
    ids=["running, older entries", "running, none", "stopped, older entries", "stopped, none"],
)
def test_redis_loses_its_tail(
    server: EmbeddedRedis, path: Path, running: bool, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    bus = Bus(server.url)
    bus.identity()
    Feed(bus)
    if kept:
        last = Feed(bus).put(*(mixed(i) for i in range(kept)))
        with sinking(bus, path, modes=TICKS):
            caught_up(path, last)

    def put(*cuts: tuple[int, int]) -> None:
        """The tape from `kept` on, cut as told, and a row that nobody knows."""
        feeds = [Feed(bus, name) for name in ("tardis:deribit", "tardis-files")]
        for i, (start, end) in enumerate(cuts):
            feeds[i % 2].put(np.concatenate([mixed(kept + n) for n in range(start, end)]))
        caught_up(path, feeds[0].put(ticks(TRADE, 1, instrument=5)))

    # The second time the tape is cut otherwise, so its records have other places.
    lost, redone = ((0, 3), (3, 4), (4, 6)), ((0, 1), (1, 6))
    if running:
        with sinking(bus, path, modes=TICKS) as loop:
            with without_tail(server, bus):
                put(*lost)
            put(*redone)
    else:
        with without_tail(server, bus), sinking(bus, path, modes=TICKS):
            put(*lost)
        with sinking(bus, path, modes=TICKS) as loop:
            put(*redone)
    assert loop.counters["rewinds"] == 1
    assert loop.counters["missing"] == 0
    assert "Redis has lost the end of 'ticks'" in caplog.text
    for name in NAMES:
        assert times(path, name) == list(range(kept + 6))
    assert query(path, "SELECT count(*) FROM dead_letters") == [(1,)]
    bus.close()


def test_a_lost_tail_takes_nothing_that_was_trimmed(server: EmbeddedRedis, path: Path) -> None:
    """Older entries are gone because the store was done with them: their rows stay."""
    bus = Bus(server.url, limits=Limits(window_ms=0, block_ms=50))
    bus.identity()
    feed = Feed(bus)
    with sinking(bus, path, modes=TICKS) as loop:
        caught_up(path, feed.put(*(ticks(TRADE, 1, i) for i in range(40))))
        until(lambda: bus.call("xlen", bus.keys.stream(0, "ticks")) == 16, what="the stream to be trimmed")
        with without_tail(server, bus):
            caught_up(path, feed.put(*(ticks(TRADE, 1, i) for i in range(40, 45))))
        feed = Feed(bus)
        caught_up(path, feed.put(ticks(TRADE, 5, 40)))
        assert loop.counters["rewinds"] == 1
    assert times(path) == list(range(45))
    bus.close()


def test_a_wiped_redis_is_another_bus(server: EmbeddedRedis, path: Path) -> None:
    bus = Bus(server.url)
    with sinking(bus, path, modes=TICKS) as loop:
        caught_up(path, Feed(bus).put(mixed()))
        bus.call("flushall")
        Feed(bus).put(mixed(1), mixed(2))
        until(lambda: len(times(path)) == 3, what="the rows of both")
        assert loop.counters["rewinds"] == 1
    assert times(path) == [0, 1, 2]
    assert query(path, "SELECT count(DISTINCT bus) FROM ticks_trades") == [(2,)]
    bus.close()


def test_entries_trimmed_beyond_a_store_are_said_aloud(bus: Bus, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0, block_ms=50))
    last = Feed(bus).put(*(ticks(TRADE, 1, i) for i in range(40)))
    with sinking(small, path, modes=TICKS):
        caught_up(path, last)
        until(lambda: small.call("xlen", small.keys.stream(0, "ticks")) == 16, what="the stream to be trimmed")
    for file in path.parent.glob("store.db*"):
        file.unlink()
    with sinking(small, path, modes=TICKS) as loop:
        caught_up(path, last)
        assert loop.counters["missing"] == 1
    assert "rows between may be missing" in caplog.text
    small.close()


def test_lost_entries_rules() -> None:
    at, here, older = "9-0", Entry("9-0", 3), Entry("7-2", 8)
    fine = [
        lost_entries("0-0", None, None, False),
        lost_entries(at, here, None, False),
        lost_entries(at, here, "3-0", True),
        lost_entries(at, None, at, True),  # trimmed up to here
        lost_entries(at, None, "10-0", True),  # beyond
        lost_entries(at, None, None, True),  # dropped as a consumer: nobody can tell
        lost_entries(at, None, "0-0", True),  # dropped, and registered again
    ]
    assert fine == [None] * 7
    gone = "entry 9-0 is gone from the stream"
    assert lost_entries(at, older, "7-2", True) == (gone, "7-2")
    assert lost_entries(at, older, None, True) == (gone, "7-2")
    assert lost_entries(at, older, "0-0", True) == (gone, "7-2")
    # An entry may be older than ours by its id and yet have been added after the loss, by a clock set back.
    assert lost_entries(at, older, "5-0", True) == (gone, "5-0")
    assert lost_entries(at, None, "5-0", True) == (gone, "5-0")
    assert lost_entries(at, None, "0-0", False) == (gone, "0-0")
    assert lost_entries(at, None, None, False) == (gone, "0-0")
