"""The compiled kernel: tick rows in, one window cell a key changed by each option trade.

It folds whole arrays and returns only where messages must leave, so that these follow from the tape alone. No
clock, no I/O, no allocation: time is what the rows say.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from services.pressure.layout import (
    ABSURD,
    CROWDED,
    DEFINED,
    DUE,
    FULL,
    GOING,
    HELD,
    IGNORED,
    LATE,
    LATE_TRADE,
    MARK,
    NEW_KEY,
    NO_NUMBER,
    NONE,
    NOT_OPTIONS,
    OUTSIDE,
    PERPETUAL,
    REASON,
    SPREADS,
    TOO_LATE,
    TRADES,
    UNDEFINED,
    UNTIL,
    WAITED,
    WHO,
)  # fmt: skip
from shared.compiled import jit, jit_inline
from shared.frames import BOOK, CLOCK, NS, OPTION, TICK, TICKER, TRADE, Frame, Row, Rows
from shared.messages import Clock, Instrument, encode
from shared.sides import lee_ready


class Arrays(NamedTuple):
    """C contracts, M markets, U underlyings, K keys, S slots. See `layout` for the dtypes."""

    params: Rows  # PARAMS (1)
    feeds: Rows  # FEED
    markets: Rows  # MARKET (M)
    sessions: Rows  # int64 (n, 2): rows of [open, close) ns
    contracts: Rows  # CONTRACT (C)
    seen: Rows  # SEEN (C, S + 1)
    unders: Rows  # UNDERLYING (U)
    closes: Rows  # CLOSE (U, S)
    cells: Rows  # CELL (K, S)
    table_key: Rows  # int64, open addressing: instrument id or 0
    table_value: Rows  # int64: contract index
    waiting: Rows  # TICK: trades that wait for a definition, in order
    waits: Rows  # int64 (n, 2): their feed (NONE: unknown) and until which watermark they wait
    queue: Rows  # int64 (2): HELD, UNTIL
    counters: Rows  # int64, see layout.COUNTERS
    pause: Rows  # int64 (3)
    contract_dirty: Rows  # int8 (C)
    cell_dirty: Rows  # int8 (K, S)


@jit
def find(table_key: Rows, key: int) -> int:
    """Slot of an instrument id in the open-addressed table (its key is 0 when absent)."""
    mask = len(table_key) - 1
    at = key & mask
    while table_key[at] != 0 and table_key[at] != key:
        at = (at + 1) & mask
    return at


@jit
def put(table_key: Rows, table_value: Rows, ids: Rows, first: int) -> None:
    """Enter contracts `first`, `first + 1`, … with these instrument ids."""
    for i in range(len(ids)):
        at = find(table_key, ids[i])
        table_key[at] = ids[i]
        table_value[at] = first + i


@jit
def _enter_session(sessions: Rows, market: Row, ts: int) -> bool:
    """Make `ts`'s session the market's; False when the market is closed then."""
    low, high = market.calendar_from, market.calendar_to
    while low < high:
        middle = (low + high) // 2
        if sessions[middle, 0] <= ts:
            low = middle + 1
        else:
            high = middle
    at = low - 1
    if at < market.calendar_from or ts >= sessions[at, 1]:
        return False
    market.open_ns = sessions[at, 0]
    market.close_ns = sessions[at, 1]
    return True


@jit
def _clear(a: Row, w: int) -> None:
    """An empty cell of window `w`."""
    a.win = w
    a.revision = NONE
    a.complete = 1
    a.trades = a.sweeps = a.blocks = 0
    a.first_ns = a.last_ns = 0
    a.volume = a.ask_volume = a.bid_volume = a.unknown_volume = a.max_size = a.price_volume = 0.0
    a.premium = a.ask_premium = a.bid_premium = a.open = a.close = a.offset = 0.0
    a.sweep_ask_volume = a.sweep_bid_volume = a.block_ask_volume = a.block_bid_volume = 0.0


@jit
def _add(a: Row, contract: Row, t: Row, side: int, block_size: float, start_ns: int) -> None:
    """Add a trade to its cell, and to the run of trades that may be a sweep."""
    price, size, ts = t.price, t.size, t.ts_event_ns
    if a.trades == 0 or ts < a.first_ns:
        a.first_ns = ts
        a.open = price
    if a.trades == 0 or ts >= a.last_ns:
        a.last_ns = ts
        a.close = price
    premium = price * size * contract.multiplier
    a.trades += 1
    a.volume += size
    a.max_size = max(a.max_size, size)
    a.price_volume += price * size
    a.premium += premium
    a.offset += size * (ts - start_ns)
    block = size >= block_size
    if block:
        a.blocks += 1
    if side > 0:
        a.ask_volume += size
        a.ask_premium += premium
        if block:
            a.block_ask_volume += size
    elif side < 0:
        a.bid_volume += size
        a.bid_premium += premium
        if block:
            a.block_bid_volume += size
    else:
        a.unknown_volume += size
    if ts != contract.run_ns or side != contract.run_side:
        contract.run_ns = ts
        contract.run_side = side
        contract.run_px = price
        contract.run_volume = size
        contract.run_swept = 0
        return
    contract.run_volume += size
    swept = 0.0
    if contract.run_swept:
        swept = size
    elif side != 0 and price != contract.run_px:
        contract.run_swept = 1
        a.sweeps += 1
        swept = contract.run_volume
    if side > 0:
        a.sweep_ask_volume += swept
    else:
        a.sweep_bid_volume += swept


@jit
def _see(x: Arrays, c: int, ts: int, px: float, iv: float, delta: float) -> None:
    """The newest of its window, and of all windows before those held."""
    window = x.params[0].window_ns
    base = x.seen.shape[1] - 1
    w = ts // window
    p = x.seen[c, w % base]
    if p.ns != NONE and p.ns // window > w:
        p = x.seen[c, base]
    elif p.ns != NONE and p.ns // window < w:
        old = x.seen[c, base]
        if p.ns >= old.ns:
            old.ns = p.ns
            old.px = p.px
            old.iv = p.iv
            old.delta = p.delta
    if ts >= p.ns:
        p.ns = ts
        p.px = px
        p.iv = iv
        p.delta = delta
        x.contract_dirty[c] = 1


@jit_inline
def _pause(x: Arrays, reason: int, who: int, mark: int) -> None:
    x.pause[REASON] = reason
    x.pause[WHO] = who
    x.pause[MARK] = mark


@jit
def _reach(x: Arrays, f: int, mark: int) -> bool:
    """The feed's watermark is at least `mark`; False when something is due at it."""
    feed = x.feeds[f]
    if mark > feed.watermark_ns:
        if mark >= feed.due_ns or mark >= feed.wait_ns or mark >= x.queue[UNTIL]:
            _pause(x, DUE, f, mark)
            return False
        feed.watermark_ns = mark
    return True


