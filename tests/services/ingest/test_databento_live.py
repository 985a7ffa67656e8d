"""The live source against a gateway that speaks the real protocol over TCP: sessions and drops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.ingest.databento_live import DatabentoLive
from shared.errors import ConfigError
from shared.instruments import partition_of
from shared.messages import Clock, Disconnect, Gap, Instrument
from shared.settings import Databento
from tests.fakes.gateway import Gateway
from tests.fakes.tape import LISTINGS, NS, START, Listing, Tape, from_dbn, generate
from tests.services.ingest.collect import Collect, Running
from tests.services.ingest.live import (
    PARTITIONS,
    SYMBOLS,
    assert_whole,
    connected,
    expected,
    live,
    total,
)
from tests.wait import until


@pytest.fixture(scope="module")
def tape() -> Tape:
    return generate()


def test_a_plain_session_is_the_tape_row_by_row(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        out = Collect()
        with Running(live(gateway), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() == total(tape))
    for p, rows in expected(tape).items():
        assert out.store.all_rows(p).tobytes() == rows.tobytes()
    assert not out.store.of(Gap)
    assert not out.store.of(Disconnect)
    assert [s for s, _ in out.store.states] == ["connected", "ended"]
    auth = gateway.sessions[0].auth
    assert (auth["compression"], auth["heartbeat_interval_s"]) == ("none", "5")
    assert [(s.schema, s.start) for s in gateway.sessions[0].subscriptions] == [("definition", 0), ("tbbo", None)]


def test_instruments_come_from_definitions_and_before_their_trades(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        out = Collect()
        with Running(live(gateway), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() == total(tape))
    found = {i.symbol: i for i in out.store.of(Instrument)}
    assert sorted(found) == ["CLG4", "ESH4", "ESM4", "NQH4"], "spreads and UD: are never published"
    assert found["ESH4"].expiration_ns == tape.listings[0].expiration_ns
    assert (found["ESH4"].estimated, found["ESH4"].multiplier, found["ESH4"].root) == (False, 50.0, "ES")
    assert isinstance(out.store.messages[0], Instrument)
    spreads = int(np.isin(tape.records["instrument_id"], (42001, 42002)).sum())
    assert out.store.counts["spread"] == spreads > 0
    definitions = sum(len(bytes(i.definition(0))) for i in tape.listings)
    assert out.store.counts["usage_bytes"] > tape.records.nbytes + definitions


WEEKLIES = (
    *LISTINGS, Listing(51001, "Q1AH4 C17000", "Q1A", kind="C", price=300.0),
    Listing(51002, "ESH4 P4700", "ES", kind="P", price=20.0),
)  # fmt: skip


@pytest.mark.parametrize("defined", [True, False])
def test_options_are_defined_before_their_trades_and_stand_with_their_futures(defined: bool) -> None:
    tape = generate(seconds=5, listings=WEEKLIES)
    symbols = (*SYMBOLS, "ES.OPT", "Q1A.OPT")
    with Gateway(tape, definitions=defined) as gateway:
        out = Collect()
        with Running(live(gateway, symbols=symbols), out):
            connected(gateway)
            gateway.finish()
            wanted = int((~np.isin(tape.records["instrument_id"], (42001, 42002))).sum())
            until(lambda: out.store.total() == wanted)
    found = {i.symbol: i for i in out.store.of(Instrument)}
    assert sorted(found) == ["CLG4", "ESH4", "ESH4 P4700", "ESM4", "NQH4", "Q1AH4 C17000"]
    call, put = found["Q1AH4 C17000"], found["ESH4 P4700"]
    assert (call.root, put.root) == ("NQ", "ES")
    assert (call.kind, put.kind) == (("C", "P") if defined else ("?", "?"))
    assert isinstance(out.store.messages[0], Instrument)
    at = {i.id: partition_of(i.root, PARTITIONS) for i in found.values()}
    for p, rows in out.store.rows.items():
        assert {at[n] for n in set(out.store.trades(p)["instrument"].tolist())} <= {p}, f"{len(rows)} rows"


def test_without_definitions_the_symbol_tells(tape: Tape) -> None:
    with Gateway(tape, definitions=False) as gateway:
        out = Collect()
        with Running(live(gateway), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() == total(tape))
    assert_whole(out.store, tape)
    assert all(i.estimated for i in out.store.of(Instrument))


def test_an_old_gateway_without_codes_and_acknowledgements(tape: Tape) -> None:
    with Gateway(tape, version=1, ack=False) as gateway:
        out = Collect()
        with Running(live(gateway), out):
            connected(gateway)
            gateway.fault("eof", at=1000)
            gateway.finish()
            until(lambda: out.store.total() == total(tape))
    assert_whole(out.store, tape)


def test_the_feed_is_watched_from_the_first_moment(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        gateway.advance_to(START + 7 * NS)
        out = Collect()
        with Running(live(gateway), out):
            connected(gateway)
            gateway.finish()
            until(out.store.total)
            clock = out.store.of(Clock)[0]
    assert (clock.watched_from_ns, clock.watermark_ns) == (START + 7 * NS, START + 7 * NS)


def test_a_start_is_asked_for(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        gateway.advance_to(START + 20 * NS)
        out = Collect()
        with Running(live(gateway, start="2023-12-25T23:00:00Z"), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() == total(tape))
    assert_whole(out.store, tape)
    assert out.store.of(Clock)[0].watched_from_ns == START


def test_a_bad_start_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"databento\.start 'yesterday' is no time"):
        DatabentoLive(Databento(start="yesterday"), 1)


def test_heartbeats_move_the_clock_of_a_quiet_feed(tape: Tape) -> None:
    quiet = replace(tape, end_ns=tape.end_ns + 1000 * NS)
    with Gateway(quiet) as gateway:
        out = Collect()
        with Running(live(gateway), out):
            connected(gateway)
            gateway.advance_to(tape.end_ns)
            until(lambda: out.store.total() == total(tape))
            held = dict(out.store.cursors)
            gateway.advance_to(tape.end_ns + 30 * NS)
            gateway.fault("heartbeat")
            until(lambda: out.store.of(Clock)[-1].wall_ns == tape.end_ns + 30 * NS)
            gateway.fault("heartbeat")  # the same time again says nothing new
            gateway.advance_to(tape.end_ns + 500 * NS)
            gateway.fault("heartbeat")
            until(lambda: out.store.of(Clock)[-1].wall_ns == tape.end_ns + 500 * NS)
            until(lambda: out.store.cursors != held)
    clocks = [c for c in out.store.of(Clock) if c.wall_ns]
    assert [c.watermark_ns - tape.end_ns for c in clocks] == [29 * NS, 499 * NS]
    assert all(b"%d" % (tape.end_ns + 499 * NS) in c for c in out.store.cursors.values()), "the cursor goes on, too"


# -- drops -----------------------------------------------------------------------------------

DROPS = {
    "eof": {"kind": "eof"},
    "eof inside a record": {"kind": "eof", "torn": 37},
    "rst": {"kind": "rst"},
    "refused connects": {"kind": "eof", "refuse": True},
    "silence": {"kind": "silence"},
    "internal error": {"kind": "error", "code": 6, "text": "an internal error"},
}


@pytest.mark.parametrize("drop", DROPS)
def test_a_drop_loses_and_doubles_nothing(tape: Tape, drop: str) -> None:
    with Gateway(tape) as gateway:
        out = Collect()
        with Running(live(gateway, silence_seconds=0.5), out):
            connected(gateway)
            gateway.fault(at=2500, **DROPS[drop])
            gateway.advance_to(START + 20 * NS)
            if drop == "refused connects":
                until(lambda: len([s for s, _ in out.store.states if s == "down"]) > 2)
                gateway.advance_to(START + 25 * NS)
                gateway.listen()
            connected(gateway, 2)
            gateway.finish()
            until(lambda: out.store.total() >= total(tape))
    assert_whole(out.store, tape)
    assert not out.store.of(Gap)
    assert len(out.store.of(Disconnect)) == 1
    # An RST also throws away what had arrived but was not read; the replay brings it again.
    assert out.store.counts["replayed"] > 0 or drop == "rst"
    first, second = gateway.sessions[0], gateway.sessions[-1]
    assert first.start_of("tbbo") is None
    assert second.start_of("tbbo") is not None


def test_many_drops_in_a_row() -> None:
    """Each where the next trade is older than the last one heard: that is what the margin is for."""
    tape = generate(disorder_ns=100_000_000)
    with Gateway(tape) as gateway:
        out = Collect()
        for i in range(12):
            gateway.fault(("eof", "rst")[i % 2], at=20 + 9 * 45 * i, torn=13 * (i % 3))
        with Running(live(gateway, resume_margin_seconds=0.5), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() >= total(tape), 20)
    assert_whole(out.store, tape)
    assert len(gateway.sessions) >= 12


def test_real_trades_through_drops(shared_data: Path) -> None:
    tape = from_dbn(shared_data / "databento" / "ESH4_tbbo_2023-12-25.dbn")
    with Gateway(tape) as gateway:
        out = Collect()
        for at in (100, 1111, 2000, 2001):
            gateway.fault("eof", at=at, torn=at % 80)
        with Running(live(gateway, symbols=("ESH4",), stype="raw_symbol"), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() >= 2973)
    assert_whole(out.store, tape)


def test_garbage_ends_the_session_not_the_feed(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        out = Collect()
        gateway.fault("records", at=1000, extra=bytes(400))
        with Running(live(gateway), out):
            connected(gateway)
            gateway.finish()
            until(lambda: out.store.total() >= total(tape))
    assert_whole(out.store, tape)
    assert "without a length" in out.store.of(Disconnect)[0].reason


def test_heartbeats_of_a_replay_do_not_run_ahead(tape: Tape) -> None:
    """While old trades are still to come, the gateway's own clock is no watermark."""
    with Gateway(tape) as gateway:
        out = Collect()
        gateway.fault("eof", at=2000, refuse=True)
        gateway.fault("heartbeat", at=2500)
        with Running(live(gateway), out):
            connected(gateway)
            gateway.advance_to(START + 20 * NS)
            until(lambda: out.store.of(Disconnect))
            gateway.advance_to(tape.end_ns)
            gateway.listen()
            until(lambda: out.store.total() >= total(tape))
    assert_whole(out.store, tape)
    assert not [c for c in out.store.of(Clock) if c.wall_ns]


def test_a_gateway_on_a_running_clock_plays_the_tape(tape: Tape) -> None:
    """`speed`: what benchmarks and demos use instead of moving the clock by hand."""
    with Gateway(tape, speed=60.0) as gateway:
        out = Collect()
        with Running(live(gateway), out):
            connected(gateway)
            gateway.begin()
            until(lambda: out.store.total() == total(tape))
    assert_whole(out.store, tape)
