"""A recording of normalized crypto with everything that can be odd about one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.services.ingest.csvs import BEGIN_US, iso, market, us_of, write_ndjson

LATE_SECONDS = (2, 45, 100, 400)
GONE = {"binance-futures": (300, 340, "btcusdt"), "deribit": (610, 633, "")}  # from, to (seconds), which symbol


def crypto_tape(path: Path, records: int = 12_000, seed: int = 5, step_us: int = 200_000) -> Path:
    """Two exchanges and their options, about 0.1 s a record: late trades, trades sent again, disconnects, garbage."""
    dice = random.Random(seed)
    lines: list[dict[str, Any]] = []
    sent: list[dict[str, Any]] = []
    told: set[str] = set()
    for message in market(records, seed=seed, step_us=step_us):
        exchange, received = message["exchange"], us_of(message["localTimestamp"])
        begin, end, lost = GONE[exchange]
        if begin <= (received - BEGIN_US) / 1e6 < end:
            if exchange not in told:
                told.add(exchange)
                symbols = {"symbols": [lost]} if lost else {}
                lines.append({"type": "disconnect", "exchange": exchange, "localTimestamp": iso(received), **symbols})
            continue
        if message["type"] == "trade":
            _odd(message, dice)
            if sent and dice.random() < 0.03:
                lines.append(dice.choice(sent[-20:]) | {"localTimestamp": iso(received)})
            sent.append(message)
        lines.append(message)
        if dice.random() < 0.002:
            lines.append({"type": "trade", "exchange": exchange})
    return write_ndjson(path, lines)


def _odd(trade: dict[str, Any], dice: random.Random) -> None:
    """Some trades are of an option, or of a second symbol, or late."""
    if trade["exchange"] == "deribit" and dice.random() < 0.2:
        trade |= {"symbol": "BTC-28JUN24-70000-C", "price": round(0.05 + dice.random() / 100, 4)}
    elif trade["exchange"] == "binance-futures" and dice.random() < 0.3:
        trade |= {"symbol": "ETHUSDT", "price": round(3800 + dice.gauss(0, 2), 2)}
    if dice.random() < 0.03:
        trade["timestamp"] = iso(us_of(trade["timestamp"]) - dice.choice(LATE_SECONDS) * 1_000_000)
