"""The live source goes on where a killed one stopped, whatever each partition holds."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import numpy as np
import pytest

from services.ingest.databento_live import DatabentoLive
from services.ingest.publisher import PublisherOutput
from services.ingest.source import Grouped, Resume
from shared.bus import Bus
from shared.errors import BusBehind
from shared.frames import TICK, Rows
from shared.messages import Clock, Gap
from shared.settings import Ingest
from tests.fakes.gateway import Gateway
from tests.fakes.tape import NS, START, Tape, generate
from tests.services.ingest.collect import Collect, Crashing, Killed, Running, Store
from tests.services.ingest.live import (
    PARTITIONS,
    assert_whole,
    connected,
    expected,
    live,
    settings,
    total,
    trades_of,
)
from tests.wait import until


@pytest.fixture(scope="module")
def tape() -> Tape:
    return generate()


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

    with Gateway(tape, heartbeat_seconds=0.1) as gateway:
        for life in range(deaths + 1):
            # Frames of odd sizes and a long linger: partitions are cut at different places.
            out, resume = process(f"me{life}", Ingest(frame_records=37 + 10 * life, linger_ms=50.0 * (life < deaths)))
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
