"""From one-second summaries to candle rows (compiled).

A window of 60 seconds is folded as (the seconds before the last minute boundary, newest first) and
(the seconds since it, oldest first): the first half is the same for a whole minute and the second grows
by one, so a row costs three merges instead of sixty, without ever subtracting. Corrections fold in the
same order, so they give the same floating-point sums.
"""

from __future__ import annotations

import numpy as np

from services.aggregate.arena import WINDOW, Arrays
from services.aggregate.layout import NONE, ROWS_1M, ROWS_1S
from shared.compiled import jit, jit_inline
from shared.frames import NS, Row, Rows


@jit
def clear(a: Row) -> None:
    """An empty summary (no trades)."""
    a.trades = 0
    a.volume = a.ask_volume = a.bid_volume = a.unknown_volume = 0.0
    a.delta = a.delta_high = a.delta_low = 0.0
    a.max_size = a.big_volume = a.bid_depth = a.ask_depth = a.price_volume = a.spread_sum = 0.0
    a.big_trades = 0
    a.spread_count = 0


@jit
def _add(a: Row, s: Row) -> None:
    """The columns whose order does not matter."""
    if a.trades == 0:
        a.high = s.high
        a.low = s.low
    else:
        a.high = max(a.high, s.high)
        a.low = min(a.low, s.low)
    a.trades += s.trades
    a.volume += s.volume
    a.ask_volume += s.ask_volume
    a.bid_volume += s.bid_volume
    a.unknown_volume += s.unknown_volume
    a.max_size = max(a.max_size, s.max_size)
    a.big_trades += s.big_trades
    a.big_volume += s.big_volume
    a.bid_depth += s.bid_depth
    a.ask_depth += s.ask_depth
    a.price_volume += s.price_volume
    a.spread_sum += s.spread_sum
    a.spread_count += s.spread_count


@jit
def append(a: Row, s: Row) -> None:
    """a := a then s."""
    if s.trades == 0:
        return
    if a.trades == 0:
        a.open = s.open
    a.close = s.close
    a.delta_high = max(a.delta_high, a.delta + s.delta_high)
    a.delta_low = min(a.delta_low, a.delta + s.delta_low)
    a.delta += s.delta
    _add(a, s)


@jit
def prepend(a: Row, s: Row) -> None:
    """a := s then a."""
    if s.trades == 0:
        return
    if a.trades == 0:
        a.close = s.close
    a.open = s.open
    a.delta_high = max(s.delta_high, s.delta + a.delta_high)
    a.delta_low = min(s.delta_low, s.delta + a.delta_low)
    a.delta += s.delta
    _add(a, s)


@jit
def _block(end: int) -> int:
    """The minute boundary inside the window that ends at `end` (its start when `end` is one)."""
    return (end - 1) // WINDOW * WINDOW


@jit
def fold(x: Arrays, contract: int, end: int, into: int) -> None:
    """Fold the window ending at `end` into scratch[into], from the ring alone."""
    mask = x.ring.shape[1] - 1
    ring = x.contracts[contract].ring
    block = _block(end)
    a = x.scratch[into]
    clear(a)
    for sec in range(block - 1, end - WINDOW - 1, -1):
        s = x.ring[ring, sec & mask]
        if s.sec == sec:
            prepend(a, s)
    b = x.scratch[1 - into]
    clear(b)
    for sec in range(block, end):
        s = x.ring[ring, sec & mask]
        if s.sec == sec:
            append(b, s)
    append(a, b)


@jit_inline
def roll(x: Arrays, k: int, contract: int, end: int) -> None:
    """The same as `fold` into scratch[0], with the root's cache of the minute's halves."""
    mask = x.ring.shape[1] - 1
    ring = x.contracts[contract].ring
    block = _block(end)
    cache = x.cache[k]
    prefix = x.prefix[k]
    if cache.contract != contract or cache.block_sec != block:
        cache.contract = contract
        cache.block_sec = block
        cache.upto_sec = block
        clear(prefix)
        a = x.scratch[1]
        clear(a)
        for i in range(WINDOW - 1, -1, -1):
            s = x.ring[ring, (block - WINDOW + i) & mask]
            if s.sec == block - WINDOW + i:
                prepend(a, s)
            x.suffix[k, i] = a
    for sec in range(cache.upto_sec, end):
        s = x.ring[ring, sec & mask]
        if s.sec == sec:
            append(prefix, s)
    cache.upto_sec = end
    r = x.scratch[0]
    if end - block < WINDOW:
        r.sec = 0
        x.scratch[0] = x.suffix[k, end - block]
    else:
        clear(r)
    append(r, prefix)


