"""The publishing side of ingest against a real Redis: nothing lost, nothing doubled, wherever it is killed."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.ingest.publisher import PublisherOutput
from services.ingest.source import Grouped, Resume
from shared.bus import Bus, Limits
from shared.errors import BusBehind, BusUnavailable, Fenced
from shared.frames import CLOCK, NS, TICK, Rows
from shared.instruments import instrument_id, partition_of
from shared.messages import Clock, Gap, Instrument, decode
from shared.redis_server import EmbeddedRedis
from shared.settings import Ingest
from tests.wait import until

FEED = "tape"
PARTITIONS = 3
T0 = 1_700_000_000 * NS


def instrument(root: str, feed: str = FEED, kind: str = "F") -> Instrument:
    symbol = f"{root}Z6" if kind == "F" else f"{root}Z6-{root}H7"
    return Instrument(instrument_id("V", symbol), "V", symbol, root, feed, kind=kind)


# Roots that fall into each of the partitions.
ROOTS = {partition_of(f"R{i}", PARTITIONS): f"R{i}" for i in range(20)}


def tape(n: int, seed: int) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Rows, the partition of each and its ordinal; partition 2 gets few, some ordinals give rows to several."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(n, TICK)
    rows["ts_event_ns"] = T0 + np.arange(n) * 1000
    rows["price"] = rng.integers(1, 1000, n)
    rows["kind"] = rng.random(n) < 0.1
    return rows, rng.choice(PARTITIONS, n, p=[0.6, 0.37, 0.03]), np.cumsum(rng.integers(1, 3, n))


def grouped(rows: Rows, parts: np.ndarray, ordinals: np.ndarray) -> Grouped:
    order = np.argsort(parts, kind="stable")
    used, counts = np.unique(parts, return_counts=True)
    return Grouped(rows[order], ordinals[order], used.tolist(), [0, *np.cumsum(counts).tolist()])


def push(out: PublisherOutput, resume: Resume, data: tuple[Rows, Any, Any], cuts: list[int]) -> None:
    """A source: instruments, a clock, chunks between cuts, a message now and then, the final clock."""
    rows, parts, ordinals = data
    starts = [0, *cuts]
    at = 0
    if resume.cursors and all(resume.cursors.values()):
        at = min(msgspec.json.decode(c)["chunk"] for c in resume.cursors.values())
    out.instruments([instrument(root) for root in ROOTS.values()])
    out.broadcast(Clock(FEED, T0, watched_from_ns=T0))
    for i in range(at, len(starts)):
        end = starts[i + 1] if i + 1 < len(starts) else len(rows)
        piece = slice(starts[i], end)
        out.ticks(grouped(rows[piece], parts[piece], ordinals[piece]), msgspec.json.encode({"chunk": i}))
        if i % 5 == 4:
            out.broadcast(Clock(FEED, int(rows["ts_event_ns"][end - 1])))
    out.flush()
    out.broadcast(Clock(FEED, T0 + NS, final=True))


def contents(bus: Bus, feed: str = FEED) -> dict[int, bytes]:
    """All rows of each partition's stream, in order."""
    found: dict[int, bytes] = {}
    for p in range(PARTITIONS):
        frames = bus.read(p, "ticks", "0-0", 100_000)
        assert [f.seq for f in frames if f.source == feed] == list(range(1, len(frames) + 1))
        found[p] = b"".join(f.body for f in frames if f.kind == "trade")
    return found


def wanted(data: tuple[Rows, Any, Any]) -> dict[int, bytes]:
    rows, parts, _ = data
    return {p: rows[parts == p].tobytes() for p in range(PARTITIONS)}


class Killed(Exception):
    """The process is gone."""


class MortalBus(Bus):
    """Dies at chosen publishing calls, before or after they happened."""

    fates: Iterator[str]

    def publish(self, *args: Any, **kwargs: Any) -> bool:
        fate = next(self.fates, "")
        if fate == "before":
            raise Killed
        done = super().publish(*args, **kwargs)
        if fate == "after":
            raise Killed
        return done


