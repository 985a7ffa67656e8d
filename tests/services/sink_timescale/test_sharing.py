"""Several sinks of one store: they share the partitions, and none overwrites what another has gone on from."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from services.sink_sqlite.store import SqliteStore
from services.sink_timescale.store import of
from shared.bus import Bus
from shared.postgres import connect
from shared.postgres import run as wait_for
from shared.redis_server import EmbeddedRedis
from shared.settings import RedisSettings, Settings, Sink, Tapeline
from shared.sink import SinkLoop, open_store
from shared.stores import read_rows
from tests.postgres import PostgresServer, free_port
from tests.services.sink_sqlite import tape
from tests.wait import until

PARTITIONS = 4
OF_THE_RUN = ("at", "id")
TABLES = ("candles_1m", "late_trades", "ticks_trades", "ticks_book_snapshots", "ticks_options_chain", "dead_letters")


def settings(bus: Bus, url: str, *, lease: float = 1.0) -> Settings:
    return Settings(
        tapeline=Tapeline(partitions=PARTITIONS, namespace=bus.keys.namespace, store=url),
        redis=RedisSettings(url=bus.url, lease_seconds=lease),
        sink=Sink(modes=("candles", "ticks"), batch_rows=500, batch_ms=10),
    )


class Running:
    """A sink on a thread; `end` is an orderly one."""

    def __init__(self, bus: Bus, url: str) -> None:
        self.stop = threading.Event()
        store = of(settings(bus, url), self.stop)
        assert open_store(store, self.stop)
        self.loop = SinkLoop(bus.clone(), store, "sink-timescale", settings(bus, url), self.stop)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:
            self.error = error

    @property
    def partitions(self) -> list[int]:
        return sorted(self.loop._readers)

    def end(self) -> None:
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error


@contextmanager
def running(bus: Bus, *urls: str) -> Iterator[list[Running]]:
    made = [Running(bus, url) for url in urls]
    try:
        yield made
    finally:
        for sink in made:
            sink.end()


def feed(bus: Bus, rounds: int, start: int = 0) -> None:
    """Candles, late trades and ticks into every partition."""
    for partition in range(PARTITIONS):
        stage, ticks = tape.Stage(bus, partition), tape.Feed(bus, partition=partition)
        for i in range(start, start + rounds):
            names = [(f"R{partition}", f"R{partition}H4"), (f"S{partition}", f"S{partition}H4")]
            stage.put(tape.candles(tape.rows(40, 20 * i), names=names), tape.late(3, 3 * i))
            ticks.put(tape.mixed(i))


def held(url: str) -> dict[str, list[Any]]:
    tables = (
        "candles_1m",
        "late_trades",
        "ticks_trades",
        "ticks_book_snapshots",
        "ticks_options_chain",
        "dead_letters",
    )
    return {t: [{k: v for k, v in r.items() if k not in OF_THE_RUN} for r in read_rows(url, t)] for t in tables}


def in_sqlite(bus: Bus, folder: Path) -> dict[str, list[Any]]:
    """What a single SQLite sink makes of the same bus."""
    path = folder / "alone.db"
    stop = threading.Event()
    store = SqliteStore(path)
    store.open()
    loop = SinkLoop(bus.clone(), store, "sink-sqlite", settings(bus, f"sqlite:///{path}"), stop)
    thread = threading.Thread(target=loop.run)
    thread.start()
    until(lambda: drained(bus, store.name), what="SQLite to have it all")
    stop.set()
    thread.join()
    return held(f"sqlite:///{path}")


def drained(bus: Bus, name: str) -> bool:
    return all(
        bus.call("hget", bus.keys.consumers(p, topic), name) == bus.last_id(p, topic).encode()
        for p in range(PARTITIONS)
        for topic in ("candles", "late", "ticks")
    )


def test_two_sinks_share_the_partitions_and_a_third_gets_its_part(bus: Bus, pg_url: str, tmp_path: Path) -> None:
    feed(bus, 5)
    with running(bus, pg_url) as [first]:
        until(lambda: first.partitions == [0, 1, 2, 3], what="the first sink to have all")
        with running(bus, pg_url) as [second]:
            until(lambda: len(first.partitions) == len(second.partitions) == 2, what="each to have two")
            assert sorted(first.partitions + second.partitions) == [0, 1, 2, 3]
            feed(bus, 20, 5)
            until(lambda: drained(bus, first.loop.consumer), what="PostgreSQL to have it all")
        # The second left in order: its partitions come back at once, and nothing is missing.
        until(lambda: first.partitions == [0, 1, 2, 3], what="the first sink to have all again")
        feed(bus, 5, 25)
        until(lambda: drained(bus, first.loop.consumer), what="PostgreSQL to have it all")
    assert held(pg_url) == in_sqlite(bus, tmp_path)


def test_a_sink_that_was_overtaken_writes_nothing_and_reads_on_from_the_store(
    bus: Bus, pg_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(bus, pg_url) as [sink]:
        feed(bus, 2)
        until(lambda: drained(bus, sink.loop.consumer), what="PostgreSQL to have it all")

        async def move() -> None:
            connection = await connect(pg_url)
            # As if another sink had stored up to the newest entry that comes next.
            await connection.execute("UPDATE sink_cursors SET seq = 0, stream_id = '0-0'")
            await connection.close()

        wait_for(move())
        feed(bus, 2, 2)
        until(lambda: sink.loop.counters["fenced"], what="the store to refuse the batch")
        until(lambda: drained(bus, sink.loop.consumer), what="PostgreSQL to have it all")
    assert "reading on from where the store is" in caplog.text
    assert held(pg_url) == in_sqlite(bus, tmp_path)


POOLER = """
[databases]
* = host=127.0.0.1 port={server} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
logfile = {folder}/log
"""


@pytest.fixture
def pooled(postgres: PostgresServer, pg_url: str) -> Iterator[str]:
    """URL of the same database through pgbouncer in transaction mode."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    folder = Path(tempfile.mkdtemp(prefix="tapeline-pgbouncer-", dir="/tmp"))
    folder.chmod(0o777)
    port = free_port()
    (folder / "ini").write_text(POOLER.format(server=postgres.port, port=port, folder=folder))
    process = subprocess.Popen([program, "-q", folder / "ini"], user="nobody" if os.getuid() == 0 else None, cwd=folder)
    url = pg_url.replace(f":{postgres.port}/", f":{port}/")

    def answers() -> bool:
        return subprocess.run([postgres.bin / "pg_isready", "-q", "-d", url], check=False).returncode == 0

    until(answers, what="pgbouncer to answer")
    yield url
    process.terminate()
    process.wait()
    shutil.rmtree(folder)


