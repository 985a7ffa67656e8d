"""The tables of a store: their keys and columns, the same in every store, in the stores' column order.

What a store adds of its own is how it writes an instant (text, or a time type) and a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from shared.frames import (
    BOOK,
    CANDLE,
    FEATURE_COLUMNS,
    FIXED,
    LIQUIDATION,
    NS,
    OPTION,
    STATE_COLUMNS,
    TICKER,
    TRADE,
    Rows,
)

_OUT = ("timestamp_out", "latency_ms")


@dataclass(frozen=True, slots=True)
class Table:
    """A candle table.

    `time` is the column of a row's `time_ns`, `names` the columns of its frame's name pair;
    `to_end_ns`: from its time to the window's end, None where that is the row's timeframe.
    """

    name: str
    key: tuple[str, ...]
    time: str
    names: tuple[str, str]
    columns: tuple[str, ...]
    to_end_ns: int | None

    @property
    def plain(self) -> tuple[str, ...]:
        """Columns that are the row's own fields, as they are."""
        return tuple(c for c in self.columns if c not in (*self.names, self.time, "timeframe", *_OUT))

    def end_ns(self, rows: Rows) -> Rows:
        """End of each row's window, ns."""
        times: Rows = rows["time_ns"]
        return times + (rows["timeframe_sec"] * NS if self.to_end_ns is None else self.to_end_ns)


def _fields(names: tuple[str, ...] | None) -> tuple[str, ...]:
    return tuple(n for n in names or () if n not in ("time_ns", "timeframe_sec", "name", "timestamp_out_ns"))


CANDLE_COLUMNS = ("time", "ticker", "symbol", *_fields(CANDLE.names), *_OUT)
FIXED_COLUMNS = ("exchange", "symbol", "timeframe", "timestamp_in", *_fields(FIXED.names), *_OUT)
_ROLLING = ("ticker", "symbol")

# Frame kind -> its table.
TABLES = {
    "candle_1m": Table("candles_1m", ("ticker", "time"), "time", _ROLLING, CANDLE_COLUMNS, 0),
    "candle_1s": Table("candles_1s", ("symbol", "time"), "time", _ROLLING, CANDLE_COLUMNS, NS),
    "candle": Table(
        "candles", ("exchange", "symbol", "timeframe", "timestamp_in"), "timestamp_in", ("exchange", "symbol"),
        FIXED_COLUMNS, None,
    ),
}  # fmt: skip
# These come from all that went before, so a row that was computed again over a short stretch may lack them.
HISTORY_COLUMNS = frozenset(
    ("cvd_open", "cvd_high", "cvd_low", "cvd_close", "session_cvd_close", *STATE_COLUMNS, *FEATURE_COLUMNS)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TickTable:
    """A table of raw records. Its key is the place on the bus: equal ticks are no duplicates."""

    name: str
    columns: tuple[str, ...]


LATE_COLUMNS = (
    "bus", "partition", "bus_seq", "row", "ticker", "symbol", "ts_event", "ts_event_ns", "ts_recv_ns",
    "price", "size", "side", "watermark_ns",
)  # fmt: skip
LATE_KEY = LATE_COLUMNS[:4]
GAP_COLUMNS = ("feed", "symbols", "start_ns", "end_ns", "start", "end", "reason")
GAP_KEY = ("feed", "start_ns", "end_ns", "symbols")
DEAD_COLUMNS = (
    "at", "bus", "topic", "partition", "seq", "stream_id", "table_name", "row_number", "reason", "row",
)  # fmt: skip
DEAD_KEY = ("bus", "topic", "partition", "stream_id", "table_name", "row_number")
PLACE_COLUMNS = ("bus", "partition", "entry_ms", "entry_seq", "row")
_TICK_HEAD = ("timestamp", "timestamp_ns", "local_timestamp_ns", "exchange", "symbol")
_BEST = ("bid_price", "bid_amount", "ask_price", "ask_amount")


def _ticks(name: str, *columns: str) -> TickTable:
    return TickTable(name, (*_TICK_HEAD, *columns, *PLACE_COLUMNS))


# Kind of a tick row -> its table.
TICK_TABLES = {
    TRADE: _ticks("ticks_trades", "price", "amount", "side", "sequence", *_BEST),
    BOOK: _ticks("ticks_book_snapshots", "depth", *_BEST, "book_imbalance_5", "bids", "asks"),
    TICKER: _ticks(
        "ticks_derivative_ticker", "last_price", "open_interest", "funding_rate", "predicted_funding_rate",
        "funding_timestamp", "mark_price", "index_price",
    ),
    LIQUIDATION: _ticks("ticks_liquidations", "price", "amount", "side"),
    OPTION: _ticks(
        "ticks_options_chain", "option_type", "strike", "expiration", "underlying", "last_price", "open_interest",
        *_BEST, "mark_price", "underlying_price", "bid_iv", "ask_iv", "mark_iv", "delta", "gamma", "vega", "theta",
        "rho",
    ),
}  # fmt: skip
# Columns of instants, which travel as int64 ns (UNDEFINED: none), and the digits that a text of them shows.
INSTANTS = {"timestamp": "ns", "funding_timestamp": "s", "expiration": "s"}
UNDEFINED = -(1 << 63)


class Column(NamedTuple):
    """A column of a message table: `path` is the message's attribute (`components.raw`: of a part of it).

    `sort`: text, real, integer, boolean, json, or time (ns that become the store's instant). `latency_ms` and
    `timestamp_out` are of every such table that has a window.
    """

    name: str
    path: str
    sort: str
    null: bool = False

    @property
    def unit(self) -> str:
        """How fine a store keeps an instant: a window and an expiry in seconds, all else in microseconds."""
        return "s" if self.name in ("time_window", "expiration") else "us"


@dataclass(frozen=True, slots=True)
class MessageTable:
    """A table of JSON messages: a row per key, the highest `order` (revision, or instant) of them wins."""

    name: str
    key: tuple[str, ...]
    time: str
    columns: tuple[Column, ...]
    order: str = "revision"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)


