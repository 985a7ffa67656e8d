"""The same tape gives the same tables: at any speed, in any frames, with any number of workers, under kill -9."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_replay import nothing_left, stored
from tests.e2e.test_up import environ
from tests.shared.test_cli import OPTIONS, tapeline
from tests.shared.test_supervise import below
from tests.wait import until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

# When a row was made, and where it stood on that run's bus.
OF_THE_RUN = frozenset(
    ("timestamp_out", "created_at", "latency_ms", "bus", "bus_seq", "row", "entry_ms", "entry_seq", "id")
)
CRYPTO = {**OPTIONS, "TAPELINE_SINK_MODES": "candles,ticks"}
Tables = dict[str, list[str]]


def tables(db: Path, but: frozenset[str] = OF_THE_RUN) -> Tables:
    """Every table of rows as sorted texts, which tell each bit of a number and keep rows that are there twice.

    Without the columns of `but`.
    """
    found: Tables = {}
    with closing(sqlite3.connect(db)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if name in ("schema_version", "sink_cursors"):
                continue
            cursor = connection.execute(f"SELECT * FROM {name}")
            keep = [i for i, column in enumerate(cursor.description) if column[0] not in but]
            found[name] = sorted(repr(tuple(row[i] for i in keep)) for row in cursor)
    return found


def one(db: Path, query: str) -> Any:
    with closing(sqlite3.connect(db)) as connection:
        return connection.execute(query).fetchone()[0]


def replay(cwd: Path, tape: Path, name: str, *args: str, **more: str) -> None:
    line = ("replay", str(tape), "--store", f"sqlite:///{name}", "--json", *args)
    done = tapeline(*line, cwd=cwd, TMPDIR=str(cwd), **more)
    assert done.returncode == 0, done.stderr
    nothing_left(cwd)


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An hour of several roots, with late trades: 40,000 records."""
    out = tmp_path_factory.mktemp("chaos") / "market.dbn"
    args = ("--trades", "40000", "--seed", "7", "--late-fraction", "0.02", "--late-seconds", "90")
    done = tapeline("generate", str(out), *args, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def calm(tape: Path, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """What an undisturbed run stores."""
    db = tmp_path_factory.mktemp("calm") / "calm.db"
    replay(db.parent, tape, db.name)
    held = tables(db)
    assert len(held["candles_1m"]) > 1000
    assert len(held["candles"]) == len(held["ohlc_bars"]) > 500
    for table in ("candles_1m", "candles"):
        assert one(db, f"SELECT max(revision) FROM {table}") > 0, f"no row of {table} was ever revised"
    assert one(db, "SELECT count(macd_hist) FROM candles") > 0, "features are warm"
    return held


@pytest.fixture(scope="module")
def calm_crypto(crypto_db: Path) -> Tables:
    """What an undisturbed run stores of candles and raw ticks."""
    db = crypto_db
    held = tables(db)
    # A tape is of no vendor's account, and its few options have no history to stand out from.
    silent = {"dead_letters", "signals", "usage_log", "usage_daily"}
    assert {name for name, rows in held.items() if not rows} == silent, "every other table tells something"
    assert len(held["gaps"]) == 2
    assert one(db, "SELECT max(revision) FROM candles") > 0
    assert one(db, "SELECT count(*) FROM candles WHERE complete = 0") > 0
    assert one(db, "SELECT count(*) FROM candles WHERE symbol LIKE 'BTC-28JUN24-%'") > 0
    assert one(db, "SELECT count(macd_hist) FROM candles") > 0, "features are warm"
    return held


def same(db: Path, calm: Tables) -> None:
    held = tables(db)
    assert held.keys() == calm.keys()
    for table, wanted in calm.items():
        assert len(held[table]) == len(wanted), table
        assert held[table] == wanted, table


@pytest.mark.parametrize(
    "args",
    [("--frame-records", "1"), ("--frame-records", "1000", "--aggregators", "3"), ("--speed", "3000")],
    ids=["frames of 1", "3 aggregators", "3000x"],
)
def test_undisturbed(tape: Path, calm: Tables, tmp_path: Path, args: tuple[str, ...]) -> None:
    replay(tmp_path, tape, "x.db", *args)
    same(tmp_path / "x.db", calm)


def test_undisturbed_crypto(crypto: Path, calm_crypto: Tables, tmp_path: Path) -> None:
    replay(tmp_path, crypto, "x.db", "--frame-records", "7", "--aggregators", "2", **CRYPTO)
    same(tmp_path / "x.db", calm_crypto)


def workers(cwd: Path, service: str) -> list[Any]:
    """Living processes of a service (`redis`: the server itself)."""
    if service == "redis":
        return [p for p in below(cwd) if p.name().startswith("redis-server")]
    return [p for p in below(cwd) if f"run {service}" in " ".join(p.cmdline())]


def begin(
    cwd: Path,
    tapes: Path | tuple[Path, ...],
    speed: str,
    aggregators: int,
    *,
    store: str = "sqlite:///x.db",
    **more: str,
) -> subprocess.Popen[str]:
    files = [str(tape) for tape in (tapes if isinstance(tapes, tuple) else (tapes,))]
    line = [
        sys.executable, "-P", "-m", "shared.cli", "replay", *files, "--store", store, "--json",
        "--speed", speed, "--aggregators", str(aggregators),
    ]  # fmt: skip
    env = environ(cwd, TMPDIR=str(cwd), TAPELINE_REDIS_LEASE_SECONDS="1", **more)
    return subprocess.Popen(line, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def disturbed(process: subprocess.Popen[str], cwd: Path, disturb: Callable[[], None]) -> None:
    """Let a replay end after `disturb`, in order and with nothing left."""
    drained = threading.Thread(target=process.wait)
    drained.start()
    try:
        disturb()
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
        drained.join()
    assert process.returncode == 0, err
    assert json.loads(out)["trades"] > 0
    nothing_left(cwd)


def kills(cwd: Path, dice: random.Random, victims: list[str], rows: int) -> None:
    """kill -9 of each victim in turn, each after up to `rows` more seconds of market were stored."""
    for victim in victims:
        before = stored(cwd / "x.db")
        until(lambda: stored(cwd / "x.db") > before + dice.randint(0, rows), 60, "more rows")  # noqa: B023
        dice.choice(until(lambda: workers(cwd, victim), 20, f"a living {victim}")).kill()  # noqa: B023


def test_an_aggregator_killed_ten_times(tape: Path, calm: Tables, tmp_path: Path) -> None:
    process = begin(tmp_path, tape, "60", 2)
    disturbed(process, tmp_path, lambda: kills(tmp_path, random.Random(11), ["aggregate"] * 10, 40))
    same(tmp_path / "x.db", calm)


def test_crypto_with_everything_killed(crypto: Path, calm_crypto: Tables, tmp_path: Path) -> None:
    dice = random.Random(1)
    victims = ["ingest-tardis-files", "aggregate", "sink-sqlite", "redis"] * 2
    dice.shuffle(victims)
    process = begin(tmp_path, crypto, "100", 2, **CRYPTO)
    disturbed(process, tmp_path, lambda: kills(tmp_path, dice, victims, 120))
    same(tmp_path / "x.db", calm_crypto)


def test_an_aggregator_paused_past_its_lease(tape: Path, calm: Tables, tmp_path: Path) -> None:
    def pause() -> None:
        until(lambda: stored(tmp_path / "x.db") > 50, 60, "rows in the midst")
        sleeper = workers(tmp_path, "aggregate")[0]
        sleeper.send_signal(signal.SIGSTOP)
        paused = time.monotonic()
        before = stored(tmp_path / "x.db")
        # Longer than the lease, and until the other one has gone on with its partitions.
        until(lambda: time.monotonic() - paused > 2 and stored(tmp_path / "x.db") > before + 50, 60, "the other one")
        sleeper.send_signal(signal.SIGCONT)

    disturbed(begin(tmp_path, tape, "120", 2), tmp_path, pause)
    same(tmp_path / "x.db", calm)
