"""The statements that the SQLite store writes with, made from the tables' columns once."""

from __future__ import annotations

from collections.abc import Sequence

from shared.frames import FEATURE_COLUMNS, STATE_COLUMNS
from shared.tables import (
    DEAD_COLUMNS,
    GAP_COLUMNS,
    GAP_KEY,
    HISTORY_COLUMNS,
    LATE_COLUMNS,
    LATE_KEY,
    MESSAGE_TABLES,
    PLACE_COLUMNS,
    TABLES,
    TICK_TABLES,
    MessageTable,
    Table,
)
from shared.timeframes import UNITS

_MESSAGES = [table for tables in MESSAGE_TABLES.values() for table in tables]
_PROCESSING = frozenset(("revision", "timestamp_out", "latency_ms"))


def _upsert(table: str, columns: Sequence[str], key: Sequence[str], where: str = "") -> str:
    sets = ", ".join(f'"{c}" = excluded."{c}"' for c in columns if c not in key)
    return f"{_insert(table, columns, key)} SET {sets} {where}"


def _insert(table: str, columns: Sequence[str], key: Sequence[str]) -> str:
    names = ", ".join(f'"{c}"' for c in columns)
    marks = ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({names}) VALUES ({marks}) ON CONFLICT ({', '.join(key)}) DO UPDATE"  # noqa: S608


def _mend_candles(table: Table) -> str:
    """Features and states, which a tape that begins later knows less of, are no reason to write."""
    values = {
        c: f"coalesce(excluded.{c}, {table.name}.{c})" if c in HISTORY_COLUMNS else f"excluded.{c}"
        for c in table.columns
        if c not in table.key
    }
    uncompared = _PROCESSING | {*FEATURE_COLUMNS, *STATE_COLUMNS}
    return _mend(table.name, table.columns, table.key, values, uncompared, "trades")


def _mend_messages(table: MessageTable) -> str:
    values = {c: f"excluded.{c}" for c in table.names if c not in table.key}
    trades = "total_trades" if "total_trades" in table.names else ""
    return _mend(table.name, table.names, table.key, values, _PROCESSING, trades)


def _mend(
    name: str,
    columns: Sequence[str],
    key: Sequence[str],
    values: dict[str, str],
    uncompared: frozenset[str],
    trades: str,
) -> str:
    """See Batch.mend: the same again changes nothing, not even a revision.

    A part of an incomplete row does not replace more of it; `trades` is the column that tells, if there is one.
    """
    differs = " OR ".join(f"{value} IS NOT {name}.{c}" for c, value in values.items() if c not in uncompared)
    values = values | {"revision": f"max(excluded.revision, {name}.revision + 1)"}
    sets = ", ".join(f"{c} = {value}" for c, value in values.items())
    more = f"AND (excluded.complete OR excluded.{trades} >= {name}.{trades}) " if trades else ""
    return f"{_insert(name, columns, key)} SET {sets} WHERE excluded.complete >= {name}.complete {more}AND ({differs})"


# Table -> statement; what a mending batch may replace has its own.
WRITE = {
    **{t.name: _upsert(t.name, t.columns, t.key, f"WHERE excluded.revision >= {t.name}.revision")
       for t in TABLES.values()},
    **{t.name: _upsert(t.name, t.columns, PLACE_COLUMNS) for t in TICK_TABLES.values()},
    **{t.name: _upsert(t.name, t.names, t.key, f"WHERE excluded.{t.order} >= {t.name}.{t.order}") for t in _MESSAGES},
    "late_trades": _upsert("late_trades", LATE_COLUMNS, LATE_KEY),
    "gaps": _upsert("gaps", GAP_COLUMNS, GAP_KEY),
}  # fmt: skip
MEND = {
    **{t.name: _mend_candles(t) for t in TABLES.values()},
    **{t.name: _mend_messages(t) for t in _MESSAGES if t.order == "revision"},
}
GAPS = WRITE["gaps"]
CURSORS = _upsert("sink_cursors", ("bus", "topic", "partition", "seq", "stream_id"), ("bus", "topic", "partition"))
DEAD = (
    f"INSERT INTO dead_letters ({', '.join(DEAD_COLUMNS)}) "  # noqa: S608
    f"VALUES ({', '.join('?' * len(DEAD_COLUMNS))}) ON CONFLICT DO NOTHING"
)

# A trigger would do the same, and was measured to take twice as long.
_BARS = f"""INSERT INTO ohlc_bars
    (contract_id, timestamp, open, high, low, close, volume, timeframe_unit, timeframe_value)
SELECT exchange || ':' || symbol, timestamp_in, open, high, low, close, volume,
    instr('{"".join(UNITS)}', substr(timeframe, -1)), CAST(timeframe AS INTEGER)
FROM candles WHERE {{}}
ON CONFLICT (contract_id, timeframe_unit, timeframe_value, timestamp) DO UPDATE SET
    open = excluded.open, high = excluded.high, low = excluded.low, close = excluded.close, volume = excluded.volume"""  # noqa: S608
BARS_OF_NEW = _BARS.format("rowid > ?")
BARS_OF_KEY = _BARS.format(" AND ".join(f"{column} = ?" for column in TABLES["candle"].key))

FORGET_LATE = "DELETE FROM late_trades WHERE bus = ? AND partition = ? AND bus_seq >= ?"
FORGET_DEAD = "DELETE FROM dead_letters WHERE bus = ? AND partition = ? AND seq >= ? AND topic = ?"
FORGET_TICKS = [
    f"DELETE FROM {t.name} WHERE bus = ? AND partition = ? AND (entry_ms, entry_seq) > (?, ?)"  # noqa: S608
    for t in TICK_TABLES.values()
]
FORGET_DEAD_BEHIND = """DELETE FROM dead_letters WHERE bus = ? AND partition = ? AND
    (CAST(stream_id AS INTEGER), CAST(substr(stream_id, instr(stream_id, '-') + 1) AS INTEGER)) > (?, ?)
    AND topic = ?"""
