"""The sink on `pressure`, `signals` (a stage's topics) and `usage` (several producers): nothing lost, nothing twice."""

from __future__ import annotations

import dataclasses
import signal as signals
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.sink_sqlite.store import SqliteStore
from shared.batches import Item, Source, batch_of
from shared.bus import Bus, Limits
from shared.frames import Frame, unreadable
from shared.redis_server import EmbeddedRedis
from shared.settings import PressureSettings, SignalSettings
from shared.sink import SinkLoop
from shared.sink_reader import MODES, Reader
from shared.stages import PRODUCER, readers
from shared.tables import MESSAGE_TABLES
from tests.services.sink_sqlite.tape import (
    Feed,
    Stage,
    candles,
    pressure,
    query,
    rollup,
    rows,
    said,
    settings,
    signal,
    sinking,
    start_sink,
    stored_id,
    stored_seq,
    usage,
    without_tail,
)
from tests.shared.test_batches import raw
from tests.wait import until

TABLES = [table for tables in MESSAGE_TABLES.values() for table in tables]


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


def caught_up(path: Path, seq: int, topic: str = "pressure", partition: int = 0) -> None:
    until(lambda: stored_seq(path, topic, partition) == seq, what=f"sequence {seq} of {topic} in the store")


def usage_caught_up(path: Path, entry: str, partition: int = 0) -> None:
    until(lambda: stored_id(path, "usage", partition) == entry, what=f"entry {entry} of usage in the store")


def window(n: int, **values: Any) -> list[Frame]:
    """What the stage says of the n-th window: four keys in two frames, and the rollup."""
    keys = [pressure(4 * n + key, **values) for key in range(4)]
    return [said(*keys[:3]), said(keys[3]), said(rollup(n, **values))]


