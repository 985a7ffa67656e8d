"""Normalized Tardis messages for tests, random tapes of them, and a slow oracle of what they become."""

from __future__ import annotations

import gzip
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from services.ingest.source import Grouped
from shared.frames import NS, TRADE
from shared.instruments import feed_id, instrument_id, partition_of
from tests.services.ingest.dbn import Memory

T0 = 1_717_200_000 * NS  # 2024-06-01T00:00:00Z
MS = 1_000_000


class Tapes(Memory):
    """Memory for rows whose ordinals repeat (records of several rows). `chunks`: trades of each push."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: list[int] = []

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        self.cursors.append(cursor)
        self.log.append(len(grouped.rows))
        self.chunks.append(int((grouped.rows["kind"] == TRADE).sum()))
        for g, p in enumerate(grouped.partitions):
            piece = slice(grouped.starts[g], grouped.starts[g + 1])
            self.rows.setdefault(p, []).append(grouped.rows[piece])
            self.pieces.append((len(self.cursors) - 1, p, grouped.rows[piece]))
            steps, parts = np.diff(grouped.ordinals[piece]), grouped.rows[piece]["part"]
            assert ((steps > 0) == (parts[1:] == 0)).all()

    def messages(self, kind: type) -> list[Any]:
        return [m for m in self.log if isinstance(m, kind)]

    def streams(self) -> dict[int, bytes]:
        return {p: rows.tobytes() for p, rows in self.joined().items()}


def iso(ns: int, digits: int = 3) -> str:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=ns // NS)
    fraction = f".{ns % NS:09d}"[: digits + 1] if digits else ""
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def message(kind: str, exchange: str, symbol: str, at: int, **more: Any) -> dict[str, Any]:
    """A message of a symbol at T0 + `at` ms, received 10 ms later."""
    return {
        "type": kind, "symbol": symbol, "exchange": exchange, **more,
        "timestamp": iso(T0 + at * MS), "localTimestamp": iso(T0 + (at + 10) * MS, 6),
    }  # fmt: skip


def trade(exchange: str, symbol: str, at: int, number: int | str = "", **more: Any) -> dict[str, Any]:
    fields = {"id": str(number or at), "price": 100.5, "amount": 2, "side": "buy"}
    return message("trade", exchange, symbol, at, **(fields | more))


def book(exchange: str, symbol: str, at: int, depth: int = 2) -> dict[str, Any]:
    sides = {
        side: [{"price": 100 + sign * (i + 1), "amount": i + 1} for i in range(depth)]
        for side, sign in (("bids", -1), ("asks", 1))
    }
    return message("book_snapshot", exchange, symbol, at, depth=depth, interval=0, name="b", **sides)


def disconnect(exchange: str, at: int, *symbols: str) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "disconnect", "exchange": exchange, "localTimestamp": iso(T0 + at * MS)}
    return made | ({"symbols": list(symbols)} if symbols else {})


def lines(messages: list[Any]) -> list[bytes]:
    return [m if isinstance(m, bytes) else json.dumps(m).encode() for m in messages]


def write(path: Path, messages: list[Any]) -> Path:
    whole = b"".join(line + b"\n" for line in lines(messages))
    if path.suffix == ".zst":
        half = len(whole) // 2
        whole = zstandard.compress(whole[:half]) + zstandard.compress(whole[half:])
    if path.suffix == ".gz":
        whole = gzip.compress(whole)
    path.write_bytes(whole)
    return path


SYMBOLS = (
    ("deribit", "BTC-PERPETUAL"), ("deribit", "BTC-28JUN24-70000-C"), ("deribit", "ETH-PERPETUAL"),
    ("binance", "BTCUSDT"), ("binance", "ETHUSDT"), ("bitmex", "XBTUSD"),
)  # fmt: skip


def random_tape(seed: int, count: int) -> list[Any]:
    """Several exchanges whose clocks wander, late records, repeated trades, disconnects, garbage."""
    rng = random.Random(seed)
    tape: list[Any] = []
    at, sent = 0, []
    for number in range(1, count + 1):
        at += rng.choice([0, 1, 50, 700])
        exchange, symbol = rng.choice(SYMBOLS)
        event = max(0, at - rng.choice([0, 0, 3, 400, 1500]))
        choice = rng.random()
        if choice < 0.5:
            tape.append(trade(exchange, symbol, event, number, side=rng.choice(["buy", "sell", "unknown"])))
            sent.append(tape[-1])
        elif choice < 0.6 and sent:
            tape.append(rng.choice(sent))
        elif choice < 0.75:
            tape.append(book(exchange, symbol, event, rng.choice([1, 2, 5])))
        elif choice < 0.8:
            tape.append(message("derivative_ticker", exchange, symbol, event + 5000, lastPrice=1, markPrice=2))
        elif choice < 0.85:
            tape.append(message("book_change", exchange, symbol, event, bids=[], asks=[]))
        elif choice < 0.93:
            some = rng.choice([(), (symbol.lower(),), (symbol, "NEVER-SEEN")])
            tape.append(disconnect(exchange, at, *some))
        else:
            tape.append(rng.choice([b"{", b'{"type":"trade"}', b'{"type":"new"}', b'["a"]', b'{"type":"trade_bar"}']))
    return tape


def expected(tape: list[Any], partitions: int, grace_ns: int) -> tuple[dict[int, list[Any]], list[Any]]:
    """Rows of each partition (kind name, instrument or feed, event time, part) and (kind, feed, start, end, symbols)
    of disconnects and gaps: record by record, as the rules read."""
    rows: dict[int, list[Any]] = {}
    said: list[Any] = []
    first: dict[str, int] = {}
    high: dict[str, int] = {}
    entered: dict[str, int] = {}
    last: dict[str, int] = {}
    known: dict[tuple[str, str], str] = {}
    down: dict[str, dict[str, int]] = {}
    seen: set[Any] = set()

    def said_of(exchange: str, name: str) -> tuple[str, ...]:
        return (known[exchange, name],) if name else ()

    for m in tape:
        if isinstance(m, bytes) or m["type"] in ("book_change", "trade_bar", "error"):
            continue
        exchange = m["exchange"]
        feed = f"p:{exchange}"
        if m["type"] == "disconnect":
            if exchange not in first:
                continue
            for name in [s.lower() for s in m.get("symbols", [])] or [""]:
                if name in down.setdefault(exchange, {}):
                    continue
                down[exchange][name] = high.get(exchange, 0) or first[exchange]
                if not name or (exchange, name) in known:
                    said.append(("disconnect", feed, down[exchange][name], None, said_of(exchange, name)))
            continue
        symbol, ts = m["symbol"], int(np.datetime64(m["timestamp"][:-1], "ns").astype(np.int64))
        if m["type"] == "trade":
            key = (exchange, symbol, m["id"], m["side"])
            if key in seen:
                continue
            seen.add(key)
        base = "ETH" if symbol.startswith("ETH") else "BTC"
        part = partition_of(f"{exchange}:{base}", partitions)
        rows.setdefault(part, [])
        first.setdefault(exchange, ts)
        known[exchange, symbol.lower()] = symbol
        last[exchange] = max(last.get(exchange, 0), ts)
        if m["type"] in ("trade", "book_snapshot", "book_ticker"):
            for name in ("", symbol.lower()):
                if name in down.get(exchange, {}):
                    since = down[exchange].pop(name)
                    said.append(("gap", feed, since, max(since + 1, ts), said_of(exchange, name)))
            high[exchange] = max(high.get(exchange, 0), ts)
            second = (high[exchange] - grace_ns) // NS
            if second > entered.get(exchange, -1):
                entered[exchange] = second
                for p, others in rows.items():
                    if p != part:
                        others.append(("clock", feed_id(feed), second * NS, 0))
        count = {"book_snapshot": max(len(m.get("bids", ())), 1), "option_summary": 3}.get(m["type"], 1)
        name = {"book_snapshot": "book", "book_ticker": "book", "derivative_ticker": "ticker"}.get(m["type"], m["type"])
        rows[part] += [(name, instrument_id(exchange, symbol), ts, n) for n in range(count)]
    for exchange in sorted(first):
        for name, since in down.get(exchange, {}).items():
            if not name or (exchange, name) in known:
                gap = ("gap", f"p:{exchange}", since, max(since + 1, last[exchange]), said_of(exchange, name))
                said.append(gap)
    return rows, said
