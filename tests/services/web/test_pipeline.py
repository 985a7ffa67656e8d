"""The state of the pipeline as the API tells it, from a real bus and store."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY

from services.web import pipeline
from services.web.pipeline import BusLook, Pipeline, StoreLook, _default
from services.web.threads import Look, in_thread
from shared.bus import Bus
from shared.frames import Frame, iso
from shared.heartbeat import beat, redis_now_ms
from shared.messages import Gap, encode
from shared.redis_server import EmbeddedRedis
from shared.settings import Settings
from shared.usage import Row, day_of, now_ns
from tests.services.web.conftest import Serving
from tests.serving import changed
from tests.wait import until


def feed(bus: Bus, name: str, state: str, *, at_ms: int, newest_ns: int = 0, detail: str = "") -> None:
    """What ingest says of a feed."""
    body = {"state": state, "detail": detail, "at_ms": at_ms, "last_event_ns": newest_ns, "published": 1, "worker": ""}
    bus.call("hset", bus.keys.feeds, name, msgspec.json.encode(body))


def publish(bus: Bus, seq: int, count: int) -> None:
    gap = Gap("f", (), seq, seq + 1, "test")
    frame = Frame("gap", count, 1, 1, "f", encode([gap] * count))
    owner = "me"
    if seq == 1:
        bus.attach(0, "f", owner)
    assert bus.publish(0, "f", owner, seq, [frame], b"")


def test_streams_consumers_and_workers_are_told(web_settings: Settings, bus: Bus) -> None:
    publish(bus, 1, 3)
    bus.register(0, "ticks", "aggregate")
    beat(bus, "aggregate@here:1", "aggregate", [0, 1])
    look = BusLook(web_settings)
    first = look.look()
    assert first["redis"] == "ok"
    (stream,) = first["streams"]
    assert (stream["topic"], stream["entries"], stream["records"]) == ("ticks", 1, 3)
    assert stream["records_per_second"] is None, "one look knows no rate"
    assert (stream["lag_records"], stream["slowest"]) == (3, "aggregate")
    (worker,) = first["workers"]
    assert (worker["service"], worker["alive"], worker["partitions"]) == ("aggregate", True, [0, 1])
    assert (worker["healthy"], worker["why"]) == (True, "")
    told = msgspec.json.decode(bus.call("hget", bus.keys.workers, "aggregate@here:1"))
    told |= {"stalled_ms": 40_000, "part": "partition 1"}
    bus.call("hset", bus.keys.workers, "aggregate@here:1", msgspec.json.encode(told))
    (worker,) = look.look()["workers"]
    assert (worker["alive"], worker["healthy"]) == (True, False)
    assert worker["why"].startswith("partition 1 has not gone on for 4")
    publish(bus, 2, 5)
    until(lambda: redis_now_ms(bus) > look._counted["ticks"][1], what="time to pass")
    (stream,) = look.look()["streams"]
    assert stream["records_per_second"] > 0
    bus.done_with(0, "ticks", "aggregate", bus.last_id(0, "ticks"))
    last = look.look()
    assert (last["streams"][0]["lag_records"], last["streams"][0]["slowest"], last["lag_seconds"]) == (0, None, 0.0)
    look.close()


def test_a_feed_that_is_connected_but_silent_is_named(web_settings: Settings, bus: Bus) -> None:
    settings = changed(web_settings, alerts_silent_seconds=30.0)
    now = redis_now_ms(bus)
    feed(bus, "databento", "connected", at_ms=now, newest_ns=(now - 5000) * 1_000_000)
    feed(bus, "tardis:okx", "connected", at_ms=now - 60_000, newest_ns=(now - 60_000) * 1_000_000)
    feed(bus, "files", "ended", at_ms=now - 60_000)
    look = BusLook(settings)
    found = {f["feed"]: f for f in look.look()["feeds"]}
    assert {name: f["silent"] for name, f in found.items()} == {
        "databento": False, "tardis:okx": True, "files": False,
    }  # fmt: skip
    assert "has not been seen since" in found["tardis:okx"]["detail"]
    assert found["databento"]["watermark"] == iso((now - 5000) * 1_000_000)[:19] + "Z"
    assert found["databento"]["watermark_age_seconds"] >= 5
    assert (found["files"]["watermark"], found["files"]["watermark_age_seconds"]) == (None, None)
    since = found["files"]["since"]
    feed(bus, "files", "ended", at_ms=now)
    assert {f["feed"]: f["since"] for f in look.look()["feeds"]}["files"] == since, "the state is the same"
    bus.call("hset", bus.keys.feeds, "broken", b"{")
    faults = {"where": "web.pipeline"}
    before = REGISTRY.get_sample_value("tapeline_faults_total", faults) or 0.0
    assert look.look()["redis"] == "what is in Redis cannot be read (DecodeError)"
    assert REGISTRY.get_sample_value("tapeline_faults_total", faults) == before + 1
    bus.call("hdel", bus.keys.feeds, "broken")
    assert look.look()["redis"] == "ok"
    look.close()


def test_cost_is_told_against_the_budget(web_settings: Settings, bus: Bus) -> None:
    day = day_of(now_ns())
    row = Row("databento", day, now_ns(), 0, 0, 0.0, 0.0, 10, 2 << 20, 60.0, 1.25, 25.0, "running")
    bus.call("hset", bus.keys.usage("databento"), day, msgspec.json.encode(row))
    look = BusLook(web_settings)
    assert look.look()["usage"] == [
        {"feed": "databento", "day": day, "cost_usd": 1.25, "budget_usd": 25.0, "state": "running", "bytes": 2 << 20}
    ]
    look.close()


def test_the_store_tells_gaps_dead_letters_and_the_newest_candle(
    web_settings: Settings, market: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = StoreLook(changed(web_settings, tapeline_store=market)).look()
    assert told["store"] == "ok"
    assert told["newest"].startswith("2024-05-09T14:3")
    assert set(told["tickers"]) == {"ES", "NQ", "CL"}
    assert (told["gaps"], told["dead_letters"]) == ({"last_hour": 0, "newest": None}, 0)
    empty = StoreLook(web_settings).look()
    assert (empty["store"], empty["newest"], empty["dead_letters"]) == ("ok", None, 0)
    unasked = StoreLook(changed(web_settings, tapeline_store="bigquery://project/dataset")).look()
    assert (unasked["store"], unasked["newest"]) == ("ok", None), "each look would cost"


def test_what_does_not_answer_is_said_and_is_no_error(web_settings: Settings, market: str) -> None:
    secret = "redis://:hush-hush@127.0.0.1:1/0"

    async def ask() -> tuple[dict[str, Any], dict[str, Any]]:
        pipeline = Pipeline(changed(web_settings, redis_url=secret, tapeline_store=market))
        await pipeline.start()
        try:
            return await pipeline.read(), await pipeline.health()
        finally:
            await pipeline.close()

    told, health = asyncio.run(ask())
    assert "127.0.0.1:1" in told["redis"]
    assert "hush" not in told["redis"]
    assert (told["feeds"], told["streams"], told["lag_seconds"], told["store"]) == ([], [], None, "ok")
    assert (health["status"], health["behind_seconds"]) == ("degraded", None)


def test_a_redis_that_hangs_holds_up_nobody(
    serving: Serving, redis_server: EmbeddedRedis, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PATIENCE_SECONDS", 0.3)
    served = serving()
    assert served.get("/health")["redis"] == "ok"
    bus.call("client_pause", 8000)
    try:
        told = until(lambda: (h := served.get("/health"))["redis"] != "ok" and h, what="the silence to be told")
        assert "has not answered for" in told["redis"]
        assert told["store"] == "ok"
    finally:
        redis_server.stop()  # a paused server does not take back the pause
        redis_server.start()


def test_the_answers_have_what_is_promised(serving: Serving, market: str) -> None:
    served = serving(tapeline_store=market)
    told = served.get("/api/v1/pipeline")
    assert set(told) == {
        "time", "redis", "store", "feeds", "workers", "streams", "lag_seconds", "gaps", "counters", "usage", "newest",
        "dead_letters",
    }  # fmt: skip
    health = served.get("/health")
    assert set(health) == {"status", "version", "redis", "store", "behind_seconds"}
    meta = served.get("/api/v1/meta")
    assert meta["timeframes"][:4] == ["rolling", "seconds", "15s", "1m"]
    assert (meta["default_symbol"], meta["pressure_window_seconds"], meta["store"]) == ("ES", 300, "sqlite")
    assert "rsi_5" in meta["features"]
    assert meta["limits"] == {"max_rows": 10_000, "max_export_rows": 1_000_000, "requests_per_second": 10_000.0}


@pytest.mark.parametrize(
    ("feeds", "tickers", "symbol"),
    [
        (("synthetic",), ["NQ", "ES"], "ES"),
        (("synthetic",), [], "ES"),
        (("databento",), ["CL"], "CL"),
        (("tardis", "databento"), ["binance-futures:BTCUSDT", "ES"], "binance-futures:BTCUSDT"),
        (("databento",), ["ES"], "ES"),
        ((), ["NQ", "CL"], "CL"),
        ((), [], None),
    ],
)
def test_what_a_page_shows_first(
    web_settings: Settings, feeds: tuple[str, ...], tickers: list[str], symbol: str | None
) -> None:
    assert _default(changed(web_settings, tapeline_feeds=feeds), tickers) == symbol


# -- looking in threads ----------------------------------------------------------------------


def test_many_who_ask_at_once_share_one_look_and_it_is_not_made_again_soon() -> None:
    made: list[int] = []
    gate = threading.Event()

    def work() -> int:
        gate.wait(10)
        made.append(1)
        return len(made)

    async def ask() -> list[int | None]:
        look = Look(work, 3600.0, "test")
        asked = [asyncio.create_task(look.get(10)) for _ in range(20)]
        await asyncio.sleep(0)
        gate.set()
        return [*await asyncio.gather(*asked), await look.get(10)]

    assert asyncio.run(ask()) == [1] * 21


def test_a_look_that_hangs_gives_what_was_found_before() -> None:
    gate, calls = threading.Event(), [0]

    def work() -> int:
        calls[0] += 1
        if calls[0] > 1:
            gate.wait(10)
        return calls[0]

    async def ask() -> tuple[int | None, int | None, float]:
        look = Look(work, 0.0, "test")
        first = await look.get(10)
        while look.waiting == 0.0:
            second = await look.get(0)
        gate.set()
        return first, second, look.waiting

    first, second, waiting = asyncio.run(ask())
    assert (first, second) == (1, 1)
    assert waiting >= 0


def test_an_error_in_a_thread_reaches_who_waits_for_it() -> None:
    def work() -> int:
        raise ValueError("no")

    async def ask() -> int:
        return await in_thread(work, "test")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(ask())
