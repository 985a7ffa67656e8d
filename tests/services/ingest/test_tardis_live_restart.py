"""The live crypto process on a real bus: killed, started again, and what the bus holds then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from services.ingest import worker
from services.ingest.publisher import PublisherOutput
from shared.bus import Bus
from shared.errors import ConfigError
from shared.frames import TICK, TICK_FRAMES, TRADE, Frame, Rows
from shared.instruments import instrument_id, partition_of
from shared.messages import Clock, Disconnect, Gap, decode
from shared.redis_server import EmbeddedRedis
from shared.settings import RedisSettings, Settings, Tapeline, Tardis
from tests.fakes.tardis_machine import Machine
from tests.services.ingest.tardis_messages import MS, T0, trade
from tests.wait import until

PARTITIONS = 3
FEED = "tardis:binance-futures"
# Two symbols that share a partition, and one apart.
SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as made:
        yield made


@pytest.fixture
def configured(redis_server: EmbeddedRedis, bus: Bus, machine: Machine) -> Settings:
    return Settings(
        tapeline=Tapeline(partitions=PARTITIONS, namespace=bus.keys.namespace),
        redis=RedisSettings(url=redis_server.url),
        tardis=Tardis(
            port=machine.port,
            symbols=tuple(f"binance-futures:{s}" for s in SYMBOLS),
            data_types=("trade", "quote"),
            backoff_max_seconds=0.02,
        ),
    )


class Process:
    """`ingest-tardis binance-futures` in a thread."""

    def __init__(self, settings: Settings) -> None:
        self.stop, self.errors = threading.Event(), list[BaseException]()
        self.thread = threading.Thread(target=self._run, args=(settings,), daemon=True)
        self.thread.start()

    def _run(self, settings: Settings) -> None:
        try:
            worker.run_tardis(settings, self.stop, ("binance-futures",))
        except BaseException as error:  # the test looks at it
            self.errors.append(error)

    def end(self) -> None:
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def start(configured: Settings) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def make(settings: Settings = configured) -> Process:
        started.append(Process(settings))
        return started[-1]

    yield make
    for one in started:
        one.end()


def frames(bus: Bus) -> list[Frame]:
    return [f for p in range(PARTITIONS) for f in bus.read(p, "ticks", "0-0", 10**6)]


def rows_on(bus: Bus) -> Rows:
    return np.concatenate([np.empty(0, TICK), *(f.rows() for f in frames(bus) if f.kind in TICK_FRAMES)])


def numbers(bus: Bus) -> list[int]:
    rows = rows_on(bus)
    return sorted((rows[rows["kind"] == TRADE]["sequence"] - 1000).tolist())


def messages(bus: Bus, kind: type) -> list[Any]:
    """Each message once, whatever the number of partitions that have it."""
    found = [m for f in frames(bus) if f.kind == kind.__name__.lower() for m in decode(f.body)]
    return list(dict.fromkeys(found))


def some(start: int, end: int) -> list[dict[str, Any]]:
    return [trade(n, SYMBOLS[n % 3]) for n in range(start, end)]


def trade_ns(n: int) -> int:
    return T0 + n * 10 * MS


def state(bus: Bus) -> str:
    body = bus.call("hget", bus.keys.feeds, FEED)
    return str(msgspec.json.decode(body)["state"]) if body else ""


def test_a_restart_neither_doubles_a_trade_nor_hides_what_it_missed(
    bus: Bus, machine: Machine, start: Callable[..., Process]
) -> None:
    assert len({partition_of(f"binance-futures:{s[:3]}", PARTITIONS) for s in SYMBOLS}) == 2
    first = start()
    until(lambda: machine.of("trade"))
    machine.send(some(0, 400))
    until(lambda: numbers(bus) == list(range(400)))
    assert state(bus) == "connected"
    first.end()
    machine.send(some(400, 450))
    start()
    until(lambda: machine.of("trade"))
    assert not messages(bus, Gap)
    machine.send(some(300, 400))  # the exchange sends its latest again
    machine.send(some(450, 600))
    until(lambda: len(numbers(bus)) == 550)
    assert numbers(bus) == [*range(400), *range(450, 600)]
    told, gap = messages(bus, Disconnect), messages(bus, Gap)
    assert [(d.feed, d.reason) for d in told] == [(FEED, "ingest was not running")]
    assert len(gap) == 1
    # From what every partition surely has, at most a second before the newest, to the first that is new.
    assert trade_ns(399) - 10**9 <= gap[0].start_ns <= trade_ns(399)
    assert gap[0].start_ns == told[0].since_ns
    assert (gap[0].end_ns, gap[0].symbols) == (trade_ns(450), ())
    until(lambda: int(bus.call("hget", bus.keys.ingest_counters(FEED), "duplicate") or 0) == 100)


def test_the_gap_stands_before_the_first_new_trade_in_every_partition(
    bus: Bus, machine: Machine, start: Callable[..., Process]
) -> None:
    for life in range(3):
        process = start()
        until(lambda: machine.of("trade"))
        machine.send(some(100 * life, 100 * life + 60))
        until(lambda n=life: len(numbers(bus)) == 60 * (n + 1))
        process.end()
    for p in range(PARTITIONS):
        high, gaps = 0, 0
        for frame in bus.read(p, "ticks", "0-0", 10**6):
            if frame.kind == "gap":
                gap = decode(frame.body)[0]
                assert isinstance(gap, Gap)
                assert gap.start_ns <= high < gap.end_ns
                gaps += 1
            elif frame.kind in TICK_FRAMES:
                times = frame.rows()["ts_event_ns"][frame.rows()["kind"] == TRADE]
                high = max(high, *times.tolist()) if len(times) else high
        assert gaps == (2 if high else 0)


def test_a_bus_that_lost_its_tail_is_told_a_gap(
    bus: Bus, machine: Machine, start: Callable[..., Process], redis_server: EmbeddedRedis
) -> None:
    """Redis comes back without its newest entries: what was in them cannot be had again."""
    process = start()
    until(lambda: machine.of("trade"))
    machine.send(some(0, 100))
    until(lambda: numbers(bus) == list(range(100)))
    kept = {p: bus.call("dump", bus.keys.stream(p, "ticks")) for p in range(PARTITIONS)}
    producers = {p: bus.call("dump", bus.keys.producers(p)) for p in range(PARTITIONS)}
    machine.send(some(100, 200))
    until(lambda: numbers(bus) == list(range(200)))
    for p in range(PARTITIONS):
        for key, body in ((bus.keys.stream(p, "ticks"), kept[p]), (bus.keys.producers(p), producers[p])):
            bus.call("delete", key)
            if body:
                bus.call("restore", key, 0, body)
    old = machine.of("trade")[0]
    machine.send(some(200, 210))  # the first of it finds out; these are lost with it
    until(lambda: [s for s in machine.of("trade") if s is not old], 20)
    machine.send(some(210, 300))
    until(lambda: 299 in numbers(bus))
    assert numbers(bus) == [*range(100), *range(210, 300)]
    gap = messages(bus, Gap)[-1]
    assert trade_ns(99) - 10**9 <= gap.start_ns <= trade_ns(99)
    assert gap.end_ns == trade_ns(210)
    assert not process.errors


def test_instruments_and_clocks_are_those_of_one_feed(
    bus: Bus, machine: Machine, start: Callable[..., Process]
) -> None:
    start()
    until(lambda: machine.of("trade"))
    machine.send(some(0, 30))
    until(lambda: len(numbers(bus)) == 30)
    held = [m for f in frames(bus) if f.kind == "instrument" for m in decode(f.body)]
    assert {(i.id, i.feed) for i in held} == {(instrument_id("binance-futures", s), FEED) for s in SYMBOLS}
    watched = [c for c in messages(bus, Clock) if c.watched_from_ns is not None]
    assert {c.watched_from_ns for c in watched} == {T0}
    assert {c.feed for c in watched} == {FEED}
    assert {f.source for f in frames(bus)} == {FEED}


def test_two_of_one_exchange_are_refused(
    bus: Bus, machine: Machine, start: Callable[..., Process], configured: Settings
) -> None:
    first = start()
    until(lambda: machine.of("trade"))
    machine.send(some(0, 30))
    until(lambda: len(numbers(bus)) == 30)
    rival = PublisherOutput(bus.clone(), FEED, "rival", PARTITIONS, configured.ingest, threading.Event(), True)
    rival.status.write()
    for p in range(PARTITIONS):
        bus.attach(p, FEED, "rival")
    machine.send(some(30, 60))
    until(lambda: first.errors)
    assert isinstance(first.errors[0], ConfigError)
    assert f"run one ingest-{FEED} on a bus" in str(first.errors[0])
    rival.close()


@pytest.mark.parametrize("args", [(), ("binance", "okex")])
def test_it_wants_one_exchange(args: tuple[str, ...], configured: Settings) -> None:
    with pytest.raises(ConfigError, match=r"one EXCHANGE of tardis\.symbols; there are: binance-futures"):
        worker.run_tardis(configured, threading.Event(), args)


def test_wrong_settings_are_told_without_a_bus(configured: Settings) -> None:
    nowhere = Settings(redis=RedisSettings(url="redis://127.0.0.1:1"), tardis=configured.tardis)
    with pytest.raises(ConfigError, match="no symbol of bybit"):
        worker.run_tardis(nowhere, threading.Event(), ("bybit",))
