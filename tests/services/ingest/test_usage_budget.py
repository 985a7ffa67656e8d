"""A live feed against its budget: it stops, stays stopped whatever happens to it, and goes on the next UTC day."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from services.ingest.usage import STOPPED_AT_BUDGET
from services.ingest.worker import run_databento, run_synthetic, run_tardis
from shared.bus import Bus
from shared.errors import ConfigError
from shared.frames import NS, TICK, TRADE, Rows
from shared.instruments import partition_of
from shared.messages import Disconnect, Gap, Usage, decode
from shared.settings import RedisSettings, Settings, Tardis, UsageSettings, load
from shared.usage import DAY_NS, HISTORY, MIB, NOTHING, OFFSET, Totals, day_of, now_ns
from shared.usage_book import row_of
from tests.fakes.gateway import KEY, Gateway
from tests.fakes.history import History
from tests.fakes.tape import START, Tape, generate
from tests.fakes.tardis_machine import Machine
from tests.services.ingest.live import PARTITIONS, SYMBOLS, settings
from tests.services.ingest.tardis_messages import trades
from tests.wait import until

# $1 a MiB: a budget of 40 cents is stopped at 32, after 4194 trades.
TINY = UsageSettings(usd_per_mib=1.0, usd_per_hour=0.0, daily_usd=0.4)
FEED = "databento"


@pytest.fixture(scope="module")
def tape() -> Tape:
    return generate(seconds=60, per_second=100)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def configured(bus: Bus, tmp_path: Path, usage: UsageSettings, **sections: Any) -> Settings:
    base = load(environ={})
    tapeline = msgspec.structs.replace(
        base.tapeline, namespace=bus.keys.namespace, partitions=PARTITIONS,
        store=f"sqlite:///{tmp_path / 'none.db'}", state_dir=str(tmp_path / "state"),
    )  # fmt: skip
    return replace(base, tapeline=tapeline, redis=RedisSettings(url=bus.url), usage=usage, **sections)


class Running:
    """An ingest service in a thread of this process."""

    def __init__(self, run: Callable[..., None], given: Settings, *args: str) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(run, given, args), daemon=True)

    def _run(self, run: Callable[..., None], given: Settings, args: tuple[str, ...]) -> None:
        try:
            run(given, self.stop, args)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()
        assert self.error is None, self.error

    def ended(self) -> BaseException | None:
        until(lambda: not self._thread.is_alive())
        error, self.error = self.error, None
        return error


# -- what is on the bus ----------------------------------------------------------------------


def feed_state(bus: Bus, feed: str = FEED) -> dict[str, Any]:
    body = bus.call("hget", bus.keys.feeds, feed)
    return msgspec.json.decode(body) if body else {"state": "", "worker": "", "detail": ""}


def day(bus: Bus, at_ns: int, feed: str = FEED) -> Totals:
    body = bus.call("hget", bus.keys.usage(feed), day_of(at_ns))
    if body is None:
        return NOTHING
    row = row_of(body)
    return Totals(row.day_events, row.day_bytes, row.day_connected_seconds, row.day_cost_usd)


def told(bus: Bus, feed: str = FEED) -> list[Usage]:
    frames = bus.read(partition_of(feed, PARTITIONS), "usage", "0-0", 10_000)
    return [m for f in frames if f.source == feed for m in decode(f.body) if isinstance(m, Usage)]


def messages(bus: Bus, kind: type) -> list[Any]:
    """Of one partition of the feed: all of them get the same."""
    frames = bus.read(partition_of("ES", PARTITIONS), "ticks", "0-0", 10_000)
    return [m for f in frames if f.kind in ("gap", "clock", "disconnect") for m in decode(f.body) if type(m) is kind]


def trades_on(bus: Bus) -> Rows:
    frames = [f for p in range(PARTITIONS) for f in bus.read(p, "ticks", "0-0", 10_000)]
    rows = np.concatenate([np.empty(0, TICK), *(f.rows() for f in frames if f.kind in ("trade", "tick"))])
    return rows[rows["kind"] == TRADE]


def assert_adds_up(bus: Bus, feed: str = FEED) -> None:
    """The intervals of each day are its totals, and the totals only grow."""
    found = told(bus, feed)
    for name in {m.day for m in found}:
        mine = [m for m in found if m.day == name]
        last = mine[-1]
        assert sum(m.events for m in mine) == last.day_events
        assert sum(m.bytes for m in mine) == last.day_bytes
        assert sum(m.connected_seconds for m in mine) == pytest.approx(last.day_connected_seconds)
        assert sum(m.cost_usd for m in mine) == pytest.approx(last.day_cost_usd)
        assert [m.day_cost_usd for m in mine] == sorted(m.day_cost_usd for m in mine)
    assert len({m.at_ns for m in found}) == len(found)


# -- the budget ------------------------------------------------------------------------------


@contextmanager
def process(bus: Bus, gateway: Gateway, tmp_path: Path, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """`tapeline run ingest-databento`, killed in the end."""
    ours = ("TAPELINE_", "REDIS_", "DATABASE_", "DATABENTO_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    given = {
        "REDIS_URL": bus.url, "TAPELINE_NAMESPACE": bus.keys.namespace, "TAPELINE_PARTITIONS": str(PARTITIONS),
        "TAPELINE_STATE_DIR": str(tmp_path / "state"), "DATABASE_URL": f"sqlite:///{tmp_path / 'none.db'}",
        "DATABENTO_API_KEY": KEY, "DATABENTO_SYMBOLS": ",".join(SYMBOLS),
        "TAPELINE_DATABENTO_GATEWAY": "127.0.0.1", "TAPELINE_DATABENTO_PORT": str(gateway.port),
        "TAPELINE_DATABENTO_BACKOFF_MAX_SECONDS": "0.05", "TAPELINE_USAGE_USD_PER_MIB": "1.0",
        "TAPELINE_USAGE_USD_PER_HOUR": "0", "TAPELINE_USAGE_DAILY_USD": "0.4", "TAPELINE_LOG_FORMAT": "plain",
    }  # fmt: skip
    with (tmp_path / "ingest.log").open("ab") as log:
        line = [sys.executable, "-P", "-m", "shared.cli", "run", "ingest-databento"]
        running = subprocess.Popen(line, env=clean | given | environ, cwd=tmp_path, stdout=log, stderr=log)
    try:
        yield running
    finally:
        running.kill()
        running.wait(10)


@pytest.mark.heavy
def test_stopped_at_the_budget_through_kills_until_the_next_day(bus: Bus, tape: Tape, tmp_path: Path) -> None:
    """The whole process, killed as hard as can be."""
    today = now_ns()
    log = tmp_path / "ingest.log"
    with Gateway(tape) as gateway:
        with process(bus, gateway, tmp_path):
            until(lambda: gateway.live, 30, "a session")
            gateway.advance_to(START + 20 * NS)
            until(lambda: day(bus, today).events >= 1500, 20)
            assert feed_state(bus)["state"] == "connected"
            gateway.advance_to(START + 45 * NS)
            until(lambda: feed_state(bus)["state"] == "budget", 20)
            until(lambda: gateway.sessions[0].over and not gateway.live, what="the end of the connection")
            until(lambda: told(bus) and told(bus)[-1].state == "stopped")
            first = feed_state(bus)
            assert first["detail"].startswith("$0.3")
            assert "spent of $0.40 a day, stops at 80%: goes on at" in first["detail"]
        spent = day(bus, today)
        assert spent.cost_usd >= 0.32
        assert spent.bytes == gateway.sessions[0].records_bytes
        seen = trades_on(bus)
        (gone,) = messages(bus, Disconnect)
        assert gone.reason == STOPPED_AT_BUDGET
        assert not messages(bus, Gap)
        assert "is not connected: $0.3" in log.read_text()
        assert " WARNING " in log.read_text()
        assert int(bus.call("hget", bus.keys.ingest_counters(FEED), "budget_stop")) == 1
        with process(bus, gateway, tmp_path):
            until(lambda: feed_state(bus)["worker"] != first["worker"] and feed_state(bus)["state"] == "budget", 20)
            # Its heart beats, and it goes on not to connect.
            worker = feed_state(bus)["worker"]
            beat = bus.call("hget", bus.keys.workers, worker)
            until(lambda: bus.call("hget", bus.keys.workers, worker) not in (None, beat), 20)
            gateway.advance_to(START + 50 * NS)
            assert len(gateway.sessions) == 1
        assert day(bus, today).events == spent.events
        tomorrow = (DAY_NS - now_ns() % DAY_NS) // NS + 600
        with process(bus, gateway, tmp_path, **{OFFSET: str(tomorrow)}):
            until(lambda: gateway.live, 30, "a session")
            assert gateway.sessions[1].start_of("tbbo") is None, "what was missed is not asked for: it would cost"
            gateway.finish()
            until(lambda: messages(bus, Gap))
            until(lambda: int(trades_on(bus)["ts_event_ns"].max()) // NS >= START // NS + 59)
            until(lambda: told(bus)[-1].day == day_of(today + tomorrow * NS) and told(bus)[-1].state == "running")
    (gap,) = messages(bus, Gap)
    assert (gap.reason, gap.start_ns // NS) == (STOPPED_AT_BUDGET, int(seen["ts_event_ns"].max()) // NS)
    assert gap.end_ns >= START + 50 * NS
    after = trades_on(bus)
    inside = (after["ts_event_ns"] > gap.start_ns) & (after["ts_event_ns"] < gap.end_ns - 3 * NS)
    assert not inside.any()
    assert_adds_up(bus)
    assert day(bus, today).cost_usd == spent.cost_usd
    assert len({m.day for m in told(bus)}) == 2


def test_it_goes_on_at_midnight_by_itself_and_may_stop_again(
    bus: Bus, tape: Tape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Gateway(tape) as gateway:
        given = configured(bus, tmp_path, TINY, databento=settings(gateway))
        with Running(run_databento, given):
            until(lambda: gateway.live, what="a session")
            gateway.advance_to(START + 45 * NS)
            until(lambda: feed_state(bus)["state"] == "budget")
            until(lambda: gateway.sessions[0].over)
            gateway.advance_to(START + 50 * NS)
            monkeypatch.setenv(OFFSET, "86400")
            until(lambda: len(gateway.sessions) == 2 and gateway.live)
            gateway.finish()
            until(lambda: messages(bus, Gap) and day(bus, now_ns()).events > 100)
            until(lambda: row_of(bus.call("hget", bus.keys.usage(FEED), day_of(now_ns()))).skipped == "")
            assert feed_state(bus)["state"] == "connected"
    (warning,) = [r for r in caplog.records if "is not connected" in r.getMessage()]
    assert warning.levelno == logging.WARNING
    assert_adds_up(bus)
    states = [m.state for m in told(bus)]
    assert "stopped" in states
    assert states[-1] == "running"


def test_connected_time_alone_reaches_the_budget(bus: Bus, tape: Tape, tmp_path: Path) -> None:
    prices = UsageSettings(usd_per_mib=0.0, usd_per_hour=7200.0, daily_usd=1.0)  # $2 a second
    with Gateway(tape) as gateway:
        with Running(run_databento, configured(bus, tmp_path, prices, databento=settings(gateway))):
            until(lambda: feed_state(bus)["state"] == "budget")
            until(lambda: gateway.sessions[0].over)
        assert len(gateway.sessions) == 1
    last = told(bus)[-1]
    assert last.day_cost_usd >= 0.8
    assert last.day_cost_usd == pytest.approx(last.day_connected_seconds * 2)
    assert not len(trades_on(bus))
    assert_adds_up(bus)


@pytest.mark.parametrize(
    "free",
    [
        UsageSettings(usd_per_mib=100.0, daily_usd=0.0),
        UsageSettings(usd_per_mib=100.0, daily_usd=0.1, priced_feeds=("tardis",)),
    ],
)
def test_every_byte_is_counted_once_and_without_a_budget_nothing_stops(
    bus: Bus, tape: Tape, tmp_path: Path, free: UsageSettings
) -> None:
    """Trades sent twice, definitions, mappings and heartbeats are all that was received."""
    with Gateway(tape) as gateway:
        gateway.fault("eof", at=2000)
        with Running(run_databento, configured(bus, tmp_path, free, databento=settings(gateway))):
            until(lambda: gateway.live, what="a session")
            gateway.advance_to(START + 30 * NS)
            until(lambda: len(gateway.sessions) == 2 and gateway.live)
            gateway.finish()
            received = until(lambda: sum(s.records_bytes for s in gateway.sessions) > len(tape.records) * 80)
            until(lambda: day(bus, now_ns()).bytes == sum(s.records_bytes for s in gateway.sessions), what="all bytes")
    assert received
    found = day(bus, now_ns())
    assert found.events > len(tape.records)
    cost = 0 if free.daily_usd else found.bytes / MIB * 100 + found.connected_seconds / 3600
    assert found.cost_usd == pytest.approx(cost, rel=1e-9)
    counters = bus.call("hgetall", bus.keys.ingest_counters(FEED))
    assert int(counters[b"usage_bytes"]) == found.bytes
    assert b"received" not in counters
    assert feed_state(bus)["state"] in ("ended", "down")
    assert_adds_up(bus)


def test_what_others_spent_counts_and_the_store_remembers(bus: Bus, tape: Tape, tmp_path: Path) -> None:
    """A purchase of today leaves nothing for the feed: it does not connect at all."""
    row = Usage(HISTORY, day_of(now_ns()), now_ns(), 0, 0, 0.0, 0.0, 5, 80, 0.0, 0.35, 0.4)
    bus.call("hset", bus.keys.usage(HISTORY), row.day, msgspec.json.encode(row))
    with Gateway(tape) as gateway:
        with Running(run_databento, configured(bus, tmp_path, TINY, databento=settings(gateway))):
            until(lambda: feed_state(bus)["state"] == "budget")
            until(lambda: told(bus) and told(bus)[-1].state == "stopped")
        assert not gateway.sessions


def test_a_fetch_from_the_archive_must_fit_and_is_put_on_the_account(
    bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The stretch that the gateway no longer has costs 25 cents: with 32 to spend once, not twice."""
    tape, reach = generate(seconds=900, per_second=4), 60 * NS
    usage = msgspec.structs.replace(TINY, usd_per_mib=0.0)
    with Gateway(tape, replay_ns=reach) as gateway, History(tape, cost=0.25) as history:
        given = settings(
            gateway, replay_hours=reach / NS / 3600, history_gateway=history.url, history_max_usd=1.0, start=str(START)
        )
        gateway.advance_to(START + 300 * NS)
        with Running(run_databento, configured(bus, tmp_path, usage, databento=given)):
            until(lambda: history.of("timeseries.get_range") and gateway.live, 20)
            until(lambda: day(bus, now_ns()).cost_usd == 0.25)
            gateway.fault("eof", refuse=True)
            until(lambda: not gateway.live)
            gateway.advance_to(START + 600 * NS)
            gateway.listen()
            until(lambda: len(history.of("metadata.get_cost")) == 2 and gateway.live, 20)
            gateway.finish()
            until(lambda: messages(bus, Gap))
        assert len(history.of("timeseries.get_range")) == 1
    (line,) = [r.getMessage() for r in caplog.records if "cannot backfill" in r.getMessage()]
    assert "costs $0.2500 at Databento Historical, more than the $0.07 that is left of today's budget" in line
    assert "raise usage.daily_usd" in line
    assert day(bus, now_ns()).cost_usd == 0.25


