"""What is said of planted windows: grades, filters, clusters, revisions, and what is remembered and forgotten."""

from __future__ import annotations

from dataclasses import replace as with_

import pytest
from msgspec.structs import replace

from services.signals.core import PartitionState
from services.signals.verdict import Limits
from shared.calendar import EQUITY_INDEX, sessions
from shared.errors import ConfigError
from shared.frames import Frame, ns_of, unreadable
from shared.messages import Pressure, Signal
from tests.services.signals.tape import (
    CONFIG,
    DAY,
    EXPIRY,
    START,
    WINDOW,
    Message,
    Stage,
    days,
    frames,
    mirrored,
    no_store,
    row,
    signals_of,
    window,
)

QUIET = (row(11, 10), row(10, 11, strike=6005.0), row(10, 10, strike=6010.0), row(10, 11, strike=6050.0))


def history(*rows: Pressure) -> list[Message]:
    """Twenty days of these rows, with a little life in them."""

    def lively(i: int, m: Message) -> Message:
        if not isinstance(m, Pressure):
            return m
        return row(
            m.ask_volume + 1 + i % 3, m.bid_volume, m.time_window_ns, m.strike, m.option_type,
            moneyness=m.moneyness, expiration=m.expiration_ns,
        )  # fmt: skip

    return [lively(i, message) for i, message in enumerate(days(20, *(rows or QUIET)))]


def only(signals: list[Signal]) -> Signal:
    assert len(signals) == 1, [(s.strike, s.score, s.status) for s in signals]
    return signals[0]


def test_a_heavy_one_sided_strike_is_a_signal_and_quiet_ones_are_not() -> None:
    signal = only(signals_of([*history(), *window(row(400, 5), *QUIET[1:])]))
    assert (signal.strike, signal.option_type, signal.expiration_ns) == (6000.0, "C", EXPIRY)
    assert (signal.direction, signal.status, signal.reason, signal.revision) == ("BUY", "emitted", "", 0)
    assert (signal.signal_type, signal.types[1:]) == (
        "institutional_flow", ("pressure_spike", "volume_anomaly", "order_imbalance")
    )  # fmt: skip
    assert (signal.baseline, signal.baseline_size, signal.source) == ("key_time", 20, "tapeline")
    assert (signal.volume, signal.premium, signal.timestamp_out_ns) == (405, 405 * 500, 0)
    parts = signal.components
    assert parts is not None
    assert (parts.z, parts.z_volume, parts.percentile, parts.volume_percentile) == (10, 10, 100, 100)
    assert parts.base == 1.0
    assert parts.trend == 0.0, "no window just before"
    assert parts.persistence == pytest.approx(1 / 3)
    assert (parts.cluster_size, parts.cluster_factor, parts.market_maker) == (1, 0.9, 0.0)


def test_a_quiet_day_says_nothing() -> None:
    assert signals_of([*history(), *window(*QUIET)]) == []


def strongest() -> list[Message]:
    """Three strikes bought harder and harder over three windows."""
    strikes = (6000.0, 6005.0, 6010.0)
    past = history(*(row(10, 10, strike=k) for k in strikes))
    out = [*past]
    for i, (ask, bid) in enumerate([(12, 10), (60, 10), (900, 0)]):
        out += window(*(row(ask, bid, START + i * WINDOW, k) for k in strikes))
    return out


@pytest.mark.parametrize(("turn", "direction"), [(False, "BUY"), (True, "SELL")])
def test_the_strongest_event_scores_at_least_95_hundredths_either_way(turn: bool, direction: str) -> None:
    tape = [mirrored(m) for m in strongest()] if turn else strongest()
    signals = [s for s in signals_of(tape) if s.time_window_ns == START + 2 * WINDOW]
    assert len(signals) == 3
    for signal in signals:
        assert 0.95 <= signal.score <= 1.0
        assert (signal.grade, signal.direction) == ("EXTREME", direction)
        assert signal.components is not None
        assert (signal.components.cluster_size, signal.components.trend) == (3, 1.0)


@pytest.mark.parametrize(("strikes", "size"), [((6000.0,), 1), ((6000.0, 6005.0), 2), ((6000.0, 6005.0, 6015.0), 3),
                                               ((6000.0, 6020.0), 1)])  # fmt: skip
