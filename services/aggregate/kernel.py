"""The compiled kernel: tick rows in, rolling and fixed candles out, in one pass.

Every trade lands in the one-second summary of its contract, whether its second is open, or closed
and then corrected. When the feed's watermark passes a whole second, that second closes: CVD moves
on, each root's trailing 60 summaries become one row, and at minutes the front month is judged.

No clock, no I/O, no allocation: time is what the rows say.
"""

from __future__ import annotations

import numpy as np

from services.aggregate.arena import WINDOW, Arrays, open_arrays
from services.aggregate.bars import (
    claim,
    close_bars,
    correct_bars,
    flush_bars,
    start_of,
)
from services.aggregate.beside import take_state
from services.aggregate.front_month import add_minute, first_front, judge_front
from services.aggregate.layout import (
    CHUNK,
    CORRECTED,
    LATE_ROWS,
    LATE_STATE,
    NONE,
    NOT_CANDLED,
    OUTSIDE,
    ROWS_1M,
    ROWS_1S,
    ROWS_FIXED,
    TRADES,
    UNKNOWN,
    WANTED,
)  # fmt: skip
from services.aggregate.rows import clear, emit_1m, emit_1s
from services.aggregate.sessions import session_at, warm_at
from shared.compiled import jit, jit_inline
from shared.frames import BOOK, CLOCK, NS, OPTION, TRADE, Row, Rows
from shared.sides import lee_ready


@jit_inline
def _count_cvd(x: Arrays, k: int, sec: int) -> None:
    """CVD takes the front contract's trades of second `sec`; a new session starts its own from 0."""
    root = x.roots[k]
    if sec * NS >= root.counted_close_ns:
        at = session_at(x.sessions, root.calendar_from, root.calendar_to, sec * NS)
        if at != NONE:
            root.counted_open_ns = x.sessions[at, 0]
            root.counted_close_ns = x.sessions[at, 1]
            root.session_cvd = 0.0
    if root.front == NONE:
        return
    s = x.ring[x.contracts[root.front].ring, sec & (x.ring.shape[1] - 1)]
    if s.sec == sec:
        root.cvd += s.delta
        root.session_cvd += s.delta


