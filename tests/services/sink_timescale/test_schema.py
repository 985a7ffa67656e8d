"""The schema of the PostgreSQL store: SQLite's tables, migrations that any number may run at once, and views."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import asyncpg
import pytest

from services.sink_sqlite.schema import migrate as migrate_sqlite
from services.sink_timescale.schema import Migration, migrate, migrations, pending, version
from services.sink_timescale.statements import INTO, WRITTEN
from services.sink_timescale.store import TimescaleStore
from shared.errors import ConfigError, VersionError
from shared.postgres import connect, run
from shared.tables import TICK_TABLES
from tests.postgres import PostgresServer
from tests.services.sink_sqlite.tape import bars, candles, fixed, rows
from tests.services.sink_timescale.tables import batch, fetch, one

PRIMARY = """SELECT a.attname FROM pg_index i, unnest(i.indkey) WITH ORDINALITY k (n, at), pg_attribute a
    WHERE i.indrelid = $1::text::regclass AND i.indisprimary AND a.attrelid = i.indrelid AND a.attnum = k.n
    ORDER BY k.at"""


@pytest.fixture
def url(pg_url: str) -> str:
    """Of a migrated database."""
    store = TimescaleStore(pg_url)
    store.open()
    store.close()
    return pg_url


@pytest.fixture(scope="module")
def url_once(postgres_servers: dict[str, PostgresServer]) -> Iterator[str]:
    """A migrated and empty database for those that only look at it."""
    yield from _kept(postgres_servers, "looked_at")


@pytest.fixture(scope="module")
def filled(postgres_servers: dict[str, PostgresServer]) -> Iterator[str]:
    """One with candles."""
    for url in _kept(postgres_servers, "filled"):
        store = TimescaleStore(url)
        store.open()
        weeks = bars(fixed(8, seconds=604_800))
        store.write(batch(candles(rows(2000)), bars(fixed(2000)), bars(fixed(300, seconds=15)), weeks))
        store.close()
        fetch(url, "ANALYZE")
        yield url


def _kept(servers: dict[str, PostgresServer], name: str) -> Iterator[str]:
    server = servers.setdefault("16", PostgresServer("16")).start()
    server.sql(f"CREATE DATABASE {name}")
    store = TimescaleStore(server.url(name))
    store.open()
    store.close()
    yield server.url(name)
    server.start()
    server.sql(f"DROP DATABASE {name} WITH (FORCE)")


def on(url: str, work: Any) -> Any:
    """What a coroutine of a connection gives."""

    async def done() -> Any:
        connection = await connect(url)
        try:
            return await work(connection)
        finally:
            await connection.close()

    return run(done())


@pytest.mark.parametrize("postgres", ["18"], indirect=True)
def test_tables_columns_and_keys_are_those_of_sqlite(url: str) -> None:
    lite = sqlite3.connect(":memory:", isolation_level=None)
    migrate_sqlite(lite, "here")
    tables = [r[0] for r in lite.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
    assert set(WRITTEN) < set(tables)
    ticks = {table.name for table in TICK_TABLES.values()}
    for table in set(tables) - {"schema_version"}:
        columns = lite.execute(f"PRAGMA table_xinfo({table})").fetchall()
        got = fetch(url, "SELECT column_name, data_type, is_nullable, collation_name FROM information_schema.columns "
                    "WHERE table_schema = 'public' AND table_name = $1 ORDER BY ordinal_position", table)  # fmt: skip
        assert [r["column_name"] for r in got] == [c[1] for c in columns], table
        if table in WRITTEN:
            key = [c[1] for c in sorted(columns, key=lambda c: c[5]) if c[5]]
            assert primary(url, table) == [*key, *(["timestamp"] if table in ticks else [])], table
            lax = {r["column_name"] for r in got if r["is_nullable"] == "YES"}
            assert lax == {c[1] for c in columns if not (c[3] or c[5])}, table
        assert {r["collation_name"] for r in got if r["data_type"] == "text"} <= {"C"}, table
    lite.close()


def primary(url: str, table: str) -> list[str]:
    return [row["attname"] for row in fetch(url, PRIMARY, table)]


def test_the_conflict_targets_are_the_keys(url_once: str) -> None:
    for name, into in INTO.items():
        key = ", ".join(f'"{column}"' for column in primary(url_once, name))
        assert f"ON CONFLICT ({key}) DO UPDATE" in into.write


def test_an_older_schema_is_migrated_and_keeps_its_rows(pg_url: str) -> None:
    def older(count: int) -> Any:
        return lambda connection: migrate(connection, "here", migrations()[:count])

    assert on(pg_url, older(1)) == [1]
    assert on(pg_url, older(1)) == []
    columns = "time, ticker, symbol, volume, trades, complete, revision, timestamp_out, latency_ms"
    fetch(pg_url, f"INSERT INTO candles_1m ({columns}) VALUES (now(), 'ES', 'ESH4', 1, 1, true, 0, now(), 1)")
    assert [step.version for step in on(pg_url, lambda c: pending(c, "here"))] == [2, 3, 4]
    store = TimescaleStore(pg_url)
    store.open()
    store.close()
    assert on(pg_url, version) == migrations()[-1].version
    assert one(pg_url, "SELECT ticker FROM candles_1m") == "ES"


def test_a_newer_schema_is_refused_in_one_line(url: str) -> None:
    fetch(url, "INSERT INTO schema_version (version, name) VALUES (9999, 'later')")
    with pytest.raises(VersionError, match=r"^PostgreSQL 127\S+ is of schema version 9999, .*: upgrade Tapeline") as it:
        TimescaleStore(url).open()
    assert "\n" not in str(it.value)


def test_a_failing_step_leaves_everything_as_it_was(pg_url: str) -> None:
    steps = [*migrations()[:2], Migration(3, "wrong", "CREATE TABLE fine (x integer); SELECT no_such_column FROM fine")]
    with pytest.raises((ConfigError, asyncpg.PostgresError)):
        on(pg_url, lambda connection: migrate(connection, "here", steps))
    assert one(pg_url, "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == 0


def test_tables_of_another_program_are_left_alone(pg_url: str) -> None:
    fetch(pg_url, "CREATE TABLE ohlc_bars (id integer)")
    with pytest.raises(ConfigError, match=r'holds what another program has made .*"ohlc_bars".* a database of'):
        TimescaleStore(pg_url).open()
    assert one(pg_url, "SELECT to_regclass('candles_1m')") is None


def test_two_migrate_at_once(pg_url: str) -> None:
    """Each with a connection of its own; one of them held up in the middle."""

    async def both() -> list[list[int]]:
        first, second, watch = [await connect(pg_url) for _ in range(3)]
        slow = [*migrations()[:3], Migration(4, "slow", migrations()[3].sql + "; SELECT pg_advisory_xact_lock(7)")]
        try:
            await watch.execute("SELECT pg_advisory_lock(7)")
            one = asyncio.ensure_future(migrate(first, "here", slow))
            await _waiting(watch, 1)
            two = asyncio.ensure_future(migrate(second, "here"))
            await _waiting(watch, 2)
            await watch.execute("SELECT pg_advisory_unlock(7)")
            return [await one, await two]
        finally:
            for connection in (first, second, watch):
                await connection.close()

    assert run(both()) == [[1, 2, 3, 4], []]
    assert one(pg_url, "SELECT count(*) FROM schema_version") == 4


async def _waiting(watch: Any, count: int) -> None:
    asked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    async with asyncio.timeout(20):
        while await watch.fetchval(asked) < count:
            await asyncio.sleep(0)


# -- views ------------------------------------------------------------------------------------


def test_the_newest_of_every_name(filled: str) -> None:
    got = fetch(filled, "SELECT * FROM v_latest ORDER BY source, name")
    assert [(r["source"], r["exchange"], r["name"], r["symbol"], r["timeframe"]) for r in got] == [
        ("candles", "binance-futures", "binance-futures:BTCUSDT", "BTCUSDT", "15s"),
        ("candles", "deribit", "deribit:BTC-PERPETUAL", "BTC-PERPETUAL", "15s"),
        ("candles_1m", "", "6E", "6EH4", "1m"),
        ("candles_1m", "", "ES", "ESH4", "1m"),
    ]
    assert got[3]["time"] == one(filled, "SELECT max(time) FROM candles_1m WHERE ticker = 'ES'")
    end = "SELECT max(timestamp_in) + interval '15 seconds' FROM candles WHERE symbol = 'BTCUSDT' AND timeframe = '15s'"
    assert got[0]["time"] == one(filled, end)
    plan = str(fetch(filled, "EXPLAIN SELECT * FROM v_latest"))
    assert "Seq Scan" not in plan


def test_bars_as_an_orm_reads_them(filled: str) -> None:
    where = "contract_id = 'deribit:BTC-PERPETUAL' AND timeframe_unit = 2 AND timeframe_value = 1"
    got = fetch(filled, f"SELECT * FROM ohlc_bars WHERE {where} ORDER BY timestamp DESC LIMIT 5")
    held = fetch(filled, "SELECT * FROM candles WHERE symbol = 'BTC-PERPETUAL' AND timeframe = '1m' "
                 "ORDER BY timestamp_in DESC LIMIT 5")  # fmt: skip
    for bar, candle in zip(got, held, strict=True):
        assert bar["timestamp"] == candle["timestamp_in"]
        assert [bar[n] for n in ("open", "high", "low", "close", "volume")] == [
            candle[n] for n in ("open", "high", "low", "close", "volume")
        ]
    units = fetch(filled, "SELECT DISTINCT timeframe_unit, timeframe_value FROM ohlc_bars ORDER BY 1, 2")
    assert [tuple(row.values()) for row in units] == [(1, 15), (2, 1), (5, 1)]
    # Its numbers fit a 32 bit integer and are one bar's each, the next bar's the next.
    ids = [r["id"] for r in fetch(filled, f"SELECT id FROM ohlc_bars WHERE {where} ORDER BY timestamp")]
    assert all(0 <= number < 2**31 for number in ids)
    assert [(b - a) % 2**31 for a, b in pairwise(ids)] == [1] * (len(ids) - 1)
    plan = str(fetch(filled, f"EXPLAIN SELECT * FROM ohlc_bars WHERE {where} AND timestamp >= '2023-12-26' "
                     "ORDER BY timestamp DESC LIMIT 5"))  # fmt: skip
    assert "candles_bars" in plan
    assert "Sort" not in plan


def test_views_begin_with_their_time(url_once: str) -> None:
    for view in ("v_candles", "v_pressure", "v_signals", "v_latest"):
        got = fetch(url_once, "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = $1 "
                    "ORDER BY ordinal_position", view)  # fmt: skip
        assert tuple(got[0].values()) == ("time", "timestamp with time zone"), view


@pytest.mark.parametrize(
    ("table", "where"),
    [
        ("candles_1m", "ticker = 'ES' AND time > now()"),
        ("candles_1m", "time > now()"),
        ("candles_1s", "ticker = 'ES' AND time < now() ORDER BY time DESC LIMIT 1"),
        ("candles", "timestamp_in > now()"),
        ("ticks_trades", "exchange = 'x' AND symbol = 'y' AND timestamp > now()"),
        ("ticks_trades", "bus = 'a' AND partition = 0 AND (entry_ms, entry_seq) > (1, 2)"),
        ("pressure_metrics", "underlying = 'NQ' AND time_window > now()"),
        ("signals", "time_window > now()"),
        ("late_trades", "symbol = 'ESH4' AND ts_event > now()"),
        ("gaps", "start > now()"),
        ("usage_log", "day = '2023-12-25'"),
    ],
)
def test_what_readers_ask_has_an_index(url_once: str, table: str, where: str) -> None:
    plan = str(on(url_once, lambda c: _plan(c, f"SELECT * FROM {table} WHERE {where}")))
    assert "Index" in plan
    assert "Filter" not in plan


async def _plan(connection: Any, sql: str) -> list[Any]:
    async with connection.transaction():
        await connection.execute("SET LOCAL enable_seqscan = off")
        return [row[0] for row in await connection.fetch(f"EXPLAIN {sql}")]
