"""Trades of options that nobody has defined: they wait, are folded, or leave as what they are."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from services.pressure.core import Emission, Output, PartitionState, Undefined
from services.pressure.layout import WAITING
from services.pressure.worker import pack
from shared.frames import TICK, UNREADABLE, reason_of
from shared.messages import Instrument
from tests.services.pressure.market import (
    FEED,
    begin,
    clock,
    config,
    define,
    emissions,
    frame,
    future,
    messages,
    ns,
    only,
    option,
    play,
    pressures,
    trade,
    watch,
)

WEEKLY = option(symbol="Q1AM6 C20000")
GUESSED = msgspec.structs.replace(WEEKLY, kind="?", strike=None, expiration_ns=None, multiplier=None, underlying=None)


def dead(output: Output) -> list[tuple[str, list[float]]]:
    return [(one.reason, one.rows["size"].tolist()) for one in output if isinstance(one, Undefined)]


def counted(state: PartitionState) -> dict[str, int]:
    names = msgspec.json.decode(state.changes()["counters"])
    return {name: n for name, n in names.items() if n}


@pytest.mark.parametrize("known", [True, False])
def test_a_definition_that_comes_in_time_loses_nothing(known: bool) -> None:
    state = PartitionState(config())
    first = begin(future(), GUESSED) if known else begin(future())
    waiting = frame(trade(1, 10, 3, who=WEEKLY), trade(2, 11, 4, -1, WEEKLY), trade(60.9, 9, who=future()))
    row = only(play([*first, waiting, define(WEEKLY), frame(trade(62, 12, 5, who=WEEKLY)), clock(300)], state))
    assert (row.ask_volume, row.bid_volume, row.open, row.close, row.revision) == (8, 4, 10, 12, 0)
    assert row.premium == 20 * (30 + 44 + 60)
    assert counted(state) == {"trades": 3, "not_options": 1, "waited": 2}


def test_a_window_that_closed_meanwhile_is_revised() -> None:
    state = PartitionState(config())
    play(
        [*begin(option(), GUESSED), frame(trade(290, who=WEEKLY), trade(291, who=WEEKLY), trade(295)), clock(310)],
        state,
    )
    got = emissions(play([define(WEEKLY)], state))
    assert [(r.total_trades, r.revision) for e in got for r in e.rows] == [(2, 1), (3, 2)]
    assert [e.rollup.revision for e in got] == [1, 2]


def test_no_definition_makes_dead_letters() -> None:
    state = PartitionState(config())
    first = frame(trade(1, size=1, who=WEEKLY), trade(30, size=2, who=WEEKLY))
    assert play([*begin(GUESSED), first, frame(trade(60, size=3, who=WEEKLY))], state) == []
    output = play([clock(61)], state)
    assert dead(output) == [
        (
            "option trades of 'Q1AM6 C20000' (GLBX.MDP3): no definition came within 60 s; load the definition schema, "
            "or name its root in databento.option_roots",
            [1, 2, 3],
        )
    ]
    (bad,) = pack(output)
    assert bad.kind == UNREADABLE
    assert reason_of(bad).startswith("option trades of 'Q1AM6 C20000'")
    raw = bad.body.partition(b"\n")[2]
    assert np.frombuffer(raw, TICK)["ts_event_ns"].tolist() == [ns(1), ns(30), ns(60)]
    assert counted(state) == {"waited": 3, "undefinable": 3}
    assert play([define(WEEKLY), clock(300)], state) == [], "they are gone"
    assert only(play([frame(trade(301, who=WEEKLY)), clock(600)], state)).total_trades == 1


def test_what_nobody_ever_named_waits_too() -> None:
    state = PartitionState(config(wait_sec=5))
    assert play([*begin(option()), frame(trade(1, who=WEEKLY)), clock(5.9)], state) == []
    ((reason, sizes),) = dead(play([frame(trade(6.0))], state))
    assert reason.startswith(f"option trades of the unknown instrument {WEEKLY.id}: no definition came within 5 s")
    assert sizes == [1]


def test_an_option_without_strike_is_undefined() -> None:
    half = msgspec.structs.replace(WEEKLY, strike=None)
    output = play([*begin(half), frame(trade(1, who=half)), clock(61)])
    assert len(dead(output)) == 1
    row = only(play([*begin(half), frame(trade(1, who=half)), define(WEEKLY), clock(300)]))
    assert row.strike == 20_000


@pytest.mark.parametrize(
    ("what", "counter"), [(future("Q1AM6 C20000"), "not_options"), (option(symbol="Q1AM6 C20000", kind="T"), "spreads")]
)
def test_what_turns_out_to_be_no_option_is_counted_as_that(what: Instrument, counter: str) -> None:
    state = PartitionState(config())
    assert (
        play([*begin(option()), frame(trade(1, who=WEEKLY), trade(2, who=WEEKLY)), define(what), clock(300)], state)
        == []
    )
    assert counted(state) == {"waited": 2, counter: 2}


def test_each_instrument_leaves_at_its_own_time() -> None:
    other = option(symbol="Q1BM6 C1")
    state = PartitionState(config())
    play(
        [*begin(option()), frame(trade(0), trade(1, size=1, who=WEEKLY), trade(20), trade(20, size=2, who=other))],
        state,
    )
    play([frame(trade(30), trade(30, size=3, who=WEEKLY))], state)
    # An unknown instrument's time is the newest watermark that the partition has.
    assert [sizes for _, sizes in dead(play([frame(trade(61))], state))] == [[1, 3]]
    assert [sizes for _, sizes in dead(play([frame(trade(80))], state))] == [[2]]


def test_one_jump_lets_windows_leave_first() -> None:
    output = play([*begin(option(), GUESSED), frame(trade(250), trade(251, who=WEEKLY)), clock(400)])
    assert [type(one) for one in output] == [Emission, Undefined]


def test_the_end_of_the_tape_ends_the_wait() -> None:
    for known, name in (((option(), GUESSED), "'Q1AM6 C20000' (GLBX.MDP3)"), ((option(),), f"instrument {WEEKLY.id}")):
        output = play([*begin(*known), frame(trade(1, who=WEEKLY)), clock(2, final=True)])
        ((reason, sizes),) = dead(output)
        assert f"{name}: no definition came before the tape's end; " in reason
        assert sizes == [1]


def test_a_definition_that_comes_too_late_for_the_window() -> None:
    state = PartitionState(config(wait_sec=600))
    play(
        [*begin(GUESSED, option()), frame(trade(1, size=1, who=WEEKLY), trade(290, size=2, who=WEEKLY)), clock(400)],
        state,
    )
    output = play([define(WEEKLY)], state)
    assert dead(output) == [
        (
            "option trades of 'Q1AM6 C20000' (GLBX.MDP3): the definition came when they were older than "
            "aggregate.max_lateness_seconds 120",
            [1],
        )
    ]
    assert [r.total_trades for r in pressures(output)] == [1]


def test_ten_thousand_wait_and_the_oldest_leave_first() -> None:
    state = PartitionState(config())
    unknown = [option(symbol=f"Q1AM6 C{k}") for k in range(3)]
    some = [trade(1, size=1, who=unknown[0]), trade(1, size=2, who=unknown[1])]
    some += [trade(1, size=3, who=unknown[2])] * (WAITING - 3)
    assert play([*begin(option()), frame(*some), frame(trade(1, size=4, who=unknown[0]))], state) == []
    ((reason, sizes),) = dead(play([frame(trade(1, size=5, who=unknown[1]))], state))
    assert f"no definition came, and {WAITING} trades wait" in reason
    assert sizes == [1, 4]
    restored = PartitionState.restore(config(), state.changes())
    ours, theirs = (dead(play([clock(100)], one)) for one in (state, restored))
    assert ours == theirs
    assert [len(sizes) for _, sizes in ours] == [2, WAITING - 3]


def test_futures_and_time_go_on_beside_those_that_wait() -> None:
    state = PartitionState(config())
    play([watch(), messages("instrument", future(), GUESSED), frame(trade(1, who=WEEKLY))], state)
    row = only(play([define(WEEKLY), frame(trade(5, 21_000.0, who=future())), clock(300)], state))
    assert row.underlying_price == 21_000.0
    assert state.registry.feeds == [FEED]


def test_waiting_trades_survive_a_restart_after_some_of_them_left() -> None:
    state, saved = PartitionState(config()), {}
    other = option(symbol="Q1BM6 C1")
    some = [trade(1, size=k + 1, who=(WEEKLY, other)[k % 3 == 0]) for k in range(300)]
    play([*begin(option()), frame(*some)], state)
    saved.update(state.changes())
    play([define(other)], state)
    saved.update(state.changes())
    restored = PartitionState.restore(config(), saved)
    ours, theirs = (dead(play([clock(61)], one)) for one in (state, restored))
    assert ours == theirs
    assert [sizes for _, sizes in ours] == [[k + 1 for k in range(300) if k % 3]]
