"""The PostgreSQL store on real servers: the same tables as SQLite's, whatever is written, refused or cut off."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from string import ascii_letters
from typing import Any

import numpy as np
import pytest

from services.sink_sqlite.store import SqliteStore
from services.sink_timescale import store as module
from services.sink_timescale.store import TimescaleStore, of
from shared.batches import Batch, Cursor, Item, Source, batch_of
from shared.errors import AuthError, ConfigError, Fenced, StoreUnavailable, TapelineError
from shared.frames import NS, TRADE, tick_frame
from shared.settings import Settings, Tapeline
from tests.postgres import PostgresServer, versions
from tests.services.sink_sqlite.tape import (
    INSTRUMENTS,
    T0,
    bars,
    candles,
    fixed,
    gap,
    pressure,
    rows,
    said,
    ticks,
    usage,
)
from tests.services.sink_timescale.tables import batch, fetch, one, same, story
from tests.wait import until

TIMESCALE = "TAPELINE_TEST_TIMESCALE_URL"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def lite(path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(path)
    made.open()
    yield made
    made.close()


@pytest.fixture
def store(pg_url: str) -> Iterator[TimescaleStore]:
    made = TimescaleStore(pg_url)
    made.open()
    yield made
    made.close()


def other(url: str) -> TimescaleStore:
    made = TimescaleStore(url)
    made.open()
    return made


# -- equal tables -----------------------------------------------------------------------------


@pytest.mark.parametrize("postgres", versions(), indirect=True)
def test_the_same_batches_make_the_same_tables(
    lite: SqliteStore, store: TimescaleStore, path: Path, pg_url: str
) -> None:
    for each in story():
        for _ in range(2):
            assert store.write(each) == lite.write(each)
        same(path, pg_url)
        assert store.cursors() == lite.cursors()


@pytest.mark.skipif(TIMESCALE not in os.environ, reason=f"{TIMESCALE} names no TimescaleDB")
def test_the_same_tables_in_timescaledb(lite: SqliteStore, path: Path) -> None:
    server, _, _ = os.environ[TIMESCALE].rpartition("/")
    name = f"t{os.getpid()}"
    fetch(os.environ[TIMESCALE], f"CREATE DATABASE {name}")
    try:
        store = other(f"{server}/{name}")
        for each in story():
            for _ in range(2):
                assert store.write(each) == lite.write(each)
            same(path, f"{server}/{name}")
        store.close()
        assert one(f"{server}/{name}", "SELECT count(*) FROM timescaledb_information.hypertables") >= 3
    finally:
        fetch(os.environ[TIMESCALE], f"DROP DATABASE {name} WITH (FORCE)")


def test_instants_keep_microseconds_and_flags_are_booleans(store: TimescaleStore, pg_url: str) -> None:
    store.write(batch(candles(rows(3)), ticks(TRADE, 2)))
    row = fetch(pg_url, "SELECT * FROM candles_1m ORDER BY time, ticker DESC")[0]
    assert (row["complete"], row["vwap"], row["time"].isoformat()) == (True, None, "2023-12-25T23:01:00+00:00")
    assert row["timestamp_out"].isoformat() == "2023-12-25T23:01:00.500123+00:00"
    assert row["latency_ms"] == 500.123456
    row = fetch(pg_url, "SELECT timestamp, timestamp_ns FROM ticks_trades ORDER BY timestamp_ns")[1]
    assert (row["timestamp"].isoformat(), row["timestamp_ns"]) == ("2023-12-25T23:01:00.000001+00:00", T0 + 1007)


# -- what is refused --------------------------------------------------------------------------


def test_poison_among_5000(store: TimescaleStore, pg_url: str, lite: SqliteStore, path: Path) -> None:
    made = rows(5000)
    for at, (name, value) in {
        0: ("revision", -1), 1: ("volume", np.nan), 2500: ("trades", -1), 4998: ("complete", 3), 4999: ("low", 1e9),
    }.items():  # fmt: skip
        made[name][at] = value
    bad = batch(candles(made))
    for _ in range(2):
        assert store.write(bad) == lite.write(bad) == 5
    same(path, pg_url, ("candles_1m", "dead_letters"))
    assert one(pg_url, "SELECT count(*) FROM candles_1m") == 4995
    reasons = [r["reason"] for r in fetch(pg_url, "SELECT reason FROM dead_letters ORDER BY row_number")]
    assert "violates check constraint" in reasons[0]
    assert 'null value in column "volume" of relation "candles_1m"' in reasons[1]
    assert not any("\n" in reason for reason in reasons)
    body = json.loads(one(pg_url, "SELECT row FROM dead_letters WHERE row_number = 1"))
    assert (body["volume"], body["time"]) == (None, "2023-12-25T23:01:00.000000Z")


def test_a_refused_correction_does_not_take_its_predecessors_along(store: TimescaleStore, pg_url: str) -> None:
    made = [rows(1, revision=r, close=c) for r, c in ((0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0))]
    for spoiled in made[2:]:
        spoiled["trades"] = -1
    assert store.write(batch(candles(np.concatenate(made)))) == 2
    assert fetch(pg_url, "SELECT close, revision FROM candles_1m") == [{"close": 2.0, "revision": 1}]


def test_texts_that_postgresql_does_not_take(store: TimescaleStore, pg_url: str) -> None:
    # The last is too long for an index.
    names = [("ES", "ESH4"), ("6\0E", "6EH4"), ("".join(Random(1).choices(ascii_letters, k=9000)), "y")]
    made = rows(6)
    made["name"] = [0, 1, 2, 0, 1, 0]
    made["time_ns"] += np.arange(6) * NS
    frames = [
        candles(made, names=names), said(pressure(0), pressure(1, underlying="N\0Q"), pressure(2)),
        gap(T0, ("E\0S",)), said(usage(1, feed="a\0b"), usage(2)),
    ]  # fmt: skip
    assert store.write(batch(*frames)) == 6
    assert one(pg_url, "SELECT count(*) FROM candles_1m") == 3
    assert one(pg_url, "SELECT count(*) FROM pressure_metrics") == 2
    assert one(pg_url, "SELECT symbols FROM gaps") == "E\ufffdS"
    reasons = fetch(
        pg_url, "SELECT table_name, reason, row FROM dead_letters ORDER BY stream_id, row_number, table_name"
    )
    assert [r["table_name"] for r in reasons] == [*["candles_1m"] * 3, "pressure_metrics", "usage_daily", "usage_log"]
    assert sum("the character NUL" in r["reason"] for r in reasons) == 5
    assert reasons[0]["reason"].startswith("ticker: ")
    assert json.loads(reasons[3]["row"])["underlying"] == "N\0Q"
    assert store.write(batch(*frames)) == 6


def test_integers_beyond_int64(store: TimescaleStore, pg_url: str, lite: SqliteStore, path: Path) -> None:
    items = [
        Item(Source("a", "ticks", 0, 1, f"1700000000000-{entry}"), tick_frame(ticks(TRADE, 2), "t"),
             instruments=INSTRUMENTS)
        for entry in (1, 2**63, 2)
    ]  # fmt: skip
    assert store.write(batch_of(items)) == lite.write(batch_of(items)) == 2
    same(path, pg_url, ("ticks_trades", "dead_letters"))
    assert one(pg_url, "SELECT count(*) FROM ticks_trades") == 4


def test_an_entry_read_twice_in_one_batch(store: TimescaleStore, pg_url: str) -> None:
    made = batch(ticks(TRADE, 3), ticks(TRADE, 3, 9))
    made.ticks.append(made.ticks[0])
    assert store.write(made) == 0
    assert one(pg_url, "SELECT count(*) FROM ticks_trades") == 6


# -- cursors ----------------------------------------------------------------------------------


def test_who_was_overtaken_writes_nothing(store: TimescaleStore, pg_url: str) -> None:
    store.write(batch(candles(rows(4)), seq=1))
    successor = other(pg_url)
    successor.write(batch(candles(rows(4, 4)), seq=2))
    before = fetch(pg_url, "SELECT * FROM candles_1m")
    for _ in range(2):
        with pytest.raises(Fenced, match=r"^PostgreSQL 127\S+: another sink has written 'candles' of partition 0"):
            store.write(batch(candles(rows(4, 9)), gap(), seq=2))
    assert fetch(pg_url, "SELECT * FROM candles_1m") == before
    assert one(pg_url, "SELECT count(*) FROM gaps") == 0
    assert store.cursors()["a", "candles", 0] == (2, "1700000000000-2")
    assert store.write(batch(candles(rows(4, 9)), seq=3)) == 0
    with pytest.raises(Fenced):
        successor.write(batch(candles(rows(4, 4)), seq=3))
    # Partitions are told apart, and so are buses.
    assert successor.write(batch(candles(rows(4, 4)), seq=3, bus="b")) == 0
    successor.close()


def test_two_that_begin_the_same_stream_at_once(store: TimescaleStore, pg_url: str) -> None:
    """The second waits for the first one's transaction and sees what it left."""
    second = other(pg_url)
    waiting = threading.Event()
    held: list[Any] = []

    def begin() -> None:
        try:
            held.append(second.write(batch(candles(rows(2, 50)))))
        except Fenced as error:
            held.append(error)

    thread = threading.Thread(target=begin)

    def hold(name: str) -> None:
        if name == "sink:before-commit" and not waiting.is_set():
            waiting.set()
            thread.start()
            until(lambda: one(pg_url, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.faults, "point", hold)
        store.write(batch(candles(rows(2))))
        thread.join()
    assert isinstance(held[0], Fenced)
    assert one(pg_url, "SELECT count(*) FROM candles_1m") == 2
    second.close()


def test_a_rewind_may_set_cursors_back(store: TimescaleStore) -> None:
    store.write(batch(candles(rows(2)), seq=90))
    store.write(batch(candles(rows(2)), seq=5, after="0-0"))
    assert store.cursors()["a", "candles", 0] == Cursor(5, "1700000000000-5")


# -- connections lost -------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["sink:before-copy", "sink:before-commit"])
def test_a_connection_lost_before_the_commit(store: TimescaleStore, pg_url: str, point: str) -> None:
    made = batch(candles(rows(4)), gap())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.faults, "point", lambda name: name == point and _terminate(pg_url))
        with pytest.raises(StoreUnavailable, match="PostgreSQL"):
            store.write(made)
    assert one(pg_url, "SELECT count(*) FROM candles_1m") == 0
    assert store.write(made) == 0
    assert one(pg_url, "SELECT count(*) FROM candles_1m") == 4


