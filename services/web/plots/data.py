"""What a plot shows, read from a store: bars, marks and option pressure on one axis. Nothing is drawn here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.web.plots.axis import Axis, Ints, Reals, axis_of
from services.web.plots.pressure import Heat, heat_of
from shared.errors import ConfigError, TapelineError
from shared.frames import NS, iso, ns_of
from shared.instants import iso_second
from shared.instruments import option_root, option_series, parse_outright
from shared.log import Masker
from shared.reader_bars import ROLLING, Series, series_of
from shared.settings import Settings
from shared.stores import parse, read_rows
from shared.timeframes import seconds_of

DEFAULT_BARS = 500  # where neither a range nor a number is given
MOST_BARS = 200_000
PAGE_ROWS = 20_000
MOST_SIGNALS = 1000  # the newest of them
# Big trades are found in the seconds, of which a day has tens of thousands: read in such chunks, at most so many.
CHUNK_NS = 6 * 3600 * NS
MOST_CHUNKS = 28
_SIDED = ("ask_volume", "bid_volume")
_COLUMNS = ("open", "high", "low", "close", "volume", *_SIDED, "cvd_close", "complete")
_LIQUIDATED = ("liquidated_long_volume", "liquidated_short_volume")
_CRYPTO_BASE = re.compile(r"([A-Z0-9]+?)(?:[-_/].*|USDT|USDC|BUSD|USD)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Ask:
    """Which bars: `since` <= time < `until` (ISO texts) of a symbol, the newest `last` of them.

    `underlying` names whose option pressure and signals to show; empty finds it by the symbol.
    """

    symbol: str
    timeframe: str = "1m"
    since: str | None = None
    until: str | None = None
    last: int | None = None
    underlying: str = ""


@dataclass(slots=True)
class Bars:
    """Columns of bars, oldest first. `time_ns` is that of the row's key, `start_ns` where its slot begins.

    `unknown` is what of the volume is neither bought nor sold; `cvd` is NaN where it is undefined.
    """

    time_ns: Ints
    start_ns: Ints
    open: Reals
    high: Reals
    low: Reals
    close: Reals
    buy: Reals
    sell: Reals
    unknown: Reals
    cvd: Reals
    complete: NDArray[np.bool_]
    long_liquidated: Reals
    short_liquidated: Reals

    def __len__(self) -> int:
        return len(self.time_ns)


class BigTrade(NamedTuple):
    """The big trades within one bar: how many, of what volume, and the `price` and `side` of the largest second.

    `side`: 1 bought, -1 sold, 0 neither more than the other.
    """

    bar: int
    price: float
    trades: int
    volume: float
    side: int


class SignalMark(NamedTuple):
    """A signal, at the newest bar of its window, since it was known when the window ended."""

    bar: int
    time_ns: int
    window_ns: int
    strike: float
    option_type: str
    direction: str
    grade: str
    score: float
    type: str
    status: str

    @property
    def label(self) -> str:
        """`C 18350 BUY`; of a plug-in's signal on no single option its type."""
        return f"{self.option_type} {self.strike:g} {self.direction}" if self.option_type else self.type


@dataclass(slots=True)
class PlotData:
    """All that a plot shows. `store` is its redacted name; `notes` say what is left out of the picture.

    `thinned`: how many slots of the bars read are one here.
    """

    name: str
    timeframe: str
    store: str
    bars: Bars
    axis: Axis
    bar_ns: int
    underlying: str = ""
    big_trades: list[BigTrade] = field(default_factory=list)
    signals: list[SignalMark] = field(default_factory=list)
    heat: Heat | None = None
    notes: list[str] = field(default_factory=list)
    thinned: int = 1

    @property
    def title(self) -> str:
        """The symbol as people say it, without its exchange where that is a dataset (GLBX.MDP3:NQ)."""
        exchange, _, symbol = self.name.partition(":")
        return symbol if symbol and "." in exchange else self.name

    @property
    def subtitle(self) -> list[str]:
        """Range, exchange where the title lacks it, store."""
        exchange = [self.name.partition(":")[0]] if self.title != self.name else []
        return [self.range, *exchange, self.store]

    @property
    def start_ns(self) -> int:
        """Where the first bar's window begins."""
        return int(self.bars.start_ns[0]) - (self.bar_ns - self.axis.step_ns)

    @property
    def end_ns(self) -> int:
        """Where the last bar's window ends (exclusive)."""
        return int(self.axis.knots_ns[-1])

    @property
    def range(self) -> str:
        """The range in UTC, for titles."""
        first, last = (iso_second(ns)[:19].replace("T", " ") for ns in (self.start_ns, self.end_ns))
        return f"{first} to {last[11:] if first[:10] == last[:10] else last} UTC"


