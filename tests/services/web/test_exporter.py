"""The metrics of bus and store that the web worker tells, and where those of all workers are."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from services.web import exporter, pipeline
from services.web.exporter import BusCollector, exported, told
from services.web.pipeline import BusLook, Pipeline, Seen, StoreLook
from shared.bus import Bus
from shared.heartbeat import Beat, beat, redis_now_ms
from shared.metrics import BUS
from shared.redis_server import EmbeddedRedis
from shared.settings import Settings
from shared.usage import Row, day_of, now_ns
from tests.services.web.conftest import Serving
from tests.services.web.following import Client
from tests.services.web.test_pipeline import feed, publish
from tests.serving import changed
from tests.wait import until

Values = dict[tuple[str, ...], float]
CLIENTS = "tapeline_web_live_clients"


def living(bus: Bus) -> None:
    """A deployment in which there is something of everything."""
    publish(bus, 1, 3)
    bus.register(0, "ticks", "aggregate")
    beat(bus, "aggregate@here:1", "aggregate", [0])
    assert bus.acquire(0, "aggregate", "aggregate@here:1", 60_000)
    bus.call("hset", bus.keys.state(0, "aggregate"), "counters", b'{"trades": 7, "late": 0}')
    now = redis_now_ms(bus)
    feed(bus, "databento", "connected", at_ms=now, newest_ns=now * 1_000_000)
    day = day_of(now_ns())
    row = Row("databento", day, now_ns(), 0, 0, 0.0, 0.0, 10, 2 << 20, 60.0, 1.25, 25.0, "running")
    bus.call("hset", bus.keys.usage("databento"), day, msgspec.json.encode(row))


def looked(settings: Settings) -> tuple[Seen | None, dict[str, Any]]:
    """One look at both."""
    look = BusLook(settings)
    look.look()
    look.close()
    return look.seen, StoreLook(settings).look()


def values(families: Any) -> dict[str, Values]:
    """Samples by name, then by their labels' values in the order of BUS."""
    found: dict[str, Values] = {}
    for family in families:
        for sample in family.samples:
            labels = tuple(sample.labels[name] for name in BUS[family.name].labels)
            assert set(sample.labels) == set(BUS[family.name].labels)
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_every_name_is_told_of_a_living_system_and_none_beside(web_settings: Settings, bus: Bus, market: str) -> None:
    living(bus)
    settings = changed(web_settings, tapeline_store=market)
    found = told(*looked(settings), settings)
    assert found.keys() == BUS.keys()
    assert [name for name, family in found.items() if not family.samples] == []
    assert {name: family.type for name, family in found.items()} == {n: metric.kind for n, metric in BUS.items()}
    got = values(found.values())
    assert got["tapeline_bus_stream_records_total"] == {("ticks", "0"): 3}
    assert got["tapeline_bus_lag_records"] == {("ticks", "0", "aggregate"): 3}
    assert got["tapeline_bus_lag_seconds"]["ticks", "0", "aggregate"] >= 0
    assert got["tapeline_bus_stage_records_total"] == {("aggregate", "trades"): 7}
    assert got["tapeline_bus_partition_owned"]["aggregate", "0"] == 1
    assert got["tapeline_bus_partition_owned"]["aggregate", "1"] == 0
    assert len(got["tapeline_bus_partition_owned"]) == 3 * 8
    assert got["tapeline_bus_memory_bytes"][()] > 0
    assert got["tapeline_bus_stream_limit_bytes"] == {(): settings.redis.stream_max_bytes}
    assert got["tapeline_bus_usage_dollars"] == {("databento",): 1.25}
    assert got["tapeline_bus_budget_dollars"] == {("databento",): 25}
    assert (got["tapeline_bus_feed_up"], got["tapeline_bus_feed_silent"]) == ({("databento",): 1}, {("databento",): 0})
    assert got["tapeline_store_newest_row_timestamp_seconds"][()] > 1_715_265_000, "2024-05-09T14:30:00Z"


def test_what_does_not_answer_is_zero_and_the_rest_of_it_absent(web_settings: Settings, bus: Bus) -> None:
    living(bus)
    seen, store = looked(web_settings)
    assert values(told(None, None, web_settings).values()) == {"tapeline_bus_up": {(): 0}, "tapeline_store_up": {(): 0}}
    got = values(told(None, store, web_settings).values())
    assert {name for name in got if name.startswith("tapeline_bus")} == {"tapeline_bus_up"}
    assert got["tapeline_store_up"] == {(): 1}
    assert "tapeline_store_newest_row_timestamp_seconds" not in got, "nothing is stored yet"
    unasked = changed(web_settings, tapeline_store="bigquery://project/dataset")
    got = values(told(seen, StoreLook(unasked).look(), unasked).values())
    assert not [name for name in got if name.startswith("tapeline_store")], "nobody has asked it"
    assert got["tapeline_bus_up"] == {(): 1}


