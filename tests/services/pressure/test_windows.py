"""When windows leave, what changes them afterwards, and what never enters them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from services.pressure.core import Emission, PartitionState
from services.pressure.worker import FRAME_MESSAGES, pack
from shared.errors import ConfigError
from shared.frames import NS, Frame
from shared.instruments import instrument_id
from shared.messages import Clock, Disconnect, Gap, Instrument, decode
from tests.services.pressure.market import (
    FEED,
    START,
    begin,
    clock,
    config,
    define,
    emissions,
    final,
    frame,
    future,
    messages,
    ns,
    only,
    option,
    play,
    pressures,
    tick,
    trade,
    watch,
)


def gap(start: float, end: float, *symbols: str, feed: str = FEED) -> Frame:
    return messages("gap", Gap(feed, ns(start), ns(end), "test", symbols))


def lost(since: float, *symbols: str) -> Frame:
    return messages("disconnect", Disconnect(FEED, ns(since), "test", ns(since), symbols))


def counters(state: PartitionState) -> dict[str, int]:
    counted = msgspec.json.decode(state.changes()["counters"])
    return {name: n for name, n in counted.items() if n}


# -- closing -------------------------------------------------------------------------------------


def test_a_window_leaves_when_the_watermark_reaches_its_end_and_not_before() -> None:
    state = PartitionState(config())
    assert play([*begin(), frame(trade(299.9)), clock(299.999)], state) == []
    row = only(play([clock(300)], state))
    assert row.time_window_ns == ns(0)
    assert play([clock(600), clock(10_000)], state) == [], "windows without trades say nothing"


def test_the_boundary_trade_belongs_to_the_new_window_and_closes_the_old() -> None:
    state = PartitionState(config())
    row = only(play([*begin(), frame(trade(299, size=2), trade(300, size=3))], state))
    assert (row.time_window_ns, row.ask_volume) == (ns(0), 2.0)
    row = only(play([frame(tick(600))], state))
    assert (row.time_window_ns, row.ask_volume) == (ns(300), 3.0)


def test_grace_keeps_a_window_open() -> None:
    state = PartitionState(config())
    assert play([*begin(grace_ns=2 * NS), frame(trade(299), trade(301), trade(298, size=5))], state) == []
    row = only(play([frame(trade(302))], state))
    assert (row.total_trades, row.revision) == (2, 0)


def test_rows_and_rollups_leave_by_window_and_underlying_sorted() -> None:
    es = [option(k, t, symbol=f"ESM6 {t}{k:g}", root="ES") for k in (6000.0, 5900.0) for t in "PC"]
    nq = [option(k, t) for k in (21_000.0, 20_000.0) for t in "PC"]
    soon = option(20_500.0, symbol="Q1AM6 C20500", expiration_ns=ns(86_400))
    all_of = [*nq, soon, *es]
    trades = [trade(at + n * 0.01, who=who) for at in (1, 301) for n, who in enumerate(all_of)]
    got = emissions(play([*begin(*all_of), frame(*trades[: len(all_of)]), frame(*trades[len(all_of) :]), clock(900)]))
    assert [(e.rollup.time_window_ns, e.rollup.underlying) for e in got] == [
        (ns(0), "ES"), (ns(0), "NQ"), (ns(300), "ES"), (ns(300), "NQ"),
    ]  # fmt: skip
    assert [(r.strike, r.option_type) for r in got[0].rows] == [
        (5900, "C"), (5900, "P"), (6000, "C"), (6000, "P"),
    ]  # fmt: skip
    assert [r.strike for r in got[1].rows] == [20_500, 20_000, 20_000, 21_000, 21_000]


def test_a_jump_over_many_windows_lets_each_leave() -> None:
    book = {"kind": 2, "instrument": option().id, "bid_px": 9.0, "ask_px": 11.0}
    slow = [trade(k * 300 + 5, size=k + 1) for k in range(3)]
    got = pressures(play([*begin(grace_ns=700 * NS), frame(*slow), frame({"at": 5000, **book})]))
    assert [(r.time_window_ns, r.ask_volume, r.revision) for r in got] == [
        (ns(0), 1, 0), (ns(300), 2, 0), (ns(600), 3, 0),
    ]  # fmt: skip


def test_more_windows_open_than_slots_lets_the_oldest_leave_early() -> None:
    got = pressures(play([*begin(grace_ns=9000 * NS), frame(*(trade(k * 300 + 5) for k in range(12))), clock(9000)]))
    assert [r.time_window_ns for r in got] == [ns(k * 300) for k in range(12)]
    assert {r.revision for r in got} == {0}


# -- late trades ---------------------------------------------------------------------------------


def test_a_late_trade_revises_its_row_and_the_rollup() -> None:
    state = PartitionState(config())
    other = option(21_000.0)
    play([*begin(option(), other), frame(trade(1, size=2), trade(2, who=other)), clock(300)], state)
    (one,) = emissions(play([frame(trade(250, size=5, side=-1))], state))
    assert [(r.strike, r.revision, r.ask_volume, r.bid_volume) for r in one.rows] == [(20_000, 1, 2, 5)]
    assert (one.rollup.revision, one.rollup.total_trades, one.rollup.strikes) == (1, 3, 2)
    (one,) = emissions(play([frame(trade(251, who=other))], state))
    assert [(r.strike, r.revision) for r in one.rows] == [(21_000, 1)]
    assert one.rollup.revision == 2


def test_a_key_whose_first_trade_is_late_has_revision_1() -> None:
    state = PartitionState(config())
    other = option(21_000.0)
    play([*begin(option(), other), frame(trade(1)), clock(310)], state)
    (one,) = emissions(play([frame(trade(299, who=other))], state))
    assert ([r.revision for r in one.rows], one.rollup.revision, one.rollup.strikes) == ([1], 1, 2)


@pytest.mark.parametrize("closed_at", [300, 310])
def test_a_window_that_was_empty_when_it_closed_begins_at_revision_1(closed_at: float) -> None:
    state = PartitionState(config())
    play([*begin(), clock(closed_at)], state)
    (one,) = emissions(play([frame(trade(299))], state))
    assert (one.rows[0].revision, one.rollup.revision) == (1, 1)
    (one,) = emissions(play([frame(trade(298))], state))
    assert (one.rows[0].revision, one.rollup.revision) == (2, 2)


def test_trades_that_are_late_together_leave_one_by_one() -> None:
    state = PartitionState(config())
    play([*begin(), frame(trade(1)), clock(310)], state)
    got = emissions(play([frame(trade(290, 1.0), trade(291, 2.0), trade(292, 3.0))], state))
    assert [(e.rows[0].revision, e.rollup.revision, e.rows[0].close) for e in got] == [
        (1, 1, 1.0), (2, 2, 2.0), (3, 3, 3.0),
    ]  # fmt: skip


def test_a_trade_beyond_the_lateness_is_only_counted() -> None:
    state = PartitionState(config())
    play([*begin(), frame(trade(1)), clock(410)], state)
    assert play([frame(trade(289.9))], state) == []
    assert counters(state) == {"trades": 1, "too_late": 1}
    assert len(pressures(play([frame(trade(290.0))], state))) == 1


def test_what_was_before_the_watch_is_too_late() -> None:
    state = PartitionState(config())
    play([*begin(at=100), frame(trade(99.0), trade(101))], state)
    assert counters(state) == {"trades": 1, "too_late": 1}


# -- complete ------------------------------------------------------------------------------------


def test_a_window_that_was_watched_in_part_is_not_complete() -> None:
    got = pressures(play([*begin(at=0.5), frame(trade(1), trade(301)), clock(600)]))
    assert [r.complete for r in got] == [False, True]
    one = emissions(play([*begin(at=0), frame(trade(1)), clock(300)]))[0]
    assert one.rows[0].complete
    assert one.rollup.complete


def test_a_feed_that_began_with_its_first_record_was_not_watched_before() -> None:
    got = pressures(play([define(option()), frame(trade(1), trade(301)), clock(600)]))
    assert [r.complete for r in got] == [False, True]


def test_nobody_watched_between_two_connections() -> None:
    got = pressures(
        play([*begin(), frame(trade(1), trade(301)), watch(620), frame(trade(650), trade(901)), clock(1200)])
    )
    assert [(r.time_window_ns, r.complete) for r in got] == [
        (ns(0), True), (ns(300), False), (ns(600), False), (ns(900), True),
    ]  # fmt: skip


def test_a_gap_before_a_window_leaves() -> None:
    got = emissions(play([*begin(), frame(trade(1)), gap(299, 301), frame(trade(302)), clock(700)]))
    assert [(e.rows[0].complete, e.rollup.complete, e.rows[0].revision) for e in got] == [(False, False, 0)] * 2


def test_a_gap_told_later_revises_what_it_touches() -> None:
    state = PartitionState(config())
    play([*begin(), frame(trade(1), trade(301)), clock(600)], state)
    got = emissions(play([gap(250, 300)], state))
    assert [(e.rows[0].time_window_ns, e.rows[0].complete, e.rows[0].revision) for e in got] == [(ns(0), False, 1)]
    assert (got[0].rollup.complete, got[0].rollup.revision) == (False, 1)
    assert play([gap(250, 300), gap(100, 200)], state) == [], "told already, or nothing new"


def test_a_gap_of_a_symbol_touches_its_keys_only() -> None:
    state = PartitionState(config())
    other, weekly = option(21_000.0), option(symbol="Q1AM6 C20000")
    play([*begin(option(), other, weekly), frame(trade(1), trade(2, who=other)), clock(300)], state)
    (one,) = emissions(play([gap(10, 20, "Q1AM6 C20000", "nobody")], state))
    assert [(r.strike, r.complete, r.revision) for r in one.rows] == [(20_000, False, 1)]
    assert (one.rollup.complete, one.rollup.revision) == (False, 1)
    assert play([gap(10, 20, feed="another")], state) == []


def test_a_gap_of_an_option_that_did_not_trade_makes_the_rollup_incomplete() -> None:
    (one,) = emissions(play([*begin(option(), option(5.0)), frame(trade(1)), gap(2, 3, "NQM6 C5"), clock(300)]))
    assert (one.rows[0].complete, one.rollup.complete) == (True, False)
    (one,) = emissions(play([*begin(option(), future()), frame(trade(1)), gap(2, 3, "NQM6"), clock(300)]))
    assert one.rollup.complete, "a future's gap is not the options'"


def test_an_unfinished_disconnect_touches_all_that_follows_until_its_gap() -> None:
    state = PartitionState(config())
    got = pressures(play([*begin(), frame(trade(1)), lost(250), frame(trade(301)), clock(600)], state))
    assert [r.complete for r in got] == [False, False]
    # It went on at 290: the first window stays broken, the second is whole after all.
    got = emissions(play([gap(250, 290)], state))
    assert [(e.rows[0].time_window_ns, e.rows[0].complete, e.rows[0].revision) for e in got] == [(ns(300), True, 1)]
    assert (got[0].rollup.complete, got[0].rollup.revision) == (True, 1)


def test_a_disconnect_that_may_resume_is_no_gap() -> None:
    drop = messages("disconnect", Disconnect(FEED, ns(10), "test"))
    assert only(play([*begin(), frame(trade(1)), drop, clock(300)])).complete


def test_a_late_trade_in_a_window_with_a_gap_stays_incomplete() -> None:
    got = pressures(play([*begin(), frame(trade(1)), gap(2, 3), clock(310), frame(trade(290))]))
    assert [(r.complete, r.revision) for r in got] == [(False, 0), (False, 1)]


def test_gaps_long_past_are_forgotten() -> None:
    state = PartitionState(config())
    play([*begin(), *(gap(k, k + 1) for k in range(50)), frame(trade(1)), clock(300)], state)
    assert len(state.holes) == 51
    play([frame(*(trade(k * 300) for k in range(1, 9))), clock(9000), gap(9000, 9001)], state)
    assert [h.start_ns for h in state.holes] == [ns(9000)]


# -- what does not enter ---------------------------------------------------------------------------


def test_only_options_are_folded_and_the_rest_is_counted() -> None:
    state = PartitionState(config())
    spread = option(symbol="UD:1V: VT 123", kind="T")
    calendar = future("NQM6-NQU6", kind="S")
    stock, guessed = future("AAPL", kind="K"), future("NQ?", kind="?")
    all_of = (option(), future(), spread, calendar, stock, guessed)
    output = play([*begin(*all_of), frame(*(trade(1, who=who) for who in all_of)), clock(300)], state)
    assert only(output).total_trades == 1
    assert counters(state) == {"trades": 1, "not_options": 3, "spreads": 2}


def test_what_is_no_number_is_ignored_and_counted() -> None:
    state = PartitionState(config())
    bad = [(np.nan, 1), (np.inf, 1), (1e300, 1), (1, np.nan), (1, np.inf), (1, 0), (1, -1), (1, 1e300)]
    output = play([*begin(), frame(*(trade(1, p, s) for p, s in bad), trade(2, 7.0, 3)), clock(300)], state)
    row = only(output)
    assert (row.total_trades, row.open, row.premium) == (1, 7.0, 420.0)
    assert counters(state) == {"trades": 1, "undefined": len(bad)}


def test_trades_outside_market_hours_are_counted_but_move_time() -> None:
    day = np.array([[ns(0), ns(100)], [ns(200), ns(1000)]], np.int64)
    state = PartitionState(config(sessions=lambda venue, root: day))
    row = only(play([*begin(), frame(trade(99), trade(100), trade(199), trade(200), trade(1000))], state))
    assert row.total_trades == 2
    assert counters(state) == {"trades": 2, "outside_hours": 3}


def test_sessions_are_asked_for_by_venue_and_ticker() -> None:
    asked = []

    def sessions(venue: str, root: str) -> Any:
        asked.append((venue, root))
        return np.array([[0, 1 << 62]], np.int64)

    play([*begin(option(), future(ticker="NQ1"))], sessions=sessions)
    assert set(asked) == {("GLBX.MDP3", "NQ"), ("GLBX.MDP3", "NQ1")}


def test_weeklies_join_their_underlying_by_root() -> None:
    weekly = option(symbol="Q1AM6 C20000", expiration_ns=ns(4 * 86_400))
    same = option(symbol="QN6M6 C20000")
    got = emissions(
        play([*begin(option(), weekly, same), frame(trade(1), trade(2, who=weekly), trade(3, who=same)), clock(300)])
    )
    assert [e.rollup.underlying for e in got] == ["NQ"]
    assert [(r.expiration_ns, r.total_trades) for r in got[0].rows] == [
        (ns(4 * 86_400), 1), (option().expiration_ns, 2),
    ]  # fmt: skip


def test_feeds_keep_their_own_time() -> None:
    btc = option(70_000.0, symbol="BTC-1", venue="deribit", root="deribit:BTC", feed="tardis:deribit")
    state = PartitionState(config())
    play([*begin(option(), btc), frame(trade(1), trade(2, who=btc))], state)
    (one,) = emissions(play([clock(300)], state))
    assert one.rollup.underlying == "NQ"
    (one,) = emissions(play([clock(300, "tardis:deribit")], state))
    assert one.rollup.underlying == "deribit:BTC"


def test_a_root_of_two_feeds_loses_nothing() -> None:
    other = option(symbol="NQM6 C20000", venue="OTHER", feed="other")
    state = PartitionState(config())
    ahead = [trade(k * 300 + 1, who=other) for k in range(6)]
    output = play([*begin(option(), other), frame(*ahead), frame(trade(1)), clock(1800), clock(1800, "other")], state)
    rows, _ = final(output)
    assert sum(r.total_trades for r in rows.values()) == 6
    assert counters(state) == {"trades": 6, "too_late": 1}, "its slot had to make room"


# -- beside the trades -----------------------------------------------------------------------------


def test_the_underlyings_price_is_the_last_before_the_windows_end() -> None:
    trades = [
        trade(1, who=option()), trade(299, 21_000.0, who=future()), trade(300.5, 22_000.0, who=future()),
        trade(302, 5.0),
    ]  # fmt: skip
    got = emissions(play([*begin(option(), future(), grace_ns=NS), frame(*trades), clock(900)]))
    assert [(e.rows[0].underlying_price, e.rollup.underlying_price) for e in got] == [
        (21_000.0, 21_000.0), (22_000.0, 22_000.0),
    ]  # fmt: skip


def test_a_price_that_is_old_still_stands_and_another_contracts_is_not_taken() -> None:
    other = option(symbol="NQU6 C20000", underlying="NQU6", expiration_ns=ns(200 * 86_400))
    trades = [trade(1, 21_000.0, who=future()), *(trade(k * 300) for k in range(1, 9)), trade(2401, who=other)]
    got = pressures(play([*begin(option(), future(), other), frame(*trades), clock(2700)]))
    assert [r.underlying_price for r in got] == [21_000.0] * 8 + [None]


BTC = {"venue": "deribit", "root": "deribit:BTC", "feed": "tardis:deribit", "multiplier": 1.0}


def coin(strike: float = 70_000.0, **changes: Any) -> Instrument:
    return option(strike, symbol=f"BTC-{strike:g}-C", underlying="SYN.BTC-26JUN26", **{**BTC, **changes})


def summary(at: float, who: Instrument, px: float, iv: float, delta: float) -> list[dict[str, Any]]:
    """The three rows of an option's summary."""
    common = {"at": at, "kind": 5, "instrument": who.id}
    return [
        {**common, "part": 0, "size": 1.0},
        {**common, "part": 1, "price": 0.02, "size": px, "bid_sz": iv, "ask_sz": delta},
        {**common, "part": 2, "price": 1.0, "size": 7.0},
    ]


