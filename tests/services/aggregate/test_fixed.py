"""What stands beside the trades of a fixed candle, and when it closes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from services.aggregate.core import PartitionState
from services.aggregate.ladder import ladder
from services.aggregate.state import Config
from shared.errors import ConfigError
from shared.frames import BOOK, FEATURE_COLUMNS, LIQUIDATION, NS, TICKER, Frame
from shared.messages import Disconnect, Gap, encode
from tests.services.aggregate.market import (
    ALWAYS,
    FEED,
    START,
    begin,
    clock,
    config,
    final,
    frame,
    perpetual,
    trade,
)

BTC = perpetual()


def quote(at: float, bid: float, ask: float, imbalance: float = math.nan, depth: int = 1) -> dict[str, float]:
    return {
        "at": at, "kind": BOOK, "instrument": BTC.id, "bid_px": bid, "ask_px": ask, "bid_sz": 3.0, "ask_sz": 1.0,
        "price": imbalance, "size": depth,
    }  # fmt: skip


def ticker(at: float, **fields: float) -> dict[str, float]:
    names = {"mark": "bid_px", "index": "ask_px", "funding": "bid_sz", "interest": "size"}
    record = {"at": at, "kind": TICKER, "instrument": BTC.id, "size": math.nan}
    return record | {names[name]: value for name, value in fields.items()}


def test_the_state_is_as_of_the_end_of_the_candle() -> None:
    tape = [
        *begin(grace_ns=NS // 2),
        frame(quote(1, 99, 101), trade(2, 100), ticker(3, mark=100.5, index=100.25, funding=0.0001, interest=5000)),
        frame(quote(14.9, 98, 102, 0.5, 5), quote(15.2, 97, 103), ticker(15.3, mark=77.0), trade(15.4, 100)),
        clock(30),
    ]
    rows = final(PartitionState(config()), tape)
    first, second = rows["BTCUSDT", 15, 0], rows["BTCUSDT", 15, 15]
    assert (first["bid_price"], first["ask_price"], first["book_imbalance_5"]) == (98, 102, 0.5)
    assert (first["mark_price"], first["index_price"], first["funding_rate"]) == (100.5, 100.25, 0.0001)
    assert first["open_interest"] == 5000
    assert (second["bid_price"], second["mark_price"]) == (97, 77)
    assert second["index_price"] == 100.25, "what a ticker does not say stands as it was"
    assert second["book_imbalance_5"] == 0.5, "a quote says nothing of five levels"


def test_trades_take_their_quotes_from_the_book() -> None:
    tape = [
        *begin(),
        frame(trade(1, 100, side=0), quote(2, 99, 101), trade(3, 101, side=0), trade(4, 99, side=0)),
        clock(15),
    ]
    row = final(PartitionState(config()), tape)["BTCUSDT", 15, 0]
    assert (row["ask_volume"], row["bid_volume"], row["unknown_volume"]) == (1, 1, 1)
    assert row["quoted_spread"] == 2


def test_liquidations_are_summed_by_who_was_liquidated() -> None:
    def liquidation(at: float, size: float, side: int) -> dict[str, float]:
        return {"at": at, "kind": LIQUIDATION, "instrument": BTC.id, "price": 100.0, "size": size, "side": side}

    tape = [
        *begin(),
        frame(trade(1, 100), liquidation(2, 5, 1), liquidation(20, 7, -1), liquidation(21, 1, 1), trade(31, 100)),
        clock(60),
    ]
    rows = final(PartitionState(config()), tape)
    assert ("BTCUSDT", 15, 15) not in rows, "liquidations alone make no candle"
    minute = rows["BTCUSDT", 60, 0]
    assert (minute["liquidated_short_volume"], minute["liquidated_long_volume"]) == (6, 7)


def test_a_quiet_symbol_closes_by_the_clock_and_empty_candles_are_left_out() -> None:
    rows = final(PartitionState(config()), [*begin(), frame(trade(1, 100)), clock(14.9)])
    assert not rows
    rows = final(PartitionState(config()), [*begin(), frame(trade(1, 100)), clock(86_400)])
    assert {(tf, at) for _, tf, at in rows} == {(n, 0) for n in (15, 60, 300, 900, 3600, 14_400, 86_400)}


def test_carried_candles_hold_the_close_inside_market_hours() -> None:
    hours = np.array([[START * NS, (START + 45) * NS]], np.int64)
    carry = config(sessions=lambda venue, root: hours, carry=True, timeframes=(15,))
    rows = final(PartitionState(carry), [*begin(), frame(trade(1, 100)), clock(90)])
    assert [at for _, _, at in sorted(rows)] == [0, 15, 30]
    empty = rows["BTCUSDT", 15, 30]
    assert [empty[c] for c in ("open", "high", "low", "close", "volume", "trades")] == [100, 100, 100, 100, 0, 0]
    assert math.isnan(empty["vwap"])
    assert empty["cvd_close"] == 1


def test_a_late_trade_moves_the_carried_close_behind_it() -> None:
    carry = config(carry=True, timeframes=(15,))
    tape = [*begin(), frame(trade(1, 100)), clock(45), frame(trade(16, 120)), clock(60)]
    rows = final(PartitionState(carry), tape)
    assert [rows["BTCUSDT", 15, at]["close"] for at in (0, 15, 30, 45)] == [100, 120, 120, 120]


def test_weeks_begin_on_monday_and_days_at_midnight() -> None:
    weekly = config(timeframes=(604_800, 86_400))
    tape = [*begin(at=86_400 * 2), frame(trade(86_400 * 2 + 5, 100)), clock(86_400 * 8)]
    rows = final(PartitionState(weekly), tape)
    assert sorted((tf, at) for _, tf, at in rows) == [(86_400, 86_400 * 2), (604_800, 0)]
    assert rows["BTCUSDT", 604_800, 0]["complete"] == 0, "nobody watched its Monday"
    assert rows["BTCUSDT", 86_400, 86_400 * 2]["complete"] == 1


def test_each_timeframe_is_folded_from_one_below() -> None:
    for wanted in ((15, 60, 300, 900, 3600, 14_400, 86_400), (1, 86_400), (7, 60), (604_800,), (90,), (600, 2_592_000)):
        rows, slots = ladder(wanted, 120)
        lengths = rows["seconds"].tolist()
        assert lengths == sorted(lengths)
        assert set(wanted) == {n for n, emit in zip(lengths, rows["emit"], strict=True) if emit}
        assert lengths[0] <= 60
        assert slots == rows["slots"].sum()
        for row in rows[1:]:
            child = rows[row["child"]]["seconds"]
            assert row["seconds"] % child == 0
            assert (row["seconds"] - row["offset"]) % child == 0
            assert row["seconds"] // child <= 40, (wanted, lengths)


def test_only_15s_and_1m_have_features() -> None:
    records = [trade(i * 15 + 1, 100 + i % 3) for i in range(60)]
    rows = final(PartitionState(config()), [*begin(), frame(*records), clock(900)])
    featured = {tf for (_, tf, _), row in rows.items() if any(np.isfinite(row[c]) for c in FEATURE_COLUMNS)}
    assert featured == {15, 60}


def test_options_have_fixed_candles_but_no_rolling_ones() -> None:
    option = perpetual("BTC-28JUN24-70000-C", "deribit", kind="C", ticker=None, root="deribit:BTC", strike=70_000.0)
    state = PartitionState(config())
    tape = [*begin(option), frame(trade(1, 0.05, who=option), trade(8, 0.04, 2.0, -1, who=option)), clock(200)]
    rolling = [state.step([f]).candles_1m for f in tape[:2]]
    rows = final(state, tape[2:])
    assert not any(rolling)
    assert not state.ring.size
    row = rows["BTC-28JUN24-70000-C", 60, 0]
    assert (row["open"], row["close"], row["volume"], row["vd"], row["cvd_close"]) == (0.05, 0.04, 3, -1, -1)
    assert not any(name == "deribit:BTC" for name, _, _ in rows), "options make no continuous ticker"


def test_options_without_a_definition_make_no_rolling_candles_either() -> None:
    """Many strikes share the name of one series."""
    strikes = [
        perpetual(f"Q1AZ6 C{strike}", "GLBX.MDP3", kind="?", ticker="Q1AZ6", root="NQ") for strike in (20000, 20100)
    ]
    state = PartitionState(config(timeframes=(60,)))
    out = state.step(
        [*begin(*strikes), frame(*(trade(1 + n, 5.0 + n, who=who) for n, who in enumerate(strikes))), clock(200)]
    )
    assert not out.candles_1m
    assert not out.candles_1s
    assert sorted(symbol for _, symbol in out.fixed_names) == ["Q1AZ6 C20000", "Q1AZ6 C20100"]


def test_an_option_corrects_its_candles_too() -> None:
    option = perpetual("O", "deribit", kind="P", ticker=None, root="deribit:BTC")
    tape = [*begin(option), frame(trade(1, 5, who=option)), clock(70), frame(trade(2, 9, who=option)), clock(75)]
    rows = final(PartitionState(config()), tape)
    assert (rows["O", 15, 0]["high"], rows["O", 15, 0]["revision"], rows["O", 60, 0]["volume"]) == (9, 1, 2)
    assert (rows["O", 15, 0]["vd"], rows["O", 60, 0]["vd"], rows["O", 60, 0]["cvd_open"]) == (2, 2, 0)


def test_a_suspect_feed_is_incomplete_until_its_gap_ends() -> None:
    suspect = Disconnect(FEED, (START + 40) * NS, "test", since_ns=(START + 20) * NS)
    gap = Gap(FEED, (START + 20) * NS, (START + 50) * NS, "test")
    records = [trade(i + 0.5, 100) for i in range(20)]
    tape = [
        *begin(), frame(*records), clock(31), Frame("disconnect", 1, 0, 0, FEED, encode([suspect])),
        clock(45), Frame("gap", 1, 0, 0, FEED, encode([gap])),
        frame(*(trade(i + 0.5, 100) for i in range(50, 90))), clock(90),
    ]  # fmt: skip
    rows = final(PartitionState(config(timeframes=(15, 60))), tape)
    complete = {at: bool(row["complete"]) for (_, tf, at), row in rows.items() if tf == 15}
    assert complete == {0: True, 15: False, 45: False, 60: True, 75: True}
    assert not rows["BTCUSDT", 60, 0]["complete"]


def test_what_stands_after_the_gap_is_complete_again() -> None:
    """The other symbols moved the feed's time on while one was suspect: its windows behind the gap are whole."""
    eth = perpetual("ETHUSDT", root="binance-futures:ETH")
    suspect = Disconnect(FEED, (START + 20) * NS, "test", since_ns=(START + 20) * NS, symbols=("BTCUSDT",))
    gap = Gap(FEED, (START + 20) * NS, (START + 29) * NS, "test", symbols=("BTCUSDT",))
    tape = [
        *begin(BTC, eth), frame(trade(16, 1), trade(31, 1)), Frame("disconnect", 1, 0, 0, FEED, encode([suspect])),
        frame(trade(46, 9, who=eth)), Frame("gap", 1, 0, 0, FEED, encode([gap])), clock(60),
    ]  # fmt: skip
    rows = final(PartitionState(config(timeframes=(15,))), tape)
    complete = {(name, at): (int(row["complete"]), int(row["revision"])) for (name, _, at), row in rows.items()}
    assert complete == {("BTCUSDT", 15): (0, 1), ("BTCUSDT", 30): (1, 1), ("ETHUSDT", 45): (1, 0)}


def test_state_of_other_settings_is_refused() -> None:
    state = PartitionState(config())
    state.step(begin())
    fields = state.changes()
    with pytest.raises(ConfigError, match="timeframes 15s,1m"):
        PartitionState.restore(Config(sessions=lambda venue, root: ALWAYS, timeframes=(60,)), fields)


def test_a_gap_told_long_after_changes_nothing_but_the_mark() -> None:
    """The seconds of these candles are gone by then."""
    tape = [*begin(), frame(*(trade(i + 0.5, 100 + i % 7, i % 3 + 1, 1 - 2 * (i % 2)) for i in range(900))), clock(900)]
    state = PartitionState(config())
    before = dict(final(state, tape))
    gap = Gap(FEED, (START + 601) * NS, (START + 602) * NS, "told late")
    after = final(state, [Frame("gap", 1, 0, 0, FEED, encode([gap])), clock(901)], dict(before))
    touched = {key for key, row in after.items() if not row["complete"]}
    assert touched >= {("BTCUSDT", 300, 600)}
    for key, row in after.items():
        for column in ("open", "high", "low", "close", "volume", "trades", "vd", "cvd_close", "vwap"):
            assert row[column] == before[key][column], (key, column)
        assert row["revision"] == (1 if key in touched else 0)
