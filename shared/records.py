"""Rows of the bus as plain records, for people and for JSON: undefined is None, times stand in ns and as ISO text.

Each record has `_about`, the names under which a symbol may be asked for; who prints it takes that out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from shared.frames import BOOK, BUY, CLOCK, LIQUIDATION, NS, OPTION, SELL, TICKER, Frame, Row, Rows, iso
from shared.messages import Instrument, Pressure, PressureRollup, Signal, Usage
from shared.timeframes import name_of

Record = dict[str, Any]
_SEPARATORS = re.compile(r"[-_/. ]")
_PERPETUAL = re.compile(r"(?<=.)(SWAP|PERPETUAL|PERP)$")


@lru_cache(maxsize=65_536)
def normal(name: str) -> str:
    """A symbol as compared: `btc-usdt` and `BTC_USDT` are BTCUSDT; an exchange before it stays as it is."""
    exchange, colon, symbol = name.upper().rpartition(":")
    return exchange + colon + _SEPARATORS.sub("", symbol)


@lru_cache(maxsize=65_536)
def aliases(exchange: str, *names: str) -> frozenset[str]:
    """Under which `normal` names an instrument may be asked for: BTC-USDT also means BTC-USDT-SWAP."""
    found = set()
    for name in names:
        plain = normal(name)
        found |= {plain, _PERPETUAL.sub("", plain)}
    return frozenset(found | {f"{exchange.upper()}:{name}" for name in found if ":" not in name})


def ticks(rows: Rows, found: dict[int, Instrument | None], partition: int) -> Iterator[Record]:
    """One record for each record of a `trade` or `tick` frame, its rows put together; no clocks.

    `found`: instrument id -> its definition, where there is one.
    """
    kinds, parts = rows["kind"], rows["part"]
    starts = np.flatnonzero((parts == 0) & (kinds != CLOCK)).tolist()
    for at in starts:
        end = at + 1
        while end < len(rows) and parts[end]:
            end += 1
        yield tick(rows[at:end], found.get(int(rows["instrument"][at])), partition)


def tick(rows: Rows, instrument: Instrument | None, partition: int) -> Record:
    """The record that these rows are."""
    first = rows[0]
    symbol = instrument.symbol if instrument else str(first["instrument"])
    about = aliases("", symbol)
    if instrument:
        about = aliases(instrument.venue, symbol, instrument.root, instrument.ticker or instrument.root)
    kind = int(first["kind"])
    name, values = _KINDS.get(kind, ("trade", _trade))
    ts, received = int(first["ts_event_ns"]), int(first["ts_recv_ns"])
    return {
        "type": name, "time": iso(ts), "ts_event_ns": ts, "ts_recv_ns": received,
        "exchange": instrument.venue if instrument else None, "symbol": symbol,
        "root": instrument.root if instrument else None, **values(rows), "flags": int(first["flags"]),
        "partition": partition, "_about": about,
    }  # fmt: skip


def _trade(rows: Rows) -> Record:
    r = rows[0]
    return {
        "price": plain(r["price"]), "size": plain(r["size"]), "side": _side(int(r["side"])), **_quotes(r),
        "sequence": int(r["sequence"]),
    }  # fmt: skip


def _book(rows: Rows) -> Record:
    depth, imbalance = plain(rows[0]["size"]), plain(rows[0]["price"])
    return {
        "depth": int(depth or 0), "book_imbalance_5": imbalance,
        "bids": [[plain(r["bid_px"]), plain(r["bid_sz"])] for r in rows if not np.isnan(r["bid_px"])],
        "asks": [[plain(r["ask_px"]), plain(r["ask_sz"])] for r in rows if not np.isnan(r["ask_px"])],
    }  # fmt: skip


def _ticker(rows: Rows) -> Record:
    r = rows[0]
    funding = int(r["sequence"])
    return {
        "last_price": plain(r["price"]), "open_interest": plain(r["size"]), "mark_price": plain(r["bid_px"]),
        "index_price": plain(r["ask_px"]), "funding_rate": plain(r["bid_sz"]),
        "predicted_funding_rate": plain(r["ask_sz"]), "funding_time": iso(funding * NS)[:19] + "Z" if funding else None,
    }  # fmt: skip


def _liquidation(rows: Rows) -> Record:
    r = rows[0]
    side = int(r["side"])
    return {
        "price": plain(r["price"]), "size": plain(r["size"]), "side": _side(side),
        "liquidated": {BUY: "short", SELL: "long"}.get(side),
    }  # fmt: skip


def _option(rows: Rows) -> Record:
    r = rows[0]
    record = {"last_price": plain(r["price"]), "open_interest": plain(r["size"]), **_quotes(r)}
    for part, columns in ((1, _OPTION_1), (2, _OPTION_2)):
        record |= {name: plain(rows[part][column]) if part < len(rows) else None for column, name in columns.items()}
    return record


_OPTION_1 = {
    "price": "mark_price", "size": "underlying_price", "bid_px": "bid_iv", "ask_px": "ask_iv", "bid_sz": "mark_iv",
    "ask_sz": "delta",
}  # fmt: skip
_OPTION_2 = {"price": "gamma", "size": "vega", "bid_px": "theta", "ask_px": "rho"}
_KINDS = {
    BOOK: ("book", _book), TICKER: ("ticker", _ticker), LIQUIDATION: ("liquidation", _liquidation),
    OPTION: ("option_summary", _option),
}  # fmt: skip


def _quotes(r: Row) -> Record:
    return {name: plain(r[name]) for name in ("bid_px", "bid_sz", "ask_px", "ask_sz")}


def rolling(frame: Frame) -> Iterator[Record]:
    """Rows of a `candle_1m` or `candle_1s` frame."""
    for row in frame.rows():
        ticker, symbol = frame.names[int(row["name"])]
        yield _candle(frame.kind, row, {"ticker": ticker, "symbol": symbol}) | {"_about": aliases("", symbol, ticker)}


def fixed(frame: Frame) -> Iterator[Record]:
    """Rows of a `candle` frame."""
    for row in frame.rows():
        exchange, symbol = frame.names[int(row["name"])]
        timeframe = name_of(int(row["timeframe_sec"]))
        named = {"exchange": exchange, "symbol": symbol, "timeframe": timeframe}
        yield _candle(frame.kind, row, named) | {"_about": aliases(exchange, symbol)}


def _candle(kind: str, row: Row, named: Record) -> Record:
    record: Record = {"type": kind, "time": iso(int(row["time_ns"])), **named}
    for name in row.dtype.names:
        if name not in ("name", "complete"):
            record[name] = plain(row[name])
    return record | {"complete": bool(row["complete"]), "timestamp_out": iso(int(row["timestamp_out_ns"]))}


def option_message(message: Pressure | PressureRollup | Signal) -> Record:
    """All of a message on option pressure, found by its underlying."""
    exchange, _, symbol = message.underlying.rpartition(":")
    return _whole(message, message.time_window_ns) | {"_about": aliases(exchange, symbol)}


def usage(message: Usage) -> Record:
    """All of a feed's usage, which is of no symbol."""
    return _whole(message, message.at_ns) | {"_about": frozenset()}


def _whole(message: msgspec.Struct, time_ns: int) -> Record:
    """Every field, those that have their default, too."""
    record: Record = {"type": message.__struct_config__.tag, "time": instant(time_ns)}
    for name in message.__struct_fields__:
        record[name] = _value(getattr(message, name))
        if name in ("expiration_ns", "timestamp_out_ns"):
            record[name.removesuffix("_ns")] = instant(record[name])
    return record


def _value(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return {name: _value(each) for name, each in msgspec.structs.asdict(value).items()}
    return [_value(each) for each in value] if isinstance(value, tuple) else value


def instant(ns: int) -> str | None:
    """As `iso`; None for what is none."""
    return iso(ns) if 0 <= ns < 1 << 63 else None


def _side(side: int) -> str:
    return {BUY: "buy", SELL: "sell"}.get(side, "none")


def plain(value: Any) -> int | float | None:
    """Python numbers; undefined is None."""
    if isinstance(value, np.integer):
        return int(value)
    found = float(value)
    return found if math.isfinite(found) else None


def number(value: float | None, digits: int = 0) -> str:
    """As the exchange writes it: no exponent, no `.0`; with `digits`, so many significant ones."""
    if value is None:
        return "-"
    if digits and value:
        value = round(value, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.10f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
