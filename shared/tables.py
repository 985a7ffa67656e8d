"""The tables of a store: their keys and columns, the same in every store, in the stores' column order.

What a store adds of its own is how it writes an instant (text, or a time type) and a list.
"""

from __future__ import annotations

from dataclasses import dataclass

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

# The column that says when, where it is not `time`.
_TIMES = {
    **{table.name: table.time for table in TABLES.values()},
    **{table.name: "timestamp" for table in TICK_TABLES.values()},
    "features": "timestamp_in", "ohlc_bars": "timestamp", "gaps": "start", "late_trades": "ts_event",
    "dead_letters": "at",
}  # fmt: skip


def time_column(table: str) -> str:
    """The time column of a table or view."""
    return _TIMES.get(table, "time")
