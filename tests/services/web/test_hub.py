"""Live subscriptions over outages: what a client that obeys has in the end is what the store tells."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shared.bus import Bus, Limits
from shared.redis_server import EmbeddedRedis
from tests.services.sink_sqlite.tape import Stage, gap, without_tail
from tests.services.web.following import Client, Told
from tests.serving import Served, Serving
from tests.shared.test_reader_follow import Place, deploy, second, server, store
from tests.wait import on_disk, until

__all__ = ["server", "store"]

ES: dict[str, Any] = {"symbol": "ES", "timeframe": "rolling"}


def seconds(told: Told) -> list[tuple[int, int]]:
    """(second, revision) of the rows in the order of their coming."""
    return [(int(row["time"][17:19]), row["revision"]) for row in told.rows]


def plain(*numbers: int) -> list[tuple[int, int]]:
    return [(n, 0) for n in numbers]


def noticed(told: Told, code: str) -> bool:
    return bool(told.notices) and told.notices[-1][0] == code


@pytest.fixture
def own(server: EmbeddedRedis) -> Iterator[Bus]:
    """A bus on a server of the test's own."""
    made = Bus(server.url, "own")
    deploy(made)
    yield made
    made.close()


@pytest.fixture
def serve(serving: Serving, store: Place) -> Callable[[Bus], Served]:
    """Starts a server over a bus and the test's store."""
    return lambda bus: serving(
        redis_url=bus.url, tapeline_namespace=bus.keys.namespace, tapeline_store=store.url
    )  # fmt: skip


def test_a_restart_of_redis_is_waited_for(
    store: Place, server: EmbeddedRedis, own: Bus, serve: Callable[[Bus], Served]
) -> None:
    stage = Stage(own)
    stage.put(second(0))
    with store.sinking(own), Client(serve(own).ws) as client:
        store.stored(1)
        told = client.subscribe(history=5, **ES)
        now = client.subscribe("now", **ES)
        stage.put(second(1))
        until(lambda: told.live and now.live, what="a row")
        on_disk(own.client)
        server.kill()
        until(lambda: noticed(told, "waiting") and noticed(now, "waiting"), what="that it waits")
        assert "Redis" in told.notices[-1][1]
        # Who comes meanwhile is shown what the store has.
        late = client.subscribe("late", history=5, **ES)
        until(lambda: noticed(late, "waiting"), what="that it waits")
        until(lambda: seconds(late) == plain(0, 1), what="history")
        server.start()
        own.client.connection_pool.disconnect()
        until(lambda: all(noticed(some, "live") for some in client.subs.values()), what="that it goes on")
        stage.put(second(2), second(0, revision=1))
        for some in client.subs.values():
            until(lambda: (0, 1) in seconds(some), what="rows of each")  # noqa: B023
        assert seconds(told) == [*plain(0, 1, 2), (0, 1)]
        assert told.kinds.count("snapshot") == now.kinds.count("snapshot") == 1
        assert seconds(now) == [*plain(1, 2), (0, 1)]
        assert seconds(late) == [*plain(0, 1, 2), (0, 1)]


def test_a_tail_that_redis_lost_comes_again(
    store: Place, server: EmbeddedRedis, own: Bus, serve: Callable[[Bus], Served]
) -> None:
    stage = Stage(own)
    stage.put(second(0), second(1))
    with store.sinking(own), Client(serve(own).ws) as client:
        store.stored(2)
        told = client.subscribe(history=5, **ES)
        now = client.subscribe("now", **ES)
        with without_tail(server, own):
            stage.put(second(2), second(3))
            store.stored(4)
            until(lambda: len(told.live) == len(now.live) == 2, what="live rows")
        again = Stage(own)
        again.put(second(2), second(3), second(4))
        until(lambda: (4, 0) in seconds(told) and (4, 0) in seconds(now), what="the row behind them")
        until(lambda: noticed(told, "live"), what="that it goes on")
        assert sorted(seconds(told)) == plain(0, 1, 2, 3, 4)
        # Without history: what it has seen, and nothing twice.
        assert sorted(seconds(now)) == plain(2, 3, 4)
        again.put(second(5))
        until(lambda: (5, 0) in seconds(told) and (5, 0) in seconds(now), what="the next row")


def test_another_deployment_in_the_same_place(store: Place, bus: Bus, serve: Callable[[Bus], Served]) -> None:
    stage = Stage(bus)
    stage.put(*(second(n) for n in range(4)))
    with Client(serve(bus).ws) as client:
        with store.sinking():
            store.stored(4)
            told = client.subscribe(history=3, **ES)
            now = client.subscribe("now", **ES)
            stage.put(second(4))
            until(lambda: told.live and now.live, what="a row")
            store.stored(5)
        place = told.id
        for key in list(bus.client.scan_iter(f"{bus.keys.namespace}:*")):
            bus.client.delete(key)
        until(lambda: noticed(told, "waiting"), what="that it waits")
        bus.deploy(3)
        bus.identity()  # as a sink does that only comes from the old one
        stages = [Stage(bus, p) for p in range(3)]
        stages[2].put(*(second(n) for n in range(3, 7)))
        until(lambda: "the store is behind" in told.notices[-1][1], what="that the store is waited for")
        with store.sinking(partitions=3):
            store.stored(4, partition=2)
            until(lambda: noticed(told, "live") and noticed(now, "live"), what="that it goes on")
            stages[2].put(second(7))
            until(lambda: (7, 0) in seconds(told) and (7, 0) in seconds(now), what="the next row")
            assert seconds(told) == plain(4, 5, 6, 7)
            assert seconds(now) == plain(4, 5, 6, 7)
            # A place of the old bus is none of this one.
            again = client.subscribe("again", after=place, history=2, **ES)
            until(lambda: seconds(again)[-2:] == plain(6, 7), what="its newest rows")
            assert again.kinds[0] == "snapshot"