def test_crypto_takes_price_iv_and_delta_of_the_newest_summary() -> None:
    who = coin()
    some = [
        *summary(1, who, 69_000.0, 55.0, 0.4), *summary(200, who, 70_500.0, 50.0, 0.5), trade(201, who=who),
        *summary(301, who, 90_000.0, 10.0, 0.9), trade(302, who=who),
    ]  # fmt: skip
    first, second = pressures(play([*begin(who), frame(*some), clock(600, "tardis:deribit")]))
    assert (first.underlying_price, first.iv, first.delta) == (70_500.0, 0.5, 0.5)
    assert first.moneyness == pytest.approx(70_500 / 70_000)
    assert (second.underlying_price, second.iv, second.delta) == (90_000.0, 0.1, 0.9)


def test_a_summary_that_says_nothing_gives_nothing() -> None:
    who = coin()
    row = only(play([*begin(who), frame(*summary(1, who, np.nan, np.nan, np.nan), trade(2, who=who)),
                     clock(300, "tardis:deribit")]))  # fmt: skip
    assert (row.underlying_price, row.moneyness, row.iv, row.delta) == (None, None, None, None)


def test_without_a_summary_the_perpetuals_trade_or_mark_is_the_price() -> None:
    who = coin()
    perpetual = Instrument(
        instrument_id("deribit", "BTC-PERPETUAL"), "deribit", "BTC-PERPETUAL", "deribit:BTC", "tardis:deribit",
        ticker="deribit:BTC-PERPETUAL",
    )  # fmt: skip
    mark = {"at": 50, "kind": 3, "instrument": perpetual.id, "bid_px": 71_000.0}
    some = [trade(40, 70_000.0, who=perpetual), mark, trade(60, who=who), trade(310, 72_000.0, who=perpetual),
            trade(311, who=who)]  # fmt: skip
    got = pressures(play([*begin(who, perpetual), frame(*some), clock(600, "tardis:deribit")]))
    assert [r.underlying_price for r in got] == [71_000.0, 72_000.0]
    assert {r.iv for r in got} == {None}, "coins are no dollars: no volatility without the exchange's"