@jit
def candle(a: Row, contract: int, cvd_close: float, session_cvd: float, o: Row) -> None:
    """Write the columns of semantics §2 that follow from a summary and the CVD at its end."""
    cvd_open = cvd_close - a.delta
    o.name = contract
    o.open = a.open
    o.high = a.high
    o.low = a.low
    o.close = a.close
    o.volume = a.volume
    o.trades = a.trades
    o.ask_volume = a.ask_volume
    o.bid_volume = a.bid_volume
    o.unknown_volume = a.unknown_volume
    o.cvd_open = cvd_open
    o.cvd_high = cvd_open + a.delta_high
    o.cvd_low = cvd_open + a.delta_low
    o.cvd_close = cvd_close
    o.session_cvd_close = session_cvd
    o.vd = a.delta
    sided = a.ask_volume + a.bid_volume
    ratio = a.delta / sided if sided > 0 else 0.0
    o.vd_ratio = ratio
    depth = a.bid_depth + a.ask_depth
    o.book_imbalance = (a.bid_depth - a.ask_depth) / depth if depth > 0 else np.nan
    change = (a.close - a.open) / a.open * 10_000.0 if a.open != 0 else np.nan
    o.price_pct = change
    o.divergence = 0
    if abs(change) >= 0.5 and abs(ratio) >= 0.1:
        if change > 0 and ratio < 0:
            o.divergence = 1
        elif change < 0 and ratio > 0:
            o.divergence = -1
    o.max_trade_size = a.max_size
    o.big_trades = a.big_trades
    o.big_volume = a.big_volume
    o.sum_bid_depth = a.bid_depth
    o.sum_ask_depth = a.ask_depth
    o.sum_price_volume = a.price_volume
    o.vwap = a.price_volume / a.volume if a.volume > 0 else np.nan
    o.avg_spread = a.spread_sum / a.spread_count if a.spread_count > 0 else np.nan
    o.timestamp_out_ns = 0


@jit
def whole(gaps: Rows, feed: int, contract: int, start_ns: int, end_ns: int) -> int:
    """1 unless a gap touches [start_ns, end_ns) of this contract."""
    for i in range(len(gaps)):
        g = gaps[i]
        mine = g.feed == feed and (g.contract == NONE or g.contract == contract)
        if mine and g.start_ns < end_ns and g.end_ns > start_ns:
            return 0
    return 1


@jit_inline
def emit_1m(x: Arrays, f: int, k: int, closed: Row, corrected: bool) -> bool:
    """Append the candles_1m row of the window ending at closed.end_sec; False when it holds no trade."""
    end = closed.end_sec
    if corrected:
        fold(x, closed.front, end, 0)
    else:
        roll(x, k, closed.front, end)
    if x.scratch[0].trades == 0:
        return False
    o = x.out_1m[x.counters[ROWS_1M]]
    candle(x.scratch[0], closed.front, closed.cvd, closed.session_cvd, o)
    o.time_ns = end * NS
    o.complete = whole(x.gaps, f, closed.front, (end - WINDOW) * NS, end * NS)
    o.revision = closed.revision
    x.counters[ROWS_1M] += 1
    return True


@jit_inline
def emit_1s(x: Arrays, f: int, contract: int, closed: Row) -> None:
    """Append the candles_1s row of the second before closed.end_sec. CVD is the front contract's alone."""
    sec = closed.end_sec - 1
    s = x.ring[x.contracts[contract].ring, sec & (x.ring.shape[1] - 1)]
    o = x.out_1s[x.counters[ROWS_1S]]
    front = closed.front == contract
    candle(s, contract, closed.cvd if front else np.nan, closed.session_cvd if front else np.nan, o)
    o.time_ns = sec * NS
    o.complete = whole(x.gaps, f, contract, sec * NS, (sec + 1) * NS)
    o.revision = s.revision
    x.counters[ROWS_1S] += 1
