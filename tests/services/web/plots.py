"""A store with a small market in it, written row by row, so that a test knows what a plot must show."""

from __future__ import annotations

import math
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from typing import Any

import msgspec

from services.sink_sqlite.store import of
from shared.frames import NS, iso, ns_of
from shared.instants import iso_second
from shared.settings import Settings, load

START = ns_of("2025-03-03T14:30:00Z")
MINUTE = 60 * NS
WINDOW = 5 * MINUTE
EXPIRY = "2025-06-20T20:00:00Z"


def settings_of(url: str) -> Settings:
    found = load(None)
    return replace(found, tapeline=msgspec.structs.replace(found.tapeline, store=url))


class Market:
    """Rows go into the store as they are added."""

    def __init__(self, url: str) -> None:
        store = of(settings_of(url), threading.Event())
        store.open()
        store.close()
        self.path = url.removeprefix("sqlite:///")

    def insert(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Rows with zeros and empty texts in what must not be NULL and is not given."""
        with closing(sqlite3.connect(self.path)) as connection:
            told = connection.execute('SELECT name, type, "notnull" FROM pragma_table_info(?)', (table,)).fetchall()
            blank = {name: "" if kind == "TEXT" else 0 for name, kind, needed in told if needed}
            for row in rows:
                values = blank | row
                names = ", ".join(f'"{name}"' for name in values)
                marks = ", ".join("?" * len(values))
                connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(values.values()))
            connection.commit()

    def candles(self, minutes: list[int], symbol: str = "ES", exchange: str = "GLBX.MDP3", **more: Any) -> None:
        """A 1m candle at each minute since START: open 100 + minute, three bought, two sold, one unknown."""
        self.insert("candles", [
            {
                "exchange": exchange, "symbol": symbol, "timeframe": "1m",
                "timestamp_in": iso_second(START + m * MINUTE), "open": 100.0 + m, "high": 102.0 + m, "low": 99.0 + m,
                "close": 101.0 + m if m % 3 else 99.5 + m, "volume": 6.0, "trades": 3, "ask_volume": 3.0,
                "bid_volume": 2.0, "unknown_volume": 1.0, "vd": 1.0, "cvd_open": m + 0.0, "cvd_close": m + 1.0,
                "complete": 1,
            } | more
            for m in minutes
        ])  # fmt: skip

    def seconds(self, rows: list[tuple[int, int, float, float]], **more: Any) -> None:
        """Seconds of the front contract with big trades: (second since START, how many, volume, vd)."""
        self.insert("candles_1s", [
            {"time": iso_second(START + s * NS), "ticker": "ES", "symbol": "ESH5", "close": 100.0, "vwap": 100.5,
             "volume": volume, "big_trades": n, "big_volume": volume, "vd": vd, "cvd_close": 1.0, "complete": 1} | more
            for s, n, volume, vd in rows
        ])  # fmt: skip

    def pressure(self, window: int, cells: list[tuple[str, float, float, float]], **more: Any) -> None:
        """A window of ES (its number since START): (type, strike, bought, sold) each, and its rollup."""
        at = {"underlying": "ES", "time_window": iso_second(START + window * WINDOW), "window_seconds": 300,
              "complete": 1}  # fmt: skip
        self.insert("pressure_metrics", [
            {**at, "expiration": EXPIRY, "option_type": kind, "strike": strike, "dominant_side": "NEUTRAL",
             "ask_volume": ask, "bid_volume": bid,
             "log_ratio": math.log(ask + 0.5) - math.log(bid + 0.5)}
            for kind, strike, ask, bid in cells
        ])  # fmt: skip
        rollup = {**at, "net_premium": 1000.0 * (window + 1), "underlying_price": 6000.0 + window, "top_strikes": "[]"}
        self.insert("pressure_rollups", [rollup | more])

    def signal(self, window: int, kind: str, strike: float, **more: Any) -> None:
        self.insert("signals", [{
            "underlying": "ES", "expiration": EXPIRY, "strike": strike, "option_type": kind,
            "time_window": iso_second(START + window * WINDOW), "window_seconds": 300, "source": "tapeline",
            "type": "sweep", "types": "[]", "direction": "BUY", "status": "emitted", "score": 0.9,
            "grade": "EXTREME", "complete": 1,
        } | more])  # fmt: skip


def until(minutes: int) -> str:
    return iso(START + minutes * MINUTE)
