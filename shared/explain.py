"""Why a stored row is what it is: the trades behind it where the store has them, the arithmetic where it is a score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from shared.errors import ConfigError
from shared.frames import NS, iso, ns_of
from shared.stores import read_rows
from shared.tables import MESSAGE_TABLES, TABLES, time_column
from shared.timeframes import seconds_of

Row = dict[str, Any]
SIGNALS = MESSAGE_TABLES["signal"][0]
EXPLAINED = (*(table.name for table in TABLES.values()), MESSAGE_TABLES["pressure"][0].name, SIGNALS.name)
_CANDLES = {table.name: table for table in TABLES.values()}


def find(url: str, table: str, where: Mapping[str, str], last: int) -> list[Row]:
    """The newest `last` rows of a table that match, in the order of its key.

    Raises ConfigError for a table that is not explained, or a column that it has not.
    """
    if table not in EXPLAINED:
        raise ConfigError(f"no rows of '{table}' are explained; there are: {', '.join(EXPLAINED)}")
    rows = read_rows(url, table, last=1)
    unknown = [column for column in where if rows and column not in rows[0]]
    if unknown:
        raise ConfigError(f"{table} has no column '{unknown[0]}'; it has: {', '.join(rows[0])}")
    return read_rows(url, table, {column: _typed(rows, column, text) for column, text in where.items()}, last=last)


def _typed(rows: list[Row], column: str, text: str) -> Any:
    """A value as the column holds it."""
    if rows and isinstance(rows[0][column], int | float):
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"{column} wants a number, not '{text}'") from None
    return text


def explain(url: str, table: str, row: Row) -> dict[str, Any]:
    """What is known of one row: `row`, and `trades` behind it with `recount`; of a signal its `window` and `score`."""
    found: dict[str, Any] = {"table": table, "row": row}
    if table in _CANDLES:
        start, end = _window(table, row)
        symbol = {"symbol": row["symbol"]} | ({"exchange": row["exchange"]} if "exchange" in row else {})
        trades = read_rows(url, "ticks_trades", symbol, since=iso(start), until=iso(end))
        trades.sort(key=lambda t: t["timestamp_ns"])
        found |= {"trades": trades, "recount": recount(row, trades) if trades else None}
    elif table == SIGNALS.name:
        key = {column: row[column] for column in MESSAGE_TABLES["pressure"][0].key}
        found |= {"window": next(iter(read_rows(url, "pressure_metrics", key)), None), "score": score(row)}
    return found


def _window(table: str, row: Row) -> tuple[int, int]:
    """[start, end) of a candle, ns."""
    at = ns_of(row[time_column(table)])
    if table == "candles_1m":
        return at - 60 * NS, at
    return at, at + NS * (seconds_of(row["timeframe"]) if "timeframe" in row else 1)


def recount(row: Row, trades: list[Row]) -> dict[str, dict[str, Any]]:
    """Column -> what the row says, what its stored trades give, and whether these agree."""
    prices = [t["price"] for t in trades if t["price"] is not None]
    counted: dict[str, Any] = {
        "trades": len(trades),
        "volume": math.fsum(t["amount"] or 0.0 for t in trades),
        "high": max(prices, default=None),
        "low": min(prices, default=None),
    }
    return {
        name: {"stored": row[name], "counted": value, "agrees": _same(row[name], value)}
        for name, value in counted.items()
    }


def _same(a: Any, b: Any) -> bool:
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9))


def score(row: Row) -> list[str]:
    """The arithmetic of a signal's score, a line for each step; [] where a plug-in made it."""
    if row["raw"] is None:
        return []

    def n(name: str) -> str:
        return "undefined" if row[name] is None else f"{row[name]:.3f}"

    factor = row["cluster_factor"]
    return [
        f"raw {n('raw')} = 0.4 x significance {n('significance')} + 0.3 x trend {n('trend')}"
        f" + 0.2 x concentration {n('concentration')} + 0.1 x persistence {n('persistence')}",
        f"base {n('base')}: z {n('z')}, percentile {n('percentile')}; of volume z {n('z_volume')}, "
        f"percentile {n('volume_percentile')}, 95 % of {n('volume_95')}",
        f"baseline {row['baseline']} of {row['baseline_size']} windows",
        f"market maker {n('market_maker')}: above 0.3 is rejected, above 0.21 watched",
        f"cluster of {row['cluster_size']}: x {factor:g}",
        f"score {n('score')} = clamp((0.5 x {n('raw')} + 0.5 x {n('base')}) x (1 - 0.5 x {n('market_maker')})"
        f" x {factor:g}, 0, 1)",
        f"types: {', '.join(json.loads(row['types']) or [row['type']])}",
    ]