@jit
def _wait(x: Arrays, f: int, t: Row) -> bool:
    """Put a trade aside until it is known what it is of; False when there is no room."""
    n = x.queue[HELD]
    if n == len(x.waiting):
        _pause(x, FULL, 0, 0)
        return False
    if f != NONE:
        now = x.feeds[f].watermark_ns
    else:
        # Nobody knows its feed: the newest watermark, which its own time would have moved.
        now = t.ts_event_ns
        for g in range(len(x.feeds)):
            now = max(now, x.feeds[g].watermark_ns)
    until = now + x.params[0].wait_ns
    x.waiting[n] = t
    x.waits[n, 0] = f
    x.waits[n, 1] = until
    x.queue[HELD] = n + 1
    x.counters[WAITED] += 1
    if f != NONE:
        x.feeds[f].wait_ns = min(x.feeds[f].wait_ns, until)
    else:
        x.queue[UNTIL] = min(x.queue[UNTIL], until)
    return True


@jit
def _side(contract: Row, t: Row, late: bool) -> int:
    """The aggressor, and the prices that the next trade is held against."""
    side = int(t.side)
    price, bid, ask = t.price, t.bid_px, t.ask_px
    if side == 0:
        if np.isnan(bid) and np.isnan(ask) and contract.quote_ns != NONE:
            # The feed gives no quotes with its trades: the newest of its books.
            bid, ask = contract.bid_px, contract.ask_px
        reference = contract.last_px if price != contract.last_px else contract.previous_px
        side = lee_ready(price, bid, ask, reference)
    if not late and price != contract.last_px:
        contract.previous_px = contract.last_px
        contract.last_px = price
    return side


