"""Normalized messages of a small crypto market, and the vendor's CSV files of the same records."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

BEGIN_US = 1_717_200_000_000_000  # 2024-06-01T00:00:00Z
HEADS = {
    "trades": "id,side,price,amount",
    "liquidations": "id,side,price,amount",
    "quotes": "ask_amount,ask_price,bid_price,bid_amount",
    "derivative_ticker": (
        "funding_timestamp,funding_rate,predicted_funding_rate,open_interest,last_price,index_price,mark_price"
    ),
    "options_chain": (
        "type,strike_price,expiration,open_interest,last_price,bid_price,bid_amount,bid_iv,ask_price,ask_amount,ask_iv,"
        "mark_price,mark_iv,underlying_index,underlying_price,delta,gamma,vega,theta,rho"
    ),
    **{
        f"book_snapshot_{n}": ",".join(
            f"{side}[{i}].{what}" for i in range(n) for side in ("asks", "bids") for what in ("price", "amount")
        )
        for n in (5, 25)
    },
}
_FIELDS = {
    "trades": ("id", "side", "price", "amount"),
    "liquidations": ("id", "side", "price", "amount"),
    "quotes": ("askAmount", "askPrice", "bidPrice", "bidAmount"),
    "derivative_ticker": (
        "fundingTimestamp", "fundingRate", "predictedFundingRate", "openInterest", "lastPrice", "indexPrice",
        "markPrice",
    ),
    "options_chain": (
        "optionType", "strikePrice", "expirationDate", "openInterest", "lastPrice", "bestBidPrice", "bestBidAmount",
        "bestBidIV", "bestAskPrice", "bestAskAmount", "bestAskIV", "markPrice", "markIV", "underlyingIndex",
        "underlyingPrice", "delta", "gamma", "vega", "theta", "rho",
    ),
}  # fmt: skip
_TYPE_OF = {
    "trade": "trades", "liquidation": "liquidations", "book_ticker": "quotes", "derivative_ticker": "derivative_ticker",
    "option_summary": "options_chain",
}  # fmt: skip


def iso(us: int) -> str:
    return f"{datetime.fromtimestamp(us // 1_000_000, UTC):%Y-%m-%dT%H:%M:%S}.{us % 1_000_000:06d}Z"


def us_of(text: str) -> int:
    at = datetime.fromisoformat(text)
    return int(at.replace(microsecond=0).timestamp()) * 1_000_000 + at.microsecond


def type_of(message: dict[str, Any]) -> str | None:
    """The data type of the CSV files that hold such a message; None for what they do not hold."""
    if message["type"] == "book_snapshot":
        return f"book_snapshot_{message['depth']}"
    return _TYPE_OF.get(message["type"])


def line(message: dict[str, Any]) -> str:
    """The CSV line of a message."""
    cells: list[Any] = [message["exchange"], message["symbol"]]
    cells += [us_of(message["timestamp"]), us_of(message["localTimestamp"])]
    data_type = type_of(message)
    if message["type"] == "book_snapshot":
        for i in range(message["depth"]):
            for side in ("asks", "bids"):
                level = message[side][i] if i < len(message[side]) else {}
                cells += [level.get("price"), level.get("amount")]
    else:
        for name in _FIELDS[data_type or ""]:
            value = message.get(name)
            cells.append(us_of(value) if value and name in ("fundingTimestamp", "expirationDate") else value)
    return ",".join("" if cell is None else str(cell) for cell in cells)


def text(data_type: str, messages: Iterable[dict[str, Any]]) -> bytes:
    """A whole file."""
    head = f"exchange,symbol,timestamp,local_timestamp,{HEADS[data_type]}"
    return "".join(f"{each}\n" for each in (head, *map(line, messages))).encode()


def write(folder: Path, messages: Iterable[dict[str, Any]], day: str = "2024-06-01") -> list[Path]:
    """Files named as the vendor does: one a data type, exchange and symbol (options: all in one)."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for message in messages:
        data_type = type_of(message)
        if data_type is not None:
            symbol = "OPTIONS" if data_type == "options_chain" else message["symbol"]
            groups.setdefault(f"{message['exchange']}_{data_type}_{day}_{symbol}.csv.gz", []).append(message)
    for name, some in groups.items():
        (folder / name).write_bytes(gzip.compress(text(type_of(some[0]) or "", some), 1))
    return [folder / name for name in groups]