@pytest.fixture
def url(redis_server: EmbeddedRedis) -> str:
    return redis_server.url


def output(
    bus: Bus, owner: str = "one", *, live: bool = False, records: int = 7, linger: float = 5, **more: Any
) -> Any:
    return PublisherOutput(
        bus, FEED, owner, PARTITIONS, Ingest(linger, records), more.pop("stop", threading.Event()), live, **more
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 5),
    records=st.sampled_from([1, 3, 7, 50, 1000]),
    cuts=st.lists(st.integers(1, 399), unique=True, max_size=12).map(sorted),
    fates=st.lists(st.tuples(st.integers(0, 25), st.sampled_from(["before", "after"])), max_size=6),
    live=st.booleans(),
)
def test_killed_anywhere_the_streams_are_the_same(
    url: str, seed: int, records: int, cuts: list[int], fates: list[tuple[int, str]], live: bool
) -> None:
    data = tape(400, seed)
    bus = MortalBus(url, f"t{uuid.uuid4().hex[:10]}")
    for life in range(len(fates) + 1):
        bus.fates = iter([""] * fates[life][0] + [fates[life][1]]) if life < len(fates) else iter(())
        out = output(bus, f"owner{life}", live=live, records=records, linger=0)
        try:
            push(out, out.attach(), data, cuts)
            break
        except Killed:
            out._closed.set()
    assert contents(bus) == wanted(data)
    bus.close()


def test_frames_are_full_and_counted(bus: Bus) -> None:
    data = tape(1000, 1)
    out = output(bus, records=100)
    push(out, out.attach(), data, list(range(50, 1000, 50)))
    frames = [f for f in bus.read(0, "ticks", "0-0", 1000) if f.kind == "trade"]
    rows = data[0][data[1] == 0]
    assert sum(f.count for f in frames) == int((rows["kind"] == 0).sum()) < len(rows)
    assert max(len(f.body) for f in frames) == 100 * TICK.itemsize
    kinds = [f.kind for f in bus.read(1, "ticks", "0-0", 3)]
    assert kinds == ["instrument", "clock", "trade"]
    out.close()


def test_the_older_process_is_fenced(bus: Bus) -> None:
    data = tape(100, 2)
    old, new = output(bus, "old"), output(bus, "new")
    old.attach()
    new.attach()
    with pytest.raises(Fenced):
        push(old, Resume(), data, [])
    push(new, new.attach(), data, [])
    assert contents(bus) == wanted(data)
    assert old.status.rival(0)
    old.close()
    new.close()
    assert not old.status.rival(0)


def test_a_bus_that_forgot_everything_is_filled_again(bus: Bus) -> None:
    data = tape(200, 3)
    out = output(bus)
    push(out, out.attach(), data, [100])
    bus.client.delete(*list(bus.client.scan_iter(f"{bus.keys.namespace}:*")))
    with pytest.raises(BusBehind):
        out.broadcast(Clock(FEED, T0 + 2 * NS))
    with pytest.raises(BusBehind):
        out.flush()
    push(out, out.attach(), data, [100])
    assert contents(bus) == wanted(data)
    out.close()


def test_a_bus_that_forgot_its_tail_gets_it_again(bus: Bus) -> None:
    data, cuts = tape(400, 8), list(range(20, 400, 20))
    out = output(bus)
    calls = 0
    saved: dict[bytes, bytes] = {}
    real = bus.publish

    def publish(*args: Any, **kwargs: Any) -> bool:
        nonlocal calls, saved
        calls += 1
        if calls == 15:
            saved = {key: bus.client.dump(key) for key in bus.client.scan_iter(f"{bus.keys.namespace}:*")}
        if calls == 30:
            for key, value in saved.items():
                bus.client.restore(key, 0, value, replace=True)
        return real(*args, **kwargs)

    bus.publish = publish  # type: ignore[method-assign]
    with pytest.raises(BusBehind):
        push(out, out.attach(), data, cuts)
    push(out, out.attach(), data, cuts)
    assert contents(bus) == wanted(data)
    out.close()


