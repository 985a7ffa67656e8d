"""Who is unhealthy, and who is not: real heartbeats, leases and processes; `health` and `status` name them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from services.sink_sqlite.store import SqliteStore
from shared import cli_health, heartbeat
from shared.batches import Batch
from shared.bus import Bus
from shared.cli import cli
from shared.errors import StoreUnavailable
from shared.feeds import states
from shared.frames import Frame
from shared.health import Verdict, ranges, unhealthy, verdicts
from shared.heartbeat import Beat, beat, redis_now_ms
from shared.progress import Asked, Progress
from shared.settings import Health, Settings, load
from shared.status import Reader
from shared.worker import StepResult
from tests.services.sink_sqlite.tape import Stage as Tape
from tests.services.sink_sqlite.tape import candles, rows, sinking
from tests.shared.test_worker import Counting, Running, Stage
from tests.wait import until

HOST = socket.gethostname()
CLOCK = Frame("clock", 1, 0, 0, "f", b"[]")


@pytest.fixture
def settings(bus: Bus) -> Settings:
    """Two partitions, leases of a second, and only aggregate to run."""
    base = load(environ={})
    return replace(
        base,
        tapeline=msgspec.structs.replace(base.tapeline, partitions=2, namespace=bus.keys.namespace),
        redis=msgspec.structs.replace(base.redis, url=bus.url, lease_seconds=1.0),
        pressure=msgspec.structs.replace(base.pressure, workers=0),
        health=Health(stalled_seconds=0.3),
    )


def looked(bus: Bus, settings: Settings) -> list[Verdict]:
    return verdicts(Reader(bus, 2, settings.redis.lease_seconds).brief(), states(bus), settings)


def wrong(bus: Bus, settings: Settings) -> dict[str, str]:
    return {v.what: v.why for v in unhealthy(looked(bus, settings))}


def environment(settings: Settings) -> dict[str, str]:
    return {
        "REDIS_URL": settings.redis.url, "TAPELINE_NAMESPACE": settings.tapeline.namespace,
        "TAPELINE_PARTITIONS": "2", "TAPELINE_REDIS_LEASE_SECONDS": f"{settings.redis.lease_seconds:g}",
        "TAPELINE_PRESSURE_WORKERS": "0", "TAPELINE_METRICS_PORT": "0", "TAPELINE_ALERTS_SILENT_SECONDS": "30",
    }  # fmt: skip


def tapeline(settings: Settings, *args: str) -> Result:
    return CliRunner().invoke(cli, args, env=environment(settings))


def put(bus: Bus, **changes: Any) -> Beat:
    """A heartbeat as another process left it."""
    left = {"worker": f"aggregate@{HOST}:1:aa", "service": "aggregate", "host": HOST, "pid": 1, "at_ms": 0} | changes
    bus.call("hset", bus.keys.workers, left["worker"], msgspec.json.encode(left))
    return msgspec.convert(left, Beat)


def known(bus: Bus) -> set[str]:
    return {name.decode() for name in bus.call("hkeys", bus.keys.workers)}


# -- verdicts --------------------------------------------------------------------------------


def test_a_worker_is_as_healthy_as_its_heartbeat_and_its_slowest_part(bus: Bus, settings: Settings) -> None:
    now = redis_now_ms(bus)
    put(bus, worker="a", at_ms=now)
    assert wrong(bus, settings) == {}
    put(bus, worker="b", at_ms=now - 12_000, name="aggregate-2", stalled_ms=40_000, part="partition 1")
    put(bus, worker="c", at_ms=now, stalled_ms=41_000, part="partition 3")
    (gone, stuck) = unhealthy(looked(bus, settings))
    assert gone.line == "worker b (aggregate-2): not seen for 12 s (stopped, killed or cut off from Redis)"
    assert stuck.line == "worker c: partition 3 has not gone on for 41 s"
    assert (stuck.kind, stuck.service, stuck.host) == ("worker", "aggregate", HOST)
    assert abs(stuck.since_ms - (now - 41_000)) < 1000


def test_partitions_without_an_owner(bus: Bus, settings: Settings) -> None:
    """Taken over within a lease is in order; free for longer is not, nor a place where ticks wait for nobody."""
    assert wrong(bus, settings) == {}, "nothing has begun"
    tokens = [bus.acquire(p, "aggregate", "w", 60_000) for p in range(2)]
    assert wrong(bus, settings) == {}
    bus.release(0, "aggregate", str(tokens[0]))
    assert wrong(bus, settings) == {}, "it was given up just now"
    long_ago = redis_now_ms(bus) - 9_000
    bus.call("hset", bus.keys.lease(0, "aggregate"), "expires_ms", long_ago)
    bus.call("hset", bus.keys.lease(0, "pressure"), "expires_ms", long_ago)
    assert wrong(bus, settings) == {"stage aggregate": "nobody works on partition 0, for 9 s"}
    bus.call("hset", bus.keys.lease(1, "aggregate"), "expires_ms", long_ago)
    (found,) = unhealthy(looked(bus, settings))
    assert (found.kind, found.name, found.host) == ("partition", "aggregate", "")
    assert found.why == "nobody works on partitions 0-1, for 9 s"
    for p in range(2):
        assert bus.acquire(p, "aggregate", "v", 60_000)
    assert wrong(bus, settings) == {}
    with_pressure = replace(settings, pressure=msgspec.structs.replace(settings.pressure, workers=1))
    assert wrong(bus, with_pressure) == {"stage pressure": "nobody works on partition 0, for 9 s"}, "one that is to run"
    bus.client.xadd(bus.keys.stream(1, "ticks"), {"x": "y"}, id=f"{long_ago}-0")
    assert wrong(bus, with_pressure) == {"stage pressure": "nobody works on partitions 0-1, for 9 s"}, "it never came"


def test_ranges() -> None:
    assert ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-10"
    assert ranges([5]) == "5"


# -- going on --------------------------------------------------------------------------------


def test_progress_is_that_of_the_slowest_part() -> None:
    progress = Progress()
    assert progress.slowest() == ("", 0.0)
    progress.mark("a")
    first = until(lambda: progress.slowest()[1] > 0.01 and progress.slowest(), what="time to pass")
    progress.mark("b")
    assert progress.slowest()[0] == first[0] == "a"
    progress.rest("a")
    assert progress.slowest()[0] == "b"


def test_asking_whether_to_stop_is_going_on() -> None:
    stop, asked = threading.Event(), list[int]()
    event = Asked(stop, lambda: asked.append(1))
    assert not event.is_set()
    assert not event.wait(0.01)
    assert len(asked) >= 2
    stop.set()
    assert event.is_set()
    assert event.wait()
    Asked(other := threading.Event(), lambda: None).set()
    assert other.is_set()


class Stuck(Stage):
    """A stage whose core hangs until `free` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def open(self, fields: dict[str, bytes]) -> Counting:
        stage = self

        class Core(Counting):
            def step(self, frames: list[Frame]) -> StepResult:
                stage.free.wait(20)
                return super().step(frames)

        return Core(fields, None)