# -- mirrored --------------------------------------------------------------------------------------


def test_mirrored_input_gives_mirrored_messages() -> None:
    rng = np.random.default_rng(5)
    chain = [option(float(k), t) for k in range(20) for t in "CP"]
    some = [
        trade(float(t), float(p), float(s), int(d), chain[int(i)])
        for t, p, s, d, i in zip(
            np.sort(rng.integers(0, 600, 800)), rng.integers(1, 40, 800) / 4, rng.integers(1, 200, 800),
            rng.choice([-1, 1], 800), rng.integers(0, len(chain), 800), strict=True,
        )
    ]  # fmt: skip
    turned = [{**one, "side": -one["side"]} for one in some]
    straight, mirrored = (emissions(play([*begin(*chain), frame(*tape), clock(900)])) for tape in (some, turned))
    assert len(straight) == len(mirrored) == 2
    sides = {"BUY": "SELL", "SELL": "BUY", "NEUTRAL": "NEUTRAL"}
    for one, other in zip(straight, mirrored, strict=True):
        for a, b in zip(one.rows, other.rows, strict=True):
            assert b.pressure_ratio == (a.bid_volume / a.ask_volume if a.ask_volume else None)
            assert b == msgspec.structs.replace(
                a, ask_volume=a.bid_volume, bid_volume=a.ask_volume, ask_premium=a.bid_premium,
                bid_premium=a.ask_premium, log_ratio=-a.log_ratio, pressure_ratio=b.pressure_ratio,
                dominant_side=sides[a.dominant_side], sweep_ask_volume=a.sweep_bid_volume,
                sweep_bid_volume=a.sweep_ask_volume, block_ask_volume=a.block_bid_volume,
                block_bid_volume=a.block_ask_volume,
            )  # fmt: skip
        a, b = one.rollup, other.rollup
        assert (b.call_pressure, b.put_pressure) == (-a.call_pressure, -a.put_pressure)
        assert (b.net_call_premium, b.net_put_premium, b.net_premium) == (
            -a.net_call_premium, -a.net_put_premium, -a.net_premium,
        )  # fmt: skip
        assert [(t.strike, t.option_type, t.log_ratio) for t in b.top_strikes] == [
            (t.strike, t.option_type, -t.log_ratio) for t in a.top_strikes
        ]


