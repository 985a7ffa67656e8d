"""History through the server: the whole tape in its order, whatever breaks on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from services.ingest import worker
from services.ingest.source import Grouped, Resume
from services.ingest.tardis_decode import Decoder
from services.ingest.tardis_replay import TardisReplay
from services.ingest.tardis_route import Router
from shared.bus import Bus
from shared.errors import AuthError, ConfigError
from shared.frames import NS, TICK, TICK_FRAMES, TRADE, Rows
from shared.messages import Clock, Disconnect, Gap, Instrument
from shared.redis_server import EmbeddedRedis
from shared.settings import RedisSettings, Settings, Tapeline, Tardis
from shared.sources import parse
from tests.fakes.tardis_machine import Machine, wire_bytes
from tests.services.ingest.collect import Collect, Running
from tests.services.ingest.tardis_messages import MS, T0, book, disconnect, liquidation, quote, ticker, trade
from tests.wait import until

PARTITIONS = 3
URL = (
    "tardis://binance-futures?symbols=BTC-USDT,ETHUSDT&from=2024-06-01T12:00&to=2024-06-01T12:05&via=server"
    "&types=trade,quote,book_snapshot_5_1s,derivative_ticker,liquidation"
)
END_NS = T0 + 300 * NS


def tape(count: int = 2000) -> list[dict[str, Any]]:
    """Trades of two symbols, a book now and then, state, one disconnect; and what was not asked for."""
    found: list[dict[str, Any]] = []
    for n in range(count):
        found.append(trade(n, "ETHUSDT" if n % 3 else "BTCUSDT"))
        at = T0 + n * 10 * MS
        found += [quote(at)] * (n % 50 == 7) + [book(at)] * (n % 90 == 8) + [ticker(at)] * (n % 200 == 9)
        found += [liquidation(at)] * (n == 500) + [disconnect(at + 5 * MS)] * (n == 700)
        found += [trade(n, "XRPUSDT")] * (n % 400 == 0)
    found.append(trade(0, at_ns=END_NS + NS))
    return found


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(tape()) as made:
        yield made


class Taped(Collect):
    """Collects rows with ordinals."""

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        for g, p in enumerate(grouped.partitions):
            ordinals = grouped.ordinals[grouped.starts[g] : grouped.starts[g + 1]]
            assert (np.diff(ordinals) >= 0).all()
            self.put(p, grouped.rows[grouped.starts[g] : grouped.starts[g + 1]].copy(), cursor)


def settings(machine: Machine, **changes: Any) -> Settings:
    basis = {"port": machine.port, "backoff_max_seconds": 0.02, "silence_seconds": 5.0}
    return Settings(tapeline=Tapeline(partitions=PARTITIONS), tardis=Tardis(**(basis | changes)))


def expected() -> Taped:
    """The asked part of the tape in one go, without a server."""
    lines = [m for m in tape() if m.get("symbol") != "XRPUSDT"][:-1]
    router, out = Router("tardis-replay", PARTITIONS, 500 * MS), Taped()
    router.take(Decoder(router.symbol)([wire_bytes(line) for line in lines], 0), out, b"")
    router.finish(out, {"binance-futures": END_NS})
    return out


def same(one: Collect, other: Collect) -> None:
    assert set(one.store.rows) == set(other.store.rows)
    for p in one.store.rows:
        assert one.store.all_rows(p).tobytes() == other.store.all_rows(p).tobytes()


def test_the_whole_interval_in_the_order_of_the_server(machine: Machine) -> None:
    out, want = Taped(), expected()
    source = TardisReplay([parse(URL)], settings(machine))
    source.run(out, Resume(), threading.Event())
    same(out, want)
    assert out.store.total() == 2000
    for kind in (Gap, Disconnect, Clock):
        # The watch is told again when a further partition takes part, after which row is up to the batches.
        assert list(dict.fromkeys(out.store.of(kind))) == list(dict.fromkeys(want.store.of(kind)))
    assert len(out.store.of(Gap)) == 1
    assert out.store.of(Clock)[-1] == Clock("tardis-replay:binance-futures", END_NS, final=True)
    assert {i.symbol for i in out.store.of(Instrument)} == {"BTCUSDT", "ETHUSDT"}
    assert out.store.states[-1][0] == "ended"
    [session] = machine.sessions
    assert session.path == "/ws-replay-normalized"
    [options] = session.options
    assert (options["from"], options["to"]) == ("2024-06-01T12:00:00.000Z", "2024-06-01T12:05:00.000Z")
    assert options["symbols"] == ["BTCUSDT", "ETHUSDT"]


@pytest.mark.parametrize("fault", ["drop", "close", "stall"])
def test_a_replay_that_breaks_off_goes_on_exactly_where_it_was(machine: Machine, fault: str) -> None:
    machine.replay_faults = [(0, fault), (700, fault), (300, fault), (1500, fault)]
    out = Taped()
    changes = {"silence_seconds": 0.02} if fault == "stall" else {}
    TardisReplay([parse(URL)], settings(machine, **changes)).run(out, Resume(), threading.Event())
    same(out, expected())
    assert len(machine.sessions) >= 5
    assert len(out.store.of(Gap)) == 1  # the tape's own; ours lost nothing


def test_it_waits_for_a_server_that_is_not_there(machine: Machine) -> None:
    machine.unplug()
    out = Taped()
    with Running(TardisReplay([parse(URL)], settings(machine)), out) as running:
        until(lambda: out.store.states and out.store.states[-1][0] == "waiting")
        machine.plug()
        assert running.ended() is None
    same(out, expected())


def test_a_fast_clock_plays_the_same(machine: Machine) -> None:
    out = Taped()
    TardisReplay([parse(URL)], settings(machine), speed=1000.0).run(out, Resume(), threading.Event())
    same(out, expected())


def test_two_intervals_are_one_tape(machine: Machine) -> None:
    halves = [
        URL.replace("to=2024-06-01T12:05", "to=2024-06-01T12:01"),
        URL.replace("from=2024-06-01T12:00", "from=2024-06-01T12:01"),
    ]
    out, source = Taped(), TardisReplay([parse(u) for u in halves], settings(machine))
    source.run(out, Resume(), threading.Event())
    same(out, expected())
    assert source.tape != TardisReplay([parse(URL)], settings(machine)).tape


@pytest.mark.parametrize(
    ("text", "kind", "hint"),
    [
        ('HttpError: status code: 401, response text: {"code":100,"message":"no key"}', AuthError, "TM_API_KEY"),
        ('HttpError: status code: 400, response text: {"message":"Invalid symbols"}', ConfigError, "check exchange"),
        ("normalizeLiquidations: binance not supported", ConfigError, "normalizeLiquidations: binance"),
    ],
)
def test_refusals_end_it(machine: Machine, text: str, kind: type, hint: str) -> None:
    machine.replay_error = text
    with Running(TardisReplay([parse(URL)], settings(machine)), Taped()) as running:
        failure = running.ended()
    assert type(failure) is kind
    assert hint in str(failure)


def test_a_server_in_trouble_is_asked_again(machine: Machine) -> None:
    machine.replay_error = "HttpError: status code: 503, response text: later"
    out = Taped()
    with Running(TardisReplay([parse(URL)], settings(machine)), out) as running:
        until(lambda: out.store.counts["reconnect"] > 2)
        machine.replay_error = ""
        assert running.ended() is None
    same(out, expected())


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (URL.replace("binance-futures", "binnace"), "no exchange 'binnace'"),
        (URL.replace("ETHUSDT", ",".join(f"COIN{n}USDT" for n in range(2000))), "too many symbols"),
    ],
)
def test_what_cannot_be_asked(machine: Machine, url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TardisReplay([parse(url)], settings(machine))
    assert not machine.sessions


def held(bus: Bus) -> dict[int, Rows]:
    found = {}
    for p in range(PARTITIONS):
        rows = [f.rows() for f in bus.read(p, "ticks", "0-0", 10**6) if f.kind in TICK_FRAMES]
        found[p] = np.concatenate([np.empty(0, TICK), *rows])
    return found


def test_the_process_goes_on_after_a_kill(bus: Bus, machine: Machine, redis_server: EmbeddedRedis) -> None:
    basis = settings(machine)
    configured = replace(
        basis,
        tapeline=Tapeline(partitions=PARTITIONS, namespace=bus.keys.namespace),
        redis=RedisSettings(url=redis_server.url),
    )
    machine.replay_faults = [(900, "stall")]
    stop = threading.Event()
    first = threading.Thread(target=worker.run_tardis_replay, args=(configured, stop, ("--speed", "1000", URL)))
    first.start()
    until(lambda: sum(int((r["kind"] == TRADE).sum()) for r in held(bus).values()) > 500)
    stop.set()
    first.join(10)
    assert not first.is_alive()
    for _ in range(2):
        worker.run_tardis_replay(configured, threading.Event(), (URL,))
        want = expected()
        for p, rows in held(bus).items():
            assert rows.tobytes() == want.store.all_rows(p).tobytes()


def test_only_replays_of_the_server(machine: Machine) -> None:
    csv = "tardis://binance-futures?symbols=BTCUSDT&from=2024-06-01&to=2024-06-02"
    with pytest.raises(ConfigError, match="via=server"):
        worker.open_tardis_replay(settings(machine), (csv,))
