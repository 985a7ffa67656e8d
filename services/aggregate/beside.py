"""What stands beside the trades of a fixed candle: quotes, tickers, liquidations, into the candle of their time."""

from __future__ import annotations

import numpy as np

from services.aggregate import arena
from services.aggregate.bars import claim, start_of
from services.aggregate.layout import NONE
from shared.compiled import jit
from shared.frames import BOOK, LIQUIDATION, NS, TICKER, Row, Rows


@jit
def take_state(t: Rows, c: int, r: Row) -> bool:
    """A BOOK, TICKER or LIQUIDATION row of contract `c`; False when the candle that it is in has closed."""
    contract = arena.contracts(t)[c]
    if r.kind == BOOK and r.ts_event_ns >= contract.quote_ns:
        _quote_now(contract, r)
        arena.contract_dirty(t)[c] = 1
    if contract.entity == NONE:
        return True
    start = start_of(t, 0, r.ts_event_ns // NS)
    if start + arena.timeframes(t)[0].seconds <= arena.feeds(t)[contract.feed].closed_sec:
        return False
    b = arena.bars(t)[contract.entity, claim(t, contract.entity, 0, start)]
    if r.kind == BOOK:
        _book(b, r)
    elif r.kind == TICKER:
        _ticker(b, r)
    elif r.kind == LIQUIDATION:
        if r.side > 0:
            b.liquidated_short_volume += r.size
        else:
            b.liquidated_long_volume += r.size
    return True


@jit
def _quote_now(contract: Row, r: Row) -> None:
    """The quotes that the next trades are held against."""
    contract.quote_ns = r.ts_event_ns
    contract.bid_px = r.bid_px
    contract.ask_px = r.ask_px
    contract.bid_sz = r.bid_sz
    contract.ask_sz = r.ask_sz


@jit
def _book(b: Row, r: Row) -> None:
    if r.ts_event_ns < b.book_ns:
        return
    b.book_ns = r.ts_event_ns
    b.bid_price = r.bid_px
    b.bid_size = r.bid_sz
    b.ask_price = r.ask_px
    b.ask_size = r.ask_sz
    if not np.isnan(r.price):
        b.book_imbalance_5 = r.price


@jit
def _ticker(b: Row, r: Row) -> None:
    """What a ticker does not say stands as it was."""
    if r.ts_event_ns < b.ticker_ns:
        return
    b.ticker_ns = r.ts_event_ns
    if not np.isnan(r.bid_px):
        b.mark_price = r.bid_px
    if not np.isnan(r.ask_px):
        b.index_price = r.ask_px
    if not np.isnan(r.size):
        b.open_interest = r.size
    if not np.isnan(r.bid_sz):
        b.funding_rate = r.bid_sz
