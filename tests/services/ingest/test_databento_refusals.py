"""What a gateway refuses: a start too old, a key, symbols; and what becomes of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from services.ingest.databento_live import DatabentoLive
from services.ingest.source import Resume
from shared.errors import AuthError, ConfigError, Unavailable
from shared.messages import Disconnect, Gap
from tests.fakes.gateway import KEY, Gateway
from tests.fakes.tape import NS, START, Tape, generate
from tests.services.ingest.collect import Collect, Running
from tests.services.ingest.live import (
    PARTITIONS,
    SYMBOLS,
    assert_whole,
    connected,
    expected,
    live,
    settings,
    total,
)
from tests.wait import until


@pytest.fixture(scope="module")
def tape() -> Tape:
    return generate()


def drop_and_return(gateway: Gateway, out: Collect, at: int, away_until: int) -> None:
    """The feed goes away at a place of the tape and comes back later."""
    connected(gateway)
    gateway.fault("eof", at=at, refuse=True)
    gateway.advance_to(int(gateway.tape.records["ts_event"][at]))
    until(lambda: out.store.of(Disconnect))
    gateway.advance_to(away_until)
    gateway.listen()
    connected(gateway, 2)


def test_a_start_too_old_becomes_a_gap() -> None:
    tape = generate(seconds=300, per_second=10)
    now, reach = START + 200 * NS, 60 * NS
    with Gateway(tape, replay_ns=reach) as gateway:
        out = Collect()
        with Running(live(gateway, replay_hours=60 / 3600), out):
            drop_and_return(gateway, out, 500, now)
            until(lambda: out.store.of(Gap))
            gateway.finish()
            last = max(int(rows["ts_event_ns"][-1]) for rows in expected(tape).values())
            until(lambda: max(int(out.store.trades(p)[-1]["ts_event_ns"]) for p in out.store.rows) == last)
    (gap,) = out.store.of(Gap)
    mine = np.isin(tape.records["instrument_id"], (17077, 17078, 23001, 31001))
    heard = int(tape.records["ts_event"][:500].max())
    assert heard - NS < gap.start_ns <= heard, "from the last record heard"
    assert gap.end_ns == now - reach + 5 * NS, "to where the gateway could resume"
    got = sum(len(out.store.trades(p)) for p in out.store.rows)
    ts = tape.records["ts_event"]
    assert got == int((mine & ((np.arange(len(ts)) < 500) | (ts >= gap.end_ns))).sum())


def test_the_oldest_start_may_be_refused_too() -> None:
    tape = generate(seconds=300, per_second=10)
    with Gateway(tape, replay_ns=10 * NS) as gateway:  # less than the settings believe
        out = Collect()
        with Running(live(gateway, replay_hours=60 / 3600), out):
            drop_and_return(gateway, out, 500, START + 200 * NS)
            until(lambda: gateway.live)
            gateway.finish()
            until(lambda: out.store.of(Gap))
    (gap,) = out.store.of(Gap)
    assert gap.end_ns == START + 200 * NS
    assert [s.start_of("tbbo") is None for s in gateway.sessions] == [True, False, False, True]


@pytest.mark.parametrize("works", [True, False])
def test_history_fills_what_the_gateway_has_lost(works: bool) -> None:
    tape = generate(seconds=300, per_second=10)
    asked = []

    def history(start_ns: int, end_ns: int) -> Iterator[Any]:
        asked.append((start_ns, end_ns))
        if not works:
            raise Unavailable("the archive does not answer")
        ts = tape.records["ts_event"]
        chosen = tape.records[(ts >= start_ns) & (ts < end_ns)]
        other_ids = chosen.copy()
        other_ids["instrument_id"] += 7  # ids are reused and differ by day
        yield {i.native + 7: i.symbol for i in tape.listings}, other_ids[:300]
        yield {i.native: i.symbol for i in tape.listings}, chosen[300:]

    with Gateway(tape, replay_ns=60 * NS) as gateway:
        out = Collect()
        source = DatabentoLive(settings(gateway, replay_hours=60 / 3600), PARTITIONS, history=history)
        with Running(source, out):
            drop_and_return(gateway, out, 500, START + 200 * NS)
            until(lambda: gateway.live)
            gateway.finish()
            if works:
                until(lambda: out.store.total() >= total(tape))
            else:
                until(lambda: out.store.of(Gap))
    assert len(asked) == 1
    if works:
        assert_whole(out.store, tape)
        assert not out.store.of(Gap)


def test_skipped_records_are_a_gap(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        out = Collect()
        gateway.fault("error", at=1000, code=7, text="skipped 12 records")
        gateway.fault("slow_reader", at=1000)
        with Running(live(gateway), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() >= total(tape))
    (gap,) = out.store.of(Gap)
    mine = np.flatnonzero(np.isin(tape.records["instrument_id"], [i.native for i in tape.listings]))
    around = tape.records["ts_event"][[mine[mine < 1000][-1], mine[mine >= 1000][0]]]
    assert (gap.start_ns <= around[0], gap.end_ns) == (True, around[1])
    assert "skipped 12 records" in gap.reason
    assert out.store.counts["skipped_by_gateway"] == out.store.counts["slow_reader_warning"] == 1


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (1, AuthError, "check DATABENTO_API_KEY"),
        (2, AuthError, "deactivated"),
        (3, ConfigError, "stop another client"),
        (5, ConfigError, "databento.stype"),
    ],
)
def test_fatal_errors_end_the_source_with_the_remedy(tape: Tape, code: int, error: type, says: str) -> None:
    with Gateway(tape) as gateway:
        gateway.fault("error", code=code, text=f"no\nway with {KEY}.")
        with Running(live(gateway), Collect()) as running:
            ended = running.ended()
    assert type(ended) is error
    assert ended.exit_code == 78
    assert says in str(ended)
    assert "no way" in str(ended)
    assert KEY not in str(ended)
    assert len(gateway.sessions) == 1, "no retry loop"


def test_a_wrong_key_is_one_clear_line_without_the_key(tape: Tape) -> None:
    wrong = "db-wrongwrongwrongwrongwrongwrong"
    with Gateway(tape) as gateway, Running(live(gateway, api_key=wrong), Collect()) as running:
        ended = running.ended()
    assert isinstance(ended, AuthError)
    assert "\n" not in str(ended)
    assert "Authentication failed" in str(ended)
    assert wrong not in str(ended)
    assert gateway.refused_keys == 1


def test_no_key_is_said_before_connecting(tape: Tape) -> None:
    with Gateway(tape) as gateway, pytest.raises(AuthError, match="set DATABENTO_API_KEY"):
        live(gateway, api_key="").run(Collect(), Resume(), threading.Event())
    assert not gateway.sessions


def test_one_unknown_symbol_is_counted_and_the_others_go_on(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        out = Collect()
        with Running(live(gateway, symbols=("XX.FUT", *SYMBOLS)), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() >= total(tape))
    assert_whole(out.store, tape)
    assert out.store.counts["unresolved_symbol"] == 2  # of two schemas


def test_only_unknown_symbols_are_a_configuration_error(tape: Tape) -> None:
    with Gateway(tape) as gateway, Running(live(gateway, symbols=("XX.FUT", "YXX.FUT")), Collect()) as running:
        ended = running.ended()
    assert isinstance(ended, ConfigError)
    assert "XX.FUT, YXX.FUT" in str(ended)


def test_a_slow_handshake_is_waited_for(tape: Tape) -> None:
    with Gateway(tape, auth_delay=0.4) as gateway:
        out = Collect()
        with Running(live(gateway), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() == total(tape))
    assert len(gateway.sessions) == 1


def test_a_gateway_that_never_answers_is_given_up(tape: Tape) -> None:
    with Gateway(tape, auth_delay=30) as gateway:
        out = Collect()
        with Running(live(gateway, silence_seconds=0.2), out):
            until(lambda: ("down", "nothing heard for 0.2 s") in out.store.states)
            until(lambda: len(gateway.sessions) > 1)
    assert not out.store.of(Disconnect), "nothing was connected"


def test_stopping_while_the_gateway_is_away(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        gateway.refuse()
        out = Collect()
        with Running(live(gateway, backoff_max_seconds=60.0), out):
            until(lambda: out.store.states)
    assert "cannot connect to 127.0.0.1" in out.store.states[0][1]
