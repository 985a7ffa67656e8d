"""Crypto, whole: `tapeline up` against the server, a dropped connection, what people look at; faults are one line."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zstandard

from shared.frames import NS, iso, ns_of
from shared.stores import read_rows
from tests.e2e.test_replay import nothing_left as no_replay_left
from tests.e2e.test_up import QUICK, START_SECONDS, Up, environ, nothing_left
from tests.fakes.tardis_machine import Machine
from tests.services.ingest.csvs import market, write_ndjson
from tests.services.ingest.tardis_messages import MS, T0, quote, ticker, trade
from tests.shared.test_cli import tapeline
from tests.shared.test_supervise import below
from tests.wait import until

pytestmark = pytest.mark.heavy
SYMBOLS = ("BTCUSDT", "ETHUSDT")
FEED = "tardis:binance-futures"
STEP = 250 * MS
ENDS_WITHIN = 5.0


def stretch(start: int, end: int) -> list[dict[str, Any]]:
    """Trades of both symbols from `start` to `end` (seconds after T0), four a second, with books and tickers."""
    made: list[dict[str, Any]] = []
    for n in range(start * NS // STEP, end * NS // STEP):
        at = T0 + n * STEP
        if n % 4 == 0:
            made += [quote(at, s) for s in SYMBOLS]
        if n % 40 == 1:
            made.append(ticker(at))
        made += [trade(n, s, at_ns=at) for s in SYMBOLS]
    return made


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as made:
        yield made


@pytest.fixture
def up(tmp_path: Path, machine: Machine) -> Iterator[Up]:
    running = Up(
        tmp_path, TAPELINE_FEEDS="tardis", TAPELINE_TARDIS_HOST="127.0.0.1", TAPELINE_TARDIS_PORT=str(machine.port),
        TAPELINE_TARDIS_SYMBOLS=",".join(f"binance-futures:{s}" for s in SYMBOLS),
        TAPELINE_TARDIS_DATA_TYPES="trade,quote,derivative_ticker", TAPELINE_TIMEFRAMES="15s,1m",
        TAPELINE_SINK_MODES="candles,ticks",
    )  # fmt: skip
    yield running
    if running.process.poll() is None:
        running.stop(signal.SIGTERM)
    for process in below(tmp_path):
        process.kill()


def query(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    try:
        with closing(sqlite3.connect(f"file:{folder / 'tapeline.db'}?mode=ro", uri=True)) as connection:
            return connection.execute(sql).fetchall()
    except sqlite3.OperationalError:
        return []


def stored_to(folder: Path, seconds: int) -> bool:
    """Whether the 15 s candles that end up to `seconds` after T0 are there, of both symbols."""
    last = f"{iso(T0 + (seconds // 15 * 15 - 15) * NS)[:19]}Z"
    sql = f"SELECT count(*) FROM candles WHERE timeframe = '15s' AND timestamp_in = '{last}'"
    return query(folder, sql) == [(len(SYMBOLS),)]


def connected(machine: Machine) -> None:
    until(lambda: machine.of("trade") and machine.of("derivative_ticker"), START_SECONDS, "both connections")


def test_a_dropped_connection_touches_its_windows_alone(up: Up, machine: Machine, tmp_path: Path) -> None:
    connected(machine)
    machine.send(stretch(0, 100))
    until(lambda: stored_to(tmp_path, 90), START_SECONDS, "candles")
    assert query(tmp_path, "SELECT count(*) FROM candles WHERE complete = 0") == [(0,)]
    before = machine.of("trade")
    machine.drop(before)
    machine.send(stretch(100, 107))  # nobody hears it
    until(lambda: [s for s in machine.of("trade") if s not in before], 30, "another connection")
    machine.send(stretch(107, 260))
    until(lambda: stored_to(tmp_path, 255), START_SECONDS, "candles after the gap")
    since, back = T0 + 100 * NS - STEP, T0 + 107 * NS
    assert query(tmp_path, "SELECT feed, symbols, start_ns, end_ns FROM gaps") == [(FEED, "", since, back)]
    for table, time, lengths in (
        ("candles", "timestamp_in", {"15s": (0, 15), "1m": (0, 60)}),
        ("candles_1s", "time", {"": (0, 1)}),
        ("candles_1m", "time", {"": (-60, 0)}),
    ):
        named = "timeframe" if table == "candles" else "''"
        touched = 0
        for at, name, complete in query(tmp_path, f"SELECT {time}, {named}, complete FROM {table}"):
            start, end = (ns_of(at) + s * NS for s in lengths[name])
            assert complete == (end <= since or start >= back), (table, name, at)
            touched += not complete
        assert touched >= len(SYMBOLS), table
    # What is raw is there as it was sent, but for what was lost.
    assert query(tmp_path, "SELECT count(*) FROM ticks_trades") == [(len(SYMBOLS) * 4 * (260 - 7),)]
    assert up.stop(signal.SIGTERM) < ENDS_WITHIN
    assert up.process.returncode == 0
    nothing_left(tmp_path)


def test_looking_on_while_the_store_is_locked_changes_nothing(up: Up, machine: Machine, tmp_path: Path) -> None:
    connected(machine)
    machine.send(stretch(0, 60))
    until(lambda: stored_to(tmp_path, 45), START_SECONDS, "candles")
    at = 60
    with closing(sqlite3.connect(tmp_path / "tapeline.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with (tmp_path / "watch.err").open("w") as errors:
            watch = subprocess.Popen(
                [sys.executable, "-P", "-m", "shared.cli", "watch", "BTC-USDT", "--json", "--count", "3"],
                cwd=tmp_path, env=environ(tmp_path), text=True, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        while watch.poll() is None:
            machine.send(stretch(at, at + 1))
            at += 1
            assert at < 5000, "watch has seen nothing"
        lines = [json.loads(line) for line in (watch.communicate()[0]).splitlines()]
        assert [(r["exchange"], r["symbol"]) for r in lines] == [("binance-futures", "BTCUSDT")] * 3
        assert {r["timeframe"] for r in lines} <= {"15s", "1m"}
        assert all(r["close"] and r["trades"] and r["complete"] for r in lines)
        assert (tmp_path / "watch.err").read_text() == ""
        found = up.status()
        assert found["feeds"][FEED]["state"] == "connected"
        assert {w["service"] for w in found["workers"] if w["alive"]} >= {"aggregate", "sink-sqlite"}
        other.execute("ROLLBACK")
    machine.send(stretch(at, at + 20))
    until(lambda: stored_to(tmp_path, at + 15), START_SECONDS, "all of it stored")
    until(lambda: query(tmp_path, "SELECT count(*) FROM ticks_trades") == [(8 * (at + 20),)], 30, "every trade")
    assert query(tmp_path, "SELECT count(*) FROM gaps") == [(0,)]
    assert up.stop(signal.SIGTERM) < ENDS_WITHIN
    nothing_left(tmp_path)


# -- tapes and stores that cannot be ---------------------------------------------------------


@pytest.fixture(scope="module")
def tapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tapes: one that is fine, and others."""
    folder = tmp_path_factory.mktemp("tapes")
    whole = write_ndjson(folder / "fine.ndjson", market(8000, step_us=80_000)).read_bytes()
    (folder / "empty.ndjson").write_bytes(b"")
    (folder / "garbage.ndjson").write_bytes(b"time,price\n{{{\n\x00\xff\n")
    (folder / "cut.ndjson.zst").write_bytes(zstandard.compress(whole)[:-50])
    return folder