def _columns(*specs: str) -> tuple[Column, ...]:
    """From texts `sort name…`; `name=path` where they differ, `name?` where it may be undefined."""
    out = []
    for spec in specs:
        sort, *names = spec.split()
        for text in names:
            name, _, path = text.rstrip("?").partition("=")
            out.append(Column(name, path or name, sort, text.endswith("?")))
    return tuple(out)


_OPTION_KEY = ("text underlying", "time expiration=expiration_ns", "real strike", "text option_type")
_WINDOW = ("time time_window=time_window_ns", "integer window_seconds=window_sec")
_STAMPS = ("boolean complete", "integer revision", "time timestamp_out=timestamp_out_ns", "real latency_ms")
_USAGE = ("text state", "real budget_usd")

# Kind of a message -> its tables.
MESSAGE_TABLES = {
    "pressure": (MessageTable(
        "pressure_metrics", ("underlying", "expiration", "strike", "option_type", "time_window"), "time_window",
        _columns(
            *_OPTION_KEY, *_WINDOW, "real bid_volume ask_volume unknown_volume pressure_ratio? log_ratio",
            "text dominant_side", "real confidence", "integer total_trades",
            "real avg_trade_size max_trade_size vwap? premium ask_premium bid_premium open close",
            "time first_trade=first_ns last_trade=last_ns mean_trade=mean_ns", "integer strike_rank sweeps",
            "real sweep_ask_volume sweep_bid_volume", "integer blocks", "real block_ask_volume block_bid_volume",
            "real underlying_price? moneyness? days_to_expiry? iv? delta?", *_STAMPS,
        ),
    ),),
    "pressure_rollup": (MessageTable(
        "pressure_rollups", ("underlying", "time_window"), "time_window",
        _columns(
            "text underlying", *_WINDOW, "real call_volume put_volume call_ask_volume call_bid_volume",
            "real put_ask_volume put_bid_volume call_pressure put_pressure put_call_ratio?",
            "real premium net_call_premium net_put_premium net_premium", "integer strikes total_trades",
            "json top_strikes", "real underlying_price?", *_STAMPS,
        ),
    ),),
    "signal": (MessageTable(
        "signals", ("underlying", "expiration", "strike", "option_type", "time_window", "source"), "time_window",
        _columns(
            *_OPTION_KEY, *_WINDOW, "text source type=signal_type", "json types", "text direction status reason",
            "real score", "text grade baseline", "integer baseline_size",
            *(f"real {name}=components.{name}?" for name in (
                "raw", "base", "significance", "trend", "concentration", "persistence", "z", "z_volume", "percentile",
                "volume_percentile", "volume_95", "market_maker", "cluster_factor",
            )),
            "integer cluster_size=components.cluster_size?",
            "real log_ratio? volume? premium? underlying_price? moneyness?", *_STAMPS,
        ),
    ),),
    "usage": (
        MessageTable(
            "usage_log", ("feed", "at"), "at",
            _columns("text feed day", "time at=at_ns", "integer events bytes", "real connected_seconds cost_usd",
                     *_USAGE),
            "at",
        ),
        MessageTable(
            "usage_daily", ("feed", "day"), "day",
            _columns("text feed day", "time at=at_ns", "integer events=day_events bytes=day_bytes",
                     "real connected_seconds=day_connected_seconds cost_usd=day_cost_usd", *_USAGE),
            "at",
        ),
    ),
}  # fmt: skip

_PATHS = {
    kind: tuple(column.path for column in tables[0].columns if column.name in tables[0].key)
    for kind, tables in MESSAGE_TABLES.items()
}


def key_of(message: Any) -> tuple[Any, ...]:
    """The key of a message's row: of all with the same one the newest revision counts."""
    kind = message.__struct_config__.tag
    return (kind, *(getattr(message, path) for path in _PATHS[kind]))


# The column that says when, where it is not `time`.
_TIMES = {
    **{table.name: table.time for table in TABLES.values()},
    **{table.name: "timestamp" for table in TICK_TABLES.values()},
    "features": "timestamp_in", "ohlc_bars": "timestamp", "gaps": "start", "late_trades": "ts_event",
    "dead_letters": "at", "usage": "timestamp",
    **{table.name: table.time for tables in MESSAGE_TABLES.values() for table in tables},
}  # fmt: skip


# Instants of the tables that no definition above gives a unit: how fine a text of them is.
_UNITS = {
    "timestamp_out": "us", "created_at": "us", "at": "us", "ts_event": "ns", "start": "ns", "end": "ns",
    "time": "s", "timestamp_in": "s",
}  # fmt: skip


def instant_unit(table: str, column: str) -> str | None:
    """How fine every store tells an instant (`s`, `us`, `ns`); None for a column that is none.

    A column whose unit is ns has one of integers beside it, `<column>_ns`.
    """
    for tables in MESSAGE_TABLES.values():
        for some in tables:
            if some.name == table:
                found = next((c for c in some.columns if c.name == column), None)
                if found is not None:
                    return found.unit if found.sort == "time" else None
    if table in (t.name for t in TICK_TABLES.values()):
        return INSTANTS.get(column)
    if table == "ohlc_bars" and column == "timestamp":
        return "s"
    if table == "usage" and column == "timestamp":
        return "us"
    return _UNITS.get(column)


def time_column(table: str) -> str:
    """The time column of a table or view."""
    return _TIMES.get(table, "time")