def test_a_newer_process_takes_over_while_both_are_stopped(bus: Bus, tape: Tape, tmp_path: Path) -> None:
    row = Usage(HISTORY, day_of(now_ns()), now_ns(), 0, 0, 0.0, 0.0, 5, 80, 0.0, 0.35, 0.4)
    bus.call("hset", bus.keys.usage(HISTORY), row.day, msgspec.json.encode(row))
    with Gateway(tape) as gateway:
        given = configured(bus, tmp_path, TINY, databento=settings(gateway))
        with Running(run_databento, given) as old:
            until(lambda: feed_state(bus)["state"] == "budget")
            with Running(run_databento, given):
                error = old.ended()
    assert isinstance(error, ConfigError)
    assert "another process publishes" in str(error)
    assert "run one ingest-databento" in str(error)


# -- other feeds -----------------------------------------------------------------------------


def test_a_feed_that_costs_nothing_is_counted_all_the_same(bus: Bus, tmp_path: Path) -> None:
    given = configured(bus, tmp_path, TINY)
    with Running(run_synthetic, given):
        until(lambda: day(bus, now_ns(), "synthetic").events > 20)
    found = day(bus, now_ns(), "synthetic")
    assert found.events == len(trades_on(bus))
    assert found.connected_seconds > 0
    assert found.cost_usd == 0.0
    assert told(bus, "synthetic")[-1].budget_usd == 0.0
    assert_adds_up(bus, "synthetic")


