"""The sink loop on a real Redis and a real SQLite file: nothing lost, nothing twice, whatever dies."""

from __future__ import annotations

import logging
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.sink_sqlite import worker
from services.sink_sqlite.store import SqliteStore
from shared.batches import Batch, Item, Source, batch_of
from shared.bus import Bus, Limits
from shared.errors import BusUnavailable, ConfigError, StoreUnavailable, TapelineError, VersionError
from shared.frames import Frame
from shared.heartbeat import living
from shared.redis_server import EmbeddedRedis
from shared.sink_reader import Inbox
from shared.sink_tail import Entry, lost_tail
from tests.services.sink_sqlite.tape import (
    Stage,
    candles,
    gap,
    late,
    query,
    rows,
    settings,
    sinking,
    start_sink,
    stored_seq,
    table,
    without_tail,
)
from tests.wait import on_disk, until


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


def expected(*frames: Frame, at: Path) -> list[tuple[object, ...]]:
    """The table that these frames make, written undisturbed into another store."""
    store = SqliteStore(at)
    store.open()
    store.write(batch_of([Item(Source("x", "candles", 0, i + 1, f"{i + 1}-0"), f) for i, f in enumerate(frames)]))
    store.close()
    return table(at)


def caught_up(path: Path, seq: int, topic: str = "candles", partition: int = 0) -> None:
    until(lambda: stored_seq(path, topic, partition) == seq, what=f"sequence {seq} of {topic} in the store")


# -- the way of a row ------------------------------------------------------------------------


def test_all_partitions_and_topics_reach_the_store(bus: Bus, path: Path) -> None:
    stages = [Stage(bus, p) for p in range(3)]
    with sinking(bus, path, partitions=3) as loop:
        for p, stage in enumerate(stages):
            stage.put(candles(rows(50, 100 * p)), late(2), candles(rows(50, 100 * p), "candle_1s"), gap(p * 10**9))
        for p in range(3):
            caught_up(path, 4, partition=p)
            caught_up(path, 2, "late", p)
        until(lambda: living(bus, 5000, "sink-sqlite"), what="a heartbeat")
        until(lambda: loop.counters["rows"] == 3 * 103, what="the counter of rows")
    counts = {
        t: query(path, f"SELECT count(*) FROM {t}")[0][0] for t in ("candles_1m", "candles_1s", "gaps", "late_trades")
    }
    assert counts == {"candles_1m": 150, "candles_1s": 150, "gaps": 3, "late_trades": 6}
    assert not query(path, "SELECT * FROM dead_letters")
    assert not living(bus, 5000, "sink-sqlite")


def test_a_restart_goes_on_where_the_store_is(bus: Bus, path: Path) -> None:
    stage = Stage(bus)
    stage.put(*(candles(rows(10, i)) for i in range(5)))
    with sinking(bus, path):
        caught_up(path, 5)
    stage.put(*(candles(rows(10, i)) for i in range(5, 9)))
    with sinking(bus, path) as loop:
        caught_up(path, 9)
        until(lambda: loop.counters["rows"], what="rows to be counted")
    assert loop.counters["rows"] == 40
    assert loop.counters["rewinds"] == loop.counters["missing"] == 0


def test_trimming_waits_for_the_store(redis_server: EmbeddedRedis, bus: Bus, path: Path) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0, block_ms=50))
    consumer = SqliteStore(path).name
    stage = Stage(bus)
    stage.put(*(candles(rows(2, i)) for i in range(40)))
    with sinking(small, path):
        caught_up(path, 40)
        until(lambda: small.call("xlen", small.keys.stream(0, "candles")) == 16, what="the stream to be trimmed")
        told = small.call("hget", small.keys.consumers(0, "candles"), consumer)
        assert told.decode() == small.last_id(0, "candles")
    # While the sink is away nothing that it has not stored goes.
    stage.put(*(candles(rows(2, i)) for i in range(40, 80)))
    small.trim(0, "candles")
    assert small.call("xlen", small.keys.stream(0, "candles")) == 40
    with sinking(small, path):
        caught_up(path, 80)
    assert len(table(path)) == 160
    small.close()


def test_a_batch_closes_by_rows_or_by_age() -> None:
    inbox = Inbox(10_000)

    def item(n: int, *, rewound: bool = False) -> Item:
        return Item(Source("a", "candles", 0, n, f"{n}-0"), candles(rows(9)), rewound=rewound)

    assert inbox.take(10, 5, 0) == []
    for n in range(5):
        assert inbox.put(item(n), 0)
    started = time.monotonic()
    assert [i.source.seq for i in inbox.take(20, 5, 1)] == [0, 1]
    assert time.monotonic() - started < 1
    assert [i.source.seq for i in inbox.take(1000, 0.02, 1)] == [2, 3, 4]
    # What comes after a rewind is never in one batch with what came before.
    for n, rewound in ((1, False), (2, True), (3, False)):
        inbox.put(item(n, rewound=rewound), 0)
    assert [i.source.seq for i in inbox.take(1000, 0, 1)] == [1]
    assert [i.source.seq for i in inbox.take(1000, 0, 1)] == [2, 3]


