"""Fixed candles, semantics §3: folded when their end is reached, again when a late trade changed them (compiled).

A contract with a ring folds its finest candles from seconds; one without (an option) puts trades
straight into them. Every coarser candle is folded from the finer ones, which are kept for as long as
one that holds them may change. A continuous ticker's candle is that of the contract in front at its end.

A slot of `bars` belongs to a candle once its `sec` is the candle's start.
"""

from __future__ import annotations

import numpy as np

from services.aggregate.arena import Arrays
from services.aggregate.features import blank, step
from services.aggregate.layout import NONE, ROWS_FIXED, UPTO
from services.aggregate.rows import append, clear, whole
from services.aggregate.sessions import session_at
from shared.compiled import jit, jit_inline
from shared.frames import NS, Row


@jit_inline
def start_of(x: Arrays, i: int, sec: int) -> int:
    """Start of the candle of timeframe `i` that second `sec` is in."""
    tf = x.timeframes[i]
    return int((sec - tf.offset) // tf.seconds * tf.seconds + tf.offset)


@jit_inline
def slot(x: Arrays, i: int, start: int) -> int:
    """Column of `bars` of the candle of timeframe `i` that starts at `start`."""
    tf = x.timeframes[i]
    return int(tf.at + (start - tf.offset) // tf.seconds % tf.slots)


@jit
def claim(x: Arrays, e: int, i: int, start: int) -> int:
    """Column of `bars` of a candle, emptied if it still belonged to an older one."""
    at = slot(x, i, start)
    b = x.bars[e, at]
    x.bar_dirty[e, at] = 1
    if b.sec != start:
        if b.sec != NONE and x.timeframes[i].feature != NONE:
            _settle(x, e, i, b.sec + x.timeframes[i].seconds)
        _empty(b)
        b.sec = start
        b.front = x.entities[e].contract
    return at


@jit
def _empty(b: Row) -> None:
    clear(b)
    b.sec = b.revision = b.book_ns = b.ticker_ns = b.front = NONE
    b.first_ns = b.last_ns = b.dirty = 0
    b.open = b.high = b.low = b.close = b.cvd = np.nan
    b.bid_price = b.bid_size = b.ask_price = b.ask_size = b.book_imbalance_5 = np.nan
    b.mark_price = b.index_price = b.open_interest = b.funding_rate = np.nan
    b.liquidated_long_volume = b.liquidated_short_volume = 0.0


@jit
def _fill(x: Arrays, e: int, i: int, b: Row, o: Row) -> None:
    """The columns of a candle but its features."""
    entity = x.entities[e]
    seconds = x.timeframes[i].seconds
    o.time_ns = b.sec * NS
    o.timeframe_sec = seconds
    o.name = e
    o.open = b.open
    o.high = b.high
    o.low = b.low
    o.close = b.close
    o.volume = b.volume
    o.trades = b.trades
    o.vwap = b.price_volume / b.volume if b.volume > 0 else np.nan
    o.ask_volume = b.ask_volume
    o.bid_volume = b.bid_volume
    o.unknown_volume = b.unknown_volume
    o.vd = b.delta
    o.cvd_open = b.cvd - b.delta
    o.cvd_high = o.cvd_open + b.delta_high
    o.cvd_low = o.cvd_open + b.delta_low
    o.cvd_close = b.cvd
    o.quoted_spread = b.spread_sum / b.spread_count if b.spread_count > 0 else np.nan
    o.bid_price = b.bid_price
    o.bid_size = b.bid_size
    o.ask_price = b.ask_price
    o.ask_size = b.ask_size
    o.book_imbalance_5 = b.book_imbalance_5
    o.mark_price = b.mark_price
    o.index_price = b.index_price
    o.open_interest = b.open_interest
    o.funding_rate = b.funding_rate
    o.liquidated_long_volume = b.liquidated_long_volume
    o.liquidated_short_volume = b.liquidated_short_volume
    o.complete = whole(x.gaps, entity.feed, b.front, b.sec * NS, (b.sec + seconds) * NS)
    o.revision = b.revision
    o.timestamp_out_ns = 0


@jit
def _settle(x: Arrays, e: int, i: int, upto: int) -> None:
    """Candles that end by `upto` can change no more: take them, in order, into the settled feature state."""
    tf = x.timeframes[i]
    s = x.features[e, tf.feature, 1]
    while True:
        found, first = NONE, upto
        for at in range(tf.at, tf.at + tf.slots):
            b = x.bars[e, at]
            if b.revision != NONE and s[UPTO] <= b.sec and b.sec + tf.seconds <= first:
                found, first = at, b.sec + tf.seconds - 1
        if found == NONE:
            return
        b = x.bars[e, found]
        _fill(x, e, i, b, x.row[0])
        step(s, x.row[0], tf.seconds)
        s[UPTO] = b.sec + tf.seconds
        x.feature_dirty[e, tf.feature] = 1


@jit_inline
def _horizon(x: Arrays, f: int) -> int:
    """Candles that end by this second can change no more, even where a correction still waits."""
    return int(x.feeds[f].closed_sec - x.params[0].lateness_sec - x.timeframes[0].seconds)


@jit
def _close(x: Arrays, f: int, e: int, i: int, b: Row) -> None:
    """Number and emit a candle that has just ended."""
    tf = x.timeframes[i]
    b.revision = 0
    o = x.out_fixed[x.counters[ROWS_FIXED]] if tf.emit else x.row[0]
    _fill(x, e, i, b, o)
    if tf.feature != NONE:
        _settle(x, e, i, _horizon(x, f))
        step(x.features[e, tf.feature, 0], o, tf.seconds)
        x.feature_dirty[e, tf.feature] = 1
    else:
        blank(o)
    if tf.emit:
        x.counters[ROWS_FIXED] += 1


@jit
def _add_state(b: Row, child: Row) -> None:
    b.liquidated_long_volume += child.liquidated_long_volume
    b.liquidated_short_volume += child.liquidated_short_volume


@jit
def _fold(x: Arrays, e: int, i: int, b: Row) -> None:
    """The trades of a contract's candle, anew from its seconds or its finer candles."""
    tf = x.timeframes[i]
    c = x.entities[e].contract
    end = b.sec + tf.seconds
    if tf.child == NONE:
        ring = x.contracts[c].ring
        if ring == NONE:
            return  # its trades are in the slot itself
        clear(b)
        mask = x.ring.shape[1] - 1
        for sec in range(b.sec, end):
            s = x.ring[ring, sec & mask]
            if s.sec == sec:
                append(b, s)
        return
    clear(b)
    b.liquidated_long_volume = b.liquidated_short_volume = 0.0
    length = x.timeframes[tf.child].seconds
    for start in range(b.sec, end, length):
        child = x.bars[e, slot(x, tf.child, start)]
        if child.sec == start:
            _add_state(b, child)
            append(b, child)


@jit
def _carry(x: Arrays, k: int, b: Row, close: float) -> bool:
    """An empty candle that goes on at the last close, if that is wanted and the market is open."""
    if not x.params[0].carry or np.isnan(close):
        return False
    root = x.roots[k]
    if session_at(x.sessions, root.calendar_from, root.calendar_to, b.sec * NS) == NONE:
        return False
    b.open = b.high = b.low = b.close = close
    return True


@jit
def _stand(b: Row, entity: Row) -> None:
    """The state columns as of this candle's end."""
    b.bid_price = entity.bid_price
    b.bid_size = entity.bid_size
    b.ask_price = entity.ask_price
    b.ask_size = entity.ask_size
    b.book_imbalance_5 = entity.book_imbalance_5
    b.mark_price = entity.mark_price
    b.index_price = entity.index_price
    b.open_interest = entity.open_interest
    b.funding_rate = entity.funding_rate


@jit
def _take_state(x: Arrays, e: int, start: int) -> None:
    """What came within the finest candle is the state at its end."""
    b = x.bars[e, slot(x, 0, start)]
    if b.sec != start or (b.book_ns == NONE and b.ticker_ns == NONE):
        return
    entity = x.entities[e]
    x.entity_dirty[e] = 1
    if b.book_ns != NONE:
        entity.bid_price = b.bid_price
        entity.bid_size = b.bid_size
        entity.ask_price = b.ask_price
        entity.ask_size = b.ask_size
    if not np.isnan(b.book_imbalance_5):
        entity.book_imbalance_5 = b.book_imbalance_5
    if not np.isnan(b.mark_price):
        entity.mark_price = b.mark_price
    if not np.isnan(b.index_price):
        entity.index_price = b.index_price
    if not np.isnan(b.open_interest):
        entity.open_interest = b.open_interest
    if not np.isnan(b.funding_rate):
        entity.funding_rate = b.funding_rate


@jit
def _close_contract(x: Arrays, f: int, e: int, i: int, start: int) -> None:
    entity = x.entities[e]
    c = entity.contract
    if i == 0:
        _take_state(x, e, start)
    if x.contracts[c].last_sec < start and not x.params[0].carry:
        return
    b = x.bars[e, claim(x, e, i, start)]
    _fold(x, e, i, b)
    if b.trades == 0 and not _carry(x, x.contracts[c].root, b, entity.close):
        return
    if i == 0:
        if b.trades > 0:
            entity.close = b.close
        entity.cvd += b.delta
        x.entity_dirty[e] = 1
    b.cvd = entity.cvd
    _stand(b, entity)
    _close(x, f, e, i, b)


@jit
def _copy(x: Arrays, k: int, i: int, b: Row, front: int, end: int) -> bool:
    """A ticker's candle from that of the contract in front; False where that has none."""
    source_entity = x.contracts[front].entity if front != NONE else NONE
    if source_entity == NONE:
        return False
    start, revision, dirty = b.sec, b.revision, b.dirty
    at = slot(x, i, start)
    source = x.bars[source_entity, at]
    if source.sec != start or source.revision == NONE:
        return False
    x.bars[x.roots[k].entity, at] = source
    b.revision = revision
    b.dirty = dirty
    b.front = front
    closed = x.closes[k, end & (x.closes.shape[1] - 1)]
    b.cvd = closed.cvd if closed.end_sec == end else x.roots[k].cvd
    return True


@jit_inline
def _front_at(x: Arrays, k: int, end: int) -> int:
    closed = x.closes[k, end & (x.closes.shape[1] - 1)]
    return int(closed.front if closed.end_sec == end else x.roots[k].front)


@jit
def close_bars(x: Arrays, f: int, end: int) -> None:
    """Close every fixed candle of feed `f` that ends at second `end`; there is room for their rows."""
    for i in range(len(x.timeframes)):
        tf = x.timeframes[i]
        if (end - tf.offset) % tf.seconds != 0:
            continue
        start = end - tf.seconds
        for e in range(len(x.entities)):
            if x.entities[e].feed == f and x.entities[e].root == NONE:
                _close_contract(x, f, e, i, start)
        for k in range(len(x.roots)):
            if x.roots[k].feed != f or x.roots[k].entity == NONE:
                continue
            front = _front_at(x, k, end)
            if front == NONE or x.contracts[front].entity == NONE:
                continue
            source = x.bars[x.contracts[front].entity, slot(x, i, start)]
            if source.sec == start and source.revision != NONE:
                b = x.bars[x.roots[k].entity, claim(x, x.roots[k].entity, i, start)]
                if _copy(x, k, i, b, front, end):
                    _close(x, f, x.roots[k].entity, i, b)


@jit
def _cvd_before(x: Arrays, e: int, end: int, closed: int) -> float:
    """A contract's CVD at second `end`, from the candles since."""
    seconds = x.timeframes[0].seconds
    for start in range(end, closed - seconds + 1, seconds):
        b = x.bars[e, slot(x, 0, start)]
        if b.sec == start and b.revision != NONE:
            return float(b.cvd - b.delta)
    return float(x.entities[e].cvd)


@jit
def correct_bars(x: Arrays, f: int, c: int, sec: int, signed: float) -> None:
    """A late trade of second `sec` changed a contract: revise its closed candles, and its ticker's, from there on."""
    e = x.contracts[c].entity
    k = x.contracts[c].root
    closed = x.feeds[f].closed_sec
    if start_of(x, 0, sec) + x.timeframes[0].seconds > closed:
        return  # it is in time for every candle
    mask = x.closes.shape[1] - 1
    ticker = x.roots[k].entity
    counts = signed != 0.0 and x.closes[k, (sec + 1) & mask].front == c
    for i in range(len(x.timeframes) - 1, -1, -1):  # the finest last: `_cvd_before` reads them as they were
        tf = x.timeframes[i]
        first = start_of(x, i, sec)
        held = False  # by the ticker
        for start in range(first, closed - tf.seconds + 1, tf.seconds):
            end = start + tf.seconds
            at = slot(x, i, start)
            if start == first:
                claim(x, e, i, start)
            b = x.bars[e, at]
            if start == first and b.revision == NONE:
                b.cvd = _cvd_before(x, e, end, closed)
                _stand(b, x.entities[e])
            if start == first or (b.sec == start and b.revision != NONE):
                if start == first or signed != 0.0 or tf.feature != NONE:
                    b.revision += 1
                    b.dirty = 1
                b.cvd += signed
                x.bar_dirty[e, at] = 1
            if ticker == NONE:
                continue
            front = _front_at(x, k, end)
            t = x.bars[ticker, at]
            exists = t.sec == start and t.revision != NONE
            if start == first and front == c:
                claim(x, ticker, i, start)
                t.front = c
                held = exists = True
                if t.revision == NONE:
                    t.cvd = x.closes[k, end & mask].cvd - (signed if counts else 0.0)
            if exists:
                if (start == first and front == c) or counts or (held and tf.feature != NONE):
                    t.revision += 1
                    t.dirty = 1
                if counts:
                    t.cvd += signed
                x.bar_dirty[ticker, at] = 1
    x.entities[e].cvd += signed
    x.entities[e].dirty = 1
    x.entity_dirty[e] = 1
    if ticker != NONE:
        x.entities[ticker].dirty = 1
        x.entity_dirty[ticker] = 1


@jit
def _again(x: Arrays, f: int, e: int, i: int) -> None:
    """Emit the revised candles of one timeframe again, and take the features anew from before them."""
    tf = x.timeframes[i]
    entity = x.entities[e]
    closed = x.feeds[f].closed_sec
    last = start_of(x, i, closed) - tf.seconds
    first = last - (tf.slots - 1) * tf.seconds
    dirty = False
    for start in range(first, last + 1, tf.seconds):
        b = x.bars[e, slot(x, i, start)]
        dirty = dirty or (b.sec == start and b.dirty != 0)
    if not dirty:
        return
    s = x.features_now[0]
    if tf.feature != NONE:
        _settle(x, e, i, _horizon(x, f))
        s[:] = x.features[e, tf.feature, 1]
    close = np.nan
    for start in range(first, last + 1, tf.seconds):
        at = slot(x, i, start)
        b = x.bars[e, at]
        if b.sec != start or b.revision == NONE:
            continue
        if entity.root == NONE:
            if b.dirty:
                _fold(x, e, i, b)
            if b.trades == 0 and not np.isnan(close):
                b.open = b.high = b.low = b.close = close
            close = b.close
        elif b.dirty:
            front = b.front
            cvd = b.cvd
            _copy(x, entity.root, i, b, front, start + tf.seconds)
            b.cvd = cvd
        emit = b.dirty != 0 and tf.emit != 0
        o = x.out_fixed[x.counters[ROWS_FIXED]] if emit else x.row[0]
        _fill(x, e, i, b, o)
        if tf.feature != NONE and start >= s[UPTO]:
            step(s, o, tf.seconds)
        else:
            blank(o)  # also where a gap is told so late that the features before it are gone
        x.bar_dirty[e, at] = 1
        b.dirty = 0
        if emit:
            x.counters[ROWS_FIXED] += 1
    if i == 0 and not np.isnan(close):
        entity.close = close
    if tf.feature != NONE:
        x.features[e, tf.feature, 0][:] = s
        x.feature_dirty[e, tf.feature] = 1


@jit
def flush_bars(x: Arrays, f: int) -> bool:
    """Emit every revised candle of a feed again; False when the output is full (drain, call again)."""
    for tickers in range(2):
        for e in range(len(x.entities)):
            entity = x.entities[e]
            if entity.feed != f or not entity.dirty or (entity.root != NONE) != (tickers == 1):
                continue
            if x.counters[ROWS_FIXED] + x.bars.shape[1] > len(x.out_fixed):
                return False
            for i in range(len(x.timeframes)):
                _again(x, f, e, i)
            entity.dirty = 0
            x.entity_dirty[e] = 1
    return True


@jit
def take_quote(x: Arrays, c: int, t: Row) -> bool:
    """A BOOK row: the contract's quotes now, and of the candle that it is in; False when that has closed."""
    contract = x.contracts[c]
    if t.ts_event_ns >= contract.quote_ns:
        contract.quote_ns = t.ts_event_ns
        contract.bid_px = t.bid_px
        contract.ask_px = t.ask_px
        contract.bid_sz = t.bid_sz
        contract.ask_sz = t.ask_sz
        x.contract_dirty[c] = 1
    if contract.entity == NONE:
        return True
    start = start_of(x, 0, t.ts_event_ns // NS)
    if start + x.timeframes[0].seconds <= x.feeds[contract.feed].closed_sec:
        return False
    b = x.bars[contract.entity, claim(x, contract.entity, 0, start)]
    if t.ts_event_ns >= b.book_ns:
        b.book_ns = t.ts_event_ns
        b.bid_price = t.bid_px
        b.bid_size = t.bid_sz
        b.ask_price = t.ask_px
        b.ask_size = t.ask_sz
        if not np.isnan(t.price):
            b.book_imbalance_5 = t.price
    return True


@jit
def take_ticker(x: Arrays, c: int, t: Row) -> bool:
    """A TICKER row into the candle that it is in; False when that has closed."""
    contract = x.contracts[c]
    if contract.entity == NONE:
        return True
    start = start_of(x, 0, t.ts_event_ns // NS)
    if start + x.timeframes[0].seconds <= x.feeds[contract.feed].closed_sec:
        return False
    b = x.bars[contract.entity, claim(x, contract.entity, 0, start)]
    if t.ts_event_ns >= b.ticker_ns:
        b.ticker_ns = t.ts_event_ns
        if not np.isnan(t.bid_px):
            b.mark_price = t.bid_px
        if not np.isnan(t.ask_px):
            b.index_price = t.ask_px
        if not np.isnan(t.size):
            b.open_interest = t.size
        if not np.isnan(t.bid_sz):
            b.funding_rate = t.bid_sz
    return True


@jit
def take_liquidation(x: Arrays, c: int, t: Row) -> bool:
    """A LIQUIDATION row into the candle that it is in; False when that has closed."""
    contract = x.contracts[c]
    if contract.entity == NONE:
        return True
    start = start_of(x, 0, t.ts_event_ns // NS)
    if start + x.timeframes[0].seconds <= x.feeds[contract.feed].closed_sec:
        return False
    b = x.bars[contract.entity, claim(x, contract.entity, 0, start)]
    if t.side > 0:
        b.liquidated_short_volume += t.size
    else:
        b.liquidated_long_volume += t.size
    return True
