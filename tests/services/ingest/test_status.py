"""What ingest tells of its source and its feed: whether it goes on, and since when it has brought nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest

from services.ingest import status, worker
from services.ingest.publisher import PublisherOutput
from services.ingest.source import Grouped, Output, Resume
from shared.bus import Bus, Limits
from shared.feeds import FeedState, silent, states
from shared.frames import CLOCK, TICK, TRADE, Frame
from shared.heartbeat import Beat, redis_now_ms
from shared.redis_server import EmbeddedRedis
from shared.settings import AlertSettings, Ingest, RedisSettings, Settings, Tapeline
from tests.services.ingest.test_worker import Running
from tests.wait import until

FEED = "files"


@pytest.fixture
def configured(redis_server: EmbeddedRedis, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(status, "BEAT_SECONDS", 0.05)
    return Settings(
        tapeline=Tapeline(partitions=1, namespace=bus.keys.namespace), redis=RedisSettings(url=redis_server.url)
    )


@dataclass
class Source:
    """Connected, and says nothing; hangs once `hangs` is set, until `free` is."""

    feed: str = FEED
    hangs: threading.Event = field(default_factory=threading.Event)
    free: threading.Event = field(default_factory=threading.Event)

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:
        out.connection("connected", "quiet")
        while not stop.wait(0.02):
            if self.hangs.is_set():
                self.free.wait(20)


def heart(bus: Bus) -> Beat:
    (body,) = until(lambda: bus.call("hvals", bus.keys.workers), what="a heartbeat")
    return msgspec.json.decode(body, type=Beat)


@pytest.mark.parametrize("metered", [True, False])
def test_a_source_that_waits_goes_on_and_one_that_hangs_does_not(bus: Bus, configured: Settings, metered: bool) -> None:
    source = Source()
    feed = worker.Feed(FEED, lambda _: source, True, metered=metered)
    running = Running(lambda settings, stop, _: worker.serve(settings, stop, feed), configured)
    try:
        until(lambda: heart(bus).detail == "connected", what="the feed to be connected")
        began = heart(bus).at_ms
        until(lambda: heart(bus).at_ms > began + 800, what="a quiet while")
        until(lambda: heart(bus).stalled_ms < 500, what="the source to go on")
        source.hangs.set()
        stuck = until(lambda: (h := heart(bus)).stalled_ms > 500 and h, what="the source to be named")
        assert stuck.part == "the source"
        source.free.set()
        source.hangs.clear()
        until(lambda: heart(bus).stalled_ms < 500, what="it to go on")
    finally:
        running.end()


@contextmanager
def output(bus: Bus, stop: threading.Event, linger_ms: float = 5.0) -> Iterator[PublisherOutput]:
    packing = Ingest(linger_ms=linger_ms)
    out = PublisherOutput(bus, FEED, "me@host:1:ab", 1, packing, stop, True, by_ordinal=False)
    out.attach()
    out.connection("connected")
    try:
        yield out
    finally:
        out.close()


def put(out: PublisherOutput, *kinds: int, flush: bool = True) -> None:
    rows = np.zeros(len(kinds), TICK)
    rows["kind"], rows["ts_event_ns"], rows["size"] = kinds, 1, 1
    out.ticks(Grouped(rows, np.zeros(len(kinds), np.int64), [0], [0, len(kinds)]), b"")
    if flush:
        out.flush()


def told(bus: Bus) -> FeedState:
    return states(bus)[FEED]


def heard_after(bus: Bus, out: PublisherOutput, at_ms: int) -> bool:
    out.status.write()
    return told(bus).heard_ms > at_ms


@pytest.mark.usefixtures("configured")
def test_a_feed_is_heard_when_it_brings_data_and_not_when_time_alone_moves(bus: Bus) -> None:
    with output(bus, threading.Event()) as out:
        first = told(bus).heard_ms
        assert first
        until(lambda: redis_now_ms(bus) > first, what="time to pass")
        put(out, CLOCK)
        assert not heard_after(bus, out, first)
        put(out, TRADE, CLOCK)
        assert heard_after(bus, out, first)
        second = told(bus).heard_ms
        until(lambda: redis_now_ms(bus) > second, what="time to pass")
        assert not heard_after(bus, out, second)
        out.connection("closed", "opens tomorrow")
        assert heard_after(bus, out, second), "nothing is expected of it"
        patience = Settings(alerts=AlertSettings(silent_seconds=0.001))
        assert silent(states(bus), patience, told(bus).at_ms + 1000) == []
        out.connection("connected")
        (found,) = silent(states(bus), patience, told(bus).at_ms + 1000)
        assert found.feed == FEED


@pytest.mark.usefixtures("configured")
def test_a_process_that_begins_again_does_not_make_a_silent_feed_fresh(bus: Bus) -> None:
    old = {"state": "connected", "detail": "", "at_ms": redis_now_ms(bus), "heard_ms": 1_000_000}

    def begun(**changes: Any) -> int:
        bus.call("hset", bus.keys.feeds, FEED, msgspec.json.encode(old | changes))
        with output(bus, threading.Event()):
            return told(bus).heard_ms

    assert begun() == 1_000_000
    assert begun(state="ended") > 1_000_000
    assert begun(state="down", detail="stopped") > 1_000_000, "it was away on purpose"
    assert begun(heard_ms=0) > 1_000_000
    bus.call("hset", bus.keys.feeds, FEED, b"{")
    with output(bus, threading.Event()):
        assert told(bus).state == "connected"


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("lingers", [False, True])
def test_waiting_for_a_full_bus_is_going_on(bus: Bus, lingers: bool) -> None:
    """Whether the source's thread waits, or the one that flushes what lingers."""
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(stream_max_bytes=2000, window_ms=0))
    bus.register(0, "ticks", "aggregate")
    stop = threading.Event()
    with output(small, stop, 300.0 if lingers else 5.0) as out:
        put(out, TRADE)
        small.attach(0, "other", "them")
        frame, seq = Frame("clock", 1, 0, 0, "other", b"[]" * 50), 1
        while small.publish(0, "other", "them", seq, [frame], b""):
            seq += 1
        pushing = threading.Thread(target=lambda: put(out, TRADE, flush=not lingers), daemon=True)
        pushing.start()
        until(lambda: told(bus).state == "waiting", what="the stream to be full")
        began = heart(bus).at_ms
        until(lambda: heart(bus).at_ms > began + 800, what="a while of waiting")
        until(lambda: heart(bus).stalled_ms < 500, what="the source to go on")
        stop.set()
        pushing.join(5)
        assert not pushing.is_alive()
    small.close()
