"""The stage in a real worker on a real bus: killed between steps, it goes on where it was."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from services.pressure import greeks, worker
from services.pressure.worker import PressureStage
from shared.bus import Bus
from shared.errors import ConfigError
from shared.frames import UNREADABLE, Frame, reason_of, unreadable
from shared.messages import Pressure, PressureRollup, decode
from shared.settings import Settings, load
from shared.worker import Worker
from tests.services.pressure.market import (
    FEED,
    begin,
    clock,
    config,
    emissions,
    frame,
    future,
    option,
    play,
    trade,
)
from tests.wait import until

CHAIN = [option(20_000.0 + 25 * k, t) for k in range(60) for t in "CP"]


@pytest.fixture
def settings(bus: Bus) -> Settings:
    base = load(environ={})
    return replace(
        base,
        tapeline=msgspec.structs.replace(base.tapeline, partitions=1, namespace=bus.keys.namespace),
        redis=msgspec.structs.replace(base.redis, lease_seconds=1.0, url=bus.url),
        pressure=msgspec.structs.replace(base.pressure, greeks=False),
    )


def tape() -> list[Frame]:
    rng = np.random.default_rng(3)
    at = np.sort(rng.integers(0, 1500, 4000))
    late = np.where(rng.random(4000) < 0.02, rng.integers(0, 100, 4000), 0)
    some = [
        trade(float(max(t - back, 0)), float(p) / 4, float(s), int(d), CHAIN[int(i)])
        for t, back, p, s, d, i in zip(
            at, late, rng.integers(1, 80, 4000), rng.integers(1, 150, 4000), rng.integers(-1, 2, 4000),
            rng.integers(0, len(CHAIN), 4000), strict=True,
        )
    ]  # fmt: skip
    unknown = option(symbol="Q1AM6 C1")
    some.insert(700, trade(float(at[700]), who=unknown))
    ticks = [frame(*some[k : k + 40]) for k in range(0, len(some), 40)]
    broken = [unreadable("test", b"raw"), Frame("clock", 1, 0, 0, FEED, b"{"), Frame("trade", 1, 0, 0, FEED, b"odd")]
    return [*begin(*CHAIN, future()), *ticks[:50], *broken, *ticks[50:], clock(1500)]


def taken(bus: Bus) -> bytes | None:
    fields: bytes | None = bus.call("hget", bus.keys.meta(0, "pressure"), "pos")
    return fields


def test_over_the_bus_with_restarts(bus: Bus, settings: Settings) -> None:
    bus.attach(0, FEED, "me")
    frames = tape()
    seq = 0

    def publish(some: list[Frame]) -> None:
        nonlocal seq
        assert bus.publish(0, FEED, "me", seq + 1, some, b"")
        seq += len(some)

    def last() -> str:
        return bus.call("xrevrange", bus.keys.stream(0, "ticks"), count=1)[0][0].decode()

    for part in (frames[:40], frames[40:80], frames[80:]):
        stop = threading.Event()
        running = Worker(bus.clone(), PressureStage(settings), settings, stop)
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        publish(part)
        wanted = last()
        until(lambda wanted=wanted: (taken(bus) or b"").decode() == wanted, 20, "the worker to take all")
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
    got = bus.read(0, "pressure", "0-0", 10_000)
    want = play([f for f in frames if f.kind != UNREADABLE and f.body not in (b"{", b"odd")], max_lateness_sec=120)
    expected: list[Any] = []
    for one in want:
        expected += [*one.rows, one.rollup] if hasattr(one, "rollup") else [one.reason]
    received: list[Any] = []
    for f in got:
        received += [reason_of(f)] if f.kind == UNREADABLE else decode(f.body)
    assert len(emissions(want)) > 15
    assert [m if isinstance(m, str) else msgspec.structs.replace(m, timestamp_out_ns=0) for m in received] == expected
    assert all(m.timestamp_out_ns > 0 for m in received if isinstance(m, Pressure | PressureRollup))
    assert [f.seq for f in got] == list(range(1, len(got) + 1))
    assert {f.kind for f in got} == {"pressure", "pressure_rollup", UNREADABLE}
    counted = msgspec.json.decode(bus.call("hget", bus.keys.state(0, "pressure"), "counters"))
    assert counted["undefinable"] == 1
    assert counted["trades"] > 3900


def test_other_settings_end_the_worker(bus: Bus, settings: Settings) -> None:
    core = PressureStage(settings).open({})
    fields = core.step(begin()).changes
    other = replace(settings, pressure=msgspec.structs.replace(settings.pressure, window_seconds=600))
    with pytest.raises(ConfigError, match=r"pressure.window_seconds 300 and aggregate.max_lateness_seconds 120"):
        PressureStage(other).open(fields)


def test_the_service_says_once_that_there_are_no_greeks(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(greeks, "available", lambda: False)
    stop = threading.Event()
    stop.set()
    with caplog.at_level(logging.WARNING):
        worker.run(replace(settings, pressure=msgspec.structs.replace(settings.pressure, greeks=True)), stop, ())
        worker.run(settings, stop, ())
    said = [r.message for r in caplog.records if "greeks" in r.message]
    assert len(said) == 1
    assert "pip install tapeline[greeks]" in said[0]


def test_the_stages_config_is_that_of_the_settings() -> None:
    base = load(environ={"TAPELINE_PRESSURE_BLOCK_SIZE": "NQ=7", "TAPELINE_PRESSURE_RATE": "0.04"})
    made = PressureStage(base)._config
    assert (made.window_sec, made.max_lateness_sec, made.wait_sec) == (300, 120, 60)
    assert (made.block_size, made.block_size_default, made.greeks, made.rate) == ({"NQ": 7.0}, 100.0, True, 0.04)
    assert made.sessions("GLBX.MDP3", "NQ").shape[1] == 2
    assert config().window_sec == 300