@jit
def _trade(x: Arrays, t: Row, c: int, waited: bool) -> int:
    """Take one trade; GOING, or what to pause for: LATE_TRADE behind it, CROWDED and NEW_KEY before it."""
    contract = x.contracts[c]
    option = contract.sort == DEFINED
    ts = t.ts_event_ns
    if not (abs(t.price) < ABSURD and 0.0 < t.size < ABSURD):  # False too when one is NaN
        x.counters[NO_NUMBER if option else NOT_OPTIONS] += 1
        return GOING
    market = x.markets[contract.market]
    if (ts < market.open_ns or ts >= market.close_ns) and not _enter_session(x.sessions, market, ts):
        x.counters[OUTSIDE if option else NOT_OPTIONS] += 1
        return GOING
    late = False
    watermark = x.feeds[contract.feed].watermark_ns
    if ts < watermark:
        sec = ts // NS
        late = sec < watermark // NS
        if late and not waited and (watermark - ts > x.params[0].max_lateness_ns or sec < market.since_sec):
            x.counters[TOO_LATE if option else NOT_OPTIONS] += 1
            return GOING
    if not option:
        x.counters[NOT_OPTIONS] += 1
        _see(x, c, ts, t.price, np.nan, np.nan)
        return GOING
    if contract.key == NONE:
        _pause(x, NEW_KEY, c, 0)
        return NEW_KEY
    under = x.unders[contract.under]
    window = x.params[0].window_ns
    w = ts // window
    s = w % x.closes.shape[1]
    held = x.closes[contract.under, s]
    if held.win != w:
        if held.win > w:
            x.counters[TOO_LATE] += 1
            return GOING
        if held.win != NONE and held.revision == NONE:
            _pause(x, CROWDED, contract.under, s)
            return CROWDED
        held.win = w
        held.revision = NONE
    cell = x.cells[contract.key, s]
    if cell.win != w:
        _clear(cell, w)
    _add(cell, contract, t, _side(contract, t, late), under.block_size, w * window)
    x.contract_dirty[c] = 1
    x.cell_dirty[contract.key, s] = 1
    x.counters[TRADES] += 1
    feed = x.feeds[under.feed]
    end = (w + 1) * window
    if held.revision != NONE or end <= feed.watermark_ns:
        x.counters[LATE] += 1
        _pause(x, LATE_TRADE, contract.key, s)
        return LATE_TRADE
    feed.due_ns = min(feed.due_ns, end)
    return GOING


@jit
def _beside(x: Arrays, t: Row, c: int) -> None:
    """A row that is no trade: quotes, marks, summaries."""
    contract = x.contracts[c]
    ts = t.ts_event_ns
    if t.kind == BOOK:
        if contract.sort == DEFINED and ts >= contract.quote_ns:
            contract.quote_ns = ts
            contract.bid_px = t.bid_px
            contract.ask_px = t.ask_px
            x.contract_dirty[c] = 1
    elif t.kind == TICKER:
        if contract.sort == PERPETUAL and abs(t.bid_px) < ABSURD:
            _see(x, c, ts, t.bid_px, np.nan, np.nan)
    elif t.kind == OPTION and contract.sort == DEFINED:
        _see(x, c, ts, t.size, t.bid_sz / 100.0, t.ask_sz)


@jit
def run(ticks: Rows, start: int, x: Arrays, waited: bool) -> int:
    """Fold tick rows from `start` on; returns the first row not done.

    `pause` says why it returned: GOING at the end of the rows. DUE: feed WHO comes to the watermark MARK, where
    windows end or have waited enough. LATE_TRADE: the row before this one changed the closed cell (WHO, MARK).
    NEW_KEY: contract WHO wants its key. CROWDED: a window of underlying WHO in slot MARK must leave to make
    room. FULL: too many trades wait. `waited`: these are trades that waited, in time when they came.
    """
    x.pause[REASON] = GOING
    for i in range(start, len(ticks)):
        t = ticks[i]
        if t.kind == CLOCK:
            for f in range(len(x.feeds)):
                if x.feeds[f].id == t.instrument and not _reach(x, f, t.ts_event_ns):
                    return i
            continue
        if t.part != (1 if t.kind == OPTION else 0):
            continue
        at = find(x.table_key, t.instrument)
        if x.table_key[at] == 0:
            if t.kind == TRADE and not _wait(x, NONE, t):
                return i
            continue
        c = x.table_value[at]
        contract = x.contracts[c]
        if contract.sort == IGNORED:
            if t.kind == TRADE:
                x.counters[SPREADS] += 1
            continue
        f = contract.feed
        timed = (t.kind == TRADE or t.kind == BOOK) and not waited
        if timed and not _reach(x, f, t.ts_event_ns - x.feeds[f].grace_ns):
            return i
        if t.kind != TRADE:
            _beside(x, t, c)
        elif contract.sort == UNDEFINED:
            if not _wait(x, f, t):
                return i
        else:
            why = _trade(x, t, c, waited)
            if why == LATE_TRADE:
                return i + 1
            if why != GOING:
                return i
    return len(ticks)


def warm() -> None:
    """Compile the kernel (or load it from the cache) before the first tick."""
    from services.pressure.core import PartitionState  # noqa: PLC0415 (it imports this module)
    from services.pressure.state import Config  # noqa: PLC0415

    always = np.array([[0, 1 << 62]], np.int64)
    state = PartitionState(Config(sessions=lambda venue, root: always))  # noqa: ARG005
    option = Instrument(1, "", "W C1", "W", "warm", kind="C", expiration_ns=NS, strike=1.0)
    tick = np.zeros(1, TICK)
    tick["ts_event_ns"], tick["instrument"], tick["price"], tick["size"] = NS, 1, 1.0, 1.0
    messages = [option, Clock("warm", NS, watched_from_ns=NS)]
    state.step([Frame("clock", 2, 0, 0, "warm", encode(messages)), Frame("trade", 1, 0, 0, "warm", tick.tobytes())])
