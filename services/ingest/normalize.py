"""Databento trade records to tick rows: one compiled pass, grouped by partition.

Time goes in-band: whenever the tape enters a new second, every partition that this feed has an
instrument in gets a CLOCK row (but the one that gets the trade itself). Its place depends on the
tape alone, never on how the input was cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.source import Grouped
from shared.compiled import jit
from shared.frames import CLOCK, NS, TICK, Rows
from shared.instruments import feed_id, is_spread, partition_of
from shared.messages import Instrument

# The wire layout of a TBBO (and MBP-1) record, and of a trades record padded to it by `widen`.
RECORD = np.dtype(
    [
        ("length", "u1"), ("rtype", "u1"), ("publisher_id", "<u2"), ("instrument_id", "<u4"),
        ("ts_event", "<i8"), ("price", "<i8"), ("size", "<u4"), ("action", "u1"), ("side", "u1"),
        ("flags", "u1"), ("depth", "u1"), ("ts_recv", "<i8"), ("ts_in_delta", "<i4"), ("sequence", "<u4"),
        ("bid_px", "<i8"), ("ask_px", "<i8"), ("bid_sz", "<u4"), ("ask_sz", "<u4"),
        ("bid_ct", "<u4"), ("ask_ct", "<u4"),
    ]
)  # fmt: skip
_TRADES = list(RECORD.fields or ())[:14]
TRADES_RECORD = np.dtype({"names": _TRADES, "formats": [RECORD[name] for name in _TRADES], "itemsize": 48})

UNDEF_PRICE = 2**63 - 1
MAX_AHEAD_NS = 3600 * NS
REASONS = ("unknown_instrument", "spread", "bad_time", "undefined_price", "not_a_trade")
SKIP_SPREAD, UNKNOWN = -2, -1


class Normalizer:
    """Turns records of one feed into grouped tick rows.

    The table of native ids is the feed's at this point of the tape (ids are reused across days:
    call `forget` at each date change and map again). `boundary_ns` is the next whole second that
    the tape has not entered: part of a source's cursor.
    """

    def __init__(self, feed: str, partitions: int) -> None:
        self.feed = feed
        self.partitions = partitions
        self.boundary_ns = 0
        self.skipped = np.zeros(len(REASONS), np.int64)
        self._feed_id = feed_id(feed)
        self._active = np.zeros(partitions, np.bool_)
        self.forget()

    def forget(self) -> None:
        """Drop the table of native ids (a new date, a new connection)."""
        self._native = np.zeros(64, np.int64)  # open addressing; 0 = free, else native id + 1
        self._id = np.zeros(64, np.int64)
        self._part = np.zeros(64, np.int64)
        self._used = 0

    def map(self, native_id: int, instrument: Instrument) -> None:
        """A native id stands for this instrument from here on."""
        part = partition_of(instrument.root, self.partitions)
        if is_spread(instrument.symbol, instrument.kind):
            part = SKIP_SPREAD
        else:
            self._active[part] = True
        if 2 * (self._used + 1) > len(self._native):
            self._grow()
        self._used += _insert(self._native, self._id, self._part, native_id, instrument.id, part)

    def _grow(self) -> None:
        old = (self._native, self._id, self._part)
        size = 2 * len(self._native)
        self._native, self._id, self._part = (np.zeros(size, np.int64) for _ in range(3))
        for native, bus_id, part in zip(*old, strict=True):
            if native:
                _insert(self._native, self._id, self._part, int(native) - 1, int(bus_id), int(part))

    def active_partitions(self) -> list[int]:
        """Partitions that this feed has an instrument in."""
        return [int(p) for p in np.flatnonzero(self._active)]

    def __call__(self, records: NDArray[Any], first_ordinal: int) -> Grouped:
        """Rows of RECORD records at tape positions first_ordinal, first_ordinal + 1, …"""
        n = len(records)
        parts = np.empty(n, np.int64)
        ids = np.empty(n, np.int64)
        crossed = np.zeros(n, np.int64)
        counts = np.zeros(self.partitions, np.int64)
        self.boundary_ns = _classify(
            records, self._native, self._id, self._part, self._active, self.boundary_ns,
            parts, ids, crossed, counts, self.skipped,
        )  # fmt: skip
        used = np.flatnonzero(counts)
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts[used])))
        offsets = np.zeros(self.partitions, np.int64)
        offsets[used] = starts[:-1]
        rows = np.empty(int(starts[-1]), TICK)
        ordinals = np.empty(len(rows), np.int64)
        _scatter(records, parts, ids, crossed, self._active, offsets, first_ordinal, self._feed_id, rows, ordinals)
        return Grouped(rows, ordinals, used.tolist(), starts.tolist())


def widen(trades: NDArray[Any]) -> NDArray[Any]:
    """TRADES_RECORD records as RECORD with an undefined BBO (the trades schema has none)."""
    wide = np.zeros(len(trades), RECORD)
    for name in TRADES_RECORD.names or ():
        wide[name] = trades[name]
    wide["bid_px"] = wide["ask_px"] = UNDEF_PRICE
    return wide


@jit
def _insert(native: Rows, ids: Rows, parts: Rows, key: int, bus_id: int, part: int) -> int:
    mask = len(native) - 1
    at = (key * 2654435761) & mask
    while native[at] != 0 and native[at] != key + 1:
        at = (at + 1) & mask
    new = 1 if native[at] == 0 else 0
    native[at] = key + 1
    ids[at] = bus_id
    parts[at] = part
    return new


@jit
def _classify(
    records: Rows, native: Rows, table_id: Rows, table_part: Rows, active: Rows, boundary: int,
    parts: Rows, ids: Rows, crossed: Rows, counts: Rows, skipped: Rows,
) -> int:  # fmt: skip
    """First pass: the partition and bus id of each record, and where the tape enters a new second."""
    mask = len(native) - 1
    for i in range(len(records)):
        r = records[i]
        key = np.int64(r.instrument_id)
        at = (key * 2654435761) & mask
        while native[at] != 0 and native[at] != key + 1:
            at = (at + 1) & mask
        part = table_part[at] if native[at] != 0 else UNKNOWN
        ids[i] = table_id[at]
        ts = r.ts_event
        bad_time = ts <= 0 or ts == UNDEF_PRICE or (r.ts_recv > 0 and ts - r.ts_recv > MAX_AHEAD_NS)
        if bad_time:
            skipped[2] += 1
            part = UNKNOWN
        elif r.action != 84:  # 'T'
            skipped[4] += 1
            part = UNKNOWN
        elif part == UNKNOWN:
            skipped[0] += 1
        elif part == SKIP_SPREAD:
            skipped[1] += 1
        elif r.price == UNDEF_PRICE:
            skipped[3] += 1
            part = UNKNOWN
        parts[i] = part
        if part >= 0:
            counts[part] += 1
        if ts >= boundary and not bad_time:
            second = ts // NS
            crossed[i] = second * NS
            boundary = (second + 1) * NS
            for p in range(len(active)):
                if active[p] and p != part:
                    counts[p] += 1
    return boundary


@jit
def _scatter(
    records: Rows, parts: Rows, ids: Rows, crossed: Rows, active: Rows, offsets: Rows,
    first_ordinal: int, feed: int, rows: Rows, ordinals: Rows,
) -> None:  # fmt: skip
    """Second pass: write each row behind its partition's last one."""
    for i in range(len(records)):
        r = records[i]
        part = parts[i]
        if crossed[i] != 0:
            for p in range(len(active)):
                if active[p] and p != part:
                    o = rows[offsets[p]]
                    o.ts_event_ns = crossed[i]
                    o.ts_recv_ns = r.ts_recv
                    o.instrument = feed
                    o.price = np.nan
                    o.size = 0.0
                    o.bid_px = np.nan
                    o.ask_px = np.nan
                    o.bid_sz = 0.0
                    o.ask_sz = 0.0
                    o.sequence = 0
                    o.kind = CLOCK
                    o.side = 0
                    o.flags = 0
                    o.part = 0
                    ordinals[offsets[p]] = first_ordinal + i
                    offsets[p] += 1
        if part < 0:
            continue
        o = rows[offsets[part]]
        o.ts_event_ns = r.ts_event
        o.ts_recv_ns = r.ts_recv
        o.instrument = ids[i]
        o.price = r.price / 1e9
        o.size = r.size
        o.bid_px = r.bid_px / 1e9 if r.bid_px != UNDEF_PRICE else np.nan
        o.ask_px = r.ask_px / 1e9 if r.ask_px != UNDEF_PRICE else np.nan
        o.bid_sz = r.bid_sz
        o.ask_sz = r.ask_sz
        o.sequence = r.sequence
        o.kind = 0
        # Databento's side is the aggressor: B (66) buys, A (65) sells.
        o.side = 1 if r.side == 66 else (-1 if r.side == 65 else 0)
        o.flags = r.flags
        o.part = 0
        ordinals[offsets[part]] = first_ordinal + i
        offsets[part] += 1


def warm() -> None:
    """Compile (or load from the cache) before the first tick."""
    normalizer = Normalizer("warm", 1)
    normalizer(np.zeros(1, RECORD), 0)
    normalizer.map(1, Instrument(id=1, venue="", symbol="", root="", feed="warm"))
