"""From window cells to messages: the measures of option pressure.

All are finite, or None where undefined. Buying and selling are treated alike: with the sides of every trade
turned round, ratios change their sign and nothing else moves, to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from services.pressure.layout import CELL
from shared.frames import NS, Rows
from shared.messages import Pressure, PressureRollup, TopStrike

DAY_NS = 86_400 * NS
TOP_STRIKES = 10
DOMINANT = 0.6  # share of one side above which it dominates
CONFIDENT = 20  # trades that a full confidence takes


class Key(NamedTuple):
    """What is summed up together; `kind` is C or P."""

    underlying: str
    expiration_ns: int
    strike: float
    kind: str


class Cell(NamedTuple):
    """A row of layout.CELL in Python numbers."""

    win: int
    revision: int
    complete: int
    trades: int
    volume: float
    ask_volume: float
    bid_volume: float
    unknown_volume: float
    max_size: float
    price_volume: float
    premium: float
    ask_premium: float
    bid_premium: float
    open: float
    close: float
    first_ns: int
    last_ns: int
    offset: float
    sweeps: int
    sweep_ask_volume: float
    sweep_bid_volume: float
    blocks: int
    block_ask_volume: float
    block_bid_volume: float


assert Cell._fields == CELL.names


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a row says beside its trades."""

    strike_rank: int
    underlying_price: float | None
    iv: float | None
    delta: float | None
    complete: bool


class Window(NamedTuple):
    """[start_ns, start_ns + length_sec)."""

    start_ns: int
    length_sec: int

    @property
    def end_ns(self) -> int:
        return self.start_ns + self.length_sec * NS


def finite(value: float) -> float | None:
    """The value, None where it is none."""
    return value if math.isfinite(value) else None


def log_ratio(ask: float, bid: float) -> float:
    """ln((ask + ½) / (bid + ½)); as a difference, which turns its sign exactly when the two are swapped."""
    return math.log(ask + 0.5) - math.log(bid + 0.5)


def dominant_side(ask: float, bid: float) -> str:
    """BUY or SELL when more than 60 % of the sided volume is, else NEUTRAL."""
    sided = ask + bid
    if sided <= 0:
        return "NEUTRAL"
    if ask / sided > DOMINANT:
        return "BUY"
    return "SELL" if bid / sided > DOMINANT else "NEUTRAL"


def confidence(trades: int, ask: float, bid: float) -> float:
    """min(n / 20, 1) · abs(share − ½) · 2, and the latter two are abs(ask − bid) / (ask + bid)."""
    sided = ask + bid
    return min(trades / CONFIDENT, 1.0) * (abs(ask - bid) / sided) if sided > 0 else 0.0


def expiry_ns(expiration_ns: int) -> int:
    """When an option ends: a stamp of midnight names a day, and the option lives until that day's end."""
    return expiration_ns + DAY_NS if expiration_ns % DAY_NS == 0 else expiration_ns


def days_to_expiry(expiration_ns: int, at_ns: int) -> float | None:
    """Days that are left; 0 for what has expired on the same day (UTC), None behind it."""
    if at_ns > expiration_ns // DAY_NS * DAY_NS + DAY_NS:
        return None
    return max(0, expiry_ns(expiration_ns) - at_ns) / DAY_NS


