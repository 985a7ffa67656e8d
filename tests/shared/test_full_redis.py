"""A Redis at its maxmemory (noeviction) is back-pressure: publishing waits, everything that empties the bus goes on."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from shared.bus import Bus, Step
from shared.errors import BusUnavailable
from shared.frames import Frame
from shared.heartbeat import beat, living
from shared.redis_server import EmbeddedRedis
from tests.e2e.test_up import environ
from tests.shared.test_cli import tapeline
from tests.wait import until

PARTITIONS = range(8)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own."""
    made = EmbeddedRedis(tmp_path / "redis", appendonly=False)
    made.start()
    yield made
    made.stop()


def limit(bus: Bus, spare: int | None) -> None:
    """Let Redis hold so many bytes more than it does; None: any number."""
    used = int(bus.call("info", "memory")["used_memory"])
    bus.call("config_set", "maxmemory-policy", "noeviction")
    bus.call("config_set", "maxmemory", 0 if spare is None else max(1, used + spare))


def frames(first: int, count: int) -> list[Frame]:
    return [Frame("clock", 1, n, n + 1, "test", b"x" * 100) for n in range(first, first + count)]


def test_only_publishing_is_refused_and_nothing_of_it_is_written(server: EmbeddedRedis) -> None:
    bus = Bus(server.url)
    bus.attach(0, "feed", "me")
    assert bus.publish(0, "feed", "me", 1, frames(1, 40), b"c1")
    bus.register(0, "ticks", "aggregate")
    before = bus.call("hgetall", bus.keys.producers(0))
    limit(bus, -1)

    with pytest.raises(BusUnavailable, match=r"^Redis at .* is at its maxmemory and takes nothing more: raise"):
        bus.publish(0, "feed", "me", 41, frames(41, 2), b"c2")
    assert bus.call("hgetall", bus.keys.producers(0)) == before
    assert bus.call("xlen", bus.keys.stream(0, "ticks")) == 40
    with pytest.raises(BusUnavailable, match="maxmemory"):
        bus.call("set", "anything", "else")

    beat(bus, "worker", "aggregate")
    assert [b.worker for b in living(bus, 5000)] == ["worker"]
    token = bus.acquire(0, "aggregate", "worker", 5000)
    assert token is not None
    assert bus.renew(0, "aggregate", token, 5000)
    last = bus.last_id(0, "ticks")
    step = Step(token, "aggregate", "0-0", last, 40, 41, 1, {"state": b"s" * 1000}, (), {"candles": frames(1, 1)})
    assert bus.commit(0, "ticks", step)
    bus.done_with(0, "candles", "sink", bus.last_id(0, "candles"))

    bus.limits = type(bus.limits)(window_ms=0)
    assert bus.trim(0, "ticks") > 0
    bus.release(0, "aggregate", token)

    limit(bus, None)
    assert bus.publish(0, "feed", "me", 41, frames(41, 2), b"c2")
    bus.close()


def held(bus: Bus, key: str, field: str) -> int:
    """A counter of the stream `ticks` (info) or of the aggregate stage (meta), over all partitions."""
    names = [bus.keys.info(p, "ticks") if key == "info" else bus.keys.meta(p, "aggregate") for p in PARTITIONS]
    return sum(int(bus.call("hget", name, field) or 0) for name in names)


def done(bus: Bus, partition: int) -> bool:
    """Whether the sink has stored every candle of a partition."""
    positions = bus.call("hvals", bus.keys.consumers(partition, "candles"))
    last = bus.last_id(partition, "candles").encode()
    return bool(positions) and all(position == last for position in positions)


@pytest.mark.heavy
def test_a_feed_waits_with_one_line_until_there_is_room(server: EmbeddedRedis, tmp_path: Path) -> None:
    trades = 20_000
    tape, db = tmp_path / "tape.dbn", tmp_path / "t.db"
    assert tapeline("generate", str(tape), "--trades", str(trades), "--seed", "3", cwd=tmp_path).returncode == 0
    bus = Bus(server.url)
    limit(bus, 1_000_000)
    env = environ(tmp_path, REDIS_URL=server.url, TAPELINE_STORE=f"sqlite:///{db}", TAPELINE_METRICS_PORT="0")
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for args in (["aggregate"], ["sink-sqlite"], ["ingest-files", str(tape)]):
            with (tmp_path / f"{args[0]}.log").open("wb") as log:
                running[args[0]] = subprocess.Popen(
                    [sys.executable, "-P", "-m", "shared.cli", "run", *args], cwd=tmp_path, env=env, stderr=log
                )
        feed = running["ingest-files"]

        def said(text: str) -> bool:
            assert all(p.poll() in (None, 0) for p in running.values()), "a worker failed"
            return text in (tmp_path / "ingest-files.log").read_text()

        until(lambda: said("is at its maxmemory and takes nothing more"), 60, "the feed to wait")
        # Everybody else is at work, and says so.
        until(lambda: {b.service for b in living(bus, 2000)} == {"aggregate", "sink-sqlite", "ingest-files"}, 30)
        assert feed.poll() is None
        limit(bus, None)

        until(lambda: feed.poll() is not None, 30, "the tape to be published")
        assert feed.returncode == 0
        assert said("goes on, after")
        assert (tmp_path / "ingest-files.log").read_text().count("at its maxmemory") == 1
        published = held(bus, "info", "kind:trade")
        assert trades * 0.99 < published <= trades  # a tape has spreads, too, which are left out
        until(lambda: held(bus, "meta", "records") == held(bus, "info", "records"), 30, "all of it to be aggregated")
        until(lambda: all(done(bus, p) for p in PARTITIONS), 30, "all of that to be stored")
        with closing(sqlite3.connect(db)) as store:
            assert store.execute("SELECT sum(trades) FROM candles_1s").fetchone()[0] == published
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            assert process.wait(10) == 0
    bus.close()