def write_ndjson(path: Path, messages: Iterable[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(m) + b"\n" for m in messages))
    return path


def market(records: int, seed: int = 1, begin_us: int = BEGIN_US, step_us: int = 40_000) -> list[dict[str, Any]]:
    """Records of all kinds of two exchanges, no two received at the same time; some values are missing."""
    r = random.Random(seed)
    made: list[dict[str, Any]] = []
    at = begin_us
    for n in range(records):
        at += r.randint(1, step_us)
        exchange, symbol = r.choice([("deribit", "BTC-PERPETUAL"), ("binance-futures", "BTCUSDT")])
        base = {
            "exchange": exchange,
            "symbol": symbol,
            "timestamp": iso(at - r.randint(0, 5000)),
            "localTimestamp": iso(at),
        }
        price = round(67000 + r.gauss(0, 20), 1)
        kind = r.random()
        if kind < 0.5:
            made.append({
                "type": "trade", **base, "id": r.choice([str(10**9 + n), f"{n:08x}-ab", "9" * 25 + str(n)]),
                "price": price, "amount": round(r.random(), 3), "side": r.choice(["buy", "sell", "unknown"]),
            })  # fmt: skip
        elif kind < 0.75:
            depth = r.choice([5, 25])
            shown = {side: r.choice([depth, depth, 2, 0]) for side in ("bids", "asks")}
            book = {
                side: [
                    {"price": round(price + sign * (i + 1) / 2, 1), "amount": r.randint(1, 99)}
                    if i < shown[side]
                    else {}
                    for i in range(depth)
                ]
                for side, sign in (("bids", -1), ("asks", 1))
            }
            made.append({"type": "book_snapshot", **base, "name": f"book_snapshot_{depth}_0ms", "depth": depth, **book})
        elif kind < 0.85:
            quote = {"bidPrice": price - 0.5, "bidAmount": 3.0, "askPrice": price + 0.5, "askAmount": 0.25}
            made.append({"type": "book_ticker", **base, **{k: v for k, v in quote.items() if r.random() < 0.9}})
        elif kind < 0.92:
            ticker = {
                "lastPrice": price, "openInterest": 5e8, "markPrice": price + 0.25, "indexPrice": price - 1.5,
                "fundingRate": 0.0001, "predictedFundingRate": -0.00002,
                "fundingTimestamp": iso(begin_us + 28_800_000_000),
            }  # fmt: skip
            made.append({"type": "derivative_ticker", **base, **{k: v for k, v in ticker.items() if r.random() < 0.7}})
        elif kind < 0.95:
            made.append({
                "type": "liquidation", **base, "id": None, "price": price, "amount": 2,
                "side": r.choice(["buy", "sell"]),
            })  # fmt: skip
        else:
            strike, right = r.choice([(70000, "call"), (65000, "put")])
            chain = {
                "bestBidPrice": 0.05, "bestBidAmount": 10, "bestBidIV": 51.5, "bestAskPrice": 0.055, "bestAskAmount": 4,
                "bestAskIV": 53.25, "lastPrice": 0.0525, "openInterest": 120.5, "markPrice": 0.0521, "markIV": 52.1,
                "delta": 0.45, "gamma": 0.00002, "vega": 61.2, "theta": -40.1, "rho": 12.5, "underlyingPrice": price,
                "underlyingIndex": "BTC-28JUN24",
            }  # fmt: skip
            made.append({
                "type": "option_summary", **base, "exchange": "deribit",
                "symbol": f"BTC-28JUN24-{strike}-{right[0].upper()}",
                "optionType": right, "strikePrice": strike, "expirationDate": "2024-06-28T08:00:00.000Z",
                **{k: v for k, v in chain.items() if r.random() < 0.9},
            })  # fmt: skip
    return made