def test_only_the_stages_of_the_settings_want_an_owner(web_settings: Settings, bus: Bus) -> None:
    seen, store = looked(web_settings)
    got = values(told(seen, store, changed(web_settings, pressure_workers=0)).values())
    assert {stage for stage, _ in got["tapeline_bus_partition_owned"]} == {"aggregate"}
    got = values(told(seen, store, changed(web_settings, sink_modes=("ticks",))).values())
    assert "tapeline_bus_partition_owned" not in got


def test_a_feed_is_up_while_it_is_connected_or_rests(web_settings: Settings, bus: Bus) -> None:
    now = redis_now_ms(bus)
    feed(bus, "a", "connected", at_ms=now)
    feed(bus, "b", "connected", at_ms=now - 60_000)
    feed(bus, "c", "down", at_ms=now, detail="refused")
    feed(bus, "d", "ended", at_ms=now - 60_000)
    feed(bus, "e", "waiting", at_ms=now)
    feed(bus, "f", "budget", at_ms=now)
    got = values(told(*looked(web_settings), web_settings).values())["tapeline_bus_feed_up"]
    assert {name for (name,), up in got.items() if up} == {"a", "d", "f"}
    assert {name for (name,), up in got.items() if not up} == {"b", "c", "e"}


# -- workers ---------------------------------------------------------------------------------


def heart(bus: Bus, worker: str, name: str = "", age_ms: int = 0, **more: Any) -> None:
    """What a worker said so long ago."""
    service, _, where = worker.partition("@")
    at = redis_now_ms(bus) - age_ms
    body = Beat(worker, service, where.partition(":")[0], 1, at, name=name, **more)
    bus.call("hset", bus.keys.workers, worker, msgspec.json.encode(body))


def test_a_worker_that_was_started_again_is_not_a_dead_one(web_settings: Settings, bus: Bus) -> None:
    heart(bus, "aggregate@a:1:x", "aggregate-1", 60_000)
    heart(bus, "aggregate@a:2:x", "aggregate-1", stalled_ms=7000, part="partition 3")
    heart(bus, "aggregate@b:1:x", "aggregate-1", 60_000)
    heart(bus, "web@c:1:x", age_ms=60_000)
    heart(bus, "web@c:2:x")
    heart(bus, "pressure@d:1:x")
    heart(bus, "pressure@d:2:x")
    heart(bus, "pressure@d:3:x", age_ms=60_000)
    got = values(told(*looked(web_settings), web_settings).values())
    assert got["tapeline_bus_worker_up"] == {
        ("aggregate-1@a", "aggregate"): 1, ("aggregate-1@b", "aggregate"): 0, ("web@c", "web"): 1,
        ("pressure@d:1:x", "pressure"): 1, ("pressure@d:2:x", "pressure"): 1,
    }  # fmt: skip
    stalled = got["tapeline_bus_worker_stalled_seconds"]
    assert 7 <= stalled["aggregate-1@a", "aggregate"] < 30
    assert stalled["web@c", "web"] == 0


def test_targets_are_the_living_workers_that_serve_metrics(serving: Serving, bus: Bus) -> None:
    served = serving(web_token="secret-token")
    heart(bus, "aggregate@a:1:x", "aggregate", 60_000, metrics="a:9464")
    heart(bus, "aggregate@a:2:x", "aggregate", metrics="a:9464")
    heart(bus, "pressure@a:3:x", "pressure", 4000, metrics="a:9465")
    heart(bus, "signals@a:4:x", "signals", metrics="a:9465")
    heart(bus, "web@a:5:x", "web")
    path = "/api/v1/metrics/targets"
    assert served.ask(path).status == 401
    answer = served.ask(path, Authorization="Bearer secret-token")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == [
        {"targets": ["a:9464"], "labels": {"service": "aggregate", "worker": "aggregate@a"}},
        {"targets": ["a:9465"], "labels": {"service": "signals", "worker": "signals@a"}},
    ]