def _terminate(url: str) -> bool:
    fetch(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
          "WHERE datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip
    return True


class Unanswered:
    """A connection that is lost once COMMIT is sent: before or after the server has done it."""

    def __init__(self, connection: Any, done: bool) -> None:
        self._connection, self._done = connection, done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def execute(self, sql: str, *values: Any) -> str:
        if sql == "COMMIT":
            if self._done:
                await self._connection.execute(sql)
            self._connection.terminate()
            raise ConnectionResetError("connection lost")
        answer: str = await self._connection.execute(sql, *values)
        return answer


@pytest.mark.parametrize("done", [True, False], ids=["done", "not done"])
def test_a_commit_without_an_answer(
    store: TimescaleStore, pg_url: str, lite: SqliteStore, path: Path, done: bool
) -> None:
    first, made = batch(candles(rows(4)), seq=7), batch(candles(rows(9, 2)), ticks(TRADE, 3), seq=3, after="0-0")
    for each in (first, made):
        lite.write(each)
    store.write(first)
    store._connection = Unanswered(store._connection, done)
    with pytest.raises(StoreUnavailable):
        store.write(made)
    assert store.write(made) == 0  # not Fenced, though the cursors may have moved
    same(path, pg_url, ("candles_1m", "ticks_trades", "sink_cursors"))
    assert store.write(batch(candles(rows(4, 20)), seq=9)) == 0


def test_who_is_overtaken_after_an_unanswered_commit_is_fenced(store: TimescaleStore, pg_url: str) -> None:
    made = batch(candles(rows(4)))
    store._connection = Unanswered(store._connection, True)
    with pytest.raises(StoreUnavailable):
        store.write(made)
    successor = other(pg_url)
    successor.write(batch(candles(rows(4, 4)), seq=2))
    successor.close()
    with pytest.raises(Fenced):
        store.write(made)


def test_connections_cut_at_any_moment(store: TimescaleStore, pg_url: str, lite: SqliteStore, path: Path) -> None:
    """Each try of a batch is cut a little later than the one before, until one is through."""
    cut = 0
    for i in range(4):
        made = batch(candles(rows(600, 200 * i, revision=i)), ticks(TRADE, 50, 50 * i), seq=2 * i)
        lite.write(made)
        for attempt in range(60):
            timer = threading.Timer(0.001 * 1.3**attempt, _terminate, [pg_url])
            timer.start()
            try:
                store.write(made)
                break
            except StoreUnavailable:
                cut += 1
            finally:
                timer.cancel()
                timer.join()
        same(path, pg_url, ("candles_1m", "ticks_trades", "sink_cursors"))
    assert cut > 5


def test_a_cancelled_statement_is_tried_again(store: TimescaleStore, pg_url: str) -> None:
    blocker = other(pg_url)
    made = batch(candles(rows(4)))
    store.write(made)
    blocker._run(blocker._connection.execute("BEGIN; LOCK TABLE candles_1m"))
    found: list[BaseException] = []

    def write() -> None:
        try:
            store.write(batch(candles(rows(4, 9)), seq=2))
        except StoreUnavailable as error:
            found.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    cancel = "SELECT pg_cancel_backend(pid) AS done FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    until(lambda: fetch(pg_url, cancel))
    thread.join()
    blocker._run(blocker._connection.execute("ROLLBACK"))
    assert "canceling statement" in str(found[0])
    assert store.write(batch(candles(rows(4, 9)), seq=2)) == 0
    blocker.close()


def test_a_server_that_hangs_does_not_hold_the_stop(pg_url: str) -> None:
    stop = threading.Event()
    store = TimescaleStore(pg_url, stop=stop)
    store.open()
    store.write(batch(candles(rows(4))))
    server = store._connection.get_server_pid()
    os.kill(server, signal.SIGSTOP)
    try:
        stop.set()
        with pytest.raises(StoreUnavailable, match="has not answered until the stop"):
            store.write(batch(candles(rows(4, 9)), seq=2))
    finally:
        os.kill(server, signal.SIGCONT)
    store.close()
    again = other(pg_url)
    assert again.write(batch(candles(rows(4, 9)), seq=2)) == 0
    again.close()


# -- settings ---------------------------------------------------------------------------------


def test_the_name_is_of_the_database_and_holds_no_secret() -> None:
    names = [
        TimescaleStore(url).name
        for url in (
            "postgresql://a:secret@db/x", "postgres://b@DB:5432/x?schema=public", "postgresql://db:5433/x",
            "postgresql://db/y",
        )
    ]  # fmt: skip
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert names[0].startswith("postgresql:")
    assert "secret" not in f"{names} {TimescaleStore('postgresql://a:secret@db/x').where}"


def test_another_stores_url_is_refused() -> None:
    settings = Settings(tapeline=Tapeline(store="sqlite:///x.db"))
    with pytest.raises(ConfigError, match="sink-timescale writes postgresql://"):
        of(settings, threading.Event())


def test_a_user_a_password_a_database_a_server(postgres: PostgresServer, pg_url: str) -> None:
    def said_of(url: str, kind: type[TapelineError]) -> str:
        with pytest.raises(kind) as found:
            TimescaleStore(url).open()
        assert "\n" not in str(found.value)
        assert "sesame" not in str(found.value)
        return str(found.value)

    name = pg_url.rpartition("/")[2]
    assert "refuses the user" in said_of(postgres.url(name, user="nobody_here", password="sesame"), AuthError)
    assert "create it, or name another" in said_of(postgres.url("no_such_database"), ConfigError)
    assert "does not answer" in said_of("postgresql://127.0.0.1:1/x", StoreUnavailable)
    assert "no URL" in said_of("postgresql://u:sesame@127.0.0.1:99999/x", ConfigError)


def test_rights_that_are_missing(postgres: PostgresServer, pg_url: str, store: TimescaleStore) -> None:
    name, user = pg_url.rpartition("/")[2], f"u{os.getpid()}"
    postgres.sql(f"CREATE ROLE {user} LOGIN", name)
    url = postgres.url(name, user=user)
    try:
        with pytest.raises(ConfigError, match=r"permission denied for table schema_version; grant it"):
            TimescaleStore(url).open()
        postgres.sql(f"GRANT SELECT ON schema_version TO {user}", name)
        with pytest.raises(ConfigError, match=r"the user may not write candles, candles_1m, .*: grant it SELECT"):
            TimescaleStore(url).open()
        postgres.sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {user}", name)
        small = other(url)
        assert small.write(batch(candles(rows(4)), bars(fixed(2)))) == 0
        postgres.sql(f"REVOKE INSERT ON candles_1m FROM {user}", name)
        with pytest.raises(ConfigError, match="permission denied for table candles_1m"):
            small.write(batch(candles(rows(4)), seq=2))
        small.close()
    finally:
        postgres.sql(f"DROP OWNED BY {user}; DROP ROLE {user}", name)


def test_a_batch_may_be_empty(store: TimescaleStore) -> None:
    assert store.write(Batch()) == 0
    assert store.cursors() == {}