def test_behind_a_pooler_in_transaction_mode(bus: Bus, pg_url: str, pooled: str, tmp_path: Path) -> None:
    # Fewer connections than sinks: each transaction may run on another one.
    with running(bus, pooled, pooled, pooled, pooled) as sinks:
        until(lambda: all(len(sink.partitions) == 1 for sink in sinks), what="each to have one")
        feed(bus, 30)
        until(lambda: drained(bus, sinks[0].loop.consumer), what="PostgreSQL to have it all")
        assert Counter(bool(sink.loop.counters["batches"]) for sink in sinks) == {True: 4}
    direct, through = held(pg_url), held(pooled)
    assert direct == through == in_sqlite(bus, tmp_path)


def test_redis_loses_its_tail_while_sinks_share(
    redis_server: EmbeddedRedis, bus: Bus, pg_url: str, tmp_path: Path
) -> None:
    with running(bus, pg_url, pg_url) as sinks:
        until(lambda: all(len(sink.partitions) == 2 for sink in sinks), what="each to have two")
        feed(bus, 3)
        until(lambda: drained(bus, sinks[0].loop.consumer), what="PostgreSQL to have it all")
        with tape.without_tail(redis_server, bus):
            feed(bus, 2, 3)
            until(lambda: drained(bus, sinks[0].loop.consumer), what="PostgreSQL to have what will be lost")
        # What was lost is made again, in other frames.
        feed(bus, 1, 3)
        feed(bus, 3, 4)
        until(lambda: drained(bus, sinks[0].loop.consumer), 20, "PostgreSQL to have it all")
    assert held(pg_url) == in_sqlite(bus, tmp_path)
