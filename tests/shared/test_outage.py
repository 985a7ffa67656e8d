"""Lines that would repeat: once when it begins, once when it is over, for all parts of a worker together."""

from __future__ import annotations

import logging
import threading

import pytest

from shared.bus import Bus
from shared.errors import BusUnavailable, StoreUnavailable
from shared.frames import Frame
from shared.outage import Outage, Seldom
from shared.redis_server import EmbeddedRedis
from shared.settings import load
from shared.worker import StepResult, Worker
from tests.wait import until

log = logging.getLogger("shared.worker")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_an_outage_is_told_once_for_all_parts(told: pytest.LogCaptureFixture) -> None:
    outage = Outage(log)
    for partition in (0, 1, 2, 0, 1):
        outage.fails(partition, BusUnavailable("Redis at here does not answer"))
    assert told.messages == ["Redis at here does not answer; trying again"]
    outage.works(0)
    outage.works(3)
    outage.works(1)
    assert len(told.messages) == 1
    outage.works(2)
    assert told.messages[1].startswith("Redis answers again, after ")
    outage.fails(2, BusUnavailable("Redis at here does not answer"))
    assert len(told.messages) == 3


def test_a_store_and_redis_are_two_outages(told: pytest.LogCaptureFixture) -> None:
    outage = Outage(log)
    outage.fails(0, BusUnavailable("no Redis"))
    outage.fails(0, StoreUnavailable("no store"))
    outage.works(0)
    assert [m.split(",")[0] for m in told.messages[2:]] == ["Redis answers again", "the store answers again"]


def test_a_part_that_is_over_says_nothing_of_an_answer(told: pytest.LogCaptureFixture) -> None:
    outage = Outage(log)
    outage.fails(0, BusUnavailable("no Redis"))
    outage.leaves(0)
    outage.works(1)
    assert told.messages == ["no Redis; trying again"]


def test_an_answer_is_told_though_the_last_part_that_waited_is_over(told: pytest.LogCaptureFixture) -> None:
    outage = Outage(log)
    outage.fails("manager", BusUnavailable("no Redis"))
    outage.fails(3, BusUnavailable("no Redis"))
    outage.works("manager")
    outage.leaves(3)  # its lease is another worker's by now
    assert told.messages[1].startswith("Redis answers again")
    assert [r.partition for r in told.records] == [None, None]  # type: ignore[attr-defined]


def test_what_is_told_seldom_is_added_up() -> None:
    seldom = Seldom(seconds=3600)
    assert [seldom.add(0), seldom.add(3), seldom.add(2)] == [0, 3, 0]
    often = Seldom(seconds=0)
    assert [often.add(), often.add(4)] == [1, 4]


class Nothing:
    """A stage that makes nothing of what it reads."""

    name, topic = "aggregate", "ticks"

    def open(self, fields: dict[str, bytes]) -> Nothing:
        return self

    def step(self, frames: list[Frame]) -> StepResult:
        return StepResult()


def test_a_worker_of_many_partitions_tells_of_a_redis_that_is_away_once(
    bus: Bus, redis_server: EmbeddedRedis, told: pytest.LogCaptureFixture
) -> None:
    settings = load(environ={"TAPELINE_PARTITIONS": "6", "TAPELINE_REDIS_LEASE_SECONDS": "1"})
    stop = threading.Event()
    worker = Worker(bus.clone(), Nothing(), settings, stop)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        until(lambda: len(worker._owned) == 6, what="the worker to own all partitions")
        redis_server.kill()
        until(lambda: worker.outage._down and len(worker.outage._down["Redis"].whom) == 7, 20, "all parts to notice")
        redis_server.start()
        until(lambda: any("answers again" in m for m in told.messages), 20, "the line at the end")
    finally:
        stop.set()
        thread.join()
    lines = [r for r in told.records if r.name == "shared.worker" and r.levelno >= logging.WARNING]
    assert [r.getMessage().endswith("; trying again") for r in lines] == [True]