def test_where_the_stream_was_trimmed_a_new_snapshot_comes(
    store: Place, bus: Bus, serve: Callable[[Bus], Served]
) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0, block_ms=50))
    stage = Stage(bus)
    stage.put(second(0))
    with store.sinking(small):
        store.stored(1)
        with Client(serve(bus).ws) as client:
            told = client.subscribe(history=1, **ES)
            stage.put(*(second(n) for n in range(1, 50)))
            until(lambda: len(told.live) == 49, what="live rows")
            first, last = client.subscribe("none", **ES).id, told.id
            assert seconds(told) == plain(*range(50))
            stage.put(*(second(n) for n in range(50, 60)))
            store.stored(60)
            until(lambda: small.call("xlen", small.keys.stream(0, "candles")) == 16, what="the stream to be trimmed")
        with Client(serve(bus).ws) as client:
            near = client.subscribe("near", after=last, **ES)
            until(lambda: len(near.live) == 10, what="what was missed")
            assert near.kinds[0] == "resumed"
            assert seconds(near) == plain(*range(50, 60))
            stage.put(*(second(n) for n in range(30)))
            store.stored(stage.seq)
            until(lambda: small.call("xlen", small.keys.stream(0, "candles")) == 16, what="the stream to be trimmed")
        with Client(serve(bus).ws) as client:
            far = client.subscribe("far", after=first, history=4, **ES)
            assert far.kinds == ["snapshot"]
            assert seconds(far) == plain(56, 57, 58, 59)
    small.close()


def test_a_store_that_is_behind_is_waited_for(store: Place, bus: Bus, serve: Callable[[Bus], Served]) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0))
    stage = Stage(bus)
    stage.put(second(0))
    with store.sinking():
        store.stored(1)
    # Another store's sink has all, this one's is dropped: what the stream holds begins behind this store's place.
    bus.client.delete(bus.keys.consumers(0, "candles"))
    stage.put(*(second(n) for n in range(1, 60)))
    bus.done_with(0, "candles", "another", bus.last_id(0, "candles"))
    small.trim(0, "candles")
    with Client(serve(bus).ws) as client:
        told = client.subscribe(history=20, **ES)
        until(lambda: told.notices, what="that it waits")
        assert seconds(told) == plain(0)
        assert told.id == ""
        assert "the store is behind" in told.notices[0][1]
        with store.sinking():
            until(lambda: noticed(told, "live"), what="that it goes on")
            stage.put(second(7, revision=3))
            until(lambda: seconds(told)[-1] == (7, 3), what="the next row")
            # What neither had is missing in the store, too.
            assert seconds(told) == [(0, 0), *plain(*range(44, 60)), (7, 3)]
    small.close()


def test_started_at_any_moment_it_is_what_the_store_tells(
    store: Place, bus: Bus, serving: Serving, serve: Callable[[Bus], Served]
) -> None:
    bus.client.delete(bus.keys.deployment)
    bus.deploy(3)
    served, stages, done = serve(bus), [Stage(bus, p) for p in range(3)], threading.Event()

    def market() -> None:
        for n in range(60):
            stages[1].put(second(n))
            stages[n % 3].put(gap(n))
            stages[1].put(second(n // 2, revision=n + 1))
        done.set()

    with store.sinking(partitions=3), Client(served.ws) as client:
        writing = threading.Thread(target=market)
        writing.start()
        names = 0
        while not done.is_set():
            client.subscribe(f"{names}", history=100, **ES)
            client.subscribe(f"gaps {names}", "gaps", history=100)
            names += 1
        writing.join()
        want = {n: max((m + 1 for m in range(60) if m // 2 == n), default=0) for n in range(60)}

        def complete(told: Told) -> bool:
            return dict(sorted(seconds(told))) == want

        until(lambda: all(complete(client.subs[f"{n}"]) for n in range(names)), what="all rows everywhere")
        gaps = [client.subs[f"gaps {n}"] for n in range(names)]
        until(lambda: all(len(told.rows) == 60 for told in gaps), what="all gaps everywhere")
        for told in client.subs.values():
            assert told.kinds[0] == "snapshot"
            assert told.kinds.count("snapshot") == 1
            assert not told.skipped
            rows = [(row.get("time"), row.get("start_ns"), row.get("revision")) for row in told.rows]
            assert len(set(rows)) == len(rows), "a row came twice"
