"""Small option markets for the pure core, and what it makes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from services.pressure.core import Emission, Output, PartitionState
from services.pressure.state import Config
from shared.frames import NS, TICK, TRADE, Frame, Rows, tick_frame
from shared.instruments import feed_id, instrument_id
from shared.messages import AnyMessage, Clock, Instrument, Pressure, PressureRollup, encode

ALWAYS = np.array([[0, 1 << 62]], np.int64)
FEED, VENUE = "glbx", "GLBX.MDP3"
START = 1_780_272_000  # a midnight (UTC), a Monday
WINDOW = 300
DAY = 86_400
EXPIRY = (START + 18 * DAY + 20 * 3600) * NS
Key = tuple[str, int, float, str, float]


def config(**changes: Any) -> Config:
    return Config(**{"sessions": lambda venue, root: ALWAYS, "greeks": False, **changes})


def option(strike: float = 20_000.0, kind: str = "C", **changes: Any) -> Instrument:
    symbol = changes.pop("symbol", f"NQM6 {kind}{strike:g}")
    venue = changes.get("venue", VENUE)
    fields = {
        "id": instrument_id(venue, symbol), "venue": venue, "symbol": symbol, "root": "NQ", "feed": FEED, "kind": kind,
        "expiration_ns": EXPIRY, "strike": strike, "underlying": "NQM6", "multiplier": 20.0,
    }  # fmt: skip
    return Instrument(**{**fields, **changes})


def future(symbol: str = "NQM6", **changes: Any) -> Instrument:
    venue = changes.get("venue", VENUE)
    fields = {
        "id": instrument_id(venue, symbol), "venue": venue, "symbol": symbol, "root": "NQ", "feed": FEED, "kind": "F",
        "expiration_ns": EXPIRY,
    }  # fmt: skip
    return Instrument(**{**fields, **changes})


def ns(at: float) -> int:
    return START * NS + round(at * 1_000_000) * 1000


def rows(*records: dict[str, Any]) -> Rows:
    """TICK rows; `at` is seconds since START, the rest are fields (undefined prices are NaN)."""
    out = np.zeros(len(records), TICK)
    for name in ("price", "bid_px", "ask_px", "bid_sz", "ask_sz"):
        out[name] = np.nan
    for row, record in zip(out, records, strict=True):
        for name, value in record.items():
            if name == "at":
                row["ts_event_ns"] = ns(value)
            else:
                row[name] = value
    return out


def trade(
    at: float, price: float = 10.0, size: float = 1.0, side: int = 1, who: Instrument | None = None, **more: Any
) -> dict[str, Any]:
    instrument = (who or option()).id
    return {"at": at, "price": price, "size": size, "side": side, "kind": TRADE, "instrument": instrument, **more}


def tick(at: float, feed: str = FEED) -> dict[str, Any]:
    """A clock row between the trades."""
    return {"at": at, "kind": 1, "instrument": feed_id(feed)}


def messages(kind: str, *some: AnyMessage) -> Frame:
    return Frame(kind, len(some), 0, 0, FEED, encode(list(some)))


def define(*instruments: Instrument) -> Frame:
    return messages("instrument", *instruments)


def watch(at: float = 0.0, feed: str = FEED, grace_ns: int = 0) -> Frame:
    return messages("clock", Clock(feed, ns(at), watched_from_ns=ns(at), grace_ns=grace_ns))


def begin(*instruments: Instrument, at: float = 0.0, grace_ns: int = 0) -> list[Frame]:
    """The frames that a tape begins with: instruments, and watched from `at`."""
    instruments = instruments or (option(),)
    feeds = sorted({i.feed for i in instruments})
    return [define(*instruments), *(watch(at, feed, grace_ns) for feed in feeds)]


def frame(*records: dict[str, Any]) -> Frame:
    return tick_frame(rows(*records), FEED)


def clock(at: float, feed: str = FEED, final: bool = False) -> Frame:
    return messages("clock", Clock(feed, ns(at), final=final))


def play(frames: Iterable[Frame], state: PartitionState | None = None, **changes: Any) -> Output:
    """What leaves, a step a frame."""
    state = state or PartitionState(config(**changes))
    return [one for some in frames for one in state.step([some])]


def emissions(output: Output) -> list[Emission]:
    some = [one for one in output if isinstance(one, Emission)]
    for one in some:
        for message in (*one.rows, one.rollup):
            assert_finite(message)
        assert all(r.time_window_ns == one.rollup.time_window_ns for r in one.rows)
        assert all(r.underlying == one.rollup.underlying for r in one.rows)
    return some


def pressures(output: Output) -> list[Pressure]:
    return [row for one in emissions(output) for row in one.rows]


def only(output: Output) -> Pressure:
    (row,) = pressures(output)
    return row


def key_of(row: Pressure) -> Key:
    """(underlying, expiration, strike, type, window's start in seconds since START)."""
    return row.underlying, row.expiration_ns, row.strike, row.option_type, row.time_window_ns // NS - START


def final(output: Output) -> tuple[dict[Key, Pressure], dict[tuple[str, int], PressureRollup]]:
    """The last revision of every row and rollup; revisions grow by one, the first may be 0 or (late) 1."""
    kept: dict[Key, Pressure] = {}
    rollups: dict[tuple[str, int], PressureRollup] = {}
    for one in emissions(output):
        for row in one.rows:
            before = kept.get(key_of(row))
            assert row.revision == (before.revision + 1 if before else row.revision)
            assert before or row.revision in (0, 1)
            kept[key_of(row)] = row
        name = one.rollup.underlying, one.rollup.time_window_ns // NS - START
        held = rollups.get(name)
        assert one.rollup.revision == (held.revision + 1 if held else one.rollup.revision)
        rollups[name] = one.rollup
    return kept, rollups


def assert_finite(message: Any) -> None:
    """No NaN and no infinity, however deep."""

    def walk(value: Any) -> Iterator[float]:
        if isinstance(value, float):
            yield value
        elif isinstance(value, dict):
            yield from itertools.chain.from_iterable(map(walk, value.values()))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from itertools.chain.from_iterable(map(walk, value))

    assert all(map(math.isfinite, walk(msgspec.to_builtins(message)))), message
    # What went through JSON is the same: no NaN that became null.
    assert msgspec.json.decode(msgspec.json.encode(message), type=type(message)) == message
