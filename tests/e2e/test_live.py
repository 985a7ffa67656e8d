"""Live, whole: the gateway's tape over TCP, through the bus and every stage, into SQLite, with faults on order."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.aggregate.worker import run as run_aggregate
from services.ingest.synthetic import generate as generate_file
from services.ingest.worker import run_databento, run_files
from services.pressure.worker import run as run_pressure
from services.signals.worker import run as run_signals
from services.sink_sqlite.worker import run as run_sink
from shared.bus import Bus
from shared.instruments import partition_of
from shared.keys import TOPICS
from shared.settings import Settings, load
from tests.e2e.test_replay import rows
from tests.fakes.gateway import KEY, Gateway
from tests.fakes.tape import NS, Tape, from_dbn
from tests.wait import until

pytestmark = pytest.mark.heavy


def configured(bus: Bus, db: Path, gateway: Gateway | None = None, **databento: Any) -> Settings:
    base = load(environ={})
    feed = {"api_key": KEY, "symbols": ("ES.FUT",), "silence_seconds": 3.0, "backoff_max_seconds": 0.2}
    if gateway is not None:
        feed |= {"gateway": "127.0.0.1", "port": gateway.port}
    return replace(
        base,
        tapeline=msgspec.structs.replace(
            base.tapeline, namespace=bus.keys.namespace, store=f"sqlite:///{db}", partitions=4
        ),
        redis=msgspec.structs.replace(base.redis, url=bus.url, lease_seconds=1.0),
        databento=msgspec.structs.replace(base.databento, **(feed | databento)),
    )


@contextmanager
def pipeline(settings: Settings, ingest: Any, *args: str) -> Iterator[threading.Event]:
    """Ingest, the stages and the sink in threads of this process; what one raises fails the test."""
    stop, errors = threading.Event(), []

    def guarded(service: Any, given: tuple[str, ...]) -> None:
        try:
            service(settings, stop, given)
        except Exception as error:
            errors.append(error)

    services = [(ingest, args), (run_aggregate, ()), (run_pressure, ()), (run_signals, ()), (run_sink, ())]
    threads = [threading.Thread(target=guarded, args=pair, daemon=True) for pair in services]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=10)
    assert not errors, errors


def drained(bus: Bus, partitions: int = 4) -> bool:
    """Every stream is consumed to its end by all who registered."""
    for p in range(partitions):
        for topic in TOPICS:
            positions = bus.call("hvals", bus.keys.consumers(p, topic))
            if topic != "late" and not positions:
                return False  # nobody has begun to read
            if any(position.decode() != bus.last_id(p, topic) for position in positions):
                return False
    return True


def newest(bus: Bus) -> int:
    """Newest event time on the bus, ns."""
    times = [bus.call("hget", bus.keys.info(p, "ticks"), "last_ns") for p in range(4)]
    return max((int(t) for t in times if t), default=0)


def everything_stored(bus: Bus, until_ns: int) -> None:
    until(lambda: newest(bus) >= until_ns and drained(bus), 60, "everything to be stored")


@pytest.fixture
def real(shared_data: Path) -> Tape:
    return from_dbn(shared_data / "databento" / "ESH4_tbbo_2023-12-25.dbn")


def from_file(bus: Bus, db: Path, file: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The table of a file, through the same pipeline on a namespace of its own."""
    other = Bus(bus.url, bus.keys.namespace + "f")
    try:
        with pipeline(configured(other, db), run_files, str(file)):
            end = 1703548800 * NS
            everything_stored(other, end)
        return rows(db)
    finally:
        for key in list(other.client.scan_iter(f"{other.keys.namespace}:*", count=1000)):
            other.client.delete(key)
        other.close()


