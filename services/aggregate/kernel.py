"""The compiled kernel: tick rows in, candle rows out, all of semantics §2 in one pass.

Every trade lands in the one-second summary of its contract, whether its second is open, or closed
and then corrected. When the feed's watermark passes a whole second, that second closes: CVD moves
on, the front month is judged at minutes, and each root's trailing 60 summaries are folded into one
row. Folding (rather than adding and subtracting) keeps the sums exact.

No clock, no I/O, no allocation: time is what the rows say. Numba's cache does not see edits of
`shared.sides`; touch this file after editing that one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from services.aggregate.layout import (
    CHUNK, CORRECTED, LATE_ROWS, MINUTES, NEVER, NONE, NOT_CANDLED, OUTSIDE, ROWS_1M, ROWS_1S, TRADES, UNKNOWN,
)  # fmt: skip
from shared.frames import CLOCK, NS, Rows
from shared.sides import lee_ready


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def session_at(sessions: Rows, low: int, high: int, ts: int) -> int:
    """Index of the session of [low, high) that `ts` is in, or NONE."""
    first, end = low, high
    while low < high:
        middle = (low + high) // 2
        if sessions[middle, 0] <= ts:
            low = middle + 1
        else:
            high = middle
    at = low - 1
    return at if first <= at < end and ts < sessions[at, 1] else NONE


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def warm_at(sessions: Rows, low: int, high: int, start_sec: int, need: int) -> int:
    """The second at which `need` whole seconds of market time have been watched since `start_sec`."""
    first = low
    end = high
    while low < high:
        middle = (low + high) // 2
        if sessions[middle, 1] <= start_sec * NS:
            low = middle + 1
        else:
            high = middle
    for i in range(max(low, first), end):
        begin = max(start_sec, sessions[i, 0] // NS)
        here = sessions[i, 1] // NS - begin
        if need <= here:
            return begin + need
        need -= here
    return NEVER


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def whole(gaps: Rows, feed: int, contract: int, start_ns: int, end_ns: int) -> int:
    """1 unless a gap touches [start_ns, end_ns) of this contract."""
    for i in range(len(gaps)):
        g = gaps[i]
        if g.feed == feed and (g.contract == NONE or g.contract == contract) and g.start_ns < end_ns and g.end_ns > start_ns:
            return 0
    return 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def fold(ring: Rows, contract: int, start: int, end: int, cvd_close: float, session_cvd: float, o: Rows) -> bool:
    """Fold the summaries of seconds [start, end) into one candle; False (nothing written) when none traded."""
    mask = ring.shape[1] - 1
    trades = 0
    first, last, high, low = 0.0, 0.0, -np.inf, np.inf
    volume = ask = bid = unknown = run = run_high = run_low = 0.0
    size = big_volume = bid_depth = ask_depth = price_volume = spread = 0.0
    big = quoted = 0
    for sec in range(start, end):
        s = ring[contract, sec & mask]
        if s.sec != sec or s.trades == 0:
            continue
        if trades == 0:
            first = s.open
        trades += s.trades
        last = s.close
        high = max(high, s.high)
        low = min(low, s.low)
        volume += s.volume
        ask += s.ask_volume
        bid += s.bid_volume
        unknown += s.unknown_volume
        run_high = max(run_high, run + s.delta_high)
        run_low = min(run_low, run + s.delta_low)
        run += s.delta
        size = max(size, s.max_size)
        big += s.big_trades
        big_volume += s.big_volume
        bid_depth += s.bid_depth
        ask_depth += s.ask_depth
        price_volume += s.price_volume
        spread += s.spread_sum
        quoted += s.spread_count
    if trades == 0:
        return False
    cvd_open = cvd_close - run
    o.name = contract
    o.open = first
    o.high = high
    o.low = low
    o.close = last
    o.volume = volume
    o.trades = trades
    o.ask_volume = ask
    o.bid_volume = bid
    o.unknown_volume = unknown
    o.cvd_open = cvd_open
    o.cvd_high = cvd_open + run_high
    o.cvd_low = cvd_open + run_low
    o.cvd_close = cvd_close
    o.session_cvd_close = session_cvd
    o.vd = run
    ratio = run / (ask + bid) if ask + bid > 0 else 0.0
    o.vd_ratio = ratio
    depth = bid_depth + ask_depth
    o.book_imbalance = (bid_depth - ask_depth) / depth if depth > 0 else np.nan
    change = (last - first) / first * 10_000.0 if first != 0 else np.nan
    o.price_pct = change
    o.divergence = 0
    if abs(change) >= 0.5 and abs(ratio) >= 0.1:
        if change > 0 and ratio < 0:
            o.divergence = 1
        elif change < 0 and ratio > 0:
            o.divergence = -1
    o.max_trade_size = size
    o.big_trades = big
    o.big_volume = big_volume
    o.sum_bid_depth = bid_depth
    o.sum_ask_depth = ask_depth
    o.sum_price_volume = price_volume
    o.vwap = price_volume / volume if volume > 0 else np.nan
    o.avg_spread = spread / quoted if quoted > 0 else np.nan
    o.timestamp_out_ns = 0
    return True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def emit_1m(f: int, root: Rows, closed: Rows, ring: Rows, gaps: Rows, window: int, out: Rows, counters: Rows) -> bool:
    """Append the candles_1m row of the window ending at closed.end_sec (revision as it stands there)."""
    o = out[counters[ROWS_1M]]
    end = closed.end_sec
    if not fold(ring, closed.front, end - window, end, closed.cvd, closed.session_cvd, o):
        return False
    o.time_ns = end * NS
    o.complete = whole(gaps, f, closed.front, (end - window) * NS, end * NS)
    o.revision = closed.revision
    counters[ROWS_1M] += 1
    return True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def emit_1s(f: int, contract: int, closed: Rows, ring: Rows, gaps: Rows, out: Rows, counters: Rows) -> None:
    """Append the candles_1s row of the second before closed.end_sec. CVD is the front contract's alone."""
    o = out[counters[ROWS_1S]]
    sec = closed.end_sec - 1
    in_front = closed.front == contract
    cvd = closed.cvd if in_front else np.nan
    if not fold(ring, contract, sec, sec + 1, cvd, closed.session_cvd if in_front else np.nan, o):
        return
    o.time_ns = sec * NS
    o.complete = whole(gaps, f, contract, sec * NS, (sec + 1) * NS)
    o.revision = ring[contract, sec & (ring.shape[1] - 1)].revision
    counters[ROWS_1S] += 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def minute_volume(minutes: Rows, contract: int, end_minute: int) -> float:
    """Volume of the five whole minutes before `end_minute`."""
    total = 0.0
    for m in range(end_minute - 5, end_minute):
        bucket = minutes[contract, m % MINUTES]
        if bucket.minute == m:
            total += bucket.volume
    return total


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def judge_front(k: int, root: Rows, contracts: Rows, minutes: Rows, end_minute: int) -> None:
    """At a minute boundary: the challenger needs strictly more volume; never to an earlier expiry.

    The first judgement after a cold start is free to pick an earlier one.
    """
    best = root.front
    volume = minute_volume(minutes, best, end_minute) if best != NONE else 0.0
    held = contracts[best].expiry_ns if best != NONE and root.judged else NONE
    for c in range(len(contracts)):
        if contracts[c].root != k or c == root.front or contracts[c].expiry_ns < held:
            continue
        v = minute_volume(minutes, c, end_minute)
        if v > volume or (v == volume and v > 0 and best != root.front and contracts[c].expiry_ns < contracts[best].expiry_ns):
            best = c
            volume = v
    if best != NONE and volume > 0:
        root.front = best
        root.judged = 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def first_front(k: int, contracts: Rows, ring: Rows, sec: int) -> int:
    """Provisional front of a root that has none: most volume in its first traded second."""
    mask = ring.shape[1] - 1
    best = NONE
    volume = 0.0
    for c in range(len(contracts)):
        s = ring[c, sec & mask]
        if contracts[c].root != k or s.sec != sec or s.trades == 0:
            continue
        if best == NONE or s.volume > volume or (s.volume == volume and contracts[c].expiry_ns < contracts[best].expiry_ns):
            best = c
            volume = s.volume
    return best


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def close_second(
    f: int, k: int, sec: int, roots: Rows, contracts: Rows, ring: Rows, minutes: Rows, closes: Rows, sessions: Rows,
    gaps: Rows, params: Rows, out_1m: Rows, out_1s: Rows, counters: Rows, ring_dirty: Rows, close_dirty: Rows,
) -> None:  # fmt: skip
    """Close second [sec, sec + 1) of one root."""
    mask = ring.shape[1] - 1
    root = roots[k]
    end = sec + 1
    if root.front == NONE:
        root.front = first_front(k, contracts, ring, sec)
    if root.front != NONE:
        s = ring[root.front, sec & mask]
        if s.sec == sec and s.trades > 0:
            at = session_at(sessions, root.calendar_from, root.calendar_to, sec * NS)
            opened = sessions[at, 0] if at != NONE else root.counted_open_ns
            if opened != root.counted_open_ns:
                root.counted_open_ns = opened
                root.session_cvd = 0.0
            root.cvd += s.delta
            root.session_cvd += s.delta
    closed = closes[k, end & mask]
    closed.end_sec = end
    closed.cvd = root.cvd
    closed.session_cvd = root.session_cvd
    closed.session_ns = root.counted_open_ns
    closed.front = root.front
    closed.revision = NONE
    closed.dirty = 0
    close_dirty[k, (end & mask) // CHUNK] = 1
    if root.front != NONE:
        front = contracts[root.front]
        if front.last_sec >= end - params[0].window_sec and end >= front.warm_sec:
            closed.revision = 0
            if not emit_1m(f, root, closed, ring, gaps, params[0].window_sec, out_1m, counters):
                closed.revision = NONE
    for c in range(len(contracts)):
        if contracts[c].root == k and contracts[c].last_sec >= sec:
            s = ring[c, sec & mask]
            if s.sec == sec and s.trades > 0:
                s.revision = 0
                s.dirty = 0
                ring_dirty[c, (sec & mask) // CHUNK] = 1
                if params[0].emit_1s:
                    emit_1s(f, c, closed, ring, gaps, out_1s, counters)
    if end % 60 == 0:
        judge_front(k, root, contracts, minutes, end // 60)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def flush(
    f: int, feeds: Rows, roots: Rows, contracts: Rows, ring: Rows, closes: Rows, gaps: Rows, params: Rows,
    out_1m: Rows, out_1s: Rows, counters: Rows,
) -> bool:  # fmt: skip
    """Emit every corrected row again; False when the output ran full first (call again)."""
    feed = feeds[f]
    if feed.dirty_from_sec == NONE:
        return True
    size = ring.shape[1]
    mask = size - 1
    for end in range(max(feed.dirty_from_sec, feed.closed_sec - size + 1), feed.closed_sec + 1):
        if counters[ROWS_1M] + len(roots) > len(out_1m) or counters[ROWS_1S] + len(contracts) > len(out_1s):
            feed.dirty_from_sec = end
            return False
        for k in range(len(roots)):
            closed = closes[k, end & mask]
            if roots[k].feed != f or closed.end_sec != end:
                continue
            if closed.dirty:
                closed.dirty = 0
                emit_1m(f, roots[k], closed, ring, gaps, params[0].window_sec, out_1m, counters)
            for c in range(len(contracts)):
                s = ring[c, (end - 1) & mask]
                if contracts[c].root == k and s.sec == end - 1 and s.dirty:
                    s.dirty = 0
                    if params[0].emit_1s:
                        emit_1s(f, c, closed, ring, gaps, out_1s, counters)
    feed.dirty_from_sec = NONE
    return True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def advance(
    f: int, to_sec: int, feeds: Rows, contracts: Rows, ring: Rows, minutes: Rows, roots: Rows, closes: Rows,
    sessions: Rows, gaps: Rows, params: Rows, out_1m: Rows, out_1s: Rows, counters: Rows,
    ring_dirty: Rows, close_dirty: Rows,
) -> bool:  # fmt: skip
    """Close every second before `to_sec`; False when the output ran full first (call again)."""
    feed = feeds[f]
    size = ring.shape[1]
    quiet = feed.last_sec + 360  # nothing can be emitted or judged any more
    if feed.closed_sec > quiet and to_sec - feed.closed_sec > size:
        if not flush(f, feeds, roots, contracts, ring, closes, gaps, params, out_1m, out_1s, counters):
            return False
        feed.closed_sec = to_sec - size
    while feed.closed_sec < to_sec:
        if counters[ROWS_1M] + len(roots) > len(out_1m) or counters[ROWS_1S] + len(contracts) > len(out_1s):
            return False
        # Corrections wait (for more late trades) only while their summaries are still in the ring.
        if feed.dirty_from_sec != NONE and feed.closed_sec - feed.dirty_from_sec >= size - 96:
            if not flush(f, feeds, roots, contracts, ring, closes, gaps, params, out_1m, out_1s, counters):
                return False
            continue
        for k in range(len(roots)):
            if roots[k].feed == f:
                close_second(
                    f, k, feed.closed_sec, roots, contracts, ring, minutes, closes, sessions, gaps, params,
                    out_1m, out_1s, counters, ring_dirty, close_dirty,
                )  # fmt: skip
        feed.closed_sec += 1
        if feed.closed_sec > quiet and to_sec - feed.closed_sec > size and feed.dirty_from_sec == NONE:
            feed.closed_sec = to_sec - size
    return True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def correct(
    f: int, c: int, sec: int, signed: float, feeds: Rows, contracts: Rows, ring: Rows, roots: Rows, closes: Rows,
    params: Rows, ring_dirty: Rows, close_dirty: Rows,
) -> None:  # fmt: skip
    """A late trade has entered second `sec`: revise every row that it changes (they are emitted by `flush`)."""
    mask = ring.shape[1] - 1
    k = contracts[c].root
    root = roots[k]
    feed = feeds[f]
    then = closes[k, (sec + 1) & mask]
    counts = then.front == c and signed != 0.0
    session = then.session_ns
    s = ring[c, sec & mask]
    s.revision += 1
    s.dirty = 1
    ring_dirty[c, (sec & mask) // CHUNK] = 1
    for end in range(sec + 1, feed.closed_sec + 1):
        closed = closes[k, end & mask]
        holds = closed.front == c and end <= sec + params[0].window_sec
        if counts:
            closed.cvd += signed
            if closed.session_ns == session:
                closed.session_cvd += signed
            front = ring[closed.front, (end - 1) & mask]
            if end > sec + 1 and front.sec == end - 1 and front.revision != NONE:
                front.revision += 1
                front.dirty = 1
                ring_dirty[closed.front, ((end - 1) & mask) // CHUNK] = 1
        if (holds and end >= contracts[c].warm_sec) or (closed.revision != NONE and (holds or counts)):
            closed.revision += 1
            closed.dirty = 1
        if holds or counts:
            close_dirty[k, (end & mask) // CHUNK] = 1
    if counts:
        root.cvd += signed
        if root.counted_open_ns == session:
            root.session_cvd += signed
    if feed.dirty_from_sec == NONE or sec + 1 < feed.dirty_from_sec:
        feed.dirty_from_sec = sec + 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def find(table_key: Rows, key: int) -> int:
    """Slot of an instrument id in the open-addressed table (its key is 0 when absent)."""
    mask = len(table_key) - 1
    at = key & mask
    while table_key[at] != 0 and table_key[at] != key:
        at = (at + 1) & mask
    return at


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def run(
    ticks: Rows, start: int, feeds: Rows, contracts: Rows, ring: Rows, minutes: Rows, roots: Rows, closes: Rows,
    sessions: Rows, gaps: Rows, table_key: Rows, table_value: Rows, params: Rows, out_1m: Rows, out_1s: Rows,
    late: Rows, counters: Rows, ring_dirty: Rows, close_dirty: Rows,
) -> int:  # fmt: skip
    """Fold tick rows from `start` on; returns the first row not done (the output is full: drain, call again).

    `late` takes (row index, watermark) of trades too late for any row.
    """
    mask = ring.shape[1] - 1
    p = params[0]
    for i in range(start, len(ticks)):
        t = ticks[i]
        ts = t.ts_event_ns
        c = table_value[find(table_key, t.instrument)]
        if t.kind == CLOCK:
            f = NONE
            for j in range(len(feeds)):
                if feeds[j].id == t.instrument:
                    f = j
        elif c >= 0:
            f = contracts[c].feed
        else:
            counters[NOT_CANDLED if c == -2 else UNKNOWN] += 1
            continue
        if f == NONE:
            continue
        feed = feeds[f]
        mark = ts if t.kind == CLOCK else ts - feed.grace_ns
        if mark > feed.watermark_ns:
            if feed.closed_sec == NONE:
                feed.closed_sec = mark // NS
            elif mark >= (feed.closed_sec + 1) * NS and not advance(
                f, mark // NS, feeds, contracts, ring, minutes, roots, closes, sessions, gaps, params,
                out_1m, out_1s, counters, ring_dirty, close_dirty,
            ):  # fmt: skip
                return i
            feed.watermark_ns = mark
        if t.kind == CLOCK:
            continue
        contract = contracts[c]
        root = roots[contract.root]
        if ts < root.open_ns or ts >= root.close_ns:
            at = session_at(sessions, root.calendar_from, root.calendar_to, ts)
            if at == NONE:
                counters[OUTSIDE] += 1
                continue
            root.open_ns = sessions[at, 0]
            root.close_ns = sessions[at, 1]
        sec = ts // NS
        is_late = sec < feed.closed_sec
        if is_late:
            # A second that closed before this root was watched has no rows to correct.
            known = closes[contract.root, (sec + 1) & mask].end_sec == sec + 1
            if feed.watermark_ns - ts > p.max_lateness_ns or not known:
                late[counters[LATE_ROWS], 0] = i
                late[counters[LATE_ROWS], 1] = feed.watermark_ns
                counters[LATE_ROWS] += 1
                continue
        price = t.price
        size = t.size
        side = np.int64(t.side)
        if side == 0:
            reference = contract.last_px if price != contract.last_px else contract.previous_px
            side = lee_ready(price, t.bid_px, t.ask_px, reference)
        if not is_late and price != contract.last_px:
            contract.previous_px = contract.last_px
            contract.last_px = price
        s = ring[c, sec & mask]
        if s.sec != sec:
            s.sec = sec
            s.open = s.high = s.low = s.close = price
            s.first_ns = ts
            s.last_ns = ts
            s.trades = 0
            s.volume = s.ask_volume = s.bid_volume = s.unknown_volume = 0.0
            s.delta = s.delta_high = s.delta_low = 0.0
            s.max_size = s.big_volume = s.bid_depth = s.ask_depth = s.price_volume = s.spread_sum = 0.0
            s.big_trades = 0
            s.spread_count = 0
            s.revision = NONE
            s.dirty = 0
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
        if size >= root.big_size:
            s.big_trades += 1
            s.big_volume += size
        s.bid_depth += t.bid_sz
        s.ask_depth += t.ask_sz
        s.price_volume += price * size
        if t.bid_px < t.ask_px:
            s.spread_sum += t.ask_px - t.bid_px
            s.spread_count += 1
        ring_dirty[c, (sec & mask) // CHUNK] = 1
        minute = sec // 60
        bucket = minutes[c, minute % MINUTES]
        if bucket.minute != minute:
            if bucket.minute < minute:
                bucket.minute = minute
                bucket.volume = size
        else:
            bucket.volume += size
        if sec > contract.last_sec:
            if contract.last_sec != NONE and sec - contract.last_sec - 1 > p.quiet_sec:
                since = contract.last_sec + 1 + p.quiet_sec
                contract.warm_sec = max(
                    contract.warm_sec, warm_at(sessions, root.calendar_from, root.calendar_to, since, p.window_sec)
                )
            contract.last_sec = sec
            feed.last_sec = max(feed.last_sec, sec)
        counters[TRADES] += 1
        if is_late:
            counters[CORRECTED] += 1
            correct(f, c, sec, signed, feeds, contracts, ring, roots, closes, params, ring_dirty, close_dirty)
    return len(ticks)