def faulty(command: str, cwd: Path, tape: Path, store: str, code: int) -> str:
    """The one line that a command says."""
    done = tapeline(command, str(tape), "--store", store, cwd=cwd, TMPDIR=str(cwd))
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("tapeline: ")
    no_replay_left(cwd)
    return done.stderr


@pytest.mark.parametrize("command", ["replay", "backfill"])
@pytest.mark.parametrize(
    ("name", "says"),
    [("empty.ndjson", "is empty"), ("garbage.ndjson", "has no record"), ("cut.ndjson.zst", "is cut off")],
)
def test_a_tape_that_is_none_is_one_line(tapes: Path, tmp_path: Path, command: str, name: str, says: str) -> None:
    line = faulty(command, tmp_path, tapes / name, "sqlite:///t.db", 1)
    assert name in line
    assert says in line


def test_what_lies_before_the_cut_is_backfilled(tapes: Path, tmp_path: Path) -> None:
    faulty("backfill", tmp_path, tapes / "cut.ndjson.zst", "sqlite:///t.db", 1)
    assert tapeline("backfill", str(tapes / "fine.ndjson"), "--store", "sqlite:///w.db", cwd=tmp_path).returncode == 0
    times = [
        {(r["symbol"], r["timestamp_in"]) for r in read_rows(f"sqlite:///{tmp_path / db}", "candles", {})}
        for db in ("t.db", "w.db")
    ]
    assert times[0]
    assert times[0] <= times[1]


@pytest.mark.parametrize("command", ["replay", "backfill"])
def test_a_folder_that_takes_no_file_is_one_line(tapes: Path, tmp_path: Path, command: str) -> None:
    line = faulty(command, tmp_path, tapes / "fine.ndjson", "sqlite:////proc/t.db", 78)
    assert "/proc/t.db cannot be written" in line
    assert "TAPELINE_STORE" in line


def test_a_locked_store_is_refused_by_backfill_and_waited_for_by_replay(tapes: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "t.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "t.db does not open (database is locked)" in faulty(
            "backfill", tmp_path, tapes / "fine.ndjson", "sqlite:///t.db", 1
        )
        line = ["replay", str(tapes / "fine.ndjson"), "--store", "sqlite:///t.db", "--json"]
        with (tmp_path / "replay.err").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "shared.cli", *line], cwd=tmp_path, text=True,
                env=environ(tmp_path, TMPDIR=str(tmp_path), **QUICK), stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        logs = "tapeline-*/logs/sink-sqlite.log"
        waits = lambda: any("waiting for it" in log.read_text() for log in tmp_path.glob(logs))  # noqa: E731
        until(waits, START_SECONDS, "the sink to wait")
        other.execute("ROLLBACK")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, (tmp_path / "replay.err").read_text()
    assert json.loads(out)["candles"] > 0
    assert (tmp_path / "replay.err").read_text() == ""
    no_replay_left(tmp_path)
