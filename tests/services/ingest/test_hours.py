"""Market hours: connected in the sessions of a calendar only; time goes on for the consumers, and nothing is a gap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.ingest.worker import run_databento, run_tardis
from shared.bus import Bus
from shared.errors import ConfigError
from shared.frames import NS, ns_of
from shared.messages import Clock, Disconnect, Gap, decode
from shared.settings import Databento, RedisSettings, Tardis, UsageSettings, load
from shared.usage import OFFSET
from tests.fakes.gateway import KEY, Gateway
from tests.fakes.tape import Tape, generate
from tests.fakes.tardis_machine import Machine
from tests.services.ingest.live import PARTITIONS, settings
from tests.services.ingest.tardis_messages import trade
from tests.services.ingest.test_usage_budget import Running, configured, feed_state, messages, trades_on
from tests.wait import until

CALENDAR = "CME Globex Equity"
CLOSE, OPEN = ns_of("2023-12-26T22:00:00Z"), ns_of("2023-12-26T23:00:00Z")
FREE = UsageSettings(priced_feeds=())
Wall = Callable[[int], None]


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    """Moves the wall clock of accounting and market hours to an instant."""
    return lambda at_ns: monkeypatch.setenv(OFFSET, str((at_ns - time.time_ns()) / NS))


@pytest.fixture(scope="module")
def tape() -> Tape:
    """The last half minute of a session and a little more, and the first minute of the next one."""
    ends = generate(seconds=40, per_second=20, start_ns=CLOSE - 30 * NS)
    begins = generate(seed=2, seconds=60, per_second=20, start_ns=OPEN)
    return replace(
        ends, records=np.concatenate([ends.records, begins.records]), start_ns=CLOSE - 30 * NS, end_ns=begins.end_ns
    )


def hours(bus: Bus, tmp_path: Path, gateway: Gateway, **more: Any) -> Any:
    given = settings(gateway, hours=CALENDAR, start=str(CLOSE - 30 * NS), **more)
    return configured(bus, tmp_path, FREE, databento=given)


def newest(bus: Bus) -> int:
    rows = trades_on(bus)
    return int(rows["ts_event_ns"].max()) if len(rows) else 0


def to_the_end(bus: Bus, gateway: Gateway, wall: Wall) -> None:
    """The session ends, with its last trades and a heartbeat behind it."""
    until(lambda: gateway.live, what="a session")
    gateway.advance_to(CLOSE + 20 * NS)
    gateway.fault("heartbeat")
    until(lambda: any(c.watermark_ns >= CLOSE + 5 * NS for c in messages(bus, Clock)))
    wall(CLOSE + 30 * NS)
    assert feed_state(bus)["state"] == "connected"
    wall(CLOSE + 61 * NS)
    until(lambda: feed_state(bus)["state"] == "closed")
    until(lambda: not gateway.live)


def test_only_in_session_and_time_goes_on(bus: Bus, tape: Tape, tmp_path: Path, wall: Wall) -> None:
    wall(CLOSE - 10 * NS)
    with Gateway(tape) as gateway, Running(run_databento, hours(bus, tmp_path, gateway)):
        to_the_end(bus, gateway, wall)
        assert feed_state(bus)["detail"] == f"{CALENDAR} is closed: opens at 2023-12-26T23:00:00Z"
        until(lambda: any(c.watermark_ns == CLOSE for c in messages(bus, Clock)))
        wall(CLOSE + 1800 * NS)
        until(lambda: messages(bus, Clock)[-1].watermark_ns >= CLOSE + 1800 * NS)
        gateway.advance_to(OPEN)
        assert len(gateway.sessions) == 1
        wall(OPEN)
        until(lambda: len(gateway.sessions) == 2 and gateway.live)
        gateway.finish()
        until(lambda: newest(bus) >= OPEN + 59 * NS)
        assert feed_state(bus)["state"] == "connected"
    assert gateway.sessions[1].start_of("tbbo") == OPEN - 2 * NS
    assert not messages(bus, Gap)
    assert not messages(bus, Disconnect)
    assert max(c.watermark_ns for c in messages(bus, Clock) if c.watermark_ns < OPEN + NS) <= OPEN


def test_a_restart_while_the_market_is_closed(bus: Bus, tape: Tape, tmp_path: Path, wall: Wall) -> None:
    wall(CLOSE - 10 * NS)
    with Gateway(tape) as gateway:
        with Running(run_databento, hours(bus, tmp_path, gateway)):
            to_the_end(bus, gateway, wall)
        with Running(run_databento, hours(bus, tmp_path, gateway)):
            until(lambda: feed_state(bus)["state"] == "closed")
            assert len(gateway.sessions) == 1
            gateway.advance_to(OPEN + 5 * NS)  # what begins before we are there is asked for
            wall(OPEN + 5 * NS)
            until(lambda: len(gateway.sessions) == 2 and gateway.live)
            gateway.finish()
            until(lambda: newest(bus) >= OPEN + 59 * NS)
    assert gateway.sessions[1].start_of("tbbo") == OPEN - 2 * NS
    found = trades_on(bus)
    spreads = np.isin(tape.records["instrument_id"], (42001, 42002))
    assert len(found) == int((~spreads).sum())
    assert not messages(bus, Gap)


def test_an_end_that_was_not_seen_is_asked_for_at_the_next_opening(
    bus: Bus, tape: Tape, tmp_path: Path, wall: Wall
) -> None:
    wall(CLOSE - 20 * NS)
    with Gateway(tape) as gateway, Running(run_databento, hours(bus, tmp_path, gateway)):
        until(lambda: gateway.live, what="a session")
        gateway.advance_to(CLOSE - 10 * NS)
        until(lambda: newest(bus) >= CLOSE - 11 * NS)
        gateway.fault("eof", refuse=True)
        until(lambda: feed_state(bus)["state"] == "down")
        gateway.advance_to(OPEN + NS)
        wall(CLOSE + 1800 * NS)
        until(lambda: feed_state(bus)["state"] == "closed")
        assert not any(c.watermark_ns >= CLOSE for c in messages(bus, Clock))
        gateway.listen()
        wall(OPEN + NS)
        until(lambda: len(gateway.sessions) == 2 and gateway.live)
        gateway.finish()
        until(lambda: newest(bus) >= OPEN + 59 * NS)
    start = gateway.sessions[1].start_of("tbbo")
    assert start is not None
    assert start < CLOSE - 10 * NS
    spreads = np.isin(tape.records["instrument_id"], (42001, 42002))
    assert len(trades_on(bus)) == int((~spreads).sum())
    assert not messages(bus, Gap)


def test_an_unknown_calendar_is_told_before_redis_is_there() -> None:
    base, stop = replace(load(environ={}), redis=RedisSettings(url="redis://127.0.0.1:1/0")), threading.Event()
    databento = replace(base, databento=Databento(api_key=KEY, hours="NYSEE"))
    with pytest.raises(ConfigError, match=r"unknown market calendar 'NYSEE' in databento\.hours"):
        run_databento(databento, stop, ())
    tardis = replace(base, tardis=Tardis(hours="NYSEE"))
    with pytest.raises(ConfigError, match=r"unknown market calendar 'NYSEE' in tardis\.hours"):
        run_tardis(tardis, stop, ("binance-futures",))


def test_crypto_in_hours_misses_only_what_came_since_the_opening(bus: Bus, tmp_path: Path, wall: Wall) -> None:
    wall(CLOSE - 10 * NS)
    feed = "tardis:binance-futures"
    with Machine() as machine:
        tardis = Tardis(port=machine.port, data_types=("trade",), silence_seconds=20.0, hours=CALENDAR)
        with Running(run_tardis, configured(bus, tmp_path, FREE, tardis=tardis), "binance-futures"):
            until(lambda: machine.of("trade"), what="a session")
            machine.send([trade(n, at_ns=CLOSE - 5 * NS + n * NS) for n in range(8)])
            until(lambda: len(trades_on(bus)) == 8)
            wall(CLOSE + 61 * NS)
            until(lambda: feed_state(bus, feed)["state"] == "closed")
            until(lambda: not machine.of("trade"), what="no connection")
            wall(OPEN)
            until(lambda: machine.of("trade"), what="a session")
            machine.send([trade(20, at_ns=OPEN + 2 * NS)])
            until(lambda: len(trades_on(bus)) == 9)
    frames = [f for p in range(PARTITIONS) for f in bus.read(p, "ticks", "0-0", 10_000) if f.kind == "gap"]
    gaps = [m for f in frames for m in decode(f.body)]
    assert [(gap.start_ns, gap.end_ns) for gap in gaps if isinstance(gap, Gap)] == [(OPEN, OPEN + 2 * NS)]
