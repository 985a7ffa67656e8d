"""Migrations: all or nothing, never backwards, and the columns that semantics §2 names."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.sink_sqlite.schema import Migration, migrate, migrations, version
from services.sink_sqlite.store import SqliteStore
from shared.errors import VersionError
from shared.frames import FEATURE_COLUMNS, STATE_COLUMNS
from shared.tables import CANDLE_COLUMNS, FIXED_COLUMNS, MESSAGE_TABLES, TICK_TABLES, MessageTable, TickTable

COLUMNS = """time ticker symbol open high low close volume trades ask_volume bid_volume unknown_volume cvd_open cvd_high
cvd_low cvd_close session_cvd_close vd vd_ratio book_imbalance price_pct divergence max_trade_size big_trades big_volume
sum_bid_depth sum_ask_depth sum_price_volume vwap avg_spread complete revision timestamp_out latency_ms"""


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    made = sqlite3.connect(":memory:", isolation_level=None)
    yield made
    made.close()


@pytest.mark.parametrize(("table", "key"), [("candles_1m", ["ticker", "time"]), ("candles_1s", ["symbol", "time"])])
def test_candle_tables(connection: sqlite3.Connection, table: str, key: list[str]) -> None:
    migrate(connection, "test")
    info = connection.execute(f"PRAGMA table_info({table})").fetchall()
    assert [column[1] for column in info] == COLUMNS.split() == list(CANDLE_COLUMNS)
    assert [c[1] for c in sorted(info, key=lambda c: c[5]) if c[5]] == key


def test_the_table_of_fixed_candles(connection: sqlite3.Connection) -> None:
    migrate(connection, "test")
    info = connection.execute("PRAGMA table_info(candles)").fetchall()
    assert [column[1] for column in info] == list(FIXED_COLUMNS)
    head = """exchange symbol timeframe timestamp_in open high low close volume trades vwap ask_volume bid_volume
    unknown_volume vd cvd_open cvd_high cvd_low cvd_close quoted_spread"""
    tail = ("complete", "revision", "timestamp_out", "latency_ms")
    assert list(FIXED_COLUMNS) == [*head.split(), *STATE_COLUMNS, *FEATURE_COLUMNS, *tail]
    key = ["exchange", "symbol", "timeframe", "timestamp_in"]
    assert [c[1] for c in sorted(info, key=lambda c: c[5]) if c[5]] == key
    assert {c[1] for c in info if c[2] == "INTEGER"} == {"trades", "complete", "revision"}
    view = connection.execute("PRAGMA table_info(features)").fetchall()
    assert [column[1] for column in view] == [*key, *FEATURE_COLUMNS]


@pytest.mark.parametrize("table", TICK_TABLES.values(), ids=lambda t: t.name)
def test_tick_tables(connection: sqlite3.Connection, table: TickTable) -> None:
    migrate(connection, "test")
    info = connection.execute(f"PRAGMA table_info({table.name})").fetchall()
    assert [column[1] for column in info] == list(table.columns)
    assert [c[1] for c in sorted(info, key=lambda c: c[5]) if c[5]] == [
        "bus",
        "partition",
        "entry_ms",
        "entry_seq",
        "row",
    ]


MESSAGES = [table for tables in MESSAGE_TABLES.values() for table in tables]
SQL_TYPES = {"text": "TEXT", "json": "TEXT", "time": "TEXT", "real": "REAL", "integer": "INTEGER", "boolean": "INTEGER"}


@pytest.mark.parametrize("table", MESSAGES, ids=lambda t: t.name)
def test_message_tables(connection: sqlite3.Connection, table: MessageTable) -> None:
    migrate(connection, "test")
    info = connection.execute(f"PRAGMA table_info({table.name})").fetchall()
    assert [(c[1], c[2], bool(c[3])) for c in info] == [(c.name, SQL_TYPES[c.sort], not c.null) for c in table.columns]
    assert tuple(c[1] for c in sorted(info, key=lambda c: c[5]) if c[5]) == table.key


def test_the_shape_that_readers_of_pressure_and_usage_know(connection: sqlite3.Connection) -> None:
    migrate(connection, "test")

    def indexes(table: str) -> dict[str, tuple[bool, list[str]]]:
        return {
            name: (bool(unique), [c for (c,) in connection.execute("SELECT name FROM pragma_index_info(?)", (name,))])
            for _, name, unique, *_ in connection.execute(f"PRAGMA index_list({table})")
        }

    of_pressure = indexes("pressure_metrics")
    assert of_pressure["idx_pressure_time"] == (False, ["time_window"])
    assert of_pressure["idx_pressure_strike"] == (False, ["strike", "option_type"])
    assert (True, ["underlying", "expiration", "strike", "option_type", "time_window"]) in of_pressure.values()
    assert indexes("usage_log")["idx_usage_date"] == (False, ["day"])
    every = [c[1] for c in connection.execute("PRAGMA table_xinfo(pressure_metrics)")]
    wanted = """strike option_type time_window bid_volume ask_volume pressure_ratio total_trades avg_trade_size
    dominant_side confidence created_at"""
    assert set(wanted.split()) <= set(every)
    view = [c[1] for c in connection.execute("PRAGMA table_info(usage)")]
    assert view == ["timestamp", "day", "feed", "events", "bytes", "cost"]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM candles WHERE timestamp_in >= '2023' ORDER BY timestamp_in",
        "SELECT * FROM candles WHERE exchange = 'x' AND symbol = 'B' AND timeframe = '1m' ORDER BY timestamp_in",
        "SELECT * FROM features WHERE exchange = 'x' AND symbol = 'B' AND timestamp_in >= '2023'",
        "SELECT * FROM ohlc_bars WHERE contract_id = 'x:B' AND timeframe_unit = 2 AND timeframe_value = 1 "
        "ORDER BY timestamp",
        "SELECT * FROM ohlc_bars WHERE timestamp >= '2023' ORDER BY timestamp",
        *(
            f"SELECT * FROM {table.name} WHERE {where} ORDER BY timestamp"
            for table in TICK_TABLES.values()
            for where in ("timestamp >= '2023'", "exchange = 'x' AND symbol = 'B' AND timestamp >= '2023'")
        ),
        "SELECT * FROM candles_1m WHERE time >= '2023' ORDER BY time",
        "SELECT * FROM candles_1m WHERE ticker = 'ES' AND time >= '2023' ORDER BY time",
        "SELECT * FROM candles_1s WHERE time >= '2023' ORDER BY time",
        "SELECT cvd_close FROM candles_1s WHERE ticker = 'ES' AND time <= '2023' ORDER BY time DESC LIMIT 1",
        "SELECT * FROM gaps WHERE start >= '2023' ORDER BY start",
        "SELECT * FROM late_trades WHERE ts_event >= '2023' ORDER BY ts_event",
        "SELECT * FROM pressure_metrics WHERE time_window >= '2023' ORDER BY time_window",
        "SELECT * FROM pressure_metrics WHERE underlying = 'NQ' AND time_window >= '2023' AND time_window < '2024' "
        "ORDER BY time_window",
        "SELECT * FROM pressure_rollups WHERE underlying = 'NQ' AND time_window >= '2023' ORDER BY time_window",
        "SELECT * FROM pressure_rollups ORDER BY time_window DESC LIMIT 20",
        "SELECT * FROM signals ORDER BY time_window DESC LIMIT 20",
        "SELECT * FROM signals WHERE underlying = 'NQ' ORDER BY time_window DESC LIMIT 20",
        "SELECT * FROM signals WHERE underlying = 'NQ' AND time_window >= '2023' ORDER BY time_window",
        "SELECT * FROM usage_log WHERE at >= '2023' ORDER BY at",
        "SELECT sum(cost) FROM usage WHERE day = '2023-12-25'",
        "SELECT day, feed, sum(bytes), sum(cost) FROM usage WHERE timestamp >= '2023'",
        "SELECT * FROM usage_daily WHERE feed = 'databento' ORDER BY day",
    ],
)
def test_time_queries_use_an_index(connection: sqlite3.Connection, sql: str) -> None:
    migrate(connection, "test")
    plan = " ".join(str(row[3]) for row in connection.execute("EXPLAIN QUERY PLAN " + sql))
    assert "USING INDEX" in plan
    assert "TEMP B-TREE" not in plan


def test_an_older_store_is_migrated(connection: sqlite3.Connection) -> None:
    first = migrations()[:1]
    assert migrate(connection, "test", first) == [1]
    more = (*first, Migration(2, "more", "-- two statements\nCREATE TABLE more (a);\nALTER TABLE gaps ADD COLUMN b;\n"))
    assert migrate(connection, "test", more) == [2]
    assert migrate(connection, "test", more) == []
    assert version(connection) == 2
    connection.execute("SELECT b FROM gaps")


def test_a_store_of_the_first_version_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    older = sqlite3.connect(path, isolation_level=None)
    migrate(older, "test", migrations()[:1])
    older.execute("INSERT INTO sink_cursors VALUES ('a', 'candles', 0, 5, '5-0')")
    older.close()
    store = SqliteStore(path)
    store.open()
    assert store.cursors() == {("a", "candles", 0): (5, "5-0")}
    assert version(store.connection()) == migrations()[-1].version >= 3
    store.close()


def test_a_failing_migration_leaves_the_older_store(connection: sqlite3.Connection) -> None:
    migrate(connection, "test", migrations()[:1])
    bad = (*migrations()[:1], Migration(2, "bad", "CREATE TABLE more (a);\nALTER TABLE none ADD COLUMN b;\n"))
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        migrate(connection, "test", bad)
    assert version(connection) == 1
    assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'more'").fetchall()


def test_a_newer_store_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = SqliteStore(path)
    store.open()
    store.connection().execute("INSERT INTO schema_version VALUES (99, 'future', '')")
    store.close()
    with pytest.raises(VersionError, match=r"s\.db is of schema version 99, .* upgrade Tapeline") as error:
        SqliteStore(path).open()
    assert "\n" not in str(error.value)