# -- frames and state ------------------------------------------------------------------------------


def test_frames_of_500_rows_then_one_rollup() -> None:
    chain = [option(float(k)) for k in range(1, 1202)]
    output = play([*begin(*chain), frame(*(trade(1, who=who) for who in chain)), clock(300)])
    frames = pack(output)
    assert [(f.kind, f.count) for f in frames] == [
        ("pressure", FRAME_MESSAGES), ("pressure", FRAME_MESSAGES), ("pressure", 201), ("pressure_rollup", 1),
    ]  # fmt: skip
    assert {(f.first_ns, f.last_ns) for f in frames} == {(START * NS, (START + 300) * NS)}
    (one,) = output
    assert isinstance(one, Emission)
    assert [m for f in frames[:3] for m in decode(f.body)] == one.rows
    assert decode(frames[3].body) == [one.rollup]


def test_only_what_changed_is_committed() -> None:
    state = PartitionState(config())
    chain = [option(float(k)) for k in range(1, 1001)]
    play([*begin(*chain), frame(*(trade(1, who=who) for who in chain))], state)
    state.changes()
    play([frame(trade(2, who=chain[7]), trade(3, who=chain[7]))], state)
    changes = state.changes()
    assert sorted(changes) == ["c:7", "counters", "feeds", "k:7:0"]
    assert sum(map(len, changes.values())) < 2000
    assert state.changes() == {}


def test_state_of_other_settings_is_refused() -> None:
    state = PartitionState(config())
    play(begin(), state)
    fields = state.changes()
    for changes in ({"window_sec": 600}, {"max_lateness_sec": 60}):
        with pytest.raises(ConfigError, match="put the settings back, or use another namespace"):
            PartitionState.restore(config(**changes), fields)
    again = PartitionState.restore(config(block_size_default=3.0, wait_sec=5), fields)
    assert again.unders["block_size"].tolist() == [3.0]


def test_a_redefined_option_moves_to_its_new_key() -> None:
    state = PartitionState(config())
    play([*begin(option(20_000.0), option(25_000.0)), frame(trade(1))], state)
    moved = msgspec.structs.replace(option(), strike=30_000.0, multiplier=5.0)
    got = pressures(play([define(moved), frame(trade(2, 10, 1)), clock(300)], state))
    assert [(r.strike, r.premium, r.strike_rank) for r in got] == [(20_000, 200, 0), (30_000, 50, 1)]


def test_the_final_clock_is_a_clock() -> None:
    ended = messages("clock", Clock(FEED, ns(300), final=True))
    assert only(play([*begin(), frame(trade(1)), ended])).revision == 0