def test_redis_killed_under_the_feed(bus: Bus, redis_server: EmbeddedRedis) -> None:
    data = tape(4000, 4)
    out = output(bus)
    resume = out.attach()
    thread = threading.Thread(target=push, args=(out, resume, data, list(range(10, 4000, 10))))
    thread.start()
    for _ in range(3):
        until(lambda: out.status.trades > 0)
        redis_server.kill()
        redis_server.start()
    thread.join(60)
    assert not thread.is_alive()
    assert contents(bus) == wanted(data)
    out.close()


def test_a_full_stream_waits_and_tells(url: str) -> None:
    bus = Bus(url, f"t{uuid.uuid4().hex[:10]}", limits=Limits(stream_max_bytes=20_000, window_ms=0))
    bus.register(0, "ticks", "slow")
    data = tape(2000, 5)
    data[1][:] = 0
    out = output(bus, records=10)
    resume = out.attach()
    thread = threading.Thread(target=push, args=(out, resume, data, []))
    thread.start()

    def state() -> str:
        body = bus.call("hget", bus.keys.feeds, FEED)
        return str(msgspec.json.decode(body)["state"]) if body else ""

    until(lambda: state() == "waiting")
    got, position = b"", "0-0"
    while len(got) < 2000 * TICK.itemsize:
        for frame in bus.read(0, "ticks", position, 5, block_ms=2000):
            got += frame.body if frame.kind == "trade" else b""
            position = frame.id
        bus.done_with(0, "ticks", "slow", position)
    thread.join(10)
    assert got == data[0].tobytes()
    assert state() != "waiting"
    out.close()
    bus.close()


def test_stopped_while_full_it_ends_at_once_and_resumes(url: str) -> None:
    bus = Bus(url, f"t{uuid.uuid4().hex[:10]}", limits=Limits(stream_max_bytes=20_000, window_ms=0))
    data = tape(1000, 6)
    stop = threading.Event()
    out = output(bus, stop=stop)
    resume = out.attach()
    thread = threading.Thread(target=push, args=(out, resume, data, list(range(5, 1000, 5))))
    thread.start()
    until(lambda: out.status._why_waiting)
    stop.set()
    thread.join(2)
    assert not thread.is_alive()
    out.close()
    roomy = Bus(url, bus.keys.namespace)
    again = output(roomy, "two")
    push(again, again.attach(), data, list(range(5, 1000, 5)))
    assert contents(roomy) == wanted(data)
    again.close()
    bus.close()
    roomy.close()


def test_stopped_without_redis_it_ends_at_once(bus: Bus, redis_server: EmbeddedRedis) -> None:
    stop = threading.Event()
    out = output(bus, stop=stop)
    out.attach()
    redis_server.kill()
    thread = threading.Thread(target=push, args=(out, Resume(), tape(100, 1), []))
    thread.start()
    until(lambda: out.status._why_waiting)
    stop.set()
    thread.join(3)
    assert not thread.is_alive()
    with pytest.raises(BusUnavailable):
        out.attach()
    redis_server.start()
    out.close()


def test_live_rows_linger_no_longer_than_allowed(bus: Bus) -> None:
    out = output(bus, live=True, records=1000, linger=50)
    out.attach()
    rows = np.zeros(3, TICK)
    rows["ts_event_ns"] = T0
    for i in range(3):
        out.ticks(Grouped(rows[i : i + 1], np.array([i]), [0], [0, 1]), b"{}")
    first = bus.read(0, "ticks", "0-0", 10)
    assert [f.count for f in first] == [1]  # nothing was published for long: no linger
    began = time.monotonic()
    frames = until(lambda: bus.read(0, "ticks", first[-1].id, 10))
    assert [f.count for f in frames] == [2]
    assert time.monotonic() - began < 1
    out.close()