def test_a_partition_that_hangs_is_named_though_its_worker_lives(bus: Bus, settings: Settings) -> None:
    stage = Stuck()
    with Running(bus, settings, stage) as running:
        until(lambda: len(running.worker._owned) == 2, what="all partitions")
        patient = replace(settings, health=Health(stalled_seconds=5))
        until(lambda: not wrong(bus, patient), what="a heartbeat with partitions that wait for ticks")
        bus.attach(1, "f", "me")
        assert bus.publish(1, "f", "me", 1, [CLOCK], b"")
        # A turn of a waiting partition takes up to half a second: longer than that it does not hang.
        late = replace(settings, health=Health(stalled_seconds=1.0))
        named = f"worker {running.worker.id}"
        found = until(lambda: wrong(bus, late).get(named), what="the partition to be named")
        assert found.startswith("partition 1 has not gone on for ")
        stage.free.set()
        until(lambda: named not in wrong(bus, late), what="it to go on")
    assert known(bus) == set()


def test_a_store_that_hangs_is_named_and_one_that_is_away_is_waited_for(
    bus: Bus, settings: Settings, tmp_path: Path
) -> None:
    free, hangs = threading.Event(), threading.Event()

    class Slow(SqliteStore):
        def write(self, batch: Batch) -> int:
            if not hangs.is_set():
                raise StoreUnavailable("away")
            free.wait(20)
            return super().write(batch)

    late = replace(settings, health=Health(stalled_seconds=1.0))
    stage = Tape(bus)
    with sinking(bus, tmp_path / "s.db", Slow(tmp_path / "s.db"), partitions=2) as loop:
        stage.put(candles(rows(3)))
        until(lambda: loop.counters["store_waits"] >= 5, what="some tries")
        assert loop.progress.slowest()[1] < 5
        hangs.set()
        found = until(lambda: wrong(bus, late).get(f"worker {loop.worker}"), what="the writer to be named")
        assert found.startswith("the writer has not gone on for ")
        free.set()
        until(lambda: wrong(bus, late) == {}, what="it to go on")
    assert loop.progress.slowest()[0] == "the writer", "readers that ended rest"