def test_a_full_inbox_holds_the_reader() -> None:
    inbox = Inbox(10)
    item = Item(Source("a", "candles", 0, 1, "1-0"), candles(rows(20)))
    assert inbox.put(item, 0)
    assert not inbox.put(item, 0.01)
    inbox.take(1, 0, 1)
    assert inbox.put(item, 0)


# -- death ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["sink:before-commit:3", "sink:after-commit:3"])
def test_kill_9_around_a_commit(bus: Bus, path: Path, tmp_path: Path, fault: str) -> None:
    frames = [candles(rows(20, 5 * i)) for i in range(8)]
    stage = Stage(bus)
    stage.put(*frames[:4], late(3), *frames[4:])
    url = f"sqlite:///{path}"
    with start_sink(bus, url, fault) as first:
        assert first.wait(timeout=20) == -signal.SIGKILL
    stored = stored_seq(path)
    assert 0 < stored < 9
    with start_sink(bus, url) as second:
        caught_up(path, 9)
        caught_up(path, 5, "late")
        second.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert second.wait(timeout=10) == 0
        assert time.monotonic() - started < 5
    assert table(path) == expected(*frames, at=tmp_path / "whole.db")
    assert query(path, "SELECT count(*) FROM late_trades") == [(3,)]
    assert not query(path, "SELECT * FROM dead_letters")


def test_redis_killed_and_back(server: EmbeddedRedis, path: Path, tmp_path: Path) -> None:
    bus = Bus(server.url)
    frames = [candles(rows(20, 10 * i)) for i in range(6)]
    stage = Stage(bus)
    with sinking(bus, path) as loop:
        stage.put(*frames[:3])
        caught_up(path, 3)
        on_disk(bus.client)
        server.kill()
        with pytest.raises(BusUnavailable):
            bus.ping()
        server.start()
        stage.put(*frames[3:])
        caught_up(path, 6)
    assert loop.counters["rewinds"] == 0
    assert table(path) == expected(*frames, at=tmp_path / "whole.db")
    bus.close()


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
    older = [candles(rows(20, 10 * i)) for i in range(kept)]
    Stage(bus).put(*older, *([late(1)] if kept else []))
    # The second time the tape is cut otherwise, so the late trades have other places.
    lost = [candles(rows(50, 20)), late(1, 10), late(1, 20), candles(rows(10, 45))]
    redone = [candles(rows(70, 20)), late(2, 10), candles(rows(10, 45, close=7.0))]

    def put(frames: list[Frame]) -> None:
        last = Stage(bus).put(*frames)
        caught_up(path, last)
        caught_up(path, last - 1, "late")

    if running:
        with sinking(bus, path) as loop:
            with without_tail(server, bus):
                put(lost)
            put(redone)
    else:
        with without_tail(server, bus), sinking(bus, path):
            put(lost)
        with sinking(bus, path) as loop:
            put(redone)
    assert loop.counters["rewinds"] >= 2
    assert "Redis has lost the end of 'candles'" in caplog.text
    assert table(path) == expected(*older, redone[0], redone[2], at=path.parent / "whole.db")
    late_trades = 2 + (kept > 0)
    assert query(path, "SELECT count(*), count(DISTINCT ts_event_ns) FROM late_trades") == [(late_trades, late_trades)]
    bus.close()


def test_a_wiped_redis_is_another_bus(server: EmbeddedRedis, path: Path, tmp_path: Path) -> None:
    bus = Bus(server.url)
    frames = [candles(rows(20, 10 * i)) for i in range(6)]
    with sinking(bus, path) as loop:
        Stage(bus).put(*frames[:4])
        caught_up(path, 4)
        bus.call("flushall")
        Stage(bus).put(*frames[4:], late(1))
        until(lambda: query(path, "SELECT count(DISTINCT bus) FROM sink_cursors WHERE topic = 'candles'") == [(2,)])
        until(lambda: query(path, "SELECT count(*) FROM late_trades") == [(1,)])
        assert loop.counters["rewinds"] == 1
    assert table(path) == expected(*frames, at=tmp_path / "whole.db")
    bus.close()


