"""Bars as strategies get them: rows of `candles` and `candles_1m`, the same from a store and from the bus."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.batches import Chunk, Source, join
from shared.errors import ConfigError
from shared.frames import NS, PACKED, Frame
from shared.store_rows import candle_columns
from shared.tables import TABLES, Table
from shared.timeframes import name_of, seconds_of

ROLLING = "rolling"
SECONDS = "seconds"
_ROLLING_KINDS = {ROLLING: "candle_1m", SECONDS: "candle_1s"}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNIT_NS = {"s": NS, "us": 1000}


class Bar(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What every bar has; its columns are those of `candles` and `candles_1m`, undefined is None.

    Instants are aware datetimes in UTC; the same in int64 ns stands beside each as `<column>_ns`.
    """

    symbol: str
    open: float | None
    high: float | None
    low: float | None
    close: float | None
    volume: float
    trades: int
    ask_volume: float | None
    bid_volume: float | None
    unknown_volume: float | None
    vd: float | None
    cvd_open: float | None
    cvd_high: float | None
    cvd_low: float | None
    cvd_close: float | None
    vwap: float | None
    complete: bool
    revision: int
    timestamp_out: datetime
    timestamp_out_ns: int
    latency_ms: float

    @property
    @abstractmethod
    def start_ns(self) -> int:
        """Where its window begins."""

    @property
    @abstractmethod
    def end_ns(self) -> int:
        """Where its window ends (exclusive)."""

    @property
    def start(self) -> datetime:
        """Where its window begins, in UTC."""
        return _datetime(self.start_ns)

    @property
    def end(self) -> datetime:
        """Where its window ends, in UTC."""
        return _datetime(self.end_ns)


class FixedBar(Bar, frozen=True, kw_only=True, gc=False):
    """A row of `candles`; `timestamp_in` is its start."""

    exchange: str
    timeframe: str
    timestamp_in: datetime
    timestamp_in_ns: int
    quoted_spread: float | None
    bid_price: float | None
    bid_size: float | None
    ask_price: float | None
    ask_size: float | None
    book_imbalance_5: float | None
    mark_price: float | None
    index_price: float | None
    open_interest: float | None
    funding_rate: float | None
    liquidated_long_volume: float | None
    liquidated_short_volume: float | None
    sma_5: float | None
    sma_10: float | None
    sma_20: float | None
    ema_5: float | None
    ema_10: float | None
    ema_20: float | None
    wma_5: float | None
    momentum_3: float | None
    momentum_5: float | None
    velocity: float | None
    acceleration: float | None
    volume_sma_5: float | None
    volume_ema_5: float | None
    volume_ratio: float | None
    vwap_deviation: float | None
    volatility_5: float | None
    volatility_10: float | None
    high_low_ratio: float | None
    log_return: float | None
    trade_intensity: float | None
    avg_trade_size: float | None
    price_impact: float | None
    spread_proxy: float | None
    order_flow_imbalance: float | None
    kyle_lambda: float | None
    vpin: float | None
    rsi_5: float | None
    bollinger_position: float | None
    macd: float | None
    macd_signal: float | None
    macd_hist: float | None

    @property
    def start_ns(self) -> int:
        return self.timestamp_in_ns

    @property
    def end_ns(self) -> int:
        return self.timestamp_in_ns + seconds_of(self.timeframe) * NS


class RollingBar(Bar, frozen=True, kw_only=True, gc=False):
    """A row of `candles_1m`: the minute that ends at `time`."""

    time: datetime
    time_ns: int
    ticker: str
    session_cvd_close: float | None
    vd_ratio: float | None
    book_imbalance: float | None
    price_pct: float | None
    divergence: int | None
    max_trade_size: float | None
    big_trades: int | None
    big_volume: float | None
    sum_bid_depth: float | None
    sum_ask_depth: float | None
    sum_price_volume: float | None
    avg_spread: float | None

    @property
    def start_ns(self) -> int:
        return self.time_ns - 60 * NS

    @property
    def end_ns(self) -> int:
        return self.time_ns


class SecondBar(RollingBar, frozen=True, kw_only=True, gc=False):
    """A row of `candles_1s`: the second that begins at `time`."""

    @property
    def start_ns(self) -> int:
        return self.time_ns

    @property
    def end_ns(self) -> int:
        return self.time_ns + NS