# -- one in the place of another ----------------------------------------------------------------


@contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def mine(bus: Bus, worker: str) -> Beat:
    return msgspec.json.decode(bus.call("hget", bus.keys.workers, worker), type=Beat)


def test_a_new_worker_takes_the_place_of_one_that_was_killed(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERVISOR_PROCESS_NAME", "aggregate-1")
    beat(bus, "me", "aggregate")
    me = mine(bus, "me")
    assert (me.name, me.pid) == ("aggregate-1", os.getpid())
    heartbeat.leave(bus, "me")
    same = {"name": "aggregate-1", "space": me.space, "at_ms": me.at_ms}
    with sleeping() as child:
        put(bus, worker="lives", pid=child.pid, born=heartbeat._born(child.pid), **same)
        put(bus, worker="pid-again", pid=child.pid, born=1, **same)
        put(bus, worker="other-name", pid=2**22 - 1, **same | {"name": "aggregate-2"})
        put(bus, worker="other-host", pid=2**22 - 1, host="elsewhere", **same)
        put(bus, worker="other-service", pid=2**22 - 1, service="pressure", **same)
        put(bus, worker="gone", pid=2**22 - 1, **same)
        bus.call("hset", bus.keys.workers, "garbage", b"{")
        beat(bus, "me", "aggregate")
        left = {"me", "lives", "other-name", "other-host", "other-service", "garbage"}
        assert known(bus) == left
        child.kill()
        until(lambda: heartbeat._born(child.pid) is None, what="the child to be dead, though nobody waited for it")
        beat(bus, "me", "aggregate")
        assert known(bus) == left - {"lives"}


def test_without_a_supervisor_one_takes_the_place_of_one(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those in another container of this host's name only silence tells, and that they were before."""
    monkeypatch.delenv("SUPERVISOR_PROCESS_NAME", raising=False)
    now = redis_now_ms(bus)
    space = heartbeat._pid_space()
    put(bus, worker="1", pid=2**22 - 1, space=space, at_ms=now)
    put(bus, worker="2", pid=2**22 - 1, space=space, at_ms=now)
    beat(bus, "me", "aggregate")
    assert known(bus) == {"2", "me"}
    beat(bus, "me", "aggregate")
    assert known(bus) == {"2", "me"}, "two died, one is back"
    beat(bus, "another", "aggregate")
    assert known(bus) == {"me", "another"}
    put(bus, worker="quiet", space="pid:[1]", at_ms=now - 11_000)
    put(bus, worker="speaks", space="pid:[1]", at_ms=now - 9_000)
    beat(bus, "third", "aggregate")
    assert known(bus) == {"me", "another", "third", "speaks"}


def test_the_dead_are_told_of_for_five_minutes(bus: Bus) -> None:
    now = redis_now_ms(bus)
    put(bus, worker="old", at_ms=now - 301_000)
    put(bus, worker="dead", at_ms=now - 290_000)
    assert heartbeat.living(bus, 1000) == []
    assert known(bus) == {"dead"}


# -- the commands --------------------------------------------------------------------------------


def test_a_stopped_worker_is_named_and_its_successor_leaves_no_trace_of_it(
    bus: Bus, settings: Settings, tmp_path: Path
) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TAPELINE_", "REDIS_"))} | environment(settings)
    env |= {"TAPELINE_STORE": f"sqlite:///{tmp_path / 's.db'}", "SUPERVISOR_PROCESS_NAME": "sink-1"}
    line = [sys.executable, "-P", "-m", "shared.cli", "run", "sink-sqlite"]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(line, env=env, cwd=tmp_path, stderr=subprocess.DEVNULL)

    first = start()
    second = None
    try:
        until(lambda: tapeline(settings, "health", "--here").exit_code == 0, 20, "a healthy worker")
        healthy = tapeline(settings, "health")
        assert healthy.output == "healthy: 1 worker\n"
        first.send_signal(signal.SIGSTOP)
        named = until(lambda: (r := tapeline(settings, "health")).exit_code and r, what="it to be named")
        assert "(sink-1): not seen for " in named.output
        assert named.exit_code == 1
        assert f"unhealthy {named.output.split(': not')[0]}" in tapeline(settings, "status").output
        (told,) = json.loads(tapeline(settings, "status", "--json").output)["unhealthy"]
        assert (told["kind"], told["service"], told["process"]) == ("worker", "sink-sqlite", "sink-1")
        first.send_signal(signal.SIGCONT)
        until(lambda: tapeline(settings, "health").exit_code == 0, what="it to be healthy again")
        first.kill()
        first.wait()
        second = start()
        until(lambda: len(known(bus)) == 1 and f":{second.pid}:" in next(iter(known(bus))), 20, "its successor alone")
        assert tapeline(settings, "health").exit_code == 0
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


def test_health_of_a_host_and_of_a_service(bus: Bus, settings: Settings) -> None:
    now = redis_now_ms(bus)
    nobody = tapeline(settings, "health")
    assert (nobody.exit_code, nobody.output) == (1, "no worker has reported\n")
    put(bus, worker="a@there", host="there", at_ms=now - 60_000)
    put(bus, worker="i", service="ingest-tardis:okx", at_ms=now + 60_000)
    assert tapeline(settings, "health", "--here").exit_code == 0
    assert tapeline(settings, "health", "--service", "ingest-tardis").exit_code == 0
    everything = tapeline(settings, "health")
    assert everything.exit_code == 1
    assert everything.output.splitlines()[0].startswith("worker a@there: not seen for ")
    missing = tapeline(settings, "health", "--here", "--service", "aggregate")
    assert (missing.exit_code, missing.output) == (1, "no worker of aggregate of this host has reported\n")
    told = json.loads(tapeline(settings, "health", "--json").output)
    assert (told["healthy"], told["wrong"]) == (False, [everything.output.splitlines()[0]])
    check = next(c for c in told["checks"] if c["name"] == "i")
    assert check == {
        "kind": "worker", "name": "i", "service": "ingest-tardis:okx", "host": HOST, "healthy": True, "why": "",
        "since_ms": 0, "process": "",
    }  # fmt: skip


def test_a_silent_feed_is_unhealthy_where_its_ingest_runs(bus: Bus, settings: Settings) -> None:
    now = redis_now_ms(bus)
    put(bus, worker="w", service="ingest-tardis:okx", at_ms=now + 60_000)
    told = {"state": "connected", "detail": "okx", "at_ms": now, "worker": f"ingest-tardis:okx@{HOST}:1:ab"}
    bus.call("hset", bus.keys.feeds, "tardis:okx", msgspec.json.encode(told | {"heard_ms": now - 20_000}))
    assert tapeline(settings, "health").output == "healthy: 1 worker, 1 feed\n"
    bus.call("hset", bus.keys.feeds, "tardis:okx", msgspec.json.encode(told | {"heard_ms": now - 40_000}))
    found = tapeline(settings, "health", "--here", "--service", "ingest-tardis")
    assert found.exit_code == 1
    assert found.output.startswith("feed tardis:okx: silent, nothing new since ")
    assert found.output.endswith("; it is connected (okx)\n")
    assert f"unhealthy {found.output}" in tapeline(settings, "status").output
    bus.call("hset", bus.keys.feeds, "tardis:okx", msgspec.json.encode(told | {"state": "down", "detail": "stopped"}))
    assert tapeline(settings, "health").exit_code == 0, "it was stopped on purpose"


def test_a_redis_that_does_not_answer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_health, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = replace(
            settings, redis=msgspec.structs.replace(settings.redis, url=f"redis://127.0.0.1:{silent.getsockname()[1]}")
        )
        hangs = tapeline(there, "health", "--here")
    assert hangs.exit_code == 1
    assert "Redis has not answered for 0.2 s" in hangs.output
    away = tapeline(there, "health", "--json")
    told = json.loads(away.output)
    assert (away.exit_code, told["healthy"], told["checks"]) == (1, False, [])
    assert "does not answer" in told["wrong"][0]