def load(settings: Settings, ask: Ask) -> PlotData:
    """Read what a plot shows. Raises TapelineError (no such bars, or too many), ConfigError, StoreUnavailable."""
    url = settings.tapeline.store
    series = series_of(ask.symbol, ask.timeframe)
    store = Masker(settings)(parse(url).shown)
    exchange, bars = _bars(url, series, ask, store)
    name = Series(exchange or series.exchange, series.symbol, series.timeframe).name
    step_ns = NS if series.of_ticker else seconds_of(series.timeframe) * NS
    bar_ns = 60 * NS if series.timeframe == ROLLING else step_ns
    data = PlotData(name, series.timeframe, store, bars, axis_of(bars.start_ns, step_ns), bar_ns)
    data.big_trades = _big_trades(url, series, data)
    for underlying in _underlyings(settings, series, ask.underlying, data.end_ns):
        heat, notes = heat_of(url, underlying, data.axis)
        data.signals = _signals(url, underlying, data)
        if heat is not None or data.signals:
            data.underlying, data.heat = underlying, heat
            data.notes += notes
            break
    if ask.underlying and not data.underlying:
        data.notes.append(f"no option pressure of {ask.underlying} in this range")
    return data


# -- bars --------------------------------------------------------------------------------------


def _bars(url: str, series: Series, ask: Ask, store: str) -> tuple[str, Bars]:
    """The bars, and the exchange that they are on (empty where the table has none)."""
    last = ask.last or (DEFAULT_BARS if ask.since is None and ask.until is None else None)
    pages, exchanges, found = list[Bars](), set[str](), 0
    for rows in _pages(url, series, ask, last or MOST_BARS + 1):
        exchanges |= {row["exchange"] for row in rows if "exchange" in row}
        if len(exchanges) > 1:
            some = ", ".join(sorted(exchanges))
            raise ConfigError(f"{series.symbol} is on {some}: write exchange:{series.symbol}")
        pages.append(_columns(series, rows))
        found += len(rows)
    if last is None and found > MOST_BARS:
        raise TapelineError(
            f"more than {MOST_BARS:,} {series.timeframe} bars of {series.name} in this range: "
            "narrow it, or choose a longer timeframe"
        )
    names = Bars.__slots__
    joined = {name: np.concatenate([getattr(page, name) for page in reversed(pages)]) for name in names}
    priced = np.isfinite(joined["open"] + joined["high"] + joined["low"] + joined["close"])
    if not priced.any():
        raise TapelineError(_nothing(url, series, ask, store))
    return next(iter(exchanges), ""), Bars(**{name: column[priced] for name, column in joined.items()})