def test_clusters_reach_three_strikes_to_either_side(strikes: tuple[float, ...], size: int) -> None:
    past = history(*(row(10, 10, strike=k) for k in strikes))
    other = (row(400, 5, strike=6005.0, kind="P"), row(400, 5, strike=6005.0, expiration=EXPIRY + DAY))
    signals = signals_of([*past, *window(*(row(400, 5, strike=k) for k in strikes), *other)])
    found = {s.strike: s.components.cluster_size for s in signals if s.components and s.expiration_ns == EXPIRY
             and s.option_type == "C"}  # fmt: skip
    assert found[6000.0] == size, "only strikes of one expiration, type and side count"


def test_another_side_is_no_cluster_and_a_neutral_strike_is_alone() -> None:
    rows = [row(400, 5), row(5, 400, strike=6005.0), row(11, 10, strike=6010.0), row(12, 10, strike=6015.0)]
    signals = signals_of([*history(*rows), *window(*rows)], with_(CONFIG, limits=Limits(emit_from=0.01)))
    sizes = {s.strike: s.components.cluster_size for s in signals if s.components and s.time_window_ns == START}
    assert sizes == {6000.0: 1, 6005.0: 1, 6010.0: 1, 6015.0: 1}


def straddle(apart_sec: float, puts: float = 480) -> list[Message]:
    past = history(row(10, 10), row(10, 10, kind="P"))
    return [*past, *window(row(495, 5, mean_sec=100), row(0, puts, kind="P", mean_sec=100 + apart_sec))]


def test_a_straddle_is_rejected_with_its_reason() -> None:
    signals = signals_of(straddle(2))
    assert [(s.option_type, s.status) for s in signals] == [("C", "rejected"), ("P", "rejected")]
    for signal in signals:
        assert signal.reason == "market maker: straddle score 0.98 (calls 500, puts 480, 2 s apart)"
        assert signal.components is not None
        assert signal.components.market_maker == pytest.approx(0.7 * 960 / 980 + 0.3 * (1 - 2 / 300))
        assert signal.score == pytest.approx(
            (signal.components.raw + signal.components.base) / 2 * (1 - signal.components.market_maker / 2) * 0.9
        )


def test_a_rejected_signal_is_published_only_if_it_would_have_been_one() -> None:
    weak = [*history(row(10, 10), row(10, 10, kind="P")), *window(row(13, 10), row(12, 10, kind="P"))]
    assert signals_of(weak) == []


def test_a_distant_other_leg_is_watched() -> None:
    past = history(row(10, 10), row(10, 10, kind="P"))
    signals = signals_of([*past, *window(row(800, 5, mean_sec=20), row(60, 40, kind="P", mean_sec=240))])
    call = next(s for s in signals if s.option_type == "C")
    assert call.status == "monitor"
    assert call.reason == "market maker: straddle score 0.23 (calls 805, puts 100, 220 s apart)"


def test_the_other_leg_is_of_the_same_strike_and_expiration() -> None:
    past = history(row(10, 10), row(10, 10, strike=6005.0, kind="P"))
    rows = (row(495, 5), row(0, 480, strike=6005.0, kind="P"), row(0, 480, kind="P", expiration=EXPIRY + DAY))
    assert {s.status for s in signals_of([*past, *window(*rows)])} == {"emitted"}


def test_blocks_and_sweeps_count_on_the_side_of_the_signal() -> None:
    def first(now: Pressure) -> Signal:
        return only(signals_of([*history(), *window(now, *QUIET[1:])]))

    assert first(row(400, 5, block=(200, 0), sweep=(50, 0))).types[:2] == ("block", "sweep")
    assert first(row(400, 5, sweep=(50, 0))).signal_type == "sweep"
    assert first(row(400, 5, block=(0, 5), sweep=(0, 5))).signal_type == "institutional_flow"
    assert first(row(5, 400, block=(0, 200))).signal_type == "block"


def test_without_samples_enough_nothing_is_emitted() -> None:
    assert signals_of([*history()[2 * 5 :], *window(row(4000, 0))]) == []
    low = with_(CONFIG, limits=Limits(emit_from=0.1))
    signal = only(signals_of([*days(19, row(10, 10)), *window(row(4000, 0))], low))
    assert (signal.baseline, signal.baseline_size) == ("insufficient", 19)
    parts = signal.components
    assert parts is not None
    assert (parts.z, parts.percentile, parts.volume_95, parts.base) == (None, None, None, 0.0)
    assert parts.significance == 0.7
    assert signal.types == ("order_imbalance",)


def test_balanced_volume_has_no_direction() -> None:
    low = with_(CONFIG, limits=Limits(emit_from=0.01))
    assert [s for s in signals_of([*history(), *window(row(500, 500))], low) if s.time_window_ns == START] == []


# -- revisions -------------------------------------------------------------------------------


