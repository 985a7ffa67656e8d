"""The compiled pass over routed rows: their partitions, and where a feed's watermark enters a new second."""

from __future__ import annotations

import numpy as np

from shared.compiled import jit
from shared.frames import BOOK, CLOCK, NS, TRADE, Rows

MAX_AHEAD_NS = 3600 * NS
REASONS = ("bad_time", "spread")
SPREAD = -2  # instead of a partition


@jit
def sound(rows: Rows, table_part: Rows, keep: Rows, skipped: Rows) -> None:
    """Which rows have a sane time and are of no spread; counts the others' records by REASONS."""
    for i in range(len(rows)):
        r = rows[i]
        ts = r.ts_event_ns
        why = -1
        if ts <= 0 or (r.ts_recv_ns > 0 and ts - r.ts_recv_ns > MAX_AHEAD_NS):
            why = 0
        elif table_part[r.instrument] == SPREAD:
            why = 1
        keep[i] = why < 0
        if why >= 0 and r.part == 0:
            skipped[why] += 1


@jit
def classify(
    rows: Rows, grace: int, table_part: Rows, table_feed: Rows, high: Rows, boundary: Rows,
    first: Rows, last: Rows, active: Rows, crossed: Rows, counts: Rows,
) -> None:  # fmt: skip
    """First pass: how many rows each partition gets, and the second that a row's feed enters with it (0: none).

    A partition takes part from its first row on (`active`).
    """
    for i in range(len(rows)):
        r = rows[i]
        symbol = r.instrument
        feed = table_feed[symbol]
        part = table_part[symbol]
        ts = r.ts_event_ns
        crossed[i] = 0
        counts[part] += 1
        active[part] = True
        if first[feed] == 0:
            first[feed] = ts
        last[feed] = max(last[feed], ts)
        if r.kind != TRADE and r.kind != BOOK:
            continue
        high[feed] = max(high[feed], ts)
        if high[feed] - grace >= boundary[feed]:
            second = (high[feed] - grace) // NS
            crossed[i] = second * NS
            boundary[feed] = (second + 1) * NS
            for p in range(len(active)):
                if active[p] and p != part:
                    counts[p] += 1


@jit
def scatter(
    rows: Rows, ordinals: Rows, table_id: Rows, table_part: Rows, table_feed: Rows, feed_ids: Rows, active: Rows,
    crossed: Rows, offsets: Rows, routed: Rows, places: Rows,
) -> None:  # fmt: skip
    """Second pass: each row behind its partition's last one, clock rows before the row that made them so.

    `active` as it was before the first pass.
    """
    for i in range(len(rows)):
        symbol = rows[i].instrument
        part = table_part[symbol]
        active[part] = True
        if crossed[i] != 0:
            for p in range(len(active)):
                if active[p] and p != part:
                    o = routed[offsets[p]]
                    o.ts_event_ns = crossed[i]
                    o.ts_recv_ns = rows[i].ts_recv_ns
                    o.instrument = feed_ids[table_feed[symbol]]
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
                    places[offsets[p]] = ordinals[i]
                    offsets[p] += 1
        routed[offsets[part]] = rows[i]
        routed[offsets[part]].instrument = table_id[symbol]
        places[offsets[part]] = ordinals[i]
        offsets[part] += 1