def test_crypto_stops_too_and_what_it_missed_is_a_gap(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = "tardis:binance-futures"
    usage = UsageSettings(usd_per_mib=1.0, usd_per_hour=0.0, daily_usd=0.01, priced_feeds=("tardis",))
    with Machine() as machine:
        tardis = Tardis(port=machine.port, data_types=("trade",), silence_seconds=20.0, backoff_max_seconds=0.02)
        with Running(run_tardis, configured(bus, tmp_path, usage, tardis=tardis), "binance-futures"):
            until(lambda: machine.of("trade"), what="a session")
            sent = trades(0, 200)
            machine.send(sent)
            until(lambda: feed_state(bus, feed)["state"] == "budget")
            until(lambda: not machine.of("trade"), what="no connection")
            until(lambda: day(bus, now_ns(), feed).events == len(sent))
            monkeypatch.setenv(OFFSET, "86400")
            until(lambda: machine.of("trade"), what="a session")
            monkeypatch.setenv(OFFSET, "86401")
            machine.send(trades(300, 303))
            gaps = until(
                lambda: [
                    m
                    for p in range(PARTITIONS)
                    for f in bus.read(p, "ticks", "0-0", 1000)
                    if f.kind == "gap"
                    for m in decode(f.body)
                ]
            )
    assert [gap.reason for gap in gaps] == [STOPPED_AT_BUDGET]
    assert_adds_up(bus, feed)
