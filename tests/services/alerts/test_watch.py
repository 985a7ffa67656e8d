"""Operational events from a real bus: silent feeds, gaps, budgets, backlogs, dead letters."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.alerts.core import Seen
from services.alerts.rules import Event
from services.alerts.watch import Watch
from services.sink_sqlite.worker import run as run_sink
from shared.bus import Bus, Step
from shared.feeds import in_session
from shared.frames import Frame, unreadable
from shared.heartbeat import beat, living, redis_now_ms
from shared.messages import Gap, Usage, encode
from shared.settings import Settings
from tests.services.alerts.receiver import Receiver
from tests.services.alerts.running import Running, alerts, begun, configured
from tests.wait import until

NOW = 1_703_548_800_000  # 2023-12-26T00:00:00Z
CHANNELS = {"ops": "https://a.example/x"}


@pytest.fixture
def s(bus: Bus) -> Settings:
    return configured(bus, CHANNELS, silent_seconds=120.0, backlog_seconds=60.0)


def feed(bus: Bus, name: str, at_ms: int, heard_ms: int = 0, state: str = "connected", detail: str = "why") -> None:
    body = {
        "state": state, "detail": detail, "at_ms": at_ms, "last_event_ns": 1, "published": 1, "worker": "w",
        "heard_ms": heard_ms,
    }  # fmt: skip
    bus.call("hset", bus.keys.feeds, name, msgspec.json.encode(body))


def of(seen: Seen, event: str) -> list[Event]:
    return [e for e in seen.conditions if e.event == event]


def silent(watch: Watch, now_ms: int) -> dict[str, str]:
    return {e.key: e.text for e in of(watch.look(now_ms), "feed_silent")}


def test_a_feed_whose_process_is_gone(bus: Bus, s: Settings) -> None:
    watch = Watch(bus, s)
    feed(bus, "databento", NOW)
    assert silent(watch, NOW + 120_000) == {}
    found = silent(watch, NOW + 120_001)
    assert found == {"databento": "its process has not been seen since 2023-12-26T00:00:00Z; it is connected (why)"}
    assert silent(Watch(bus, s), NOW + 120_001) == found, "a watch that has just begun sees it at once"
    assert silent(watch, NOW + 86_400_001) == {}, "nobody runs it any more"


@pytest.mark.parametrize("state", ["connected", "down", "waiting"])
def test_a_feed_that_says_it_lives_but_brings_nothing(bus: Bus, s: Settings, state: str) -> None:
    watch = Watch(bus, s)
    feed(bus, "databento", NOW + 120_000, NOW, state)
    assert silent(watch, NOW + 120_000) == {}
    feed(bus, "databento", NOW + 121_000, NOW, state)
    found = {"databento": f"nothing new since 2023-12-26T00:00:00Z; it is {state} (why)"}
    assert silent(watch, NOW + 121_000) == found == silent(Watch(bus, s), NOW + 121_000), "one look is enough"
    feed(bus, "databento", NOW + 122_000, NOW + 121_500)
    assert silent(watch, NOW + 122_000) == {}


@pytest.mark.parametrize(
    ("state", "detail"), [("ended", "why"), ("budget", "why"), ("closed", "why"), ("down", "stopped")]
)
def test_a_feed_that_rests_is_not_silent(bus: Bus, s: Settings, state: str, detail: str) -> None:
    watch = Watch(bus, s)
    feed(bus, "databento", NOW, NOW, state, detail)
    assert silent(watch, NOW + 3_600_000) == {}


def test_a_feed_is_not_silent_outside_its_hours(bus: Bus, s: Settings) -> None:
    """Its calendar is that of `hours`, else of its symbols: index futures rest at weekends, crypto never does."""
    hours = replace(s, databento=msgspec.structs.replace(s.databento, hours="CME Globex Equity"))
    saturday = 1_703_332_800_000 + 12 * 3_600_000  # 2023-12-23T12:00Z + 12 h
    wednesday = 1_703_700_000_000
    for symbols, rests in (
        (("ES.FUT", "E1A.OPT"), True), (("NQZ4", "ES.c.0", "ESZ4 C5000"), True), (("ES.FUT", "CL.FUT"), False),
    ):  # fmt: skip
        only = replace(s, databento=msgspec.structs.replace(s.databento, symbols=symbols))
        assert in_session("databento", only, saturday) != rests
        assert in_session("databento", only, wednesday)
    assert not in_session("databento", hours, saturday)
    assert in_session("databento", hours, wednesday)
    assert in_session("tardis:binance", hours, saturday)
    watch = Watch(bus, hours)
    feed(bus, "databento", saturday)
    assert silent(watch, saturday + 600_000) == {}
    opened = 1_703_545_200_000  # Monday 2023-12-25T23:00Z, after the holiday
    feed(bus, "databento", opened + 120_000, saturday)
    assert silent(watch, opened + 120_000) == {}, "it had no time to bring anything yet"
    feed(bus, "databento", opened + 121_000, saturday)
    assert silent(watch, opened + 121_000) == {
        "databento": "nothing new since 2023-12-25T23:00:00Z; it is connected (why)"
    }


def test_workers_and_partitions_that_are_unhealthy_for_a_while(bus: Bus, s: Settings) -> None:
    """A lease (5 s) and the time of a restart must have passed."""
    watch = Watch(bus, s)

    def worker(worker: str, age_ms: int, **more: object) -> None:
        told = {"worker": worker, "service": "aggregate", "host": "box", "pid": 1, "at_ms": now - age_ms}
        bus.call("hset", bus.keys.workers, worker, msgspec.json.encode(told | more))

    now = redis_now_ms(bus)
    worker("lives", 0)
    worker("restarts", 9_000)
    bus.call("hset", bus.keys.lease(0, "pressure"), "expires_ms", now - 9_000)
    assert of(watch.look(NOW), "worker") == []
    worker("restarts", 16_000, name="aggregate-1")
    worker("hangs", 0, stalled_ms=31_000, part="partition 3")
    bus.call("hset", bus.keys.lease(0, "pressure"), "expires_ms", now - 16_000)
    found = {event.key: event for event in of(watch.look(NOW), "worker")}
    assert set(found) == {"aggregate-1 on box", "worker hangs", "partition pressure"}
    gone, stuck, free = found["aggregate-1 on box"], found["worker hangs"], found["partition pressure"]
    assert gone.title == "worker restarts (aggregate-1) is unhealthy"
    assert gone.text.startswith("not seen for 16 s")
    assert stuck.text.startswith("partition 3 has not gone on for 31 s")
    assert (free.title, free.text[:40]) == ("stage pressure is unhealthy", "nobody works on partition 0, for 16 s")
    bus.call("hdel", bus.keys.workers, "restarts", "hangs")
    assert bus.acquire(0, "pressure", "new", 60_000)
    assert of(watch.look(NOW), "worker") == []


def usage(bus: Bus, name: str, cost: float, state: str = "running", at_ms: int = NOW) -> None:
    day = datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d")
    used = Usage(
        feed=name, day=day, at_ns=at_ms * 1_000_000, events=1, bytes=80, connected_seconds=1.0, cost_usd=0.0,
        day_events=1, day_bytes=80, day_connected_seconds=1.0, day_cost_usd=cost, budget_usd=25.0, state=state,
    )  # fmt: skip
    bus.call("hset", bus.keys.usage(name), day, msgspec.json.encode(used))


def test_a_budget_that_is_near_and_one_that_is_used_up(bus: Bus, s: Settings) -> None:
    """25 USD a day, stopped at 80 % (20 USD), near from 16 USD."""
    watch = Watch(bus, s)
    usage(bus, "databento", 15.99)
    assert of(watch.look(NOW), "budget") == []
    usage(bus, "databento", 16.0)
    (near,) = of(watch.look(NOW), "budget")
    assert (near.key, near.title) == ("databento near 2023-12-26", "databento is near its budget")
    assert near.text == "16.00 USD used on 2023-12-26; its feeds stop at 20.00"
    usage(bus, "databento", 20.0, "stopped")
    (stopped,) = of(watch.look(NOW), "budget")
    assert (stopped.key, stopped.title) == ("databento stopped 2023-12-26", "feed databento is stopped at its budget")
    assert of(watch.look(NOW + 86_400_000), "budget") == [], "the next day has a budget of its own"


def test_a_budget_is_a_vendors(bus: Bus, s: Settings) -> None:
    feed(bus, "tardis:binance", NOW)
    usage(bus, "tardis:binance", 100.0)
    usage(bus, "databento", 10.0)
    usage(bus, "databento:history", 5.99)
    watch = Watch(bus, s)
    assert of(watch.look(NOW), "budget") == [], "tardis costs nothing"
    usage(bus, "databento:history", 6.0)
    assert [e.key for e in of(watch.look(NOW), "budget")] == ["databento near 2023-12-26"]
    unlimited = replace(s, usage=msgspec.structs.replace(s.usage, daily_usd=0.0))
    assert of(Watch(bus, unlimited).look(NOW), "budget") == []


def test_a_backlog_is_the_age_of_what_is_not_done(bus: Bus, s: Settings) -> None:
    watch = Watch(bus, s)
    bus.attach(1, "f", "me")
    frame = Frame("clock", 1, 0, 0, "f", b"[]")
    for seq in (1, 2, 3):
        assert bus.publish(1, "f", "me", seq, [frame], b"")
    first, second, third = (f.id for f in bus.read(1, "ticks", "0-0", 10))
    bus.done_with(1, "ticks", "aggregate", first)
    bus.done_with(1, "ticks", "sink", third)
    bus.done_with(1, "ticks", "alerts", "0-0")
    at = int(second.partition("-")[0])
    assert of(watch.look(at + 60_000), "backlog") == []
    (found,) = of(watch.look(at + 61_000), "backlog")
    assert (found.key, found.at_ms) == ("aggregate ticks", at)
    assert found.text == "61 s in partition 1, 1 partitions in all"
    bus.done_with(1, "ticks", "aggregate", third)
    assert of(watch.look(at + 61_000), "backlog") == []


def gap(bus: Bus, partition: int = 0) -> None:
    """A gap as the aggregate stage publishes it."""
    token = bus.acquire(partition, "aggregate", "w", 60_000)
    assert token
    position, out_seq, _ = bus.load(partition, "aggregate", "ticks")
    frame = Frame("gap", 1, 0, 0, "aggregate", encode([Gap("f", 0, 1, "x")]), seq=out_seq + 1)
    step = Step(
        token, "aggregate", position, f"{int(position[0]) + 1}-1", 0, 0, out_seq + 1, {}, (), {"candles": [frame]}
    )
    assert bus.commit(partition, "ticks", step)
    bus.release(partition, "aggregate", token)


def counted(watch: Watch, event: str) -> dict[str, int]:
    return {c.name: c.value for c in watch.look(NOW).counts if c.event == event}


def test_gaps_are_counted_on_candles(bus: Bus, s: Settings) -> None:
    watch = Watch(bus, s)
    assert counted(watch, "gap") == {"gap 0": 0, "gap 1": 0}
    gap(bus, 1)
    assert counted(watch, "gap") == {"gap 0": 0, "gap 1": 1}


def test_dead_letters_of_a_real_sink(bus: Bus, s: Settings, tmp_path: Path) -> None:
    watch = Watch(bus, s)
    beat(bus, "worker", "aggregate")
    assert counted(watch, "dead_letters") == {}
    stop = threading.Event()
    store = replace(s, tapeline=msgspec.structs.replace(s.tapeline, store=f"sqlite:///{tmp_path / 'x.db'}"))
    thread = threading.Thread(target=run_sink, args=(store, stop, ()), daemon=True)
    thread.start()
    try:
        bus.attach(0, "t", "t")
        assert bus.publish(0, "t", "t", 1, [unreadable("a reason", b"raw")], b"", topic="candles")
        until(lambda: any(b.counters.get("dead_letters") == 1 for b in living(bus, 60_000)), 20, "the counter")
        (name,) = counted(watch, "dead_letters")
        assert name.startswith("dead_letters sink-sqlite@")
        assert counted(watch, "dead_letters")[name] == 1
    finally:
        stop.set()
        thread.join(10)


def test_what_is_no_message_does_not_end_the_watch(bus: Bus, s: Settings) -> None:
    bus.call("hset", bus.keys.feeds, "odd", b"{}")
    bus.call("hset", bus.keys.workers, "odd", b"nonsense")
    bus.call("hset", bus.keys.usage("databento"), "2023-12-26", b"[]")
    assert Watch(bus, s).look(NOW).conditions == ()


def test_each_event_arrives_at_the_webhook(bus: Bus, receiver: Receiver) -> None:
    s = configured(bus, {"ops": receiver.url("ops")}, silent_seconds=5.0, backlog_seconds=0.001)
    now = redis_now_ms(bus)
    feed(bus, "synthetic", now)
    beat(bus, "sink@h:1:a", "sink-sqlite", counters={"dead_letters": 2})

    def told() -> dict[str, Any]:
        return {g.body["type"]: g.body for g in receiver.taken()}

    with Running(s):
        until(lambda: begun(bus) and bus.call("hexists", bus.keys.alerts("state"), "memory"), what="the first look")
        assert told() == {}
        beat(bus, "sink@h:1:a", "sink-sqlite", counters={"dead_letters": 3})
        gap(bus)
        usage(bus, "databento", 20.0, "stopped", now)
        bus.register(0, "candles", "sqlite:x")
        feed(bus, "synthetic", now - 3_600_000)
        until(lambda: len(told()) == 5, 20, "all five")
    severity = {kind: body["severity"] for kind, body in told().items()}
    assert severity == {
        "feed_silent": "CRITICAL", "gap": "WARNING", "budget": "CRITICAL", "backlog": "WARNING",
        "dead_letters": "WARNING",
    }  # fmt: skip
    assert told()["dead_letters"]["title"].startswith("1 more dead letters of sink-sqlite")
    assert told()["backlog"]["title"] == "sqlite:x is behind on candles"
    assert len(alerts(bus)) == 5