def test_faults_leave_no_trace_in_the_table(bus: Bus, real: Tape, shared_data: Path, tmp_path: Path) -> None:
    """An EOF, an RST, refused connects and a silence in one hour: the table is the file's."""
    truth = from_file(bus, tmp_path / "file.db", shared_data / "databento" / "ESH4_tbbo_2023-12-25.dbn")
    with Gateway(real) as gateway:
        gateway.fault("eof", at=400)
        gateway.fault("rst", at=900, torn=33)
        gateway.fault("eof", at=1500, refuse=True)
        gateway.fault("silence", at=2200)
        settings = configured(bus, tmp_path / "live.db", gateway, start=str(real.start_ns))
        with pipeline(settings, run_databento):
            until(lambda: gateway.live, 20, "a session")
            gateway.advance_to(int(real.records["ts_recv"][1500]))
            until(lambda: newest(bus) >= int(real.records["ts_event"][1450]), 30, "the refused stretch")
            # What is sent while nobody can connect is missed, and asked for again.
            gateway.advance_to(int(real.records["ts_recv"][1800]))
            gateway.listen()
            until(lambda: gateway.live and newest(bus) >= int(real.records["ts_event"][1799]), 30, "the way back")
            gateway.advance_to(real.end_ns)
            until(lambda: newest(bus) >= int(real.records["ts_event"][-1]), 60, "the last trade")
            gateway.finish()
            everything_stored(bus, int(real.records["ts_event"][-1]))
            sessions = len(gateway.sessions)
    assert sessions >= 5
    held = rows(tmp_path / "live.db")
    with closing(sqlite3.connect(tmp_path / "live.db")) as connection:
        assert connection.execute("SELECT count(*) FROM gaps").fetchone() == (0,)
    # Live knows the time from what it hears: the last seconds after the last trade need a heartbeat.
    last = held["candles_1m"][-1][0]
    assert last >= "2023-12-25T23:59:56Z"
    wanted = [row for row in truth["candles_1m"] if row[0] <= last]
    assert len(held["candles_1m"]) == len(wanted)
    for row, want in zip(held["candles_1m"], wanted, strict=True):
        assert row == want
    assert held["candles_1s"] == truth["candles_1s"][: len(held["candles_1s"])]
    assert len(truth["candles_1s"]) - len(held["candles_1s"]) <= 1


def test_a_stretch_beyond_the_replay_window_is_a_gap(bus: Bus, real: Tape, tmp_path: Path) -> None:
    """What cannot be had again is named, and exactly the rows that it touches are incomplete."""
    with Gateway(real, replay_ns=60 * NS) as gateway:
        gateway.fault("eof", at=1000, refuse=True)
        settings = configured(bus, tmp_path / "gap.db", gateway)
        with pipeline(settings, run_databento):
            until(lambda: gateway.live, 20, "a session")
            gateway.advance_to(int(real.records["ts_recv"][1000]))
            until(lambda: newest(bus) >= int(real.records["ts_event"][999]), 30, "the first part")
            gateway.advance_to(int(real.records["ts_recv"][1000]) + 600 * NS)  # away for ten minutes, one is kept
            gateway.listen()
            until(lambda: len(gateway.sessions) >= 2 and gateway.live, 30, "the way back")
            gateway.advance_to(real.end_ns)
            gateway.finish()
            everything_stored(bus, int(real.records["ts_event"][-1]))
    with closing(sqlite3.connect(tmp_path / "gap.db")) as connection:
        gaps = connection.execute("SELECT start_ns, end_ns FROM gaps").fetchall()
        table = connection.execute(
            "SELECT CAST(strftime('%s', time) AS INTEGER), complete FROM candles_1m ORDER BY time"
        ).fetchall()
    assert len(gaps) == 1
    start, end = gaps[0]
    assert int(real.records["ts_event"][999]) <= start < end
    touched = {t for t, _ in table if t * NS > start and (t - 60) * NS < end}
    assert touched
    assert {t for t, complete in table if not complete} == touched


def test_garbage_on_the_bus_is_a_dead_letter_and_the_rest_goes_on(bus: Bus, tmp_path: Path) -> None:
    """Somebody's stray XADD, a torn body and an unknown kind: none stops a worker, all are on record."""
    made = tmp_path / "tape.dbn"
    generate_file(made, trades=3000, seed=2, roots=["ES"], rate=20.0)
    settings = configured(bus, tmp_path / "g.db")
    plain = {"count": 1, "first": "2026-01-01Z", "last": "2026-01-01Z", "src": "x", "seq": 1, "v": 1}
    stray: list[dict[str, Any]] = [
        {"hello": "world"},
        {"kind": "trade", **plain, "body": "torn"},
        {"kind": "rumour", **plain, "body": "[]"},
    ]
    partition = partition_of("ES", 4)
    for fields in stray:
        bus.call("xadd", bus.keys.stream(partition, "ticks"), fields)
    with pipeline(settings, run_files, str(made)):
        until(lambda: b'"ended"' in (bus.call("hget", bus.keys.feeds, "files") or b""), 30, "the end of the tape")
        until(lambda: drained(bus), 30, "everything to be stored")
        until(lambda: rows(tmp_path / "g.db")["candles_1m"], 10, "rows")
    with sqlite3.connect(tmp_path / "g.db") as connection:
        reasons = [r for (r,) in connection.execute("SELECT reason FROM dead_letters ORDER BY id")]
    assert len(reasons) == 3
    assert "is no frame" in reasons[0]
    assert "no whole tick rows" in reasons[1]
    assert "no stage reads frames of kind 'rumour'" in reasons[2]