class Series(NamedTuple):
    """Whose bars of which length. `exchange` is empty where only the symbol, or ticker, is known."""

    exchange: str
    symbol: str
    timeframe: str

    @property
    def name(self) -> str:
        return f"{self.exchange}:{self.symbol}" if self.exchange else self.symbol

    @property
    def kind(self) -> str:
        """Of the frames that it is in."""
        return _ROLLING_KINDS.get(self.timeframe, "candle")

    @property
    def of_ticker(self) -> bool:
        """Whether its rows are of a ticker (`ES`, `exchange:symbol`), not of a length."""
        return self.timeframe in _ROLLING_KINDS

    @property
    def table(self) -> Table:
        return TABLES[self.kind]

    @property
    def where(self) -> dict[str, str]:
        """The columns that name it in its table."""
        if self.of_ticker:
            return {"ticker": self.name}
        exchange = {"exchange": self.exchange} if self.exchange else {}
        return exchange | {"symbol": self.symbol, "timeframe": self.timeframe}

    def is_of(self, name: tuple[str, str]) -> bool:
        """Whether a frame's name pair is this one's."""
        if self.of_ticker:
            return name[0] == self.name
        return name[1] == self.symbol and self.exchange in ("", name[0])


def series_of(symbol: str, timeframe: str) -> Series:
    """From `ES` or `exchange:symbol`, and `rolling`, `seconds` or a length. Raises ConfigError for what is none."""
    if timeframe not in _ROLLING_KINDS:
        if not seconds_of(timeframe):
            raise ConfigError(
                f"'{timeframe}' is no timeframe; write {ROLLING}, {SECONDS}, or a length such as 15s, 1m, 4h"
            )
        timeframe = name_of(seconds_of(timeframe))
    exchange, colon, rest = symbol.partition(":")
    if not exchange or (colon and not rest):
        raise ConfigError(f"'{symbol}' is no symbol; write a ticker such as ES, or exchange:symbol")
    return Series(exchange, rest, timeframe) if colon else Series("", symbol, timeframe)


def key_ns(table: Table, bar: Bar) -> int:
    """The instant in a bar's key, ns."""
    at: int = getattr(bar, f"{table.time}_ns")
    return at


def bars_of_rows(table: Table, rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Bars of a store's rows, as `shared.stores.read_rows` gives them."""
    made = []
    for row in rows:
        values = dict(row)
        for name in (table.time, "timestamp_out"):
            at = datetime.fromisoformat(values[name])
            values[name], values[f"{name}_ns"] = at, _ns(at)
        values["complete"] = bool(values["complete"])
        made.append(_TYPES[table.name](**values))
    return made


def bars_of_frame(frame: Frame, series: Series) -> list[Bar]:
    """A series' bars of a frame, in its order, as the store would tell them; [] for a frame that is none of its."""
    table = series.table
    if frame.kind != series.kind or len(frame.body) != frame.count * PACKED[frame.kind].itemsize:
        return []
    numbers = [i for i, name in enumerate(frame.names) if series.is_of(name)]
    if not numbers:
        return []
    rows = frame.rows()
    mine = np.isin(rows["name"], numbers)
    if not series.of_ticker:
        mine &= rows["timeframe_sec"] == seconds_of(series.timeframe)
    if not mine.any():
        return []
    # What cannot be a row becomes a dead letter in the store, and is none here.
    joined = join([Chunk(Source("", "", 0, frame.seq, frame.id), rows[mine], frame.names)], table.name)
    columns = dict(zip(table.columns, candle_columns(_BarForm(), joined, None, table), strict=True))
    for name in (table.time, "timestamp_out"):
        columns[f"{name}_ns"] = columns[name]
        columns[name] = [_datetime(at) for at in columns[name]]
    made = _TYPES[table.name]
    return [made(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


class _BarForm:
    """See shared.store_rows.Form: instants as ns, as fine as the stores have them."""

    def instants(self, times_ns: NDArray[np.int64], unit: str) -> list[Any]:
        step = _UNIT_NS[unit]
        out: list[Any] = (times_ns // step * step).tolist()
        return out

    def reals(self, values: NDArray[np.float64]) -> list[Any]:
        return [None if value != value else value for value in values.tolist()]  # noqa: PLR0124 - NaN

    def flags(self, values: NDArray[Any]) -> list[Any]:
        out: list[Any] = values.astype(bool).tolist()
        return out

    def json(self, values: list[Any]) -> list[Any]:
        return values


def _datetime(ns: int) -> datetime:
    return _EPOCH + timedelta(microseconds=ns // 1000)


def _ns(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1) * 1000


def instant_ns(at: datetime | int | str) -> int:
    """An instant given as an aware datetime, ns, or ISO text. Raises ConfigError."""
    if isinstance(at, int):
        return at
    try:
        when = datetime.fromisoformat(at) if isinstance(at, str) else at
    except ValueError:
        raise ConfigError(f"'{at}' is no instant; write 2023-12-25T23:01:00Z") from None
    if when.tzinfo is None:
        raise ConfigError(f"'{at}' has no time zone; write 2023-12-25T23:01:00Z, or give an aware datetime")
    return _ns(when)


_TYPES: dict[str, type[Bar]] = {"candles": FixedBar, "candles_1m": RollingBar, "candles_1s": SecondBar}