def row(key: Key, cell: Cell, window: Window, around: Surroundings, revision: int, now_ns: int) -> Pressure:
    """The message of one key and window."""
    ask, bid = cell.ask_volume, cell.bid_volume
    price = around.underlying_price
    mean_ns = window.start_ns + round(cell.offset / cell.volume)
    return Pressure(
        underlying=key.underlying, expiration_ns=key.expiration_ns, strike=key.strike, option_type=key.kind,
        time_window_ns=window.start_ns, window_sec=window.length_sec,
        bid_volume=bid, ask_volume=ask, unknown_volume=cell.unknown_volume,
        pressure_ratio=finite(ask / bid) if bid > 0 else None,
        log_ratio=log_ratio(ask, bid), dominant_side=dominant_side(ask, bid),
        confidence=confidence(cell.trades, ask, bid), total_trades=cell.trades,
        avg_trade_size=cell.volume / cell.trades, max_trade_size=cell.max_size,
        vwap=finite(cell.price_volume / cell.volume),
        premium=cell.premium, ask_premium=cell.ask_premium, bid_premium=cell.bid_premium,
        open=cell.open, close=cell.close, first_ns=cell.first_ns, last_ns=cell.last_ns,
        mean_ns=min(max(mean_ns, cell.first_ns), cell.last_ns), strike_rank=around.strike_rank,
        sweeps=cell.sweeps, sweep_ask_volume=cell.sweep_ask_volume, sweep_bid_volume=cell.sweep_bid_volume,
        blocks=cell.blocks, block_ask_volume=cell.block_ask_volume, block_bid_volume=cell.block_bid_volume,
        underlying_price=price, moneyness=moneyness(price, key.strike),
        days_to_expiry=days_to_expiry(key.expiration_ns, window.end_ns), iv=around.iv, delta=around.delta,
        complete=around.complete, revision=revision, timestamp_out_ns=now_ns,
    )  # fmt: skip


def moneyness(price: float | None, strike: float) -> float | None:
    """Price of the underlying over the strike, for calls and puts alike: above 1 a call is in the money."""
    return finite(price / strike) if price is not None and price > 0 and strike > 0 else None


def rollup(
    underlying: str, window: Window, keys: list[Key], cells: Rows, price: float | None, complete: bool, revision: int,
    now_ns: int,
) -> PressureRollup:  # fmt: skip
    """The message of one underlying and window, of its keys that traded, in their order."""
    calls = np.array([key.kind == "C" for key in keys], bool)
    of_calls, of_puts = cells[calls], cells[~calls]
    call_ask, call_bid, call_volume = (float(of_calls[n].sum()) for n in ("ask_volume", "bid_volume", "volume"))
    put_ask, put_bid, put_volume = (float(of_puts[n].sum()) for n in ("ask_volume", "bid_volume", "volume"))
    net_calls = float(of_calls["ask_premium"].sum()) - float(of_calls["bid_premium"].sum())
    net_puts = float(of_puts["ask_premium"].sum()) - float(of_puts["bid_premium"].sum())
    return PressureRollup(
        underlying=underlying, time_window_ns=window.start_ns, window_sec=window.length_sec,
        call_volume=call_volume, put_volume=put_volume, call_ask_volume=call_ask, call_bid_volume=call_bid,
        put_ask_volume=put_ask, put_bid_volume=put_bid,
        call_pressure=log_ratio(call_ask, call_bid), put_pressure=log_ratio(put_ask, put_bid),
        put_call_ratio=finite(put_volume / call_volume) if call_volume > 0 else None,
        premium=float(cells["premium"].sum()), net_call_premium=net_calls, net_put_premium=net_puts,
        net_premium=net_calls - net_puts, strikes=len(keys), total_trades=int(cells["trades"].sum()),
        top_strikes=_top(keys, cells), underlying_price=price, complete=complete, revision=revision,
        timestamp_out_ns=now_ns,
    )  # fmt: skip


def _top(keys: list[Key], cells: Rows) -> tuple[TopStrike, ...]:
    """The keys with the strongest log ratios, of equal ones those with more volume, then in their order."""
    ask, bid, volume = cells["ask_volume"], cells["bid_volume"], cells["volume"]
    # Ratios that are equal may differ in the last bit: rounded.
    strength = np.round(np.abs(np.log(ask + 0.5) - np.log(bid + 0.5)), 9)
    best = np.lexsort((np.arange(len(keys)), -volume, -strength))[:TOP_STRIKES].tolist()
    return tuple(
        TopStrike(
            keys[i].expiration_ns, keys[i].strike, keys[i].kind, log_ratio(float(ask[i]), float(bid[i])),
            float(volume[i]),
        )
        for i in best
    )  # fmt: skip