def stored(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the message tables."""
    return {table.name: sorted(query(path, f"SELECT * FROM {table.name}"), key=repr) for table in TABLES}


def expected(at: Path, *frames: Frame) -> dict[str, list[tuple[Any, ...]]]:
    """The tables that these frames make, written undisturbed into another store."""
    store = SqliteStore(at)
    store.open()
    for i, frame in enumerate(frames):
        store.write(batch_of([Item(Source("x", "pressure", 0, i + 1, f"{i + 1}-0"), frame)]))
    store.close()
    return stored(at)


def test_which_topics_are_read_and_by_which_rule() -> None:
    assert MODES == {"candles": ("candles", "late", "pressure", "signals", "usage"), "ticks": ("ticks",)}
    assert {topic for topics in MODES.values() for topic in topics} - set(PRODUCER) == {"ticks", "usage"}


def test_all_topics_and_partitions_reach_the_store(bus: Bus, path: Path, tmp_path: Path) -> None:
    with sinking(bus, path, partitions=2) as loop:
        frames = []
        for p in range(2):
            mine = [frame for n in (2 * p, 2 * p + 1) for frame in window(n)]
            own = [said(signal(8 * p), signal(8 * p + 1)), said(signal(8 * p + 2))]
            log = [said(usage(n, feed=f"feed-{p}")) for n in range(3)]
            Stage(bus, p).put(candles(rows(10, 100 * p)))
            Stage(bus, p, "pressure").put(*mine)
            Stage(bus, p, "signals").put(*own)
            last = Feed(bus, f"usage-{p}", p, topic="usage").put(*log)
            caught_up(path, 6, partition=p)
            caught_up(path, 2, "signals", p)
            usage_caught_up(path, last, p)
            frames += [*mine, *own, *log]
        # Of usage each message makes a row of the log and a row of its day.
        until(lambda: loop.counters["rows"] == 20 + 20 + 6 + 12, what="the counter of rows")
    assert stored(path) == expected(tmp_path / "whole.db", *frames)
    assert query(path, "SELECT count(*) FROM candles_1m") == [(20,)]
    assert not query(path, "SELECT * FROM dead_letters")
    assert not any(loop.counters[name] for name in ("rewinds", "missing", "sequence_steps_back", "ignored"))


def test_revisions_come_in_order_and_a_restart_goes_on(bus: Bus, path: Path, tmp_path: Path) -> None:
    stage = Stage(bus, name="pressure")
    first, late = window(0), [said(pressure(1, revision=1, premium=9.0)), said(rollup(0, revision=1))]
    stage.put(*first)
    with sinking(bus, path):
        caught_up(path, 3)
    stage.put(*late, *window(1))
    with sinking(bus, path) as loop:
        caught_up(path, 8)
        until(lambda: loop.counters["rows"] == 7, what="only what is new to be counted")
    assert stored(path) == expected(tmp_path / "whole.db", *first, *late, *window(1))
    assert query(path, "SELECT revision, premium FROM pressure_metrics WHERE revision") == [(1, 9.0)]


def test_an_unreadable_frame_and_garbage_are_buried(bus: Bus, path: Path) -> None:
    stage, feed = Stage(bus, name="pressure"), Feed(bus, "usage-a", topic="usage")
    good = msgspec.to_builtins(pressure(1))
    with sinking(bus, path):
        stage.put(
            said(pressure(0)), unreadable("2 option trades without a definition", b"\x00"),
            raw("pressure", good | {"vwap": float("nan")}, msgspec.to_builtins(pressure(2))), topic="pressure",
        )  # fmt: skip
        for topic in ("pressure", "usage"):
            bus.call("xadd", bus.keys.stream(0, topic), {"hello": "world"})
        stage.put(said(rollup(0)))
        feed.put(raw("usage", {"type": "usage"}))
        usage_caught_up(path, feed.put(said(usage(0))))
        caught_up(path, 4)
    assert query(path, "SELECT count(*) FROM pressure_metrics") == [(2,)]
    assert query(path, "SELECT count(*) FROM pressure_rollups") == [(1,)]
    assert query(path, "SELECT count(*) FROM usage_log") == [(1,)]
    got = query(path, "SELECT topic, row_number, reason FROM dead_letters ORDER BY topic, seq, row_number, id")
    assert [(topic, row) for topic, row, _ in got] == [("pressure", -1), ("pressure", -1), ("pressure", 0),
                                                      ("usage", -1), ("usage", 0)]  # fmt: skip
    assert "2 option trades without a definition" in {reason for _, _, reason in got}
    assert "vwap is not finite" in {reason for _, _, reason in got}


# -- who holds the trimming -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "workers", "held"),
    [
        (("candles",), (1, 1), {"pressure": {"signals"}}),
        (("candles", "ticks"), (1, 1), {"ticks": {"aggregate", "pressure"}, "pressure": {"signals"}}),
        (("candles", "ticks"), (1, 0), {"ticks": {"aggregate", "pressure"}}),
        (("candles", "ticks"), (0, 1), {"ticks": {"aggregate"}}),
        (("ticks",), (1, 1), {}),
    ],
)
def test_stages_that_may_start_later_are_registered(
    bus: Bus, path: Path, modes: tuple[str, ...], workers: tuple[int, int], held: dict[str, set[str]]
) -> None:
    """Of each topic that the store reads, every enabled stage; no other topic and no other stage."""
    wanted = dataclasses.replace(
        settings(bus, modes=modes),
        pressure=PressureSettings(workers=workers[0]),
        signals=SignalSettings(workers=workers[1]),
    )
    store = SqliteStore(path)
    store.open()
    loop = SinkLoop(bus.clone(), store, "sink-sqlite", wanted, threading.Event())
    Reader(loop, 0)._attach(bus)
    for topic in ("ticks", "candles", "late", "pressure", "signals", "usage"):
        names = {name.decode() for name in bus.call("hkeys", bus.keys.consumers(0, topic))}
        mine = {store.name} if topic in loop.topics else set()
        assert names == mine | held.get(topic, set()), topic
        assert not mine or set(readers(topic, wanted)) == held.get(topic, set())
    loop.bus.close()
    store.close()


def test_trimming_waits_for_the_store_and_for_the_signals_stage(bus: Bus, path: Path) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0, block_ms=50))
    stage, feed = Stage(bus, name="pressure"), Feed(bus, "usage-a", topic="usage")
    seq = stage.put(*(said(pressure(n)) for n in range(40)))
    last = feed.put(*(said(usage(n)) for n in range(40)))
    with sinking(small, path):
        caught_up(path, seq)
        usage_caught_up(path, last)
        until(lambda: small.call("xlen", small.keys.stream(0, "usage")) == 16, what="usage to be trimmed")
        small.trim(0, "pressure")
        assert small.call("xlen", small.keys.stream(0, "pressure")) == 40
        small.done_with(0, "pressure", "signals", small.last_id(0, "pressure"))
        until(lambda: small.call("xlen", small.keys.stream(0, "pressure")) == 16, what="pressure to be trimmed")
    seq = stage.put(*(said(pressure(n)) for n in range(40, 60)))
    last = feed.put(*(said(usage(n)) for n in range(40, 60)))
    small.trim(0, "usage")
    assert small.call("xlen", small.keys.stream(0, "usage")) >= 20
    with sinking(small, path) as loop:
        caught_up(path, seq)
        usage_caught_up(path, last)
    assert query(path, "SELECT count(*) FROM pressure_metrics") == [(60,)]
    assert query(path, "SELECT count(*) FROM usage_log") == [(60,)]
    assert loop.counters["rewinds"] == loop.counters["missing"] == 0
    small.close()


# -- death ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["sink:before-commit:4", "sink:after-commit:4"])
def test_kill_9_around_a_commit(bus: Bus, path: Path, tmp_path: Path, fault: str) -> None:
    bad = raw("pressure", {"type": "pressure"})
    of_pressure = [*window(0), bad, *window(1), said(pressure(2, revision=1, premium=9.0))]
    of_signals = [said(signal(n)) for n in range(4)]
    of_usage = [said(usage(n)) for n in range(4)]
    Stage(bus, name="pressure").put(*of_pressure)
    Stage(bus, name="signals").put(*of_signals)
    feeds = [Feed(bus, name, topic="usage") for name in ("usage-a", "usage-b")]
    last = [feeds[n % 2].put(frame) for n, frame in enumerate(of_usage)][-1]

    def done() -> bool:
        return (
            stored_seq(path, "pressure") == 8 and stored_seq(path, "signals") == 4 and stored_id(path, "usage") == last
        )

    url = f"sqlite:///{path}"
    with start_sink(bus, url, fault) as first:
        assert first.wait(timeout=20) == -signals.SIGKILL
    assert not done()
    with start_sink(bus, url) as second:
        until(done, what="all of it in the store")
        second.send_signal(signals.SIGTERM)
        assert second.wait(timeout=10) == 0
    assert stored(path) == expected(tmp_path / "whole.db", *of_pressure, *of_signals, *of_usage)
    assert query(path, "SELECT topic, seq, row_number FROM dead_letters") == [("pressure", 4, 0)]


@pytest.mark.parametrize("kept", [2, 0], ids=["older entries", "none"])
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_redis_loses_its_tail(
    server: EmbeddedRedis, path: Path, running: bool, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    bus = Bus(server.url)
    bus.identity()
    older = [frame for n in range(kept) for frame in window(n)]
    log = [said(usage(n)) for n in range(kept)]
    if kept:
        seq = Stage(bus, name="pressure").put(*older)
        Stage(bus, name="signals").put(said(signal(0)))
        last = Feed(bus, "usage-a", topic="usage").put(*log)
        with sinking(bus, path):
            caught_up(path, seq)
            caught_up(path, 1, "signals")
            usage_caught_up(path, last)

    def put(of_pressure: list[Frame], of_signals: list[Frame], of_usage: list[Frame]) -> None:
        seq = Stage(bus, name="pressure").put(*of_pressure)
        caught_up(path, seq)
        seq = Stage(bus, name="signals").put(*of_signals)
        caught_up(path, seq, "signals")
        usage_caught_up(path, Feed(bus, "usage-b", topic="usage").put(*of_usage))

    bad, bad_usage = raw("pressure", {"type": "pressure"}), raw("usage", {"type": "usage"})
    # The second time the same messages are cut otherwise, and so are the places of what cannot be stored.
    whole = window(kept)
    lost = [said(pressure(4 * kept)), said(*(pressure(4 * kept + n) for n in (1, 2, 3))), whole[2], bad]
    lost_signals = [said(signal(4 * kept)), raw("signal", {"type": "signal"}), said(signal(4 * kept + 1))]
    redone = [*whole, *window(kept + 1), bad]
    redone_signals = [said(signal(4 * kept), signal(4 * kept + 1)), raw("signal", {"type": "signal"}, 5)]
    first = (lost, lost_signals, [said(usage(kept)), said(usage(kept + 1)), bad_usage])
    second = (redone, redone_signals, [said(usage(kept), usage(kept + 1)), bad_usage])
    if running:
        with sinking(bus, path) as loop:
            with without_tail(server, bus):
                put(*first)
            put(*second)
    else:
        with without_tail(server, bus), sinking(bus, path):
            put(*first)
        with sinking(bus, path) as loop:
            put(*second)
    for topic in ("pressure", "signals", "usage"):
        assert f"Redis has lost the end of '{topic}'" in caplog.text
    assert loop.counters["rewinds"] == 3
    assert loop.counters["missing"] == 0
    frames = [*older, *log, *([said(signal(0))] if kept else []), *redone, *redone_signals, *second[2]]
    assert stored(path) == expected(path.parent / "whole.db", *frames)
    got = query(path, "SELECT topic, row_number FROM dead_letters ORDER BY 1, 2")
    assert got == [("pressure", 0), ("signals", 0), ("signals", 1), ("usage", 0)]
    bus.close()


def test_a_wiped_redis_is_another_bus(server: EmbeddedRedis, path: Path, tmp_path: Path) -> None:
    bus = Bus(server.url)
    with sinking(bus, path) as loop:
        usage_caught_up(path, Feed(bus, "usage-a", topic="usage").put(said(usage(0))))
        caught_up(path, Stage(bus, name="pressure").put(*window(0)))
        bus.call("flushall")
        Feed(bus, "usage-a", topic="usage").put(said(usage(1)), said(usage(2)))
        Stage(bus, name="pressure").put(*window(1))
        until(lambda: query(path, "SELECT count(*) FROM usage_log") == [(3,)], what="the usage of both")
        until(lambda: query(path, "SELECT count(*) FROM pressure_rollups") == [(2,)], what="the pressure of both")
        assert loop.counters["rewinds"] == 1
    made = [*window(0), *window(1), *(said(usage(n)) for n in range(3))]
    assert stored(path) == expected(tmp_path / "whole.db", *made)
    bus.close()
