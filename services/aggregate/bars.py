"""Fixed candles, semantics §3: folded when their end is reached, again when a late trade changed them (compiled).

A contract with a ring folds its finest candles from seconds; one without (an option) puts trades
straight into them. Every coarser candle is folded from the finer ones, which are kept for as long as
one that holds them may change. A continuous ticker's candle is that of the contract in front at its end.

A slot of `bars` belongs to a candle once its `sec` is the candle's start.
"""

from __future__ import annotations

import numpy as np

from services.aggregate import arena
from services.aggregate.features import blank, step
from services.aggregate.layout import CHANGED, NONE, REVISED, ROWS_FIXED, UPTO
from services.aggregate.rows import append, clear, whole
from services.aggregate.sessions import session_at
from shared.compiled import jit, jit_inline
from shared.frames import NS, Row, Rows


@jit_inline
def start_of(t: Rows, i: int, sec: int) -> int:
    """Start of the candle of timeframe `i` that second `sec` is in."""
    tf = arena.timeframes(t)[i]
    return int((sec - tf.offset) // tf.seconds * tf.seconds + tf.offset)


@jit_inline
def slot(t: Rows, i: int, start: int) -> int:
    """Column of `bars` of the candle of timeframe `i` that starts at `start`."""
    tf = arena.timeframes(t)[i]
    return int(tf.at + (start - tf.offset) // tf.seconds % tf.slots)


@jit
def claim(t: Rows, e: int, i: int, start: int) -> int:
    """Column of `bars` of a candle, emptied if it still belonged to an older one."""
    at = slot(t, i, start)
    b = arena.bars(t)[e, at]
    arena.bar_dirty(t)[e, at] = 1
    if b.sec != start:
        if b.sec != NONE and arena.timeframes(t)[i].feature != NONE:
            _settle(t, e, i, b.sec + arena.timeframes(t)[i].seconds)
        _empty(b)
        b.sec = start
        b.front = arena.entities(t)[e].contract
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
def _fill(t: Rows, e: int, i: int, b: Row, o: Row) -> None:
    """The columns of a candle but its features."""
    entity = arena.entities(t)[e]
    seconds = arena.timeframes(t)[i].seconds
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
    o.complete = whole(arena.gaps(t), entity.feed, b.front, b.sec * NS, (b.sec + seconds) * NS)
    o.revision = b.revision
    o.timestamp_out_ns = 0


@jit
def _settle(t: Rows, e: int, i: int, upto: int) -> None:
    """Candles that end by `upto` can change no more: take them, in order, into the settled feature state."""
    tf = arena.timeframes(t)[i]
    s = arena.features(t)[e, tf.feature, 1]
    while True:
        found, first = NONE, upto
        for at in range(tf.at, tf.at + tf.slots):
            b = arena.bars(t)[e, at]
            if b.revision != NONE and s[UPTO] <= b.sec and b.sec + tf.seconds <= first:
                found, first = at, b.sec + tf.seconds - 1
        if found == NONE:
            return
        b = arena.bars(t)[e, found]
        _fill(t, e, i, b, arena.row(t)[0])
        step(s, arena.row(t)[0], tf.seconds)
        s[UPTO] = b.sec + tf.seconds
        arena.feature_dirty(t)[e, tf.feature] = 1


@jit_inline
def _horizon(t: Rows, f: int) -> int:
    """Candles that end by this second can change no more, even where a correction still waits."""
    return int(arena.feeds(t)[f].closed_sec - arena.params(t)[0].lateness_sec - arena.timeframes(t)[0].seconds)


@jit
def _close(t: Rows, f: int, e: int, i: int, b: Row) -> None:
    """Number and emit a candle that has just ended."""
    tf = arena.timeframes(t)[i]
    b.revision = 0
    o = arena.out_fixed(t)[arena.counters(t)[ROWS_FIXED]] if tf.emit else arena.row(t)[0]
    _fill(t, e, i, b, o)
    if tf.feature != NONE:
        _settle(t, e, i, _horizon(t, f))
        step(arena.features(t)[e, tf.feature, 0], o, tf.seconds)
        arena.feature_dirty(t)[e, tf.feature] = 1
    else:
        blank(o)
    if tf.emit:
        arena.counters(t)[ROWS_FIXED] += 1


@jit
def _add_state(b: Row, child: Row) -> None:
    b.liquidated_long_volume += child.liquidated_long_volume
    b.liquidated_short_volume += child.liquidated_short_volume


@jit
def _fold(t: Rows, e: int, i: int, b: Row) -> None:
    """The trades of a contract's candle, anew from its seconds or its finer candles."""
    tf = arena.timeframes(t)[i]
    c = arena.entities(t)[e].contract
    end = b.sec + tf.seconds
    if tf.child == NONE:
        ring = arena.contracts(t)[c].ring
        if ring == NONE:
            return  # its trades are in the slot itself
        clear(b)
        mask = arena.ring(t).shape[1] - 1
        for sec in range(b.sec, end):
            s = arena.ring(t)[ring, sec & mask]
            if s.sec == sec:
                append(b, s)
        return
    clear(b)
    b.liquidated_long_volume = b.liquidated_short_volume = 0.0
    length = arena.timeframes(t)[tf.child].seconds
    for start in range(b.sec, end, length):
        child = arena.bars(t)[e, slot(t, tf.child, start)]
        if child.sec == start:
            _add_state(b, child)
            append(b, child)


@jit
def _carry(t: Rows, k: int, b: Row, close: float) -> bool:
    """An empty candle that goes on at the last close, if that is wanted and the market is open."""
    if not arena.params(t)[0].carry or np.isnan(close):
        return False
    root = arena.roots(t)[k]
    if session_at(arena.sessions(t), root.calendar_from, root.calendar_to, b.sec * NS) == NONE:
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
def _take_state(t: Rows, e: int, start: int) -> None:
    """What came within the finest candle is the state at its end."""
    b = arena.bars(t)[e, slot(t, 0, start)]
    if b.sec != start or (b.book_ns == NONE and b.ticker_ns == NONE):
        return
    entity = arena.entities(t)[e]
    arena.entity_dirty(t)[e] = 1
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
def _close_contract(t: Rows, f: int, e: int, i: int, start: int) -> None:
    entity = arena.entities(t)[e]
    c = entity.contract
    if i == 0:
        _take_state(t, e, start)
    if arena.contracts(t)[c].last_sec < start and not arena.params(t)[0].carry:
        return
    b = arena.bars(t)[e, claim(t, e, i, start)]
    _fold(t, e, i, b)
    if b.trades == 0 and not _carry(t, arena.contracts(t)[c].root, b, entity.close):
        return
    if i == 0:
        if b.trades > 0:
            entity.close = b.close
        entity.cvd += b.delta
        arena.entity_dirty(t)[e] = 1
    b.cvd = entity.cvd
    _stand(b, entity)
    _close(t, f, e, i, b)


@jit
def _copy(t: Rows, k: int, i: int, b: Row, front: int, end: int) -> bool:
    """A ticker's candle from that of the contract in front; False where that has none."""
    source_entity = arena.contracts(t)[front].entity if front != NONE else NONE
    if source_entity == NONE:
        return False
    start, revision, dirty = b.sec, b.revision, b.dirty
    at = slot(t, i, start)
    source = arena.bars(t)[source_entity, at]
    if source.sec != start or source.revision == NONE:
        return False
    arena.bars(t)[arena.roots(t)[k].entity, at] = source
    b.revision = revision
    b.dirty = dirty
    b.front = front
    closed = arena.closes(t)[k, end & (arena.closes(t).shape[1] - 1)]
    b.cvd = closed.cvd if closed.end_sec == end else arena.roots(t)[k].cvd
    return True


@jit_inline
def _front_at(t: Rows, k: int, end: int) -> int:
    closed = arena.closes(t)[k, end & (arena.closes(t).shape[1] - 1)]
    return int(closed.front if closed.end_sec == end else arena.roots(t)[k].front)


@jit
def close_bars(t: Rows, f: int, end: int) -> None:
    """Close every fixed candle of feed `f` that ends at second `end`; there is room for their rows."""
    for i in range(len(arena.timeframes(t))):
        tf = arena.timeframes(t)[i]
        if (end - tf.offset) % tf.seconds != 0:
            continue
        start = end - tf.seconds
        for e in range(len(arena.entities(t))):
            if arena.entities(t)[e].feed == f and arena.entities(t)[e].root == NONE:
                _close_contract(t, f, e, i, start)
        for k in range(len(arena.roots(t))):
            if arena.roots(t)[k].feed != f or arena.roots(t)[k].entity == NONE:
                continue
            front = _front_at(t, k, end)
            if front == NONE or arena.contracts(t)[front].entity == NONE:
                continue
            source = arena.bars(t)[arena.contracts(t)[front].entity, slot(t, i, start)]
            if source.sec == start and source.revision != NONE:
                b = arena.bars(t)[arena.roots(t)[k].entity, claim(t, arena.roots(t)[k].entity, i, start)]
                if _copy(t, k, i, b, front, end):
                    _close(t, f, arena.roots(t)[k].entity, i, b)


@jit
def _cvd_before(t: Rows, e: int, end: int, closed: int) -> float:
    """A contract's CVD at second `end`, from the candles since."""
    seconds = arena.timeframes(t)[0].seconds
    for start in range(end, closed - seconds + 1, seconds):
        b = arena.bars(t)[e, slot(t, 0, start)]
        if b.sec == start and b.revision != NONE:
            return float(b.cvd - b.delta)
    return float(arena.entities(t)[e].cvd)


@jit
def correct_bars(t: Rows, f: int, c: int, sec: int, signed: float) -> None:
    """A late trade of second `sec` changed a contract: revise its closed candles, and its ticker's, from there on."""
    e = arena.contracts(t)[c].entity
    k = arena.contracts(t)[c].root
    closed = arena.feeds(t)[f].closed_sec
    if start_of(t, 0, sec) + arena.timeframes(t)[0].seconds > closed:
        return  # it is in time for every candle
    mask = arena.closes(t).shape[1] - 1
    ticker = arena.roots(t)[k].entity
    counts = signed != 0.0 and arena.closes(t)[k, (sec + 1) & mask].front == c
    for i in range(len(arena.timeframes(t)) - 1, -1, -1):  # the finest last: `_cvd_before` reads them as they were
        tf = arena.timeframes(t)[i]
        first = start_of(t, i, sec)
        held = False  # by the ticker
        for start in range(first, closed - tf.seconds + 1, tf.seconds):
            end = start + tf.seconds
            at = slot(t, i, start)
            if start == first:
                claim(t, e, i, start)
            b = arena.bars(t)[e, at]
            if start == first and b.revision == NONE:
                b.cvd = _cvd_before(t, e, end, closed)
                _stand(b, arena.entities(t)[e])
            if start == first or (b.sec == start and b.revision != NONE):
                if start == first or signed != 0.0 or tf.feature != NONE:
                    b.revision += 1
                    b.dirty |= CHANGED if start == first else REVISED
                b.cvd += signed
                if start == first and arena.contracts(t)[c].ring != NONE:
                    b.delta += signed  # it is folded again later; `_cvd_before` may look before that
                arena.bar_dirty(t)[e, at] = 1
            if ticker == NONE:
                continue
            front = _front_at(t, k, end)
            own = arena.bars(t)[ticker, at]
            exists = own.sec == start and own.revision != NONE
            if start == first and front == c:
                claim(t, ticker, i, start)
                own.front = c
                held = exists = True
                if own.revision == NONE:
                    own.cvd = arena.closes(t)[k, end & mask].cvd - (signed if counts else 0.0)
            if exists:
                if (start == first and front == c) or counts or (held and tf.feature != NONE):
                    own.revision += 1
                    own.dirty |= CHANGED if start == first and front == c else REVISED
                if counts:
                    own.cvd += signed
                arena.bar_dirty(t)[ticker, at] = 1
    arena.entities(t)[e].cvd += signed
    arena.entities(t)[e].dirty = 1
    arena.entity_dirty(t)[e] = 1
    if ticker != NONE:
        arena.entities(t)[ticker].dirty = 1
        arena.entity_dirty(t)[ticker] = 1


@jit
def _again(t: Rows, f: int, e: int, i: int) -> None:
    """Emit the revised candles of one timeframe again, and take the features anew from before them."""
    tf = arena.timeframes(t)[i]
    entity = arena.entities(t)[e]
    closed = arena.feeds(t)[f].closed_sec
    last = start_of(t, i, closed) - tf.seconds
    first = last - (tf.slots - 1) * tf.seconds
    dirty = False
    for start in range(first, last + 1, tf.seconds):
        b = arena.bars(t)[e, slot(t, i, start)]
        dirty = dirty or (b.sec == start and b.dirty != 0)
    if not dirty:
        return
    s = arena.features_now(t)[0]
    if tf.feature != NONE:
        _settle(t, e, i, _horizon(t, f))
        s[:] = arena.features(t)[e, tf.feature, 1]
    close = np.nan
    for start in range(first, last + 1, tf.seconds):
        at = slot(t, i, start)
        b = arena.bars(t)[e, at]
        if b.sec != start or b.revision == NONE:
            continue
        if entity.root == NONE:
            if b.dirty & CHANGED:
                _fold(t, e, i, b)
            if b.trades == 0 and not np.isnan(close):
                b.open = b.high = b.low = b.close = close
            close = b.close
        elif b.dirty & CHANGED:
            front = b.front
            cvd = b.cvd
            _copy(t, entity.root, i, b, front, start + tf.seconds)
            b.cvd = cvd
        emit = b.dirty != 0 and tf.emit != 0
        o = arena.out_fixed(t)[arena.counters(t)[ROWS_FIXED]] if emit else arena.row(t)[0]
        _fill(t, e, i, b, o)
        if tf.feature != NONE and start >= s[UPTO]:
            step(s, o, tf.seconds)
        else:
            blank(o)  # also where a gap is told so late that the features before it are gone
        arena.bar_dirty(t)[e, at] = 1
        b.dirty = 0
        if emit:
            arena.counters(t)[ROWS_FIXED] += 1
    if i == 0 and not np.isnan(close):
        entity.close = close
    if tf.feature != NONE:
        arena.features(t)[e, tf.feature, 0][:] = s
        arena.feature_dirty(t)[e, tf.feature] = 1


@jit
def flush_bars(t: Rows, f: int) -> bool:
    """Emit every revised candle of a feed again; False when the output is full (drain, call again)."""
    for tickers in range(2):
        for e in range(len(arena.entities(t))):
            entity = arena.entities(t)[e]
            if entity.feed != f or not entity.dirty or (entity.root != NONE) != (tickers == 1):
                continue
            if arena.counters(t)[ROWS_FIXED] + arena.bars(t).shape[1] > len(arena.out_fixed(t)):
                return False
            for i in range(len(arena.timeframes(t))):
                _again(t, f, e, i)
            entity.dirty = 0
            arena.entity_dirty(t)[e] = 1
    return True
