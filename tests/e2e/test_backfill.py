"""`tapeline backfill`, whole: the rows of `replay`, the same when repeated, one line for what cannot be."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import zstandard

from tests.e2e.test_up import environ
from tests.shared.test_cli import tapeline
from tests.shared.test_supervise import below
from tests.wait import until

pytestmark = pytest.mark.heavy
TRADES = 20_000
# What differs between any two runs, and places on a bus.
OF_THE_RUN = frozenset(
    ("timestamp_out", "latency_ms", "bus", "bus_seq", "row", "id", "at", "entry_ms", "entry_seq", "watermark_ns")
)
EXCHANGE = "binance-futures"


def message(kind: str, at: datetime, symbol: str, **more: Any) -> dict[str, Any]:
    stamp = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    received = (at + timedelta(milliseconds=20)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    named = {"type": kind, "symbol": symbol, "exchange": EXCHANGE}
    return named | more | {"timestamp": stamp, "localTimestamp": received}


def normalized(out: Path, seed: int = 1, minutes: int = 12) -> Path:
    """A made-up recording: two symbols, every kind of message, late trades, a disconnect of one symbol, garbage."""
    rng = random.Random(seed)
    at = datetime(2024, 8, 8, 0, 0, 7, tzinfo=UTC)
    price = {"BTCUSDT": 57000.0, "ETHUSDT": 2400.0}
    end = at + timedelta(minutes=minutes)
    gone: tuple[datetime, datetime] = (at + timedelta(minutes=4), at + timedelta(minutes=4, seconds=40))
    lines: list[str] = []
    number, told = 0, False
    while at < end:
        at += timedelta(milliseconds=rng.randint(1, 120))
        symbol = rng.choice(list(price))
        price[symbol] = p = round(price[symbol] * (1 + rng.gauss(0, 1e-4)), 1)
        if symbol == "BTCUSDT" and gone[0] <= at < gone[1]:
            if not told:
                told = True
                lost = message("disconnect", at, symbol, symbols=["btcusdt"])
                lines.append(json.dumps({k: v for k, v in lost.items() if k not in {"symbol", "timestamp"}}))
            continue
        best = {"bids": [{"price": p - 0.1, "amount": rng.randint(1, 9)}], "asks": [{"price": p + 0.1, "amount": 2.5}]}
        kind = rng.choices(("trade", "quote", "ticker", "liquidation", "garbage"), (70, 24, 4, 1, 1))[0]
        if kind == "trade":
            number += 1
            when = at - timedelta(seconds=rng.choice((3, 40, 200)) if rng.random() < 0.01 else 0)
            amount, side = round(rng.uniform(0.001, 3), 3), rng.choice(("buy", "sell", "unknown"))
            lines.append(json.dumps(message(kind, when, symbol, id=str(number), price=p, amount=amount, side=side)))
        elif kind == "quote":
            lines.append(json.dumps(message("book_snapshot", at, symbol, name="quote", depth=1, interval=0, **best)))
        elif kind == "ticker":
            values = {"lastPrice": p, "openInterest": 1e5, "fundingRate": 1e-4, "markPrice": p + 1, "indexPrice": p - 1}
            lines.append(json.dumps(message("derivative_ticker", at, symbol, **values)))
        elif kind == "liquidation":
            lines.append(json.dumps(message(kind, at, symbol, id=f"L{at}", price=p, amount=1.5, side="sell")))
        else:
            lines.append('{"type":"trade","symb')
    out.write_bytes(zstandard.compress(("\n".join(lines) + "\n").encode()))
    return out


@pytest.fixture(scope="module")
def dbn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic market in a file, with some late trades, definitions beside it."""
    out = tmp_path_factory.mktemp("tape") / "market.dbn.zst"
    args = ("--trades", str(TRADES), "--late-fraction", "0.01", "--late-seconds", "5", "--definitions")
    done = tapeline("generate", str(out), *args, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def ndjson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return normalized(tmp_path_factory.mktemp("tape") / "recorded.ndjson.zst")


def play(command: str, cwd: Path, db: str, *tapes: Path, **more: str) -> dict[str, Any]:
    sources = [str(tape) for tape in tapes]
    done = tapeline(
        command, *sources, "--store", f"sqlite:///{db}", "--json", cwd=cwd,
        TMPDIR=str(cwd), TAPELINE_SINK_MODES="candles,ticks", **more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tables(db: Path, without: frozenset[str] = OF_THE_RUN) -> dict[str, list[tuple[Any, ...]]]:
    """Every table of rows, but the cursors."""
    found = {}
    with closing(sqlite3.connect(db)) as connection:
        listed = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in listed:
            if name in {"schema_version", "sink_cursors"} or name.startswith("sqlite_"):
                continue
            cursor = connection.execute(f"SELECT * FROM {name}")
            keep = [i for i, c in enumerate(cursor.description) if c[0] not in without]
            found[name] = sorted((tuple(row[i] for i in keep) for row in cursor), key=repr)
    return found


@pytest.mark.parametrize("kind", ["dbn", "ndjson"])
def test_the_rows_of_replay_in_every_table(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tape = request.getfixturevalue(kind)
    replayed = play("replay", tmp_path, "r.db", tape)
    filled = play("backfill", tmp_path, "b.db", tape)
    of_time = {"seconds", "trades_per_second"}
    assert {k: v for k, v in filled.items() if k not in of_time} == {
        k: v for k, v in replayed.items() if k not in of_time
    }
    wanted, found = tables(tmp_path / "r.db"), tables(tmp_path / "b.db")
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert found[name] == rows, name
    for name in ("candles", "candles_1m", "candles_1s", "late_trades", "ticks_trades", "ohlc_bars"):
        assert wanted[name], f"{name} tells something"
    if kind == "ndjson":
        assert all(wanted[name] for name in ("gaps", "ticks_book_snapshots", "ticks_derivative_ticker"))
        assert filled["skipped"]["garbage"] > 0
    # A second run changes nothing.
    held = tables(tmp_path / "b.db", frozenset())
    play("backfill", tmp_path, "b.db", tape)
    assert tables(tmp_path / "b.db", frozenset()) == held
    # Nor does a backfill of what was replayed, but for late trades and ticks: they keep the bus they came from.
    held = tables(tmp_path / "r.db", frozenset())
    play("backfill", tmp_path, "r.db", tape)
    again = tables(tmp_path / "r.db", frozenset())
    for name in ("candles", "candles_1m", "candles_1s", "ohlc_bars", "gaps"):
        assert again[name] == held[name], name


def test_both_kinds_of_tapes_at_once(dbn: Path, ndjson: Path, tmp_path: Path) -> None:
    both = play("backfill", tmp_path, "both.db", dbn, ndjson)
    each = [play("backfill", tmp_path, "each.db", tape) for tape in (dbn, ndjson)]
    assert both["trades"] == sum(one["trades"] for one in each)
    # The identity in the store is that of all tapes of a run.
    assert tables(tmp_path / "both.db") == tables(tmp_path / "each.db")


def test_it_needs_no_redis_and_starts_no_process(dbn: Path, tmp_path: Path) -> None:
    process = start(tmp_path, dbn, REDIS_URL="redis://127.0.0.1:1/0")
    most = 0
    while process.poll() is None:
        most = max(most, len(below(tmp_path)))
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert most <= 1
    assert not list(tmp_path.glob("tapeline-*"))


def test_the_summary_for_people(dbn: Path, tmp_path: Path) -> None:
    done = tapeline("backfill", str(dbn), cwd=tmp_path, TAPELINE_STORE="sqlite:///p.db")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "trades/s); skipped: " in done.stdout
    assert done.stdout.splitlines()[-1] == "stored in sqlite:///p.db"


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("odd.dbn", b"this is no tape at all, only text", 1), ("empty.dbn", b"", 1), ("odd.txt", b"x", 2),
     ("missing.dbn", None, 2), ("odd.ndjson.zst", b"not zstandard", 1)],
)  # fmt: skip
def test_what_is_no_tape_is_one_line(tmp_path: Path, name: str, content: bytes | None, code: int) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = tapeline("backfill", name, "--store", "sqlite:///t.db", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("tapeline: ")
    assert name in done.stderr


def test_a_truncated_tape_stores_what_came_before(tmp_path: Path) -> None:
    assert tapeline("generate", "whole.dbn", "--trades", "5000", cwd=tmp_path).returncode == 0
    (tmp_path / "short.dbn").write_bytes((tmp_path / "whole.dbn").read_bytes()[:-17])
    done = tapeline("backfill", "short.dbn", "--store", "sqlite:///t.db", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "short.dbn" in done.stderr


@pytest.mark.parametrize(
    ("store", "code", "says"),
    [
        ("sqlite:///none/t.db", 78, "folder"),
        ("mysql://h/d", 78, "store URL"),
        ("postgresql://u:pw@127.0.0.1:9/d", 1, "PostgreSQL 127.0.0.1:9/d does not answer"),
    ],
)
def test_a_store_that_cannot_be(dbn: Path, tmp_path: Path, store: str, code: int, says: str) -> None:
    done = tapeline("backfill", str(dbn), "--store", store, cwd=tmp_path)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert says in done.stderr


def test_a_tape_given_twice_is_refused(dbn: Path, tmp_path: Path) -> None:
    done = tapeline("backfill", str(dbn), str(dbn), "--store", "sqlite:///t.db", cwd=tmp_path)
    assert done.returncode in {2, 78}
    assert "twice" in done.stderr


def start(cwd: Path, *tapes: Path, **more: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-P", "-m", "shared.cli", "backfill", *map(str, tapes), "--store", "sqlite:///k.db"]
    return subprocess.Popen(
        line, cwd=cwd, env=environ(cwd, TMPDIR=str(cwd), **more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def stored(db: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM candles_1s").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So long that a signal comes in the midst: about a day of three roots."""
    out = tmp_path_factory.mktemp("tape") / "long.dbn"
    done = tapeline("generate", str(out), "--trades", "2000000", "--rate", "25", cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_it_leaves_a_readable_store(long: Path, tmp_path: Path, signum: int, code: int) -> None:
    process = start(tmp_path, long)
    until(lambda: stored(tmp_path / "k.db") > 2000, 60, "rows in the midst")
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "stored in" not in out
    assert "Traceback" not in err
    with closing(sqlite3.connect(tmp_path / "k.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert stored(tmp_path / "k.db") > 2000
    assert below(tmp_path) == []


def test_memory_does_not_grow_with_the_tape(long: Path, tmp_path: Path) -> None:
    """The second half of a day holds no more than the first, but for SQLite's cache and the file's own pages."""
    process = start(tmp_path, long, TAPELINE_AGGREGATE_CANDLES_1S="false")
    watched = psutil.Process(process.pid)
    seen: list[tuple[int, int]] = []
    while process.poll() is None:
        try:
            memory = watched.memory_info()
        except psutil.NoSuchProcess:
            break
        seen.append(
            (os.stat(tmp_path / "k.db").st_size if (tmp_path / "k.db").exists() else 0, memory.rss - memory.shared)
        )
    process.communicate()
    assert process.returncode == 0
    largest = max(size for size, _ in seen)
    first = max(held for size, held in seen if 0 < size <= largest / 2)
    second = max(held for size, held in seen if size > largest / 2)
    assert second < 1.15 * first + (64 << 20)