def test_a_revision_that_bears_a_signal_out_no_more_withdraws_it() -> None:
    stage = Stage()
    first = only(stage.take([*history(), *window(row(400, 5), *QUIET[1:])]))
    stage.restart()
    late = row(400, 390, revision=1)
    second = only(stage.take([late, replace(window(late)[-1], revision=1)]))
    assert (second.status, second.revision) == ("withdrawn", 1)
    assert second.reason == "revision 1 of the window does not bear it out"
    assert (second.score, second.components, second.strike) == (first.score, first.components, first.strike)
    assert stage.take([replace(window(late)[-1], revision=2)]) == [], "once is enough"
    again = row(900, 390, revision=3)
    third = only(stage.take([replace(again, ask_volume=4000.0, log_ratio=2.3), replace(window(late)[-1], revision=3)]))
    assert (third.status, third.revision, third.reason) == ("emitted", 2, "")


def test_a_revision_that_changes_a_signal_publishes_it_again_and_one_that_does_not_is_silent() -> None:
    stage = Stage()
    stage.take([*history(), *window(row(400, 5), *QUIET[1:])])
    quiet = row(11, 11, strike=6010.0, revision=1)
    assert stage.take([quiet, replace(window(quiet)[-1], revision=1)]) == []
    more = row(600, 5, revision=1)
    signal = only(stage.take([more, replace(window(more)[-1], revision=2)]))
    assert (signal.revision, signal.volume, signal.status) == (1, 605, "emitted")


def test_a_late_row_joins_a_cluster_of_its_window() -> None:
    stage = Stage()
    past = history(row(10, 10), row(10, 10, strike=6005.0))
    assert only(stage.take([*past, *window(row(400, 5))])).components.cluster_factor == 0.9
    late = row(400, 5, strike=6005.0)
    pair = stage.take([late, replace(window(late)[-1], revision=1)])
    assert [(s.strike, s.revision, s.components.cluster_factor) for s in pair if s.components] == [
        (6000.0, 1, 1.1), (6005.0, 0, 1.1),
    ]  # fmt: skip


def test_a_revised_window_is_the_history_of_later_ones_as_revised() -> None:
    stage = Stage(with_(CONFIG, limits=Limits(emit_from=0.01)))
    stage.take([*history(), *window(row(50, 10))])
    late = row(10, 50, revision=1)
    stage.take([late, replace(window(late)[-1], revision=1)])
    signal = only(stage.take(window(row(50, 10, START + WINDOW))))
    assert signal.components is not None
    assert signal.components.persistence == pytest.approx(1 / 3)
    assert signal.components.trend == 1.0


def test_a_gap_in_an_old_window_changes_only_whether_its_signals_are_complete() -> None:
    stage = Stage()
    first = only(stage.take([*history(), *window(row(400, 5), *QUIET[1:])]))
    for i in range(1, 5):
        stage.take(window(*(replace(r, time_window_ns=START + i * WINDOW) for r in QUIET)))
    stage.restart()
    holed = [row(10, 5, complete=False, revision=1), replace(QUIET[1], complete=False, revision=1)]
    again = only(stage.take([*holed, replace(window(*holed)[-1], revision=1)]))
    assert again == replace(first, complete=False, revision=1)
    assert stage.take([*holed, replace(window(*holed)[-1], revision=2)]) == []
    assert f"w:ES:{START}" not in stage.fields


# -- what is kept ----------------------------------------------------------------------------


def test_rows_are_kept_for_three_windows_and_signals_for_two_sessions() -> None:
    stage = Stage()
    stage.take([*history(), *window(row(400, 5), *QUIET[1:])])
    assert stage.names("s") == [f"s:ES:{START}"]
    for i in (1, 2):
        stage.take(window(*(replace(r, time_window_ns=START + i * WINDOW) for r in QUIET)))
    assert len(stage.names("w")) == 3
    stage.take(window(*(replace(r, time_window_ns=START + 3 * WINDOW) for r in QUIET)))
    assert stage.names("w") == [f"w:ES:{START + i * WINDOW}" for i in (1, 2, 3)]
    stage.take(window(*(replace(r, time_window_ns=START + DAY) for r in QUIET)))
    assert stage.names("s") == [f"s:ES:{START}"]
    stage.take(window(*(replace(r, time_window_ns=START + 2 * DAY) for r in QUIET)))
    assert stage.names("s") == []


