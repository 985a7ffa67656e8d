"""Normalized messages for tests, as the server writes them."""

from __future__ import annotations

from typing import Any

from shared.frames import NS, iso

T0 = 1_717_243_200 * NS  # 2024-06-01 12:00 UTC
MS = NS // 1000


def stamp(ns: int) -> str:
    return f"{iso(ns)[:23]}Z"


def _of(kind: str, symbol: str, exchange: str, at_ns: int, late_ns: int = 5 * MS, **rest: Any) -> dict[str, Any]:
    times = {"timestamp": stamp(at_ns), "localTimestamp": stamp(at_ns + late_ns)}
    return {"type": kind, "symbol": symbol, "exchange": exchange, **rest, **times}


def trade(
    n: int, symbol: str = "BTCUSDT", exchange: str = "binance-futures", at_ns: int | None = None
) -> dict[str, Any]:
    """The n-th trade, 10 ms after the one before."""
    at_ns = T0 + n * 10 * MS if at_ns is None else at_ns
    side = "buy" if n % 3 else "sell"
    return _of("trade", symbol, exchange, at_ns, id=str(1000 + n), price=60000 + n % 7, amount=0.5 + n % 4, side=side)


def trades(start: int, end: int, **rest: Any) -> list[dict[str, Any]]:
    return [trade(n, **rest) for n in range(start, end)]


def book(at_ns: int, levels: int = 5, symbol: str = "BTCUSDT", exchange: str = "binance-futures") -> dict[str, Any]:
    bids = [{"price": 60000 - i, "amount": 1 + i} for i in range(levels)]
    asks = [{"price": 60001 + i, "amount": 2 + i} for i in range(levels)]
    about = {"name": "book_snapshot_5_1s", "depth": levels, "interval": 1000, "bids": bids, "asks": asks}
    return _of("book_snapshot", symbol, exchange, at_ns, **about)


def quote(at_ns: int, symbol: str = "BTCUSDT", exchange: str = "binance-futures") -> dict[str, Any]:
    return book(at_ns, 1, symbol, exchange) | {"name": "quote", "interval": 0}


def book_ticker(at_ns: int, symbol: str = "BTCUSDT", exchange: str = "binance-futures") -> dict[str, Any]:
    best = {"askAmount": 2, "askPrice": 60001, "bidPrice": 60000, "bidAmount": 1}
    return _of("book_ticker", symbol, exchange, at_ns, **best)


def ticker(at_ns: int, symbol: str = "BTCUSDT", exchange: str = "binance-futures") -> dict[str, Any]:
    values = {"lastPrice": 60000, "openInterest": 1e5, "fundingRate": 1e-4, "markPrice": 60001, "indexPrice": 60002}
    return _of("derivative_ticker", symbol, exchange, at_ns, fundingTimestamp=stamp(T0 + 3600 * NS), **values)


def liquidation(at_ns: int, symbol: str = "BTCUSDT", exchange: str = "binance-futures") -> dict[str, Any]:
    return _of("liquidation", symbol, exchange, at_ns, id="7", price=60000, amount=3, side="buy")


def option(at_ns: int, symbol: str, strike: float, kind: str = "call", exchange: str = "deribit") -> dict[str, Any]:
    values = {"optionType": kind, "strikePrice": strike, "expirationDate": "2024-06-28T08:00:00.000Z"}
    more = {"bestBidPrice": 0.05, "bestAskPrice": 0.06, "markIV": 55.0, "underlyingPrice": 67000, "delta": 0.5}
    return _of("option_summary", symbol, exchange, at_ns, underlyingIndex="BTC-28JUN24", **values, **more)


def disconnect(at_ns: int, exchange: str = "binance-futures", symbols: list[str] | None = None) -> dict[str, Any]:
    message = {"type": "disconnect", "exchange": exchange, "localTimestamp": stamp(at_ns)}
    return message | ({"symbols": symbols} if symbols else {})


def error(at_ns: int, details: str, exchange: str = "binance-futures") -> dict[str, Any]:
    about = {"type": "error", "exchange": exchange, "localTimestamp": stamp(at_ns)}
    return about | {"details": details, "subSequentErrorsCount": 1}
