"""The tables of a tape in PostgreSQL are those in SQLite, row by row, whatever befalls the sinks and the server."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.stores import read_rows
from shared.tables import MESSAGE_TABLES, TABLES, TICK_TABLES
from tests.chaos.test_same_table import CRYPTO, OF_THE_RUN, Tables, begin, disturbed, workers
from tests.e2e.test_replay import nothing_left
from tests.postgres import PostgresServer
from tests.shared.test_cli import tapeline
from tests.wait import until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

NAMES = (
    *(table.name for table in (*TABLES.values(), *TICK_TABLES.values())),
    *(table.name for tables in MESSAGE_TABLES.values() for table in tables),
    "gaps", "late_trades", "dead_letters", "ohlc_bars", "features",
)  # fmt: skip
TWO_SINKS = {**CRYPTO, "TAPELINE_TIMESCALE_WORKERS": "2"}


def tables(url: str) -> Tables:
    """Every table and view of rows as sorted texts, without what belongs to the run."""
    return {
        name: sorted(repr([v for k, v in row.items() if k not in OF_THE_RUN]) for row in read_rows(url, name))
        for name in NAMES
    }


def same(url: str, calm: Tables) -> None:
    held = tables(url)
    for name, wanted in calm.items():
        assert len(held[name]) == len(wanted), name
        assert held[name] == wanted, name


@pytest.fixture(scope="module")
def calm(crypto_db: Path) -> Tables:
    """What SQLite holds of it."""
    held = tables(f"sqlite:///{crypto_db}")
    # A tape is of no vendor's account, and its few options have no history to stand out from.
    silent = {"dead_letters", "signals", "usage_log", "usage_daily"}
    assert {name for name, rows in held.items() if not rows} == silent, "every other table tells something"
    return held


def bring(verb: str, cwd: Path, tape: Path, store: str, **more: str) -> None:
    done = tapeline(verb, str(tape), "--store", store, "--json", cwd=cwd, TMPDIR=str(cwd), **(CRYPTO | more))
    assert done.returncode == 0, done.stderr
    nothing_left(cwd)


@pytest.mark.parametrize("postgres", ["18"], indirect=True)
def test_undisturbed(crypto: Path, calm: Tables, pg_url: str, tmp_path: Path) -> None:
    bring("replay", tmp_path, crypto, pg_url, **TWO_SINKS)
    same(pg_url, calm)
    # Backfill into the same store has nothing to mend in it, and raw ticks of its own.
    bring("backfill", tmp_path, crypto, pg_url, TAPELINE_SINK_MODES="candles")
    held = tables(pg_url)
    assert {name: held[name] for name in ("candles", "candles_1m", "candles_1s", "pressure_metrics")} == {
        name: calm[name] for name in ("candles", "candles_1m", "candles_1s", "pressure_metrics")
    }


def stored(url: str) -> int:
    return len(read_rows(url, "candles_1s", columns=["time"]))


def more_rows(url: str, calm: Tables, count: int = 100) -> None:
    """Wait for so many more, or for the last there is: a slow machine must not wait for what cannot come."""
    wanted = min(stored(url) + count, len(calm["candles_1s"]))
    until(lambda: stored(url) >= wanted, 60, "more rows in PostgreSQL")


def test_sinks_killed_paused_and_cut_off(
    crypto: Path, calm: Tables, pg_url: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    database = pg_url.rpartition("/")[2]
    of_the_sinks = f"FROM pg_stat_activity WHERE datname = '{database}' AND pid <> pg_backend_pid()"

    def disturb() -> None:
        for _ in range(2):
            more_rows(pg_url, calm)
            until(lambda: workers(tmp_path, "sink-timescale"), 20, "a sink")[0].kill()
        for attempt in range(6):
            more_rows(pg_url, calm, 20)
            postgres.sql(f"SELECT pg_{('cancel', 'terminate')[attempt % 2]}_backend(pid) {of_the_sinks}", database)
        sleeper = until(lambda: workers(tmp_path, "sink-timescale"), 20, "a sink")[0]
        sleeper.send_signal(signal.SIGSTOP)
        paused = time.monotonic()
        more_rows(pg_url, calm)
        # Longer than the lease, so that the other one has gone on with its partitions.
        until(lambda: time.monotonic() - paused > 2, what="the lease to end")
        sleeper.send_signal(signal.SIGCONT)
        more_rows(pg_url, calm)

    disturbed(begin(tmp_path, crypto, "60", 1, store=pg_url, **TWO_SINKS), tmp_path, disturb)
    same(pg_url, calm)


def test_a_server_killed_and_away(crypto: Path, calm: Tables, tmp_path: Path) -> None:
    server = PostgresServer("16").start()
    try:
        url = server.url()
        process = begin(tmp_path, crypto, "50", 1, store=url, **CRYPTO)

        def disturb() -> None:
            for _ in range(2):
                more_rows(url, calm)
                server.kill()
                until(lambda: waits(tmp_path), 30, "the sink to say that it waits")
                server.start()

        disturbed(process, tmp_path, disturb)
        same(url, calm)
    finally:
        server.stop()


def waits(cwd: Path) -> bool:
    """Whether the newest word of the sink on its store is that it does not answer."""
    said = [line for log in cwd.glob("tapeline-*/logs/sink-timescale.log") for line in log.read_text().splitlines()]
    told = [line for line in said if "trying again" in line or "answers again" in line]
    return bool(told) and "trying again" in told[-1]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 96 MiB; needs the right to mount."""
    folder = Path(tempfile.mkdtemp(prefix="tapeline-small-", dir="/tmp"))
    line = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    if subprocess.run(line, check=False, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def test_a_full_disk(crypto: Path, calm: Tables, small_disk: Path, tmp_path: Path) -> None:
    small_disk.chmod(0o755)
    (small_disk / "pg").mkdir()
    server = PostgresServer("16", small_disk / "pg", "max_wal_size = 32MB\nmin_wal_size = 32MB\nwal_recycle = off\n")
    ballast = small_disk / "ballast"
    try:
        server.start()
        url = server.url()

        def disturb() -> None:
            more_rows(url, calm)
            fill(ballast)
            until(lambda: waits(tmp_path), 60, "the sink to say that it waits")
            ballast.unlink()
            server.start()  # a full disk may end the server itself

        disturbed(begin(tmp_path, crypto, "50", 1, store=url, **CRYPTO), tmp_path, disturb)
        same(url, calm)
    finally:
        server.stop()


def fill(path: Path) -> None:
    """All the room there is."""
    with path.open("wb", buffering=0) as file:
        size = 1 << 20
        while size >= 1024:
            try:
                file.write(b"x" * size)
            except OSError:
                size //= 2