def test_two_replays_into_one_file(redis_server: EmbeddedRedis, bus: Bus, path: Path, tmp_path: Path) -> None:
    other = Bus(bus.url, bus.keys.namespace + "b")
    one = [candles(rows(20, 10 * i)) for i in range(5)]
    two = [candles(rows(20, 10 * i, close=1.0)) for i in range(3, 7)]
    with sinking(bus, path):
        Stage(bus).put(*one, late(2))
        caught_up(path, 5)
        caught_up(path, 6, "late")
    with sinking(other, path):
        Stage(other).put(*two, late(3))
        until(lambda: query(path, "SELECT count(*) FROM late_trades") == [(5,)])
    assert table(path) == expected(*one, *two, at=tmp_path / "whole.db")
    # The first tape again changes nothing but the times of processing.
    again = Bus(bus.url, bus.keys.namespace + "c")
    before = table(path)
    with sinking(again, path):
        Stage(again).put(*two)
        until(lambda: query(path, "SELECT count(DISTINCT bus) FROM sink_cursors") == [(3,)])
    assert table(path) == before
    for made in (other, again):
        for key in list(made.client.scan_iter(f"{made.keys.namespace}:*")):
            made.client.delete(key)
        made.close()


def test_entries_trimmed_beyond_a_store_are_said_aloud(bus: Bus, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0, block_ms=50))
    Stage(bus).put(*(candles(rows(2, i)) for i in range(40)))
    with sinking(small, path):
        caught_up(path, 40)
        until(lambda: small.call("xlen", small.keys.stream(0, "candles")) == 16, what="the stream to be trimmed")
    for file in path.parent.glob("store.db*"):
        file.unlink()
    with sinking(small, path) as loop:
        caught_up(path, 40)
        assert loop.counters["missing"] == 1
    assert "rows between may be missing" in caplog.text
    small.close()


def test_lost_tail_rules() -> None:
    first = Entry("5-0", 5)
    fine = [
        lost_tail(0, "0-0", None, None, 0),
        lost_tail(9, "9-0", Entry("9-0", 9), first, 9),
        lost_tail(9, "9-0", Entry("9-0", 9), first, 2),  # a stage that began anew
        lost_tail(9, "9-0", Entry("9-0", None), first, None),
        lost_tail(9, "9-0", None, Entry("12-0", 12), 30),  # trimmed up to here
    ]
    assert fine == [None] * 5
    assert "newest sequence is 8" in (lost_tail(9, "9-0", None, Entry("12-0", 12), 8) or "")
    assert "entry 9-0" in (lost_tail(9, "9-0", Entry("8-0", 8), first, 9) or "")
    assert "entry 9-0" in (lost_tail(9, "9-0", Entry("9-0", 3), first, 9) or "")
    assert "empty" in (lost_tail(9, "9-0", None, None, None) or "")
    assert "begins again at sequence 1" in (lost_tail(9, "9-0", None, Entry("12-0", 1), 9) or "")


def test_sequences_going_back_without_loss_do_not_stop_the_sink(bus: Bus, path: Path) -> None:
    stage = Stage(bus)
    stage.put(*(candles(rows(2, i)) for i in range(4)))
    with sinking(bus, path) as loop:
        caught_up(path, 4)
        # Somebody deleted the stage's state but not its output.
        bus.call("delete", bus.keys.producers(0), bus.keys.meta(0, "aggregate"))
        Stage(bus).put(candles(rows(2, 4)), candles(rows(2, 5)))
        until(lambda: len(table(path)) == 12, what="all rows")
        assert loop.counters["sequence_steps_back"] == 1
        assert loop.counters["rewinds"] == 0


# -- bad input, bad stores --------------------------------------------------------------------


def test_a_refused_row_among_5000(bus: Bus, path: Path) -> None:
    made = rows(5000)
    made["trades"][1234] = -1
    stage = Stage(bus)
    with sinking(bus, path) as loop:
        stage.put(*(candles(made[i : i + 1000]) for i in range(0, 5000, 1000)))
        caught_up(path, 5)
        until(lambda: loop.counters["dead_letters"] == 1, what="the counter of dead letters")
    assert len(table(path)) == 4999
    assert query(path, "SELECT seq, row_number, table_name FROM dead_letters") == [(2, 234, "candles_1m")]


def test_garbage_on_the_stream(bus: Bus, path: Path) -> None:
    stage = Stage(bus)
    with sinking(bus, path):
        stage.put(candles(rows(10)), Frame("candle_1m", 5, 0, 0, "x", b"garbage"))
        for fields in (
            {"hello": "world"},
            {"v": "1", "kind": "candle_1m", "body": b"\xff\x00", "seq": "x", "count": "1"},
        ):
            bus.call("xadd", bus.keys.stream(0, "candles"), fields)
        odd = candles(rows(1))
        for seq in (0, -5, 1 << 70):
            bus.call("execute_command", "XADD", bus.keys.stream(0, "candles"), "*", *odd.fields(seq))
        stage.put(candles(rows(10, 5)))
        caught_up(path, 3)
    assert len(table(path)) == 20
    got = query(path, "SELECT seq, stream_id <> '', reason FROM dead_letters ORDER BY id")
    assert [r[:2] for r in got] == [(2, 1)] * 6
    assert "7 bytes are not 5 rows" in got[0][2]
    assert "not a frame" in got[1][2]


