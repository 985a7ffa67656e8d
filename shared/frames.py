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
TRADE, CLOCK, BOOK, TICKER, LIQUIDATION, OPTION = range(6)
ROW_KINDS = ("trade", "clock", "book", "ticker", "liquidation", "option_summary")
MAX_PARTS = 64

# One row of a `trade` or `tick` frame: all that a feed says, in its order, so that rows do not depend on how
# the tape is cut into frames. `kind` is one of ROW_KINDS; a record of several rows counts them in `part`
# (0 first), stands in one frame, and has `ts_event_ns`, `ts_recv_ns` and `instrument` on each. Undefined is NaN.
#   TRADE        `side` is the aggressor as the feed gives it (1 buy, -1 sell, 0 none); bid/ask are the best
#                quotes just before the trade where the feed has them; `sequence` the venue's, or of the trade's id.
#   CLOCK        `instrument` is the feed's id and `ts_event_ns` its watermark: time travels between the trades.
#   BOOK         part 0: bid/ask the best level, `size` the depth (1: a quote), `price` the imbalance of the best
#                five levels; part n: bid/ask of level n + 1.
#   TICKER       `price` last, `size` open interest, `bid_px` mark price, `ask_px` index price, `bid_sz` funding
#                rate, `ask_sz` predicted funding rate, `sequence` the next funding's time in seconds (0 none).
#   LIQUIDATION  `side` 1: a short was liquidated (bought back), -1: a long.
#   OPTION       part 0: bid/ask the quotes, `price` last, `size` open interest; part 1: `price` mark, `size` the
#                underlying's price, `bid_px` bid IV, `ask_px` ask IV, `bid_sz` mark IV, `ask_sz` delta;
#                part 2: `price` gamma, `size` vega, `bid_px` theta, `ask_px` rho. IV is in percent.
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
        ("part", "u1"),
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

# What a fixed candle says beside its trades: the newest value before its end, as known when it closed.
# Liquidated volumes are of the candle itself.
STATE_COLUMNS = (
    "bid_price", "bid_size", "ask_price", "ask_size", "book_imbalance_5",
    "mark_price", "index_price", "open_interest", "funding_rate",
    "liquidated_long_volume", "liquidated_short_volume",
)  # fmt: skip
# Features of 15s and 1m candles, see docs/concepts.md; NaN until warm.
FEATURE_COLUMNS = (
    "sma_5", "sma_10", "sma_20", "ema_5", "ema_10", "ema_20", "wma_5", "momentum_3", "momentum_5",
    "velocity", "acceleration", "volume_sma_5", "volume_ema_5", "volume_ratio", "vwap_deviation",
    "volatility_5", "volatility_10", "high_low_ratio", "log_return", "trade_intensity", "avg_trade_size",
    "price_impact", "spread_proxy", "order_flow_imbalance", "kyle_lambda", "vpin",
    "rsi_5", "bollinger_position", "macd", "macd_signal", "macd_hist",
)  # fmt: skip

# One row of a `candle` frame: a fixed candle. `time_ns` is its start, `timeframe_sec` its length; `name` indexes
# the frame's `names`, here (exchange, symbol or continuous ticker) pairs.
FIXED = np.dtype(
    [
        ("time_ns", "<i8"), ("timeframe_sec", "<i8"), ("name", "<i8"),
        ("open", "<f8"), ("high", "<f8"), ("low", "<f8"), ("close", "<f8"), ("volume", "<f8"), ("trades", "<i8"),
        ("vwap", "<f8"), ("ask_volume", "<f8"), ("bid_volume", "<f8"), ("unknown_volume", "<f8"), ("vd", "<f8"),
        ("cvd_open", "<f8"), ("cvd_high", "<f8"), ("cvd_low", "<f8"), ("cvd_close", "<f8"), ("quoted_spread", "<f8"),
        *((name, "<f8") for name in STATE_COLUMNS),
        *((name, "<f8") for name in FEATURE_COLUMNS),
        ("complete", "<i8"), ("revision", "<i8"), ("timestamp_out_ns", "<i8"),
    ]
)  # fmt: skip

# One row of a `late_trade` frame: a trade that came too late to change any row.
LATE = np.dtype([("tick", TICK), ("name", "<i8"), ("watermark_ns", "<i8")])

PACKED = {
    "trade": TICK, "tick": TICK, "candle_1m": CANDLE, "candle_1s": CANDLE, "candle": FIXED, "late_trade": LATE,
}  # fmt: skip
TICK_FRAMES = frozenset({"trade", "tick"})

# A frame that cannot be read travels on as this kind (body: the reason, then the raw bytes), to the dead letters.
UNREADABLE = "unreadable"
REASON_BYTES = 200

Rows = NDArray[Any]
Row = Any  # one record of such an array (compiled code reads its fields as attributes)


@dataclass(slots=True)
class Frame:
    """One entry of a stream. `names` only for packed kinds that index it.

    `of` tells what a `tick` frame's records are (`trade 12 book 3`).
    """

    kind: str
    count: int
    first_ns: int
    last_ns: int
    source: str
    body: bytes
    seq: int = 0
    names: list[tuple[str, str]] = field(default_factory=list)
    id: str = ""
    of: str = ""

    def fields(self, seq: int) -> list[bytes | str | int]:
        """Flat list of field, value … as XADD takes it, with this sequence."""
        out: list[bytes | str | int] = [
            "kind", self.kind, "count", self.count, "first", iso(self.first_ns),
            "last", iso(self.last_ns), "src", self.source, "seq", seq, "v", VERSION,
        ]  # fmt: skip
        if self.of:
            out += ["of", self.of]
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
        of=flat.get(b"of", b"").decode(),
    )


def tick_frame(rows: Rows, source: str) -> Frame:
    """Frame of TICK rows: `trade` with the number of trades, or `tick` with the number of records."""
    times = rows["ts_event_ns"]
    first, last = int(times[0]), int(times[-1])
    clocks = int(np.count_nonzero(rows["kind"] == CLOCK))
    trades = int(np.count_nonzero(rows["kind"] == TRADE))
    if trades + clocks == len(rows):
        return Frame("trade", trades, first, last, source, rows.tobytes())
    counts = np.bincount(rows["kind"][rows["part"] == 0], minlength=len(ROW_KINDS))
    counts[CLOCK] = 0
    of = " ".join(f"{name} {n}" for name, n in zip(ROW_KINDS, counts.tolist(), strict=True) if n)
    return Frame("tick", int(counts.sum()), first, last, source, rows.tobytes(), of=of)


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