def test_sessions_too_old_are_forgotten() -> None:
    stage = Stage(with_(CONFIG, count=3))
    for day in range(10):
        stage.take(window(row(10, 11, START + day * DAY)))
    assert stage.names("h") == [f"h:ES:{START + day * DAY}" for day in (6, 7, 8, 9)], "its own session and three before"
    chain = stage.state._chains["ES"]
    assert (chain.book.windows, len(chain.book)) == ([START + day * DAY for day in (6, 7, 8, 9)], 4)


def test_expired_options_are_dropped_and_their_bucket_stays() -> None:
    stage = Stage()
    stage.take(window(row(10, 10, expiration=START + DAY // 4, moneyness=1.0)))
    held = []
    for day in range(1, 5):
        stage.take(window(row(10, 10, START + day * DAY)))
        held.append(len(stage.state._chains["ES"].book))
    assert held == [2, 3, 3, 4], "one less from two days after it expired"
    stage.restart()
    book = stage.state._chains["ES"].book
    assert len(book) == 4
    assert len(book._buckets["C", 50].windows) == 1


def test_windows_of_another_length_start_anew() -> None:
    stage = Stage()
    stage.take(history())
    stage.take(window(row(10, 10, START, window_sec=60)))
    assert [stage.names(kind) for kind in "husw"] == [[f"h:ES:{START}"], ["u:ES"], [], [f"w:ES:{START}"]]


def test_only_the_window_at_hand_is_written() -> None:
    stage = Stage()
    stage.take(history())
    stage.state.step(frames(window(*QUIET)))
    fields, deletes = stage.state.changes()
    assert sorted(fields) == ["counters", f"h:ES:{START}", "u:ES", "version", f"w:ES:{START}"]
    assert deletes == (f"w:ES:{START - DAY}",)


def test_other_frames_are_not_read_and_broken_ones_are_counted() -> None:
    stage = Stage()
    broken = [Frame("pressure", 1, 0, 0, "x", b"[{"), Frame("tick", 1, 0, 0, "x", b"??"), unreadable("why", b"raw")]
    assert stage.step(broken) == []
    assert stage.state._counters["unreadable"] == 1


def test_state_of_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="signals state of version 99"):
        PartitionState.restore(CONFIG, {"version": b"99"}, no_store)


def test_counters() -> None:
    stage = Stage()
    stage.take([*history(), *window(row(400, 5), *QUIET[1:])])
    late = row(400, 390, revision=1)
    stage.take([late, replace(window(late)[-1], revision=1)])
    counted = {name: n for name, n in stage.state._counters.items() if n}
    assert counted == {
        "windows": 21, "revisions": 1, "rows": 22 * 4, "insufficient": 20 * 4, "emitted": 1, "withdrawn": 1,
    }  # fmt: skip


# -- sessions --------------------------------------------------------------------------------


def test_time_of_day_is_that_of_the_session_through_a_clock_change() -> None:
    config = with_(CONFIG, sessions=lambda _: sessions(EQUITY_INDEX), count=20)
    # Half past nine in New York: 14:30 UTC until 2025-03-08, 13:30 behind it.
    dates = [f"2025-02-{d:02d}" for d in (18, 19, 20, 21, 24, 25, 26, 27, 28)] + [
        f"2025-03-{d:02d}" for d in (3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 17)
    ]
    tape: list[Message] = []
    for i, date in enumerate(dates):
        clock = "14:30" if date < "2025-03-09" else "13:30"
        tape += window(row(10 + i % 3, 10, ns_of(f"{date}T{clock}:00Z")))
    now = ns_of("2025-03-18T13:30:00Z")
    signal = only(signals_of([*tape, *window(row(400, 5, now))], config))
    assert (signal.baseline, signal.baseline_size) == ("key_time", 20)


def test_underlyings_do_not_meet() -> None:
    one = [*history(), *window(row(400, 5), *QUIET[1:])]
    two = [replace(m, underlying="NQ") for m in one]
    both = [m for pair in zip(one, two, strict=True) for m in pair]
    signals = signals_of(both)
    assert [s.underlying for s in signals] == ["ES", "NQ"]
    assert signals[0] == replace(signals[1], underlying="ES")


def test_an_underlying_may_hold_a_colon() -> None:
    tape = [replace(m, underlying="deribit:BTC") for m in [*history(), *window(row(400, 5), *QUIET[1:])]]
    stage = Stage()
    assert only(stage.take(tape)).underlying == "deribit:BTC"
    assert all(":deribit:BTC" in name for name in stage.fields if ":" in name)
    stage.restart()
    assert stage.state._chains.keys() == {"deribit:BTC"}
    assert len(stage.state._chains["deribit:BTC"].book) == 21 * 4