def _pages(url: str, series: Series, ask: Ask, most: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in pages, the newest page first; at least one page, which may be empty."""
    time = series.table.time
    columns = (time, *_COLUMNS, *(() if series.of_ticker else ("exchange", *_LIQUIDATED)))
    until = ask.until
    while True:
        size = min(PAGE_ROWS, most)
        rows = read_rows(url, series.table.name, series.where, since=ask.since, until=until, last=size, columns=columns)
        yield rows
        most -= len(rows)
        if len(rows) < size or most <= 0:
            return
        until = rows[0][time]


def _columns(series: Series, rows: Sequence[Mapping[str, Any]]) -> Bars:
    def reals(name: str) -> Reals:
        return np.array([row.get(name) for row in rows], np.float64)  # None is NaN

    times = np.array([ns_of(row[series.table.time]) for row in rows], np.int64)
    buy, sell = (np.nan_to_num(reals(name)) for name in _SIDED)
    return Bars(
        time_ns=times,
        start_ns=times - NS if series.timeframe == ROLLING else times,
        open=reals("open"),
        high=reals("high"),
        low=reals("low"),
        close=reals("close"),
        buy=buy,
        sell=sell,
        unknown=np.maximum(np.nan_to_num(reals("volume")) - buy - sell, 0.0),
        cvd=reals("cvd_close"),
        complete=np.array([bool(row["complete"]) for row in rows], np.bool_),
        long_liquidated=np.nan_to_num(reals("liquidated_long_volume")),
        short_liquidated=np.nan_to_num(reals("liquidated_short_volume")),
    )


def _nothing(url: str, series: Series, ask: Ask, store: str) -> str:
    """The line of a range that is empty."""
    of = f"no {series.timeframe} bars of {series.name}"
    time = series.table.time
    newest = read_rows(url, series.table.name, series.where, last=1, columns=(time,))
    if not newest or (ask.since is None and ask.until is None):
        return f"{of} in {store}: name a symbol and timeframe that it has, or another --store"
    given = (("from", ask.since), ("until", ask.until))
    bounds = " ".join(f"{word} {re.sub(r'[.]0+Z$', 'Z', text)}" for word, text in given if text is not None)
    return f"{of} {bounds} in {store}; the newest is of {newest[0][time]}"


# -- marks -------------------------------------------------------------------------------------


def bar_at(data: PlotData, times_ns: Ints) -> Ints:
    """The bar in whose slot each instant is, -1 where there is no bar."""
    starts = data.bars.start_ns
    found: Ints = np.searchsorted(starts, times_ns, side="right") - 1
    inside = (found >= 0) & (times_ns < starts[np.maximum(found, 0)] + data.axis.step_ns)
    return np.where(inside, found, -1)


def _big_trades(url: str, series: Series, data: PlotData) -> list[BigTrade]:
    knots = data.axis.knots_ns.tolist()
    chunks = sorted({
        chunk for start, end in zip(knots[::2], knots[1::2], strict=True)
        for chunk in range(start // CHUNK_NS, -(-end // CHUNK_NS))
    })  # fmt: skip
    if len(chunks) > MOST_CHUNKS:
        data.notes.append(f"big trades are marked in up to {MOST_CHUNKS * CHUNK_NS // (86_400 * NS)} days")
        return []
    columns = ("time", "vwap", "close", "big_trades", "big_volume", "vd", "cvd_close")
    of_bar: dict[int, tuple[float, BigTrade]] = {}
    key: dict[str, str] | None = None
    for chunk in chunks:
        since, until = max(chunk * CHUNK_NS, knots[0]), min((chunk + 1) * CHUNK_NS, knots[-1])
        rows: list[dict[str, Any]] = []
        # A continuous ticker's seconds are those of its contracts; only of the one in front there is a CVD.
        for where in ({"ticker": data.name}, {"ticker": series.symbol}, {"symbol": series.symbol}):
            if key in (None, where) and not rows:
                rows = read_rows(url, "candles_1s", where, since=iso(since), until=iso(until), columns=columns)
                key = where if rows else key
        front = key is not None and "ticker" in key
        big = [r for r in rows if r["big_trades"] and (r["cvd_close"] is not None or not front)]
        bars = bar_at(data, np.array([ns_of(r["time"]) for r in big], np.int64)).tolist() if big else []
        for row, bar in zip(big, bars, strict=True):
            if bar >= 0:
                _add_big(of_bar, bar, row)
    return [of_bar[bar][1] for bar in sorted(of_bar)]


def _add_big(of_bar: dict[int, tuple[float, BigTrade]], bar: int, row: Mapping[str, Any]) -> None:
    volume, price = row["big_volume"] or 0.0, row["vwap"] if row["vwap"] is not None else row["close"]
    side = int(np.sign(row["vd"] or 0.0))
    largest, held = of_bar.get(bar, (-1.0, BigTrade(bar, price, 0, 0.0, side)))
    total = held._replace(trades=held.trades + row["big_trades"], volume=held.volume + volume)
    if volume > largest:
        of_bar[bar] = volume, total._replace(price=price, side=side)
    else:
        of_bar[bar] = largest, total


def _signals(url: str, underlying: str, data: PlotData) -> list[SignalMark]:
    columns = (
        "time_window", "window_seconds", "strike", "option_type", "direction", "grade", "score", "type", "status",
    )  # fmt: skip
    first, end = data.axis.knots_ns[0], data.axis.knots_ns[-1]
    rows: list[dict[str, Any]] = []
    for status in ("emitted", "monitor"):
        where = {"underlying": underlying, "status": status}
        # A signal is known at its window's end; no window is longer than a day.
        since, until = iso(int(first) - 86_400 * NS), iso(int(end))
        rows += read_rows(url, "signals", where, since=since, until=until, last=MOST_SIGNALS, columns=columns)
    marks = []
    for row in rows:
        window_ns = row["window_seconds"] * NS
        at = ns_of(row["time_window"])
        # Where no trade made a bar at the window's end, the newest bar within the window.
        before = int(np.searchsorted(data.bars.start_ns, at + window_ns, side="left")) - 1
        if before < 0 or data.bars.start_ns[before] + data.axis.step_ns <= at:
            continue
        marks.append(SignalMark(
            before, at, window_ns, row["strike"], row["option_type"], row["direction"], row["grade"], row["score"],
            row["type"], row["status"],
        ))  # fmt: skip
    return sorted(marks, key=lambda m: (m.bar, m.score))


def _underlyings(settings: Settings, series: Series, given: str, on_ns: int) -> list[str]:
    """Names under which this symbol's option pressure may stand, the likeliest first."""
    if given:
        return [given]
    found = [series.name, series.symbol]
    contract = option_series(series.symbol) or series.symbol
    outright = parse_outright(contract, on_ns)
    if outright is not None:
        found.append(option_root(outright[0], settings.databento.option_roots))
    base = _CRYPTO_BASE.fullmatch(series.symbol)
    if series.exchange and base is not None:
        found.append(f"{series.exchange}:{base[1].upper()}")
    return list(dict.fromkeys(found))
