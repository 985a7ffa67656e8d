"""Every measure against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from services.pressure.measures import confidence, days_to_expiry, dominant_side, log_ratio, moneyness
from shared.frames import NS
from shared.messages import Instrument, PressureRollup, TopStrike
from tests.services.pressure.market import (
    DAY,
    EXPIRY,
    START,
    begin,
    clock,
    emissions,
    frame,
    future,
    ns,
    only,
    option,
    play,
    pressures,
    trade,
)


def window(*trades: dict[str, Any], instruments: tuple[Instrument, ...] = (), **changes: Any) -> Any:
    return play([*begin(*instruments), frame(*trades), clock(300)], **changes)


def test_a_window_of_one_key() -> None:
    row = only(
        window(
            trade(10.0, 12.0, 4.0, 1),
            trade(20.0, 13.0, 6.0, -1),
            trade(40.0, 11.0, 2.0, 1),
            trade(100.0, 12.5, 8.0, 0),
        )
    )
    assert (row.underlying, row.expiration_ns, row.strike, row.option_type) == ("NQ", EXPIRY, 20_000.0, "C")
    assert (row.time_window_ns, row.window_sec) == (START * NS, 300)
    # The last is above the last different price: the tick rule calls it bought.
    assert (row.ask_volume, row.bid_volume, row.unknown_volume) == (14.0, 6.0, 0.0)
    assert row.pressure_ratio == pytest.approx(14 / 6)
    assert row.log_ratio == pytest.approx(math.log(14.5 / 6.5))
    assert row.dominant_side == "BUY"
    assert row.confidence == pytest.approx(4 / 20 * abs(14 / 20 - 0.5) * 2)
    assert (row.total_trades, row.avg_trade_size, row.max_trade_size) == (4, 5.0, 8.0)
    assert row.vwap == pytest.approx((48 + 78 + 22 + 100) / 20)
    assert row.premium == pytest.approx(20 * (48 + 78 + 22 + 100))
    assert row.ask_premium == pytest.approx(20 * (48 + 22 + 100))
    assert row.bid_premium == pytest.approx(20 * 78)
    assert (row.open, row.close) == (12.0, 12.5)
    assert (row.first_ns, row.last_ns) == (ns(10), ns(100))
    assert row.mean_ns == ns((4 * 10 + 6 * 20 + 2 * 40 + 8 * 100) / 20)
    assert (row.complete, row.revision, row.strike_rank) == (True, 0, 0)
    assert (row.underlying_price, row.moneyness, row.iv, row.delta) == (None, None, None, None)
    assert row.days_to_expiry == pytest.approx((EXPIRY - ns(300)) / NS / DAY)


def test_only_buys_have_no_ratio_and_a_finite_log_ratio() -> None:
    row = only(window(*(trade(t, size=5.0) for t in range(20))))
    assert row.pressure_ratio is None
    assert row.log_ratio == pytest.approx(math.log(100.5 / 0.5))
    assert (row.dominant_side, row.confidence) == ("BUY", 1.0)
    row = only(window(*(trade(t, size=5.0, side=-1) for t in range(20))))
    assert row.pressure_ratio == 0.0
    assert row.log_ratio == pytest.approx(-math.log(100.5 / 0.5))
    assert (row.dominant_side, row.confidence) == ("SELL", 1.0)


def test_unknown_sides_count_in_all_but_the_sides() -> None:
    row = only(window(trade(1, 10, 3, 0), trade(2, 10, 4, 0)))
    assert (row.ask_volume, row.bid_volume, row.unknown_volume) == (0, 0, 7)
    assert (row.total_trades, row.max_trade_size, row.vwap, row.premium) == (2, 4, 10, 1400)
    assert (row.ask_premium, row.bid_premium) == (0, 0)
    assert (row.pressure_ratio, row.log_ratio, row.dominant_side, row.confidence) == (None, 0.0, "NEUTRAL", 0.0)


@pytest.mark.parametrize(
    ("ask", "bid", "side"), [(6, 4, "NEUTRAL"), (61, 39, "BUY"), (39, 61, "SELL"), (0, 0, "NEUTRAL")]
)
def test_dominance(ask: float, bid: float, side: str) -> None:
    assert dominant_side(ask, bid) == side
    assert dominant_side(bid, ask) == {"BUY": "SELL", "SELL": "BUY"}.get(side, side)
    assert log_ratio(ask, bid) == -log_ratio(bid, ask)
    assert confidence(40, ask, bid) == confidence(40, bid, ask)


def test_confidence_grows_with_trades() -> None:
    assert confidence(10, 9, 1) == pytest.approx(0.5 * 0.8)
    assert confidence(20, 9, 1) == confidence(500, 9, 1) == pytest.approx(0.8)
    assert confidence(20, 0, 0) == 0


def test_lee_ready_when_the_feed_gives_no_side() -> None:
    quotes = {"bid_px": 9.0, "ask_px": 11.0}
    row = only(
        window(
            trade(1, 11, 1, 0, **quotes),  # at the ask
            trade(2, 9, 2, 0, **quotes),  # at the bid
            trade(3, 10.4, 4, 0, **quotes),  # nearer the ask
            trade(4, 9.6, 8, 0, **quotes),  # nearer the bid
            trade(5, 10, 16, 0, **quotes),  # midpoint, above the last price
            trade(6, 9.9, 32, 0, bid_px=11.0, ask_px=9.0),  # crossed: below the last price
        )
    )
    assert (row.ask_volume, row.bid_volume, row.unknown_volume) == (1 + 4 + 16, 2 + 8 + 32, 0)


def test_quotes_of_a_book_serve_trades_without() -> None:
    book = {"at": 0.5, "kind": 2, "instrument": option().id, "bid_px": 9.0, "ask_px": 11.0, "size": 1}
    row = only(window(book, trade(1, 11, 1, 0), trade(2, 9, 2, 0)))
    assert (row.ask_volume, row.bid_volume) == (1, 2)


def test_a_sweep_is_counted_once_with_all_its_volume() -> None:
    row = only(
        window(
            trade(1, 10.0, 3, 1),
            trade(1, 10.0, 4, 1),
            trade(1, 10.25, 5, 1),  # the second price: 3 + 4 + 5
            trade(1, 10.5, 6, 1),  # and more of it
            trade(2, 10.5, 7, 1),  # another event time, one price
            trade(3, 10.25, 1, -1),
            trade(3, 10.0, 2, -1),  # a sweep of sales
            trade(4, 10.0, 9, 1),
            trade(4, 10.25, 9, -1),  # two aggressors
        )
    )
    assert (row.sweeps, row.sweep_ask_volume, row.sweep_bid_volume) == (2, 18.0, 3.0)


def test_trades_of_another_instrument_are_no_part_of_a_sweep() -> None:
    weekly = option(symbol="Q1AM6 C20000")
    row = only(
        window(
            trade(1, 10.0),
            trade(1, 10.25, who=weekly),
            trade(2, 10.0),
            trade(2, 11.0, who=weekly),
            trade(2, 10.25),
            instruments=(option(), weekly),
        )
    )
    assert (row.sweeps, row.sweep_ask_volume) == (1, 2.0)


def test_unknown_aggressors_sweep_nothing() -> None:
    row = only(window(trade(1, 10, 1, 0), trade(1, 10, 1, 0)))
    assert row.sweeps == 0


def test_blocks_by_root_and_side() -> None:
    trades = [trade(1, 10, 50, 1), trade(2, 10, 49, 1), trade(3, 10, 60, -1), trade(4, 10, 100, 1)]
    row = only(window(*trades, block_size={"NQ": 50.0}))
    assert (row.blocks, row.block_ask_volume, row.block_bid_volume) == (3, 150.0, 60.0)
    row = only(window(*trades))
    assert (row.blocks, row.block_ask_volume, row.block_bid_volume) == (1, 100.0, 0.0)


def test_open_and_close_follow_event_time_and_ties_arrival() -> None:
    row = only(window(trade(5, 1.0), trade(5, 2.0), trade(3, 3.0), trade(3, 4.0), trade(5, 6.0), trade(4, 5.0)))
    assert (row.open, row.close, row.first_ns, row.last_ns) == (3.0, 6.0, ns(3), ns(5))


def test_multiplier_is_each_instruments_own() -> None:
    weekly = option(symbol="Q1AM6 C20000", multiplier=None)
    row = only(window(trade(1, 10, 2), trade(2, 3, 5, -1, weekly), instruments=(option(), weekly)))
    assert (row.premium, row.ask_premium, row.bid_premium) == (415.0, 400.0, 15.0)


def test_mean_time_is_exact_over_a_long_window() -> None:
    at = [0.000001 * k + 299.5 for k in range(1000)]
    row = only(window(*(trade(t, size=1000.0) for t in at)))
    want = np.mean([ns(t) - START * NS for t in at]) + START * NS
    assert abs(row.mean_ns - want) <= 1


def test_moneyness_and_days_from_the_future() -> None:
    row = only(window(trade(1, 21_000.0, who=future()), trade(2), instruments=(option(), future())))
    assert row.underlying_price == 21_000.0
    assert row.moneyness == pytest.approx(21_000 / 20_000)
    assert moneyness(None, 5.0) is None
    assert moneyness(-1.0, 5.0) is None
    assert moneyness(5.0, 0.0) is None


def test_days_to_expiry() -> None:
    day = START * NS
    assert days_to_expiry(day + 20 * 3600 * NS, day + 8 * 3600 * NS) == 0.5
    assert days_to_expiry(day + 8 * 3600 * NS, day + 9 * 3600 * NS) == 0.0
    assert days_to_expiry(day + 8 * 3600 * NS, day + 25 * 3600 * NS) is None
    # A stamp of midnight is a day: alive until its end.
    assert days_to_expiry(day, day + 18 * 3600 * NS) == 0.25
    assert days_to_expiry(day, day - 6 * 3600 * NS) == 1.25
    assert days_to_expiry(day, day + 24 * 3600 * NS) == 0.0
    assert days_to_expiry(day, day + 24 * 3600 * NS + 1) is None


def test_strike_rank_is_among_all_strikes_of_the_expiration() -> None:
    chain = [option(k, t) for k in (19_000.0, 20_000.0, 21_000.0) for t in "CP"]
    chain += [option(19_500.0, "P"), option(18_000.0, symbol="NQU6 C18000", expiration_ns=EXPIRY + 90 * DAY * NS)]
    found = pressures(window(*(trade(k, who=i) for k, i in enumerate(chain)), instruments=tuple(chain)))
    ranks = {(r.expiration_ns, r.strike): r.strike_rank for r in found}
    assert [ranks[EXPIRY, k] for k in (19_000.0, 19_500.0, 20_000.0, 21_000.0)] == [0, 1, 2, 3]
    assert ranks[EXPIRY + 90 * DAY * NS, 18_000.0] == 0


def rollup_of(*trades: dict[str, Any], instruments: tuple[Instrument, ...]) -> PressureRollup:
    (one,) = emissions(window(*trades, instruments=instruments))
    return one.rollup


def test_rollup() -> None:
    call, put = option(20_000.0, "C"), option(19_000.0, "P")
    got = rollup_of(
        trade(1, 10, 6, 1, call), trade(2, 9, 2, -1, call), trade(3, 4, 4, 0, put), trade(4, 5, 4, 1, put),
        trade(5, 4, 8, -1, put), instruments=(call, put),
    )  # fmt: skip
    assert (got.call_volume, got.put_volume) == (8, 16)
    assert (got.call_ask_volume, got.call_bid_volume, got.put_ask_volume, got.put_bid_volume) == (6, 2, 4, 8)
    assert got.call_pressure == pytest.approx(math.log(6.5 / 2.5))
    assert got.put_pressure == pytest.approx(math.log(4.5 / 8.5))
    assert got.put_call_ratio == 2.0
    assert got.premium == 20 * (60 + 18 + 20 + 32 + 16)
    assert (got.net_call_premium, got.net_put_premium, got.net_premium) == (840.0, -240.0, 1080.0)
    assert (got.strikes, got.total_trades, got.complete, got.revision) == (2, 5, True, 0)
    assert got.top_strikes == (
        TopStrike(EXPIRY, 20_000.0, "C", log_ratio(6, 2), 8.0),
        TopStrike(EXPIRY, 19_000.0, "P", log_ratio(4, 8), 16.0),
    )


def test_rollup_without_calls_has_no_put_call_ratio() -> None:
    put = option(kind="P")
    got = rollup_of(trade(1, who=put), instruments=(put,))
    assert (got.put_call_ratio, got.call_volume, got.call_pressure) == (None, 0.0, 0.0)


def test_top_strikes_are_the_ten_strongest_then_the_larger_then_by_key() -> None:
    chain = [option(float(k)) for k in range(1, 15)]
    trades = [trade(1 + k, size=k + 1, who=i) for k, i in enumerate(chain[:11])]  # ever stronger
    # (1 + ½)/(0 + ½) = (4 + ½)/(1 + ½) = 3: as strong as the first, and one of them larger.
    trades += [trade(20, size=4, who=chain[11]), trade(21, size=1, side=-1, who=chain[11])]
    got = rollup_of(*trades, instruments=tuple(chain))
    assert [t.strike for t in got.top_strikes] == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2]
    got = rollup_of(
        trade(1, size=1, who=chain[2]), trade(1, size=1, side=-1, who=chain[1]), trade(1, size=4, who=chain[3]),
        trade(1, size=1, side=-1, who=chain[3]), instruments=tuple(chain),
    )  # fmt: skip
    assert [t.strike for t in got.top_strikes] == [4, 2, 3]
