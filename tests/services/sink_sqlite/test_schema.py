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
from shared.tables import CANDLE_COLUMNS, FIXED_COLUMNS, TICK_TABLES, TickTable

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
    assert version(store.connection()) == migrations()[-1].version >= 2
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
