"""Closed fixed candles as they come, of the symbols that somebody watches; nothing on the bus is changed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

from shared.bus import Bus
from shared.frames import NS, iso
from shared.records import Record, aliases, fixed, normal, number
from shared.tail import Names, Tail, label, marks, ohlc

# Shown on a line: text -> column.
FEATURES = {
    "rsi": "rsi_5", "ema5": "ema_5", "ema20": "ema_20", "boll": "bollinger_position", "macd": "macd_hist",
    "vpin": "vpin",
}  # fmt: skip
STATE = {"mark": "mark_price", "oi": "open_interest", "funding": "funding_rate", "book": "book_imbalance_5"}
DIGITS = 7
FEATURE_DIGITS = 4


class Watch:
    """Candles of some symbols (`BTC-USDT`, `binance:BTCUSDT`, `ES`) and timeframes (none: all)."""

    def __init__(self, bus: Bus, partitions: int, symbols: Sequence[str], timeframes: Iterable[str] = ()) -> None:
        self._tail = Tail(bus, partitions, "candles")
        self._names = Names(bus, partitions)
        self._wanted = {normal(symbol): symbol for symbol in symbols}
        self._timeframes = frozenset(timeframes)

    def unknown(self) -> list[str]:
        """Symbols that nothing on the bus answers to yet, as they were given."""
        known: set[str] = set()
        for i in self._names.instruments():
            known |= aliases(i.venue, i.symbol, i.ticker or i.root)
        return [symbol for name, symbol in self._wanted.items() if name not in known]

    def candles(self, start: str | None, follow: bool, stop: threading.Event) -> Iterator[Record]:
        """A record for each closed candle and each later revision of it, in the order of arrival."""
        wanted = self._wanted.keys()
        for _, frame in self._tail.frames(start, follow, stop):
            if frame.kind != "candle" or not any(aliases(*name) & wanted for name in frame.names):
                continue
            for record in fixed(frame):
                chosen = not self._timeframes or record["timeframe"] in self._timeframes
                if chosen and record.pop("_about") & wanted:
                    yield _timed(record)


def _timed(record: Record) -> Record:
    """With the instants of its end and the rate of its trades."""
    seconds = record["timeframe_sec"]
    end = record["time_ns"] + seconds * NS
    rates = {"end": iso(end), "end_ns": end, "trades_per_second": record["trades"] / seconds}
    return record | rates | {"latency_ms": (record["timestamp_out_ns"] - end) / 1e6}


def line(r: Record) -> str:
    """One readable line of a candle; features and states that it does not have are left out."""
    return (
        f"{r['time'][:19]}Z  {label(r)}  {r['timeframe']:>3}  {ohlc(r)}  V {number(r['volume'], DIGITS)}"
        f"  vd {number(r['vd'], DIGITS)}  n {r['trades']}  {number(r['trades_per_second'], 3)}/s"
        f"{_valued(r, STATE, DIGITS)}{_valued(r, FEATURES, FEATURE_DIGITS)}{marks(r)}"
    )


def _valued(r: Record, columns: dict[str, str], digits: int) -> str:
    shown = {text: r[name] for text, name in columns.items() if r[name] is not None}
    # An average of prices is read beside prices.
    return "".join(f"  {text} {number(v, DIGITS if text.startswith('ema') else digits)}" for text, v in shown.items())


def colour(r: Record) -> str:
    """How a terminal shows it."""
    if not r["complete"]:
        return "yellow"
    if r["open"] is None or r["close"] is None or r["close"] == r["open"]:
        return "white"
    return "green" if r["close"] > r["open"] else "red"
