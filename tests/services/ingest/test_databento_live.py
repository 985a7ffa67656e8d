"""The live source against a gateway that speaks the real protocol over TCP, with every fault on order."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import databento_dbn as dbn
import numpy as np
import pytest

from services.ingest.databento_live import DatabentoLive
from services.ingest.databento_session import Dropped, Wire
from services.ingest.dedupe import Ledger
from services.ingest.definitions import from_definition
from services.ingest.normalize import RECORD, Normalizer
from services.ingest.publisher import PublisherOutput
from services.ingest.source import Grouped, Resume
from shared.bus import Bus
from shared.errors import AuthError, BusBehind, ConfigError, Unavailable
from shared.frames import CLOCK, TICK, TRADE, Rows
from shared.instruments import instrument_id
from shared.messages import Clock, Disconnect, Gap, Instrument
from shared.settings import Databento, Ingest
from tests.fakes.gateway import KEY, Gateway
from tests.fakes.tape import NS, START, Tape, from_dbn, generate
from tests.services.ingest.collect import Collect, Crashing, Killed, Running, Store
from tests.wait import until

PARTITIONS = 4
SYMBOLS = ("ES.FUT", "NQ.FUT", "CL.FUT")


@pytest.fixture(scope="module")
def tape() -> Tape:
    return generate()


def settings(gateway: Gateway, **changes: Any) -> Databento:
    basis = {
        "api_key": KEY, "gateway": "127.0.0.1", "port": gateway.port, "symbols": SYMBOLS,
        "silence_seconds": 5.0, "backoff_max_seconds": 0.02,
    }  # fmt: skip
    return Databento(**(basis | changes))


def live(gateway: Gateway, store: Store | None = None, **changes: Any) -> DatabentoLive:
    return DatabentoLive(settings(gateway, **changes), PARTITIONS, published=store.published if store else None)


def expected(tape: Tape, since: int = 0) -> dict[int, Rows]:
    """All rows of the tape by partition, normalized in one go."""
    normalizer = Normalizer("databento", PARTITIONS)
    for listing in tape.listings:
        normalizer.map(listing.native, from_definition(listing.definition(START), tape.dataset, "databento"))
    grouped = normalizer(tape.records[since:], 0)
    return {p: grouped.rows[grouped.starts[g] : grouped.starts[g + 1]] for g, p in enumerate(grouped.partitions)}


def trades_of(rows: Rows) -> Rows:
    return rows[rows["kind"] == TRADE]


def total(tape: Tape) -> int:
    return sum(len(trades_of(rows)) for rows in expected(tape).values())


def assert_whole(store: Store, tape: Tape) -> None:
    """Nothing lost, nothing doubled, each partition in the order of the tape."""
    want = expected(tape)
    assert set(store.rows) <= set(want)
    for p, rows in want.items():
        assert store.trades(p).tobytes() == trades_of(rows).tobytes(), f"partition {p}"


def connected(gateway: Gateway, sessions: int = 1) -> None:
    until(lambda: len(gateway.sessions) >= sessions and gateway.live, what="a session")


# -- a session without faults ----------------------------------------------------------------


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


# -- what cannot be recovered ----------------------------------------------------------------


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


# -- refusals --------------------------------------------------------------------------------


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


# -- restarts --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_any_instant_it_goes_on_exactly(seed: int) -> None:
    """Partitions hold different parts of the tape when the process dies; still no row is lost or doubled."""
    tape = generate(seed=seed, seconds=20, per_second=150, disorder_ns=20_000_000)
    rng = random.Random(seed)
    store = Store()
    deaths = 10
    with Gateway(tape) as gateway:
        for life in range(deaths):
            out = Crashing(store, rng.randint(20, 900), rng.random())
            resume = Resume({p: store.cursors.get(p, b"") for p in range(PARTITIONS)})
            with Running(live(gateway, store, resume_margin_seconds=0.3), out, resume) as running:
                until(lambda n=life: len(gateway.sessions) > n and (gateway.live or gateway.sessions[n].over))
                gateway.advance_to(START + 2 * (life + 1) * NS)
                until(lambda r=running: (r.error or rng.random() < 0.05) and store.cursors)
                out.dead = True
                running.stop.set()
                assert isinstance(running.ended(), Killed | None)
        with Running(live(gateway, store), Collect(store), Resume(dict(store.cursors))):
            gateway.finish()
            until(lambda: store.total() >= total(tape))
    assert_whole(store, tape)
    assert not store.of(Gap)


def test_a_restart_after_a_quiet_weekend_asks_from_the_last_heartbeat(tape: Tape) -> None:
    long = replace(tape, end_ns=tape.end_ns + 100_000 * NS)
    store = Store()
    with Gateway(long) as gateway:
        with Running(live(gateway, store), Collect(store)):
            connected(gateway)
            gateway.advance_to(tape.end_ns)
            until(lambda: store.total() == total(tape))
            gateway.advance_to(long.end_ns)
            gateway.fault("heartbeat")
            until(lambda: len(store.of(Clock)) > 1)
            until(lambda: all(b"%d" % (long.end_ns - NS) in c for c in store.cursors.values()))
        with Running(live(gateway, store), Collect(store), Resume(dict(store.cursors))):
            connected(gateway, 2)
    assert gateway.sessions[1].start_of("tbbo") == long.end_ns - 3 * NS
    assert not store.of(Gap)


def rows_on(bus: Bus) -> dict[int, Rows]:
    found = {}
    for p in range(PARTITIONS):
        rows = [f.rows() for f in bus.read(p, "ticks", "0-0", 100_000) if f.kind == "trade"]
        found[p] = trades_of(np.concatenate([np.empty(0, TICK), *rows]))
    return found


def test_on_a_real_bus_with_deaths(bus: Bus) -> None:
    tape = generate(seed=9, seconds=40, per_second=150, disorder_ns=20_000_000)
    deaths = 5

    def process(name: str, packing: Ingest) -> tuple[PublisherOutput, Resume]:
        stop = threading.Event()
        out = PublisherOutput(bus.clone(), "databento", name, PARTITIONS, packing, stop, True, by_ordinal=False)
        return out, out.attach()

    with Gateway(tape) as gateway:
        for life in range(deaths + 1):
            # Frames of odd sizes and a long linger: partitions are cut at different places.
            out, resume = process(f"me{life}", Ingest(frame_records=37 + 10 * life, linger_ms=500.0 * (life < deaths)))
            with Running(DatabentoLive(settings(gateway), PARTITIONS), out, resume) as running:
                connected(gateway, life + 1)
                before = sum(len(r) for r in rows_on(bus).values())
                gateway.advance_to(START + 6 * (life + 1) * NS)
                if life < deaths:
                    until(lambda b=before: sum(len(r) for r in rows_on(bus).values()) > b + 100)
                    # Another owner takes the feed over in the middle of it: this one is as good as dead.
                    process("next", Ingest())[0].close()
                    gateway.advance_to(START + 6 * (life + 1) * NS + NS // 2)
                    assert "another process publishes" in str(running.ended())
                else:
                    gateway.finish()
                    until(lambda: sum(len(r) for r in rows_on(bus).values()) >= total(tape), 20)
            out.close()
    want = expected(tape)
    for p, found in rows_on(bus).items():
        assert found.tobytes() == (trades_of(want[p]).tobytes() if p in want else b"")


class Forgetful(Collect):
    """After some rows, the bus turns out to have lost everything."""

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        if self.store.total() > 500:
            raise BusBehind("the bus forgot")
        super().ticks(grouped, cursor)


def test_a_bus_that_lost_everything_gets_it_again(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        source = live(gateway)
        with Running(source, Forgetful()) as running:
            connected(gateway)
            gateway.advance_to(START + 5 * NS)
            until(lambda: gateway.sessions[0].sent)
            gateway.advance_to(START + 15 * NS)
            assert isinstance(running.ended(), BusBehind)
        out = Collect()
        with Running(source, out):
            connected(gateway, 2)
            gateway.finish()
            until(lambda: out.store.total() >= total(tape))
    assert_whole(out.store, tape)
    assert out.store.of(Clock)[0].watched_from_ns == START


# -- the pieces ------------------------------------------------------------------------------


class Taken:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.trades_: list[Any] = []
        self.order: list[str] = []
        self.meta: Any = None

    def metadata(self, metadata: Any) -> None:
        self.meta = metadata

    def trades(self, records: Any) -> None:
        self.trades_.append(records.copy())
        self.order += ["t"] * len(records)

    def record(self, record: Any) -> None:
        self.order.append(type(record).__name__[0])


@pytest.mark.parametrize("chunk", [1, 7, 80, 81, 1000, 10**6])
def test_however_the_bytes_are_cut(tape: Tape, chunk: int) -> None:
    beat = bytes(dbn.SystemMsg(5, "Heartbeat", code=dbn.SystemCode.HEARTBEAT))
    definition = bytes(tape.listings[0].definition(1))
    raw = bytes(dbn.Metadata(tape.dataset, 5, None, dbn.SType.INSTRUMENT_ID, None))
    raw += definition + tape.records[:30].tobytes() + beat + beat + tape.records[30:60].tobytes() + definition

    async def feed() -> Taken:
        taken = Taken()
        wire = Wire(taken, KEY, tape.dataset, 5)
        wire.authenticated.set_result("1")
        for at in range(0, len(raw), chunk):
            piece = raw[at : at + chunk]
            wire.get_buffer(-1)[: len(piece)] = piece
            wire.buffer_updated(len(piece))
        assert not wire.failed.done()
        return taken

    taken = asyncio.run(feed())
    assert np.concatenate(taken.trades_).tobytes() == tape.records[:60].tobytes()
    assert "".join(taken.order) == "I" + 30 * "t" + "SS" + 30 * "t" + "I"
    assert taken.meta.dataset == tape.dataset


def test_what_is_not_dbn_is_refused() -> None:
    class Transport:
        def abort(self) -> None: ...

        def write(self, data: bytes) -> None: ...

    async def feed() -> None:
        wire = Wire(Taken(), KEY, "GLBX.MDP3", 5)
        wire.connection_made(Transport())  # type: ignore[arg-type]
        wire.authenticated.set_result("1")
        wire.get_buffer(-1)[:8] = b"HTTP/1.1"
        wire.buffer_updated(8)
        await wire.failed

    with pytest.raises(Dropped, match="not DBN"):
        asyncio.run(feed())


def rows(*spec: tuple[int, int]) -> Grouped:
    """Grouped rows of partition 0 from (instrument, time); instrument 0 is a clock."""
    made = np.zeros(len(spec), TICK)
    for i, (instrument, ts) in enumerate(spec):
        made[i]["instrument"], made[i]["ts_event_ns"] = instrument, ts
        made[i]["kind"] = CLOCK if instrument == 0 else TRADE
    return Grouped(made, np.zeros(len(spec), np.int64), [0], [0, len(spec)])


def test_the_ledger_leaves_out_as_many_as_are_held() -> None:
    ledger = Ledger(100)
    ledger.add(rows((1, 10), (1, 10), (2, 10), (0, 11), (1, 12)))
    ledger.expect(10)
    fresh, doubled = ledger.admit(rows((1, 10), (1, 10), (1, 10), (2, 10), (0, 11), (1, 12), (1, 12), (0, 20)))
    assert doubled == 4
    assert [(int(r["instrument"]), int(r["ts_event_ns"])) for r in fresh.rows] == [(1, 10), (1, 12), (0, 20)]
    assert fresh.starts == [0, 3]


def test_the_ledger_leaves_out_what_was_trimmed_away() -> None:
    ledger = Ledger(NS)
    ledger.restore(0, rows((1, 500_000_000), (1, 600_000_000)).rows)
    ledger.expect(0)
    fresh, doubled = ledger.admit(rows((1, 400_000_000), (1, 500_000_000), (1, 600_000_000), (1, 700_000_000)))
    assert (len(fresh.rows), doubled) == (1, 3)


def test_record_is_the_wire_layout() -> None:
    assert RECORD.itemsize == 80
    assert instrument_id("GLBX.MDP3", "ESH4") > 0
