"""Workers share the partitions of a stage, hand them over, and are fenced when they sleep too long."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from shared.bus import Bus
from shared.errors import ConfigError, StoreUnavailable, TapelineError
from shared.frames import Frame
from shared.settings import Settings, load
from shared.worker import StepResult, Worker
from tests.wait import on_disk, until


class Counting:
    """A core that counts frames into its state and puts each one out again."""

    def __init__(self, fields: dict[str, bytes], fail: BaseException | None) -> None:
        self.seen = int(fields.get("seen", b"0"))
        self._fail = fail

    def step(self, frames: list[Frame]) -> StepResult:
        if self._fail:
            raise self._fail
        self.seen += len(frames)
        return StepResult({"candles": [replace(f) for f in frames]}, {"seen": b"%d" % self.seen})


class Stage:
    name, topic = "aggregate", "ticks"

    def __init__(self, fail: BaseException | None = None) -> None:
        self._fail = fail

    def open(self, fields: dict[str, bytes]) -> Counting:
        return Counting(fields, self._fail)


@pytest.fixture
def settings() -> Settings:
    base = load(environ={})
    return replace(
        base,
        tapeline=msgspec.structs.replace(base.tapeline, partitions=6),
        redis=msgspec.structs.replace(base.redis, lease_seconds=1.0),
    )


class Running:
    def __init__(self, bus: Bus, settings: Settings, stage: Stage | None = None) -> None:
        self.stop = threading.Event()
        self.worker = Worker(bus.clone(), stage or Stage(), settings, self.stop)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.worker.run()
        except TapelineError as error:
            self.error = error

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive(), "a worker stops within seconds"


def owners(bus: Bus) -> dict[int, str]:
    held = {p: bus.call("hget", bus.keys.lease(p, "aggregate"), "owner") for p in range(6)}
    return {p: o.decode() for p, o in held.items() if o}


def shares(bus: Bus) -> list[int]:
    names = list(owners(bus).values())
    return sorted(names.count(n) for n in set(names))


def publish(bus: Bus, partition: int, seq: int) -> None:
    bus.publish(partition, "feed", "me", seq, [Frame("clock", 1, seq, seq, "t", b"[]")], b"")


def put_out(bus: Bus, partition: int) -> list[int]:
    return [f.seq for f in bus.read(partition, "candles", "0-0", 10_000)]


def test_every_frame_once_while_workers_come_and_go(bus: Bus, settings: Settings) -> None:
    for p in range(6):
        bus.attach(p, "feed", "me")
    seq = 0
    with ExitStack() as stack:
        workers = [stack.enter_context(Running(bus, settings))]
        until(lambda: shares(bus) == [6], what="one worker to own all")
        workers.append(stack.enter_context(Running(bus, settings)))
        workers.append(stack.enter_context(Running(bus, settings)))
        while shares(bus) != [2, 2, 2]:
            seq += 1
            assert seq < 100_000, shares(bus)
            for p in range(6):
                publish(bus, p, seq)
        workers[1].__exit__()
        until(lambda: shares(bus) == [3, 3], what="the others to take over")
        for p in range(6):
            publish(bus, p, seq + 1)
        until(lambda: all(len(put_out(bus, p)) == seq + 1 for p in range(6)), 30, "all frames")
    for p in range(6):
        assert put_out(bus, p) == list(range(1, seq + 2))
        assert bus.load(p, "aggregate", "ticks")[2]["seen"] == b"%d" % (seq + 1)
    assert owners(bus) == {}, "leases are given back"
    assert bus.call("hlen", bus.keys.workers) == 0


def test_a_stolen_lease_ends_the_partition_without_a_write(bus: Bus, settings: Settings) -> None:
    bus.attach(0, "feed", "me")
    with Running(bus, settings):
        until(lambda: shares(bus) == [6])
        bus.call("hset", bus.keys.lease(0, "aggregate"), mapping={"token": "stolen", "owner": "thief"})
        publish(bus, 0, 1)
        until(lambda: owners(bus).get(0) != "thief", 10, "the thief's lease to expire and be taken")
        until(lambda: put_out(bus, 0) == [1], what="the frame, once")


def test_redis_gone_for_a_while(bus: Bus, settings: Settings, redis_server: Any) -> None:
    bus.attach(0, "feed", "me")
    with Running(bus, settings):
        publish(bus, 0, 1)
        until(lambda: put_out(bus, 0) == [1])
        on_disk(bus.client)
        redis_server.kill()
        redis_server.start()
        bus.client.connection_pool.disconnect()
        publish(bus, 0, 2)
        until(lambda: put_out(bus, 0) == [1, 2], 20, "the worker to come back")


class AskingStage(Stage):
    """Its core needs a store that does not answer the first times."""

    def __init__(self, refusals: int) -> None:
        self.left = refusals

    def open(self, fields: dict[str, bytes]) -> Counting:
        self.left -= 1
        return Counting(fields, StoreUnavailable("the store does not answer") if self.left >= 0 else None)


def test_a_store_that_a_core_asks_is_waited_for(bus: Bus, settings: Settings) -> None:
    bus.attach(0, "feed", "me")
    publish(bus, 0, 1)
    stage = AskingStage(8)  # six partitions are opened once, one of them again after each refusal
    with Running(bus, settings, stage) as running:
        until(lambda: put_out(bus, 0) == [1], what="the frame, once the store answers")
        assert running.thread.is_alive()
    assert stage.left < 0
    assert running.error is None


def test_stages_that_read_the_same_are_waited_for(bus: Bus, settings: Settings) -> None:
    def names() -> set[bytes]:
        return set(bus.call("hkeys", bus.keys.consumers(5, "ticks")))

    with Running(bus, settings):
        until(lambda: shares(bus) == [6])
        until(lambda: names() == {b"aggregate", b"pressure"}, what="pressure to be registered, too")
    off = replace(settings, pressure=msgspec.structs.replace(settings.pressure, workers=0))
    with Running(bus, off):
        until(lambda: names() == {b"aggregate"}, what="pressure to be let go")


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [(ConfigError("wrong"), ConfigError, 78), (ValueError("a bug"), TapelineError, 1)],
)
def test_what_restarting_cannot_mend_ends_the_worker(
    bus: Bus, settings: Settings, fault: BaseException, kind: type[TapelineError], code: int
) -> None:
    bus.attach(0, "feed", "me")
    publish(bus, 0, 1)
    with Running(bus, settings, Stage(fault)) as running:
        running.thread.join(10)
        assert isinstance(running.error, kind)
        assert running.error.exit_code == code
    assert put_out(bus, 0) == []
