"""Rows of the API as programs get them: of each channel its struct, and which of them a consumer has been given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from shared.api_rows import key_of
from shared.errors import VersionError
from shared.frames import iso
from shared.messages import TopStrike
from shared.reader_bars import Bar, FixedBar, RollingBar, SecondBar, instant_ns, series_of
from shared.tables import TABLES, time_column

# Of this many instants the revisions are remembered: a correction of an older row is not delivered.
REMEMBERED = 10_000
# How much older than the first one a row may be that comes late, from an underlying or feed that is behind the others.
BEHIND = timedelta(hours=1)


class PressureRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `pressure_metrics`: one option in the window of `window_seconds` from `time_window` on."""

    underlying: str
    expiration: datetime
    strike: float
    option_type: str
    time_window: datetime
    window_seconds: int
    bid_volume: float
    ask_volume: float
    unknown_volume: float
    pressure_ratio: float | None
    log_ratio: float
    dominant_side: str
    confidence: float
    total_trades: int
    avg_trade_size: float
    max_trade_size: float
    vwap: float | None
    premium: float
    ask_premium: float
    bid_premium: float
    open: float
    close: float
    first_trade: datetime
    last_trade: datetime
    mean_trade: datetime
    strike_rank: int
    sweeps: int
    sweep_ask_volume: float
    sweep_bid_volume: float
    blocks: int
    block_ask_volume: float
    block_bid_volume: float
    underlying_price: float | None
    moneyness: float | None
    days_to_expiry: float | None
    iv: float | None
    delta: float | None
    complete: bool
    revision: int
    timestamp_out: datetime
    latency_ms: float


class RollupRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `pressure_rollups`: all options of one underlying in a window."""

    underlying: str
    time_window: datetime
    window_seconds: int
    call_volume: float
    put_volume: float
    call_ask_volume: float
    call_bid_volume: float
    put_ask_volume: float
    put_bid_volume: float
    call_pressure: float
    put_pressure: float
    put_call_ratio: float | None
    premium: float
    net_call_premium: float
    net_put_premium: float
    net_premium: float
    strikes: int
    total_trades: int
    top_strikes: tuple[TopStrike, ...]
    underlying_price: float | None
    complete: bool
    revision: int
    timestamp_out: datetime
    latency_ms: float


class SignalRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `signals`: a verdict on one option and window; `status` `withdrawn` takes one back."""

    underlying: str
    expiration: datetime
    strike: float
    option_type: str
    time_window: datetime
    window_seconds: int
    source: str
    type: str
    types: tuple[str, ...]
    direction: str
    status: str
    reason: str
    score: float
    grade: str
    baseline: str
    baseline_size: int
    raw: float | None
    base: float | None
    significance: float | None
    trend: float | None
    concentration: float | None
    persistence: float | None
    z: float | None
    z_volume: float | None
    percentile: float | None
    volume_percentile: float | None
    volume_95: float | None
    market_maker: float | None
    cluster_factor: float | None
    cluster_size: int | None
    log_ratio: float | None
    volume: float | None
    premium: float | None
    underlying_price: float | None
    moneyness: float | None
    complete: bool
    revision: int
    timestamp_out: datetime
    latency_ms: float


class GapRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `gaps`: trades in [start, end) may be missing, of `symbols` (comma between them; empty: of all)."""

    feed: str
    symbols: str
    start_ns: int
    end_ns: int
    start: datetime
    end: datetime
    reason: str


Row = Bar | PressureRow | RollupRow | SignalRow | GapRow
_TYPES: dict[str, type[Any]] = {
    "candles": FixedBar, "candles_1m": RollingBar, "candles_1s": SecondBar,
    "pressure_metrics": PressureRow, "pressure_rollups": RollupRow, "signals": SignalRow, "gaps": GapRow,
}  # fmt: skip
_TABLES = {"pressure": "pressure_metrics", "rollups": "pressure_rollups", "signals": "signals", "gaps": "gaps"}
_BAR_TABLES = frozenset(table.name for table in TABLES.values())


def table_of(channel: str, timeframe: str) -> str:
    """The table whose rows a channel has. Raises ConfigError for what is no timeframe."""
    return _TABLES.get(channel) or series_of("-", timeframe).table.name


def typed(table: str, row: Mapping[str, Any]) -> Any:
    """A row of the API as its struct. Raises VersionError where the server's tables are not this program's."""
    values: Mapping[str, Any] = row
    if table in _BAR_TABLES:
        values = {**row, **{f"{name}_ns": instant_ns(row[name]) for name in (time_column(table), "timestamp_out")}}
    try:
        return msgspec.convert(values, _TYPES[table])
    except msgspec.ValidationError as error:
        raise VersionError(
            f"a row of {table} is not as this version of Tapeline knows it ({error}): run the server's version here"
        ) from None


class Given:
    """Which rows a consumer has: the newest revision of each key. Times are the API's texts, whose order is theirs.

    `first`: from which time on all rows are the consumer's, "" while there is none. Bars older than that are not given;
    of the other tables, of which one subscription has many series, a row that is made is given however old it is.
    """

    def __init__(self, table: str, first: str = "") -> None:
        self._time, self._key = time_column(table), key_of(table)
        self._bars = table in _BAR_TABLES
        self._late = not self._bars
        self._revisions: dict[tuple[Any, ...], int] = {}
        self._times: dict[str, list[tuple[Any, ...]]] = {}
        self._floor = ""
        self.first = ""
        if first:
            self._begin(first)

    def resume(self) -> None:
        """The consumer has had rows before, in another life: corrections of those are given, too."""
        self._late = True

    def _begin(self, first: str) -> None:
        self.first = first
        if not self._late:
            self._floor = first

    def take(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those to be given now: new ones, and newer revisions."""
        if rows and not self.first:
            first = min(row[self._time] for row in rows)
            behind = iso(instant_ns(first) - BEHIND // timedelta(microseconds=1) * 1000)
            self._begin(first if self._bars else behind[: len(first) - 1] + "Z")
        return [row for row in rows if self._take(row)]

    def _take(self, row: dict[str, Any]) -> bool:
        time, key, revision = row[self._time], tuple(row[name] for name in self._key), row.get("revision", 0)
        held = self._revisions.get(key)
        if time < self._floor or (held is not None and revision <= held):
            return False
        self._revisions[key] = revision
        if held is None:
            self._times.setdefault(time, []).append(key)
            if len(self._times) > 2 * REMEMBERED:
                self._forget()
        return True

    def _forget(self) -> None:
        ordered = sorted(self._times)
        for time in ordered[:-REMEMBERED]:
            for key in self._times.pop(time):
                del self._revisions[key]
        self._floor = self.first = ordered[-REMEMBERED]
