"""Small tapes for the pure core, and its final rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from services.aggregate.core import PartitionState
from services.aggregate.state import Config
from shared.frames import NS, TICK, TRADE, Frame, Rows, tick_frame
from shared.instruments import instrument_id
from shared.messages import Clock, Instrument, encode
from tests.services.ingest.collect import Collect, Store

ALWAYS = np.array([[0, 1 << 62]], np.int64)
FEED = "tardis:binance-futures"
START = 1_780_272_000  # a midnight (UTC), a Monday


def config(**changes: Any) -> Config:
    return Config(**{"sessions": lambda venue, root: ALWAYS, **changes})


def perpetual(symbol: str = "BTCUSDT", venue: str = "binance-futures", **changes: Any) -> Instrument:
    fields = {
        "id": instrument_id(venue, symbol), "venue": venue, "symbol": symbol, "root": f"{venue}:BTC", "feed": FEED,
        "kind": "F", "ticker": f"{venue}:{symbol}",
    }  # fmt: skip
    return Instrument(**{**fields, **changes})


def rows(*records: dict[str, Any]) -> Rows:
    """TICK rows; `at` is seconds since START, the rest are fields (undefined prices are NaN)."""
    out = np.zeros(len(records), TICK)
    for name in ("price", "bid_px", "ask_px", "bid_sz", "ask_sz"):
        out[name] = np.nan
    for row, record in zip(out, records, strict=True):
        for name, value in record.items():
            if name == "at":
                row["ts_event_ns"] = START * NS + round(value * 1000) * (NS // 1000)
            else:
                row[name] = value
    return out


def trade(at: float, price: float, size: float = 1.0, side: int = 1, who: Instrument | None = None) -> dict[str, Any]:
    instrument = (who or perpetual()).id
    return {"at": at, "price": price, "size": size, "side": side, "kind": TRADE, "instrument": instrument}


def begin(*instruments: Instrument, at: float = 0.0, grace_ns: int = 0) -> list[Frame]:
    """The frames that a tape begins with: instruments, and watched from `at`."""
    instruments = instruments or (perpetual(),)
    watched = START * NS + int(at * NS)
    clocks = [
        Clock(feed, watched, watched_from_ns=watched, grace_ns=grace_ns)
        for feed in sorted({i.feed for i in instruments})
    ]
    return [
        Frame("instrument", len(instruments), 0, 0, FEED, encode(list(instruments))),
        Frame("clock", len(clocks), 0, 0, FEED, encode(clocks)),
    ]


def frame(*records: dict[str, Any]) -> Frame:
    return tick_frame(rows(*records), FEED)


def clock(at: float, feed: str = FEED) -> Frame:
    return Frame("clock", 1, 0, 0, FEED, encode([Clock(feed, START * NS + int(at * NS))]))


class ToFrames(Collect):
    """An Output that makes the frames of one partition, in order."""

    def __init__(self) -> None:
        super().__init__(Store())
        self.frames: list[Frame] = []

    def instruments(self, messages: Any) -> None:
        messages = list(messages)
        self.frames.append(Frame("instrument", len(messages), 0, 0, "test", encode(messages)))

    def broadcast(self, message: Any) -> None:
        self.frames.append(Frame(type(message).__name__.lower(), 1, 0, 0, "test", encode([message])))

    def ticks(self, grouped: Any, cursor: bytes) -> None:
        self.frames.append(tick_frame(grouped.rows, "test"))


Key = tuple[str, int, int]


def final(state: PartitionState, frames: Iterable[Frame], into: dict[Key, Rows] | None = None) -> dict[Key, Rows]:
    """{(name, timeframe, start since START): FIXED row} as finally emitted, a step a frame."""
    kept: dict[Key, Rows] = {} if into is None else into
    for one in frames:
        out = state.step([one])
        for row in (r for chunk in out.fixed for r in chunk):
            name = out.fixed_names[int(row["name"])][1]
            key = (name, int(row["timeframe_sec"]), int(row["time_ns"]) // NS - START)
            assert key not in kept or kept[key]["revision"] < row["revision"], "revisions only grow"
            kept[key] = row.copy()
    return kept
