"""Frames: the micro-batches that travel on the bus.

A stream entry has plain fields that a person reads in redis-cli (`kind`, `count`, `first`,
`last`, `src`, `seq`, `v`) and a `body`: packed rows of one NumPy dtype for ticks and candles,
a JSON array of `shared.messages` for everything else.

Times are int64 ns UTC. Undefined prices and sizes are NaN. Sizes are in contracts or base units.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.errors import VersionError

VERSION = 1
NS = 1_000_000_000

BUY, NO_SIDE, SELL = 1, 0, -1
TRADE, CLOCK = 0, 1

# One row of a `trade` frame. `side` is the aggressor as the feed gives it (1 buy, -1 sell, 0 none);
# bid/ask are the best quotes just before the trade. A row of kind CLOCK carries the feed's id in
# `instrument` and its watermark in `ts_event_ns`: time travels between the trades, so windows close
# at the same place of the tape however it is cut into frames.
TICK = np.dtype(
    [
        ("ts_event_ns", "<i8"),
        ("ts_recv_ns", "<i8"),
        ("instrument", "<i8"),
        ("price", "<f8"),
        ("size", "<f8"),
        ("bid_px", "<f8"),
        ("ask_px", "<f8"),
        ("bid_sz", "<f8"),
        ("ask_sz", "<f8"),
        ("sequence", "<u4"),
        ("kind", "u1"),
        ("side", "i1"),
        ("flags", "u1"),
        ("pad", "u1"),
    ]
)

# One row of a `candle_1m` or `candle_1s` frame; `name` indexes the frame's `names`
# ((ticker, symbol) pairs). `time_ns` is the window's end for candle_1m, its start for candle_1s.
CANDLE = np.dtype(
    [
        ("time_ns", "<i8"),
        ("name", "<i8"),
        ("open", "<f8"),
        ("high", "<f8"),
        ("low", "<f8"),
        ("close", "<f8"),
        ("volume", "<f8"),
        ("trades", "<i8"),
        ("ask_volume", "<f8"),
        ("bid_volume", "<f8"),
        ("unknown_volume", "<f8"),
        ("cvd_open", "<f8"),
        ("cvd_high", "<f8"),
        ("cvd_low", "<f8"),
        ("cvd_close", "<f8"),
        ("session_cvd_close", "<f8"),
        ("vd", "<f8"),
        ("vd_ratio", "<f8"),
        ("book_imbalance", "<f8"),
        ("price_pct", "<f8"),
        ("divergence", "<i8"),
        ("max_trade_size", "<f8"),
        ("big_trades", "<i8"),
        ("big_volume", "<f8"),
        ("sum_bid_depth", "<f8"),
        ("sum_ask_depth", "<f8"),
        ("sum_price_volume", "<f8"),
        ("vwap", "<f8"),
        ("avg_spread", "<f8"),
        ("complete", "<i8"),
        ("revision", "<i8"),
        ("timestamp_out_ns", "<i8"),
    ]
)

# One row of a `late_trade` frame: a trade that came too late to change any row.
LATE = np.dtype([("tick", TICK), ("name", "<i8"), ("watermark_ns", "<i8")])

PACKED = {"trade": TICK, "candle_1m": CANDLE, "candle_1s": CANDLE, "late_trade": LATE}

# A frame that cannot be read travels on as this kind (body: the reason, then the raw bytes), to the dead letters.
UNREADABLE = "unreadable"
REASON_BYTES = 200

Rows = NDArray[Any]
Row = Any  # one record of such an array (compiled code reads its fields as attributes)


@dataclass(slots=True)
class Frame:
    """One entry of a stream. `names` only for packed kinds that index it."""

    kind: str
    count: int
    first_ns: int
    last_ns: int
    source: str
    body: bytes
    seq: int = 0
    names: list[tuple[str, str]] = field(default_factory=list)
    id: str = ""

    def fields(self, seq: int) -> list[bytes | str | int]:
        """Flat list of field, value … as XADD takes it, with this sequence."""
        out: list[bytes | str | int] = [
            "kind", self.kind, "count", self.count, "first", iso(self.first_ns),
            "last", iso(self.last_ns), "src", self.source, "seq", seq, "v", VERSION,
        ]  # fmt: skip
        if self.names:
            out += ["names", msgspec.json.encode(self.names)]
        out += ["body", self.body]
        return out

    def rows(self) -> Rows:
        """The body as a read-only structured array (packed kinds)."""
        return np.frombuffer(self.body, dtype=PACKED[self.kind])


_names = msgspec.json.Decoder(list[tuple[str, str]])


def parse(entry_id: bytes, flat: dict[bytes, bytes]) -> Frame:
    """Frame of a stream entry.

    Raises VersionError when a newer program wrote it.
    """
    version = int(flat[b"v"])
    if version > VERSION:
        raise VersionError(
            f"the bus holds frames of version {version}, this program reads up to {VERSION}: upgrade this worker"
        )
    names = flat.get(b"names")
    return Frame(
        kind=flat[b"kind"].decode(),
        count=int(flat[b"count"]),
        first_ns=ns_of(flat[b"first"].decode()),
        last_ns=ns_of(flat[b"last"].decode()),
        source=flat[b"src"].decode(),
        body=flat[b"body"],
        seq=int(flat[b"seq"]),
        names=_names.decode(names) if names else [],
        id=entry_id.decode(),
    )


def unreadable(reason: str, raw: bytes, entry_id: str = "") -> Frame:
    """What stands for an entry that is no sound frame; `reason_of` and the dead letters read it."""
    text = reason.encode()[:REASON_BYTES].replace(b"\n", b" ")
    return Frame(UNREADABLE, 1, 0, 0, "", text + b"\n" + raw, id=entry_id)


def reason_of(frame: Frame) -> str:
    """Why an UNREADABLE frame is one."""
    return frame.body.partition(b"\n")[0].decode(errors="replace")


def iso(ns: int) -> str:
    """`2023-12-25T23:00:00.085275419Z`: fixed width, so that text order is time order."""
    return f"{np.datetime64(ns, 'ns')}Z"


def ns_of(text: str) -> int:
    """The instant of an `iso` text, ns."""
    return int(np.datetime64(text.removesuffix("Z"), "ns").astype(np.int64))
