"""Views: of each table the rows that count, and the questions that are asked most.

Tables are only appended to, so a key may be there several times: `v_<table>_dedup` shows each once, as the other
stores hold it.
"""

from __future__ import annotations

from services.sink_bigquery.clients import Target
from services.sink_bigquery.tables import DERIVED, INSTANT, INTEGER, LAYOUTS, REAL, STORED_AT, TEXT, Layout
from shared.frames import FEATURE_COLUMNS
from shared.tables import TABLES
from shared.timeframes import UNITS

_BARS = TABLES["candle"].key
# Of what a stage makes: from the end of its window to the row, and from the row to its batch in this store.
_STAGES = {
    "candles": "candles", "candles_1m": "candles_1m", "candles_1s": "candles_1s", "pressure": "pressure_metrics",
    "signals": "signals",
}  # fmt: skip


def newest_rows(source: str, layout: Layout, columns: tuple[str, ...] = (), filters: str = "") -> str:
    """SELECT of the rows that count. `filters` must not tell rows of one key apart."""
    direction = "ASC" if layout.first else "DESC"
    order = f"`{layout.order}` DESC, " if layout.order else ""
    # BigQuery partitions by no FLOAT64; as text, equal numbers are equal.
    key = ", ".join(f"CAST(`{c}` AS STRING)" if layout.type_of(c) == REAL else f"`{c}`" for c in layout.key)
    derived = DERIVED.get(layout.name, {})
    names = ", ".join(
        f"`{derived[c]}` AS `{c}`" if c in derived else f"`{c}`" for c in columns or (*layout.names, *derived)
    )
    where = f" WHERE {filters}" if filters else ""
    place = f"ROW_NUMBER() OVER (PARTITION BY {key} ORDER BY {order}{STORED_AT} {direction}) AS place"
    return f"SELECT {names} FROM (SELECT *, {place} FROM {source}{where}) WHERE place = 1"  # noqa: S608


def types_of(layout: Layout) -> dict[str, str]:
    """Columns of a table as they are shown, and their types."""
    derived = {c: layout.type_of(of) for c, of in DERIVED.get(layout.name, {}).items()}
    return {name: layout.type_of(name) for name in layout.names} | derived


def _dedup(name: str) -> str:
    return f"v_{name}_dedup"


def view_sql(name: str, target: Target) -> str:
    """The query of a view."""
    return VIEWS[name].replace("{", f"`{target.project}.{target.dataset}.").replace("}", "`")


def _latency() -> str:
    parts = [
        f"SELECT '{stage}' AS stage, latency_ms FROM {{v_{table}_dedup}}"  # noqa: S608
        for stage, table in _STAGES.items()
    ]
    parts += [
        f"SELECT 'store {stage}', TIMESTAMP_DIFF({STORED_AT}, timestamp_out, MICROSECOND) / 1000 FROM {{{table}}}"  # noqa: S608
        for stage, table in _STAGES.items()
    ]
    marks = ", ".join(f"APPROX_QUANTILES(latency_ms, 100)[OFFSET({p})] AS p{p}_ms" for p in (50, 95, 99))
    return (
        f"SELECT stage, COUNT(*) AS samples, AVG(latency_ms) AS avg_ms, {marks} FROM ({' UNION ALL '.join(parts)}) "  # noqa: S608
        "GROUP BY stage"
    )


def _bars() -> str:
    units = " ".join(f"WHEN '{unit}' THEN {i + 1}" for i, unit in enumerate(UNITS))
    return (
        "SELECT CONCAT(exchange, ':', symbol) AS contract_id, timestamp_in AS timestamp, "  # noqa: S608
        "open, high, low, close, volume, "
        f"CASE SUBSTR(timeframe, -1) {units} END AS timeframe_unit, "
        "CAST(SUBSTR(timeframe, 1, LENGTH(timeframe) - 1) AS INT64) AS timeframe_value FROM {v_candles_dedup}"
    )