def test_a_frame_of_a_newer_program_stops_the_sink(bus: Bus, path: Path) -> None:
    bus.call("xadd", bus.keys.stream(0, "candles"), {"v": "99"})
    with pytest.raises(VersionError, match="upgrade this worker"), sinking(bus, path) as loop:
        until(loop.stop.is_set, what="the sink to stop")


def test_a_store_that_is_locked_for_a_while(bus: Bus, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stage = Stage(bus)
    with sinking(bus, path) as loop:
        stage.put(candles(rows(10)))
        caught_up(path, 1)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        stage.put(candles(rows(10, 5)), candles(rows(10, 10)))
        until(lambda: loop.counters["store_waits"] >= 3, what="some tries")
        assert stored_seq(path) == 1
        other.execute("ROLLBACK")
        other.close()
        caught_up(path, 3)
        until(lambda: "answers again" in caplog.text, what="the line at the end")
    assert caplog.text.count("trying again, the streams hold the backlog") == 1
    assert len(table(path)) == 30


def test_stopping_while_the_store_is_locked_leaves_the_rows_on_the_bus(bus: Bus, path: Path) -> None:
    stage = Stage(bus)
    with sinking(bus, path, batch_rows=1) as loop:
        stage.put(candles(rows(10)))
        caught_up(path, 1)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        stage.put(*(candles(rows(10, 5 * i)) for i in range(1, 4)))
        until(lambda: loop.counters["store_waits"], what="the first try")
        started = time.monotonic()
    assert time.monotonic() - started < 5
    other.execute("ROLLBACK")
    other.close()
    assert stored_seq(path) == 1
    with sinking(bus, path):
        caught_up(path, 4)
    assert len(table(path)) == 40


def test_nothing_is_written_behind_a_batch_that_was_given_up(bus: Bus, path: Path) -> None:
    class Flapping(SqliteStore):
        """Busy whenever sequence 2 comes, free for all others."""

        def write(self, batch: Batch) -> int:
            if any(cursor.seq == 2 for cursor in batch.cursors.values()):
                raise StoreUnavailable("busy just now")
            return super().write(batch)

    stage = Stage(bus)
    with sinking(bus, path, Flapping(path), batch_rows=1) as loop:
        stage.put(*(candles(rows(10, 5 * i)) for i in range(4)))
        until(lambda: loop.counters["store_waits"], what="the first try")
    assert stored_seq(path) == 1
    with sinking(bus, path):
        caught_up(path, 4)
    assert len(table(path)) == 40


def test_a_full_disk_holds_the_batch(bus: Bus, path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    pages = store.connection().execute("PRAGMA page_count").fetchone()[0]
    store.connection().execute(f"PRAGMA max_page_count = {pages + 10}")
    stage = Stage(bus)
    with sinking(bus, path, store) as loop:
        stage.put(candles(rows(3000)))
        until(lambda: loop.counters["store_waits"] >= 2, what="some tries")
        assert stored_seq(path) == 0
        store.connection().execute("PRAGMA max_page_count = 1000000")
        caught_up(path, 1)
    assert len(table(path)) == 3000
    assert loop.counters["dead_letters"] == 0


def test_a_removed_store_ends_the_sink_loudly(bus: Bus, path: Path) -> None:
    stage = Stage(bus)

    def remove_it_underneath() -> None:
        with sinking(bus, path) as loop:
            stage.put(candles(rows(10)))
            caught_up(path, 1)
            path.unlink()
            stage.put(candles(rows(10, 5)))
            until(loop.stop.is_set, what="the sink to stop")

    with pytest.raises(TapelineError, match="removed or replaced"):
        remove_it_underneath()


# -- the service ------------------------------------------------------------------------------


def test_the_service_waits_for_redis(server: EmbeddedRedis, path: Path) -> None:
    bus = Bus(server.url)
    Stage(bus).put(candles(rows(10)))
    on_disk(bus.client)
    server.kill()
    with start_sink(bus, f"sqlite:///{path}") as sink:
        until(path.exists, what="the store to be made", timeout=20)
        with pytest.raises(subprocess.TimeoutExpired):
            sink.wait(timeout=0.3)
        server.start()
        caught_up(path, 1)
        sink.terminate()
        assert sink.wait(timeout=10) == 0
    bus.close()


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("postgresql://bob:s3cret@h/db", r"sink-sqlite writes sqlite:/// stores, .*postgresql://bob:\*\*\*@h/db"),
        ("sqlite:////none/such/folder/s.db", "does not exist: create it"),
    ],
)
def test_a_wrong_store_is_said_at_once(bus: Bus, store: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        worker.run(settings(bus, store), threading.Event(), ())