def test_another_tape_begins_at_its_beginning(bus: Bus) -> None:
    first = output(bus, tape="a")
    push(first, first.attach(), tape(100, 1), [])
    second = output(bus, "two", tape="b")
    assert second.attach().cursors == {}
    push(second, second.attach(), tape(100, 2), [])
    third = output(bus, "three", tape="b")
    assert set(third.attach().cursors) == {0, 1, 2}
    assert contents(bus) == {p: wanted(tape(100, 1))[p] + wanted(tape(100, 2))[p] for p in range(PARTITIONS)}
    for out in (first, second, third):
        out.close()


def test_without_ordinals_the_cursor_is_the_sources(bus: Bus) -> None:
    out = output(bus, by_ordinal=False)
    out.attach()
    rows = np.zeros(2, TICK)
    rows["ts_event_ns"] = [T0, T0 + 1]
    for _ in range(2):
        out.ticks(Grouped(rows, np.zeros(2, np.int64), [1], [0, 2]), b"any bytes")
    out.flush()
    again = output(bus, "two", by_ordinal=False)
    assert again.attach().cursors == {1: b"any bytes"}
    assert len(again.published(1, 0)) == 4
    out.close()
    again.close()


def test_instruments_go_where_their_root_lives_once(bus: Bus) -> None:
    out = output(bus)
    out.attach()
    one = instrument(ROOTS[1])
    out.instruments([one, instrument(ROOTS[1], kind="S")])
    out.instruments([one])
    out.broadcast(Gap(FEED, T0, T0 + 1, "test"))
    frames = bus.read(1, "ticks", "0-0", 10)
    assert [f.kind for f in frames] == ["instrument", "gap"]
    assert decode(frames[0].body) == [one]
    assert bus.last_id(0, "ticks") == bus.last_id(2, "ticks") == "0-0"
    assert bus.call("hkeys", bus.keys.instruments(1)) == [str(one.id).encode()]
    # A new process knows from the bus where this feed has instruments.
    again = output(bus, "two")
    again.attach()
    again.broadcast(Clock(FEED, T0))
    assert bus.read(1, "ticks", "0-0", 10)[-1].kind == "clock"
    assert bus.last_id(0, "ticks") == "0-0"
    out.close()
    again.close()


def test_published_reads_back_to_an_instant(bus: Bus) -> None:
    out = output(bus, records=10)
    rows, parts, ordinals = tape(2000, 7)
    parts[:] = 1
    push(out, out.attach(), (rows, parts, ordinals), [])
    bus.call("xadd", bus.keys.stream(1, "ticks"), {"hello": "somebody's stray entry"})
    for since in (0, int(rows["ts_event_ns"][1234]), T0 + NS):
        expected = rows[(rows["ts_event_ns"] >= since) & (rows["kind"] != CLOCK)]
        assert out.published(1, since).tobytes() == expected.tobytes()
    assert len(out.published(0, 0)) == 0
    out.close()


def test_counters_and_state(bus: Bus) -> None:
    out = output(bus)
    out.attach()
    out.connection("connected", "somewhere")
    out.count("spread", 3)
    out.count("spread", 2, usage_bytes=160)
    out.flush()
    assert bus.call("hgetall", bus.keys.ingest_counters(FEED)) == {b"spread": b"5", b"usage_bytes": b"160"}
    state = msgspec.json.decode(bus.call("hget", bus.keys.feeds, FEED))
    assert (state["state"], state["detail"]) == ("connected", "somewhere")
    assert bus.call("hexists", bus.keys.workers, "one")
    out.close()
    assert not bus.call("hexists", bus.keys.workers, "one")