# Name -> query, in which {table} is a table or view of the dataset; each after those that it reads.
VIEWS: dict[str, str] = {_dedup(name): newest_rows(f"{{{name}}}", layout) for name, layout in LAYOUTS.items()}
VIEWS |= {
    "features": (
        f"SELECT {', '.join((*_BARS, *FEATURE_COLUMNS))} FROM {{v_candles_dedup}} WHERE timeframe IN ('15s', '1m')"  # noqa: S608
    ),
    "ohlc_bars": _bars(),
    "usage": (
        "SELECT `at` AS timestamp, day, feed, events, bytes, cost_usd AS cost FROM {v_usage_log_dedup}"
    ),
    "late_counts": (
        "SELECT symbol, ticker, COUNT(*) AS trades, SUM(size) AS volume, MIN(ts_event) AS first, MAX(ts_event) AS last "
        "FROM {v_late_trades_dedup} GROUP BY symbol, ticker"
    ),
    # The last price of each symbol and the one before it of the same source: trades, or the closes of minutes.
    "v_latest_price": (
        "SELECT exchange, symbol, `at`, source, price, previous_price, price - previous_price AS price_change FROM ("
        "SELECT *, LAG(price) OVER (PARTITION BY exchange, symbol, source ORDER BY `at`, place) AS previous_price, "
        "ROW_NUMBER() OVER (PARTITION BY exchange, symbol ORDER BY `at` DESC, source DESC, place DESC) AS newest FROM ("
        "SELECT exchange, symbol, 'trades' AS source, timestamp AS `at`, timestamp_ns AS place, price "
        "FROM {ticks_trades} WHERE price IS NOT NULL "
        "UNION ALL SELECT exchange, symbol, 'candles', TIMESTAMP_ADD(timestamp_in, INTERVAL 1 MINUTE), 0, close "
        "FROM {v_candles_dedup} WHERE timeframe = '1m' AND close IS NOT NULL AND trades > 0)) WHERE newest = 1"
    ),
    "v_volume_by_minute": (
        "SELECT exchange, symbol, timestamp_in AS minute, volume, trades, ask_volume, bid_volume, unknown_volume, vd "
        "FROM {v_candles_dedup} WHERE timeframe = '1m'"
    ),
    "v_latency": _latency(),
}  # fmt: skip


def _typed(table: str, *columns: str, **others: str) -> dict[str, str]:
    return {column: LAYOUTS[table].type_of(column) for column in columns} | others


_PRICES = dict.fromkeys(("price", "previous_price", "price_change"), REAL)
# Columns and types of the views, and by which their rows are ordered (where shared.stores does not say it).
VIEW_TYPES = {_dedup(name): types_of(layout) for name, layout in LAYOUTS.items()} | {
    "features": _typed("candles", *_BARS, *FEATURE_COLUMNS),
    "ohlc_bars": {
        "contract_id": TEXT, "timestamp": INSTANT,
        **_typed("candles", "open", "high", "low", "close", "volume", timeframe_unit=INTEGER, timeframe_value=INTEGER),
    },
    "usage": {
        "timestamp": INSTANT, **_typed("usage_log", "day", "feed", "events", "bytes", cost=REAL),
    },
    "late_counts": _typed("late_trades", "symbol", "ticker", trades=INTEGER, volume=REAL, first=INSTANT, last=INSTANT),
    "v_latest_price": {"exchange": TEXT, "symbol": TEXT, "at": INSTANT, "source": TEXT, **_PRICES},
    "v_volume_by_minute": _typed(
        "candles", "exchange", "symbol", "volume", "trades", "ask_volume", "bid_volume", "unknown_volume", "vd",
        minute=INSTANT,
    ),
    "v_latency": {
        "stage": TEXT, "samples": INTEGER, **dict.fromkeys(("avg_ms", "p50_ms", "p95_ms", "p99_ms"), REAL),
    },
}  # fmt: skip
VIEW_KEYS = {_dedup(name): layout.key for name, layout in LAYOUTS.items()} | {
    "late_counts": ("symbol", "ticker"),
    "v_latest_price": ("exchange", "symbol"),
    "v_volume_by_minute": ("exchange", "symbol", "minute"),
}