@jit_inline
def close_second(x: Arrays, f: int, k: int, sec: int) -> None:
    """Close second [sec, sec + 1) of one root: CVD, the row of the window ending there, the front month."""
    mask = x.ring.shape[1] - 1
    root = x.roots[k]
    end = sec + 1
    if root.front == NONE:
        root.front = first_front(x, k, sec)
    _count_cvd(x, k, sec)
    closed = x.closes[k, end & mask]
    closed.end_sec = end
    closed.cvd = root.cvd
    closed.session_cvd = root.session_cvd
    closed.session_ns = root.counted_open_ns
    closed.front = root.front
    closed.revision = NONE
    closed.dirty = 0
    x.close_dirty[k, (end & mask) // CHUNK] = 1
    if root.front != NONE:
        front = x.contracts[root.front]
        if front.last_sec >= end - WINDOW and end >= front.warm_sec:
            closed.revision = 0
            if not emit_1m(x, f, k, closed, False):
                closed.revision = NONE
    c = root.head
    while c != NONE:
        if x.contracts[c].last_sec >= sec:
            ring = x.contracts[c].ring
            s = x.ring[ring, sec & mask]
            if s.sec == sec:
                s.revision = 0
                x.ring_dirty[ring, (sec & mask) // CHUNK] = 1
                add_minute(x.minutes, c, sec, s.volume)
                x.contract_dirty[c] = 1  # its minutes are committed with it
                if x.params[0].emit_1s:
                    emit_1s(x, f, c, closed)
        c = x.contracts[c].next
    if end % 60 == 0:
        judge_front(x, k, end // 60)


@jit_inline
def _room(x: Arrays) -> bool:
    """Is there room for the rows of one closing second?"""
    fits_1m = x.counters[ROWS_1M] + len(x.roots) <= len(x.out_1m)
    fits_1s = x.counters[ROWS_1S] + len(x.ring) <= len(x.out_1s)
    fits_fixed = x.counters[ROWS_FIXED] + len(x.entities) * len(x.timeframes) <= len(x.out_fixed)
    return bool(fits_1m and fits_1s and fits_fixed)


@jit
def flush(table: Rows, f: int) -> bool:
    """Emit every corrected row again; False when the output is full (drain, call again)."""
    x = open_arrays(table)
    feed = x.feeds[f]
    if feed.dirty_from_sec == NONE:
        return True
    size = x.ring.shape[1]
    mask = size - 1
    for end in range(max(feed.dirty_from_sec, feed.closed_sec - size + 1), feed.closed_sec + 1):
        if not _room(x):
            feed.dirty_from_sec = end
            return False
        for k in range(len(x.roots)):
            closed = x.closes[k, end & mask]
            if x.roots[k].feed != f or closed.end_sec != end:
                continue
            if closed.dirty:
                closed.dirty = 0
                emit_1m(x, f, k, closed, True)
            c = x.roots[k].head
            while c != NONE:
                s = x.ring[x.contracts[c].ring, (end - 1) & mask]
                if s.sec == end - 1 and s.dirty:
                    s.dirty = 0
                    if x.params[0].emit_1s:
                        emit_1s(x, f, c, closed)
                c = x.contracts[c].next
    feed.dirty_from_sec = feed.closed_sec + 1  # these are done, should the output be full
    if not flush_bars(table, f):
        return False
    feed.dirty_from_sec = NONE
    return True


@jit
def advance(table: Rows, f: int, to_sec: int) -> bool:
    """Close every second of feed `f` before `to_sec`; False when the output is full (drain, call again)."""
    x = open_arrays(table)
    feed = x.feeds[f]
    size = x.ring.shape[1]
    base = x.timeframes[0].seconds
    quiet = feed.last_sec + 360  # behind it no second can be emitted or judged any more
    while feed.closed_sec < to_sec:
        if not _room(x):
            return False
        # Corrections wait (for more late trades) until the next candle closes: its features build on them.
        end = feed.closed_sec + 1
        if feed.dirty_from_sec != NONE and end % base == 0:
            if not flush(table, f):
                return False
            continue
        if feed.closed_sec > quiet and to_sec - feed.closed_sec > size and feed.dirty_from_sec == NONE:
            end = min((feed.closed_sec // base + 1) * base, to_sec - size)
        else:
            for k in range(len(x.roots)):
                if x.roots[k].feed == f:
                    close_second(x, f, k, feed.closed_sec)
        feed.closed_sec = end
        if end % base == 0:
            close_bars(table, f, end)
    return True


@jit
def _correct(x: Arrays, f: int, c: int, sec: int, signed: float, size: float) -> None:
    """A late trade has entered second `sec`: revise every row that it changes (`flush` emits them)."""
    mask = x.ring.shape[1] - 1
    k = x.contracts[c].root
    root = x.roots[k]
    feed = x.feeds[f]
    add_minute(x.minutes, c, sec, size)
    x.cache[k].contract = NONE
    then = x.closes[k, (sec + 1) & mask]
    counts = then.front == c and signed != 0.0
    session = then.session_ns
    s = x.ring[x.contracts[c].ring, sec & mask]
    s.revision += 1
    s.dirty = 1
    for end in range(sec + 1, feed.closed_sec + 1):
        closed = x.closes[k, end & mask]
        holds = closed.front == c and end <= sec + WINDOW
        if counts:
            closed.cvd += signed
            if closed.session_ns == session:
                closed.session_cvd += signed
            ring = x.contracts[closed.front].ring
            front = x.ring[ring, (end - 1) & mask]
            if end > sec + 1 and front.sec == end - 1 and front.revision != NONE:
                front.revision += 1
                front.dirty = 1
                x.ring_dirty[ring, ((end - 1) & mask) // CHUNK] = 1
        if (holds and end >= x.contracts[c].warm_sec) or (closed.revision != NONE and (holds or counts)):
            closed.revision += 1
            closed.dirty = 1
        if holds or counts:
            x.close_dirty[k, (end & mask) // CHUNK] = 1
    if counts:
        root.cvd += signed
        if root.counted_open_ns == session:
            root.session_cvd += signed
    _dirty(feed, sec)


@jit_inline
def _dirty(feed: Row, sec: int) -> None:
    """Rows of the second `sec` or later have to be emitted again."""
    if feed.dirty_from_sec == NONE or sec + 1 < feed.dirty_from_sec:
        feed.dirty_from_sec = sec + 1


@jit_inline
def find(table_key: Rows, key: int) -> int:
    """Slot of an instrument id in the open-addressed table (its key is 0 when absent)."""
    mask = len(table_key) - 1
    at = key & mask
    while table_key[at] != 0 and table_key[at] != key:
        at = (at + 1) & mask
    return at


@jit_inline
def _put(
    s: Row, fresh: bool, t: Row, side: int, big_size: float, bid: float, ask: float, bid_sz: float, ask_sz: float
) -> float:
    """Add a trade to its second (or, without a ring, to its finest candle); returns its signed size."""
    price, size, ts = t.price, t.size, t.ts_event_ns
    if fresh:
        clear(s)
        s.open = s.high = s.low = s.close = price
        s.first_ns = ts
        s.last_ns = ts
    if ts < s.first_ns:
        s.first_ns = ts
        s.open = price
    if ts >= s.last_ns:
        s.last_ns = ts
        s.close = price
    s.high = max(s.high, price)
    s.low = min(s.low, price)
    s.trades += 1
    s.volume += size
    signed = 0.0
    if side > 0:
        s.ask_volume += size
        signed = size
    elif side < 0:
        s.bid_volume += size
        signed = -size
    else:
        s.unknown_volume += size
    s.delta += signed
    s.delta_high = max(s.delta_high, s.delta)
    s.delta_low = min(s.delta_low, s.delta)
    s.max_size = max(s.max_size, size)
    if size >= big_size:
        s.big_trades += 1
        s.big_volume += size
    s.bid_depth += bid_sz
    s.ask_depth += ask_sz
    s.price_volume += price * size
    if bid < ask:
        s.spread_sum += ask - bid
        s.spread_count += 1
    return signed


@jit_inline
def _feed_of(feeds: Rows, key: int) -> int:
    for f in range(len(feeds)):
        if feeds[f].id == key:
            return f
    return NONE


@jit_inline
def _trade(x: Arrays, table: Rows, i: int, t: Row, c: int, late: Rows) -> None:
    """Classify one accepted trade and fold it in, or hand it to the late ledger."""
    p = x.params[0]
    contract = x.contracts[c]
    root = x.roots[contract.root]
    f = contract.feed
    feed = x.feeds[f]
    ts = t.ts_event_ns
    if ts < root.open_ns or ts >= root.close_ns:
        at = session_at(x.sessions, root.calendar_from, root.calendar_to, ts)
        if at == NONE:
            x.counters[OUTSIDE] += 1
            return
        root.open_ns = x.sessions[at, 0]
        root.close_ns = x.sessions[at, 1]
    # Nearly every trade is in the open second: no division for those.
    sec = feed.closed_sec
    if ts < sec * NS or ts >= (sec + 1) * NS:
        sec = ts // NS
    is_late = sec < feed.closed_sec
    if is_late:
        # A second that closed before this root was watched has no rows to correct.
        known = x.closes[contract.root, (sec + 1) & (x.ring.shape[1] - 1)].end_sec == sec + 1
        if feed.watermark_ns - ts > p.max_lateness_ns or not known:
            late[x.counters[LATE_ROWS], 0] = i
            late[x.counters[LATE_ROWS], 1] = feed.watermark_ns
            x.counters[LATE_ROWS] += 1
            return
    side = int(t.side)
    price = t.price
    bid, ask, bid_sz, ask_sz = t.bid_px, t.ask_px, t.bid_sz, t.ask_sz
    if np.isnan(bid) and np.isnan(ask) and contract.quote_ns != NONE:
        # The feed gives no quotes with its trades: the newest of its books.
        bid, ask, bid_sz, ask_sz = contract.bid_px, contract.ask_px, contract.bid_sz, contract.ask_sz
    bid_sz = 0.0 if np.isnan(bid_sz) else bid_sz
    ask_sz = 0.0 if np.isnan(ask_sz) else ask_sz
    if side == 0:
        reference = contract.last_px if price != contract.last_px else contract.previous_px
        side = lee_ready(price, bid, ask, reference)
    if not is_late and price != contract.last_px:
        contract.previous_px = contract.last_px
        contract.last_px = price
    if contract.ring == NONE:
        start = start_of(table, 0, sec)
        leaf_late = start + x.timeframes[0].seconds <= feed.closed_sec
        b = x.bars[contract.entity, claim(table, contract.entity, 0, start)]
        signed = _put(b, b.trades == 0, t, side, root.big_size, bid, ask, bid_sz, ask_sz)
    else:
        leaf_late = is_late
        mask = x.ring.shape[1] - 1
        s = x.ring[contract.ring, sec & mask]
        fresh = s.sec != sec
        if fresh:
            s.sec = sec
            s.revision = NONE
            s.dirty = 0
        signed = _put(s, fresh, t, side, root.big_size, bid, ask, bid_sz, ask_sz)
        x.ring_dirty[contract.ring, (sec & mask) // CHUNK] = 1
    x.contract_dirty[c] = 1
    if sec > contract.last_sec:
        if contract.last_sec != NONE and sec - contract.last_sec - 1 > p.quiet_sec:
            since = contract.last_sec + 1 + p.quiet_sec
            warm = warm_at(x.sessions, root.calendar_from, root.calendar_to, since, WINDOW)
            contract.warm_sec = max(contract.warm_sec, warm)
        contract.last_sec = sec
        feed.last_sec = max(feed.last_sec, sec)
    x.counters[TRADES] += 1
    if leaf_late:
        x.counters[CORRECTED] += 1
        if contract.ring != NONE:
            _correct(x, f, c, sec, signed, t.size)
        else:
            _dirty(feed, sec)
        correct_bars(table, f, c, sec, signed)


@jit_inline
def _reach(x: Arrays, table: Rows, f: int, mark: int) -> bool:
    """The feed's watermark is at least `mark`; False when the output is full."""
    feed = x.feeds[f]
    if mark > feed.watermark_ns:
        if mark >= (feed.closed_sec + 1) * NS and not advance(table, f, mark // NS):
            return False
        feed.watermark_ns = mark
    return True


@jit
def run(ticks: Rows, start: int, table: Rows, late: Rows) -> int:
    """Fold tick rows from `start` on; returns the first row not done.

    Then the output is full (drain it, call again), or contract `counters[WANTED] - 1` wants an entity.
    `late` takes (row index, watermark) of trades too late for any row.
    """
    x = open_arrays(table)
    for i in range(start, len(ticks)):
        t = ticks[i]
        if t.kind == CLOCK:
            f = _feed_of(x.feeds, t.instrument)
            if f != NONE and not _reach(x, table, f, t.ts_event_ns):
                return i
            continue
        if t.part != 0:
            continue
        c = x.table_value[find(x.table_key, t.instrument)]
        if c < 0:
            if t.kind == TRADE:
                x.counters[NOT_CANDLED if c == -2 else UNKNOWN] += 1
            continue
        f = x.contracts[c].feed
        if t.kind == TRADE:
            if x.contracts[c].entity == NONE:
                x.counters[WANTED] = c + 1
                return i
            if not _reach(x, table, f, t.ts_event_ns - x.feeds[f].grace_ns):
                return i
            _trade(x, table, i, t, c, late)
        else:
            if t.kind == BOOK and not _reach(x, table, f, t.ts_event_ns - x.feeds[f].grace_ns):
                return i
            if t.kind != OPTION and not take_state(table, c, t):
                x.counters[LATE_STATE] += 1
    return len(ticks)