def test_without_redis_the_targets_are_not_known(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving(redis_url="redis://127.0.0.1:1/0")
    answer = served.ask("/api/v1/metrics/targets")
    assert (answer.status, answer.json["error"]["code"]) == (503, "unavailable"), "Prometheus keeps what it has"


# -- scraping --------------------------------------------------------------------------------


def test_it_is_registered_while_the_server_runs(web_settings: Settings, bus: Bus) -> None:
    living(bus)
    registry = CollectorRegistry(auto_describe=True)

    async def scrape() -> dict[str, Values]:
        pipe = Pipeline(web_settings)
        await pipe.start()
        try:
            with exported(pipe, web_settings, registry):
                with pytest.raises(ValueError, match="tapeline_bus_up"):
                    registry.register(BusCollector(pipe, web_settings, asyncio.get_running_loop()))
                return values(await asyncio.to_thread(lambda: list(registry.collect())))
        finally:
            await pipe.close()

    got = asyncio.run(scrape())
    assert got["tapeline_bus_up"] == {(): 1}
    assert {name.removesuffix("_total") for name in got} <= BUS.keys()
    assert list(registry.collect()) == []


def test_a_server_that_has_ended_tells_nothing(web_settings: Settings) -> None:
    async def made() -> BusCollector:
        return BusCollector(Pipeline(web_settings), web_settings, asyncio.get_running_loop())

    assert list(asyncio.run(made()).collect()) == []


def test_a_redis_that_hangs_is_down_and_the_scrape_comes_back(
    web_settings: Settings, bus: Bus, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "SCRAPE_SECONDS", 0.3)

    async def scrape() -> tuple[dict[str, Values], dict[str, Values]]:
        pipe = Pipeline(web_settings)
        await pipe.start()
        collector = BusCollector(pipe, web_settings, asyncio.get_running_loop())
        try:
            first = values(await asyncio.to_thread(collector.collect))
            bus.call("client_pause", 8000)
            while (after := values(await asyncio.to_thread(collector.collect)))["tapeline_bus_up"][()]:
                pass  # what was found a moment ago is still told
            return first, after
        finally:
            redis_server.stop()  # a paused server does not take back the pause
            await pipe.close()

    try:
        first, after = asyncio.run(scrape())
    finally:
        redis_server.start()
    assert first["tapeline_bus_up"] == {(): 1}
    assert {name for name in after if name.startswith("tapeline_bus")} == {"tapeline_bus_up"}
    assert after["tapeline_store_up"] == {(): 1}


def test_a_fault_of_ours_does_not_take_the_other_metrics_along(
    web_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(exporter, "told", broken)

    async def scrape() -> list[Any]:
        pipe = Pipeline(web_settings)
        collector = BusCollector(pipe, web_settings, asyncio.get_running_loop())
        return list(await asyncio.to_thread(collector.collect))

    assert asyncio.run(scrape()) == []
    assert "ValueError" in caplog.text


# -- the server's own ------------------------------------------------------------------------


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_requests_are_counted_by_the_template_of_their_route(serving: Serving, market: str) -> None:
    served = serving(tapeline_store=market, web_token="secret-token")
    names = [
        ("/static/{name}", "200"), ("/health", "200"), ("/api/v1/meta", "200"), ("none", "404"), ("none", "401"),
    ]  # fmt: skip
    before = [sample("tapeline_web_requests_total", route=route, status=status) for route, status in names]
    timed = sample("tapeline_web_request_seconds_count", route="/api/v1/meta")
    token = {"Authorization": "Bearer secret-token"}
    for path in ("/static/app.js", "/static/style.css", "/health", "/api/v1/meta", "/api/v1/nothing/here"):
        served.ask(path, **token)
    served.ask("/api/v1/meta")
    after = [sample("tapeline_web_requests_total", route=route, status=status) for route, status in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 1, 1, 1, 1]
    until(lambda: sample("tapeline_web_request_seconds_count", route="/api/v1/meta") == timed + 1, what="its time")
    told = {s.labels["route"] for m in REGISTRY.collect() for s in m.samples if s.name == "tapeline_web_requests_total"}
    assert not told & {"/static/app.js", "/api/v1/nothing/here"}


def test_live_clients_and_their_messages_are_counted(serving: Serving) -> None:
    served = serving()
    messages = "tapeline_web_live_messages_total"
    sent, opened = sample(messages, transport="websocket"), sample(CLIENTS, transport="websocket")
    with Client(served.ws) as client:
        client.subscribe("p", "pipeline")
        assert sample(CLIENTS, transport="websocket") == opened + 1
        until(lambda: sample(messages, transport="websocket") > sent, what="a message")
    until(lambda: sample(CLIENTS, transport="websocket") == opened, what="the client to be gone")


def test_an_event_stream_is_a_request_without_a_time(serving: Serving) -> None:
    served = serving()
    route = {"route": "/api/v1/stream"}
    asked, opened = sample("tapeline_web_requests_total", status="200", **route), sample(CLIENTS, transport="sse")
    with urllib.request.urlopen(f"{served.base}/api/v1/stream?channel=pipeline", timeout=10) as stream:
        stream.readline()
        until(lambda: sample(CLIENTS, transport="sse") == opened + 1, what="the client to be counted")
        assert sample("tapeline_web_requests_total", status="200", **route) == asked + 1
    until(lambda: sample(CLIENTS, transport="sse") == opened, what="the client to be gone")
    assert REGISTRY.get_sample_value("tapeline_web_request_seconds_count", route) is None
