"""The live API over a real server, a real Redis, real stores and sinks."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from shared.api_rows import columns_of, rows_of_store
from shared.bus import Bus
from shared.live import CLOSE_SHUTDOWN, CLOSE_TOO_MANY
from shared.stores import read_rows
from tests.services.sink_sqlite.tape import NS, T0, Stage, bars, fixed, gap, pressure, rollup, said, signal
from tests.services.web.following import Client, Told
from tests.serving import Served, Serving
from tests.shared.test_reader_follow import BOTH, Place, second, store
from tests.wait import until

__all__ = ["store"]


def held(store: Place, table: str, **where: Any) -> list[dict[str, Any]]:
    return rows_of_store(table, read_rows(store.url, table, where, columns=columns_of(table)))


def upserted(told: Told, *key: str) -> list[dict[str, Any]]:
    """What a client has that upserts by key, in the key's order."""
    rows = {tuple(row[name] for name in key): row for row in told.rows}
    return [rows[at] for at in sorted(rows)]


@BOTH
def test_history_and_live_are_one(store: Place, bus: Bus, serving: Serving, kind: str) -> None:
    stage = Stage(bus)
    stage.put(*(second(n) for n in range(5)), bars(fixed(10)))
    with store.sinking():
        store.stored(6)
        served = serving(tapeline_store=store.url)
        with Client(served.ws) as client:
            rolling = client.subscribe("rolling", symbol="ES", timeframe="rolling", history=3)
            since = client.subscribe("since", symbol="ES", timeframe="rolling", since="2023-12-26T00:01:01+01:00")
            one = client.subscribe("one", symbol="binance-futures:BTCUSDT", timeframe="1m", history=100)
            plain = client.subscribe("plain", symbol="BTC-PERPETUAL", timeframe="60s")
            assert [len(told.rows) for told in (rolling, since, one, plain)] == [3, 4, 5, 0]
            stage.put(*(second(n) for n in range(5, 9)), second(4, revision=1, close=1.0), bars(fixed(2, 5)))
            until(lambda: len(rolling.live) == 5 and len(plain.live) == 1, what="live rows")
            until(lambda: len(since.live) == 5 and len(one.live) == 1, what="live rows of the others")
            place, at = one.id, client.subs["plain"].id
            store.stored(stage.seq)
            rows = held(store, "candles_1m", ticker="ES")
            assert upserted(rolling, "time") == rows[2:]
            assert upserted(since, "time") == rows[1:]
            assert upserted(one, "timestamp_in") == held(store, "candles", symbol="BTCUSDT", timeframe="1m")
            assert all(told.kinds[0] == "snapshot" and not told.notices for told in client.subs.values())
        page = served.get("/api/v1/candles?symbol=BTC-PERPETUAL&timeframe=1m&limit=2")
        assert page["rows"] == held(store, "candles", symbol="BTC-PERPETUAL", timeframe="1m")[-2:]
        stage.put(bars(fixed(4, 6)), second(9))
        with Client(served.ws) as again:
            paged = again.subscribe("paged", symbol="BTC-PERPETUAL", timeframe="1m", after=page["id"])
            until(lambda: len(paged.live) == 2, what="what came behind the page")
            resumed = again.subscribe("one", symbol="binance-futures:BTCUSDT", timeframe="1m", after=place)
            other = again.subscribe("plain", symbol="BTC-PERPETUAL", timeframe="1m", after=at, history=100)
            until(lambda: len(resumed.live) == len(other.live) == 2, what="what was missed")
            assert resumed.kinds[0] == other.kinds[0] == "resumed"
            stage.put(bars(fixed(2, 8)))
            until(lambda: len(resumed.live) == len(other.live) == 3, what="what is new")
        store.stored(stage.seq)
        assert resumed.live == held(store, "candles", symbol="BTCUSDT", timeframe="1m")[-3:]


def test_every_channel_has_the_rows_of_its_table(store: Place, bus: Bus, serving: Serving) -> None:
    stage, options, verdicts = Stage(bus), Stage(bus, name="pressure"), Stage(bus, name="signals")
    served = serving(tapeline_store=store.url)
    asks = {
        "pressure": "NQ", "rollups": "NQ", "signals": "NQ", "gaps": "", "all": "", "none": "ES",
    }  # fmt: skip
    tables = {"pressure": "pressure_metrics", "rollups": "pressure_rollups", "signals": "signals", "gaps": "gaps"}

    def put(n: int) -> None:
        stage.put(gap(T0 + n * NS), gap(T0 + n * NS), second(n))
        options.put(said(pressure(n), pressure(n, underlying="CL")), said(rollup(n)))
        verdicts.put(said(signal(n)))

    with store.sinking():
        put(0)
        until(lambda: held(store, "signals") and held(store, "gaps") and held(store, "pressure_rollups"), what="rows")
        with Client(served.ws) as client:
            for name, symbol in asks.items():
                channel = name if name in tables else "pressure"
                client.subscribe(name, channel, symbol=symbol, history=10)
            put(1)
            until(lambda: all(client.subs[name].live for name in asks if name != "none"), what="rows of each channel")
            until(lambda: len(held(store, "pressure_metrics")) == 4 and len(held(store, "signals")) == 2, what="rows")
            for name, table in tables.items():
                found = client.subs[name].rows
                want = held(store, table) if name == "gaps" else held(store, table, underlying="NQ")
                assert sorted(found, key=str) == sorted(want, key=str), name
                # A gap that came again is told once.
                assert len(client.subs[name].live) == 1, name
            assert len(client.subs["all"].rows) == 4
            assert not client.subs["none"].rows
            place = client.subs["signals"].id
            client.send("unsubscribe", sub="signals")
            assert client.other() == {"op": "unsubscribed", "sub": "signals"}
            put(2)
            until(lambda: len(client.subs["all"].live) == 4, what="more")
            assert len(client.subs["signals"].live) == 1
            back = client.subscribe("signals", "signals", symbol="NQ", after=place)
            until(lambda: back.live, what="what was missed")
            assert back.kinds[0] == "resumed"
            assert len(back.live) == 1


def test_what_cannot_be_meant_is_answered_and_harms_nothing(served: Served) -> None:
    good = {"op": "subscribe", "sub": "a", "channel": "candles", "symbol": "ES", "timeframe": "1m"}
    wrong: list[tuple[Any, str]] = [
        ("{", "bad_request"), ("[]", "bad_request"), ("7", "bad_request"), ('{"op":"shout"}', "bad_request"),
        ('{"op":"subscribe"}', "bad_request"), (b"\x00\x01", "bad_request"), ("[" * 5000, "bad_request"),
        (good | {"colour": 1}, "bad_request"), (good | {"channel": "ticks"}, "bad_request"),
        (good | {"symbol": ""}, "bad_request"), (good | {"symbol": "x:"}, "bad_request"),
        (good | {"timeframe": "7q"}, "bad_request"), (good | {"timeframe": ""}, "bad_request"),
        (good | {"history": -1}, "bad_request"), (good | {"history": 10_001}, "bad_request"),
        (good | {"history": 1, "since": "2024-01-01T00:00:00Z"}, "bad_request"),
        (good | {"since": "yesterday"}, "bad_request"), (good | {"since": "2024-01-01T00:00:00"}, "bad_request"),
        (good | {"since": "9999-01-01T00:00:00Z"}, "bad_request"), (good | {"after": "nowhere"}, "bad_request"),
        (good | {"sub": "x" * 101}, "bad_request"),
        (good | {"channel": "signals"}, "bad_request"), (good | {"symbol": "x" * 201}, "bad_request"),
        ({"op": "unsubscribe", "sub": "none"}, "not_found"),
    ]  # fmt: skip
    with Client(served.ws) as client:
        for message, code in wrong:
            client.socket.send(message if isinstance(message, str | bytes) else json.dumps(message))
            error = client.other()
            assert (error["op"], error["code"]) == ("error", code), message
            assert error["message"]
            assert "\n" not in error["message"]
            assert error.get("sub", "") == (message.get("sub", "")[:100] if isinstance(message, dict) else "")
        client.send("ping", t=1.5)
        assert client.other() == {"op": "pong", "t": 1.5}
        client.socket.send(json.dumps(good))
        client.socket.send(json.dumps(good))
        assert client.other()["code"] == "subscribed"
        for n in range(200):
            client.socket.send(json.dumps(good | {"sub": f"s{n}"}))
        assert client.other()["code"] == "too_many"
        assert not client.closed
    with Client(served.ws) as client:
        client.socket.send("x" * 100_000)
        until(lambda: client.closed, what="the end of who sends too much")
        assert client.closed
        assert client.closed[0] == 1009


def test_connections_are_bounded_and_told_of_the_end(serving: Serving) -> None:
    served = serving(web_connections=2)
    with Client(served.ws) as one, Client(served.ws) as two:
        one.send("ping", t=1)
        two.send("ping", t=2)
        assert one.other()["t"], two.other()["t"]
        with Client(served.ws) as three:
            until(lambda: three.closed, what="the refusal")
            assert three.closed
            assert three.closed[0] == CLOSE_TOO_MANY
            assert "2" in three.closed[1]
        refused = served.ask("/api/v1/stream?channel=gaps")
        assert refused.status == 503
        assert "retry-after" in refused.headers
        served.stop.set()
        until(lambda: one.closed and two.closed, what="the end")
        assert one.closed
        assert one.closed[0] == CLOSE_SHUTDOWN
        assert one.closed[1]


def test_the_pipeline_is_told_again_and_again(served: Served) -> None:
    with Client(served.ws) as client:
        told = client.subscribe("p", "pipeline")
        until(lambda: len(told.live) >= 2, what="the pipeline twice")
        assert "redis" in told.live[-1]
        assert told.kinds[0] == "snapshot"
        client.send("unsubscribe", sub="p")
        assert client.other()["op"] == "unsubscribed"


@contextmanager
def events(served: Served, query: str, **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
    """Server-sent events as they come, over a plain socket."""
    with socket.create_connection(("127.0.0.1", served.port), 10) as plain:
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"GET /api/v1/stream?{query} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n{extra}\r\n"
        plain.sendall(request.encode())
        with plain.makefile("rb") as lines:
            assert b" 200 " in lines.readline()
            seen = {name.lower(): value for name, value in iter(lambda: _header(lines.readline()), ("", ""))}
            assert seen["content-type"].startswith("text/event-stream")
            assert seen["cache-control"] == "no-store"
            yield _events(lines)


def _header(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode().strip().partition(": ")
    return name, value


def _events(lines: Any) -> Iterator[dict[str, Any]]:
    made: dict[str, Any] = {}
    for line in lines:
        field, _, value = line.decode().strip().partition(": ")
        if field in ("event", "id", "data"):
            made[field] = json.loads(value) if field == "data" else value
        if field == "data":
            yield made
            made = {}


def test_server_sent_events_go_on_from_the_last(store: Place, bus: Bus, serving: Serving) -> None:
    stage = Stage(bus)
    stage.put(*(second(n) for n in range(3)))
    served = serving(tapeline_store=store.url)
    with store.sinking():
        store.stored(3)
        with events(served, "channel=candles&symbol=ES&timeframe=rolling&history=2") as stream:
            first = next(stream)
            assert first["event"] == "snapshot"
            assert len(first["data"]["rows"]) == 2
            assert first["data"]["sub"] == ""
            stage.put(second(3))
            second_event = next(stream)
            assert second_event["event"] == "rows"
            assert second_event["id"] == second_event["data"]["id"]
        stage.put(second(4), second(5))
        # As a browser reconnects: the same request, and the last id.
        query, last = "channel=candles&symbol=ES&timeframe=rolling&history=2", second_event["id"]
        with events(served, query, **{"Last-Event-ID": last}) as stream:
            assert next(stream)["event"] == "resumed"
            rows: list[Any] = []
            while len(rows) < 2:
                rows += next(stream)["data"]["rows"]
            assert [row["time"] for row in rows] == ["2023-12-25T23:01:04Z", "2023-12-25T23:01:05Z"]
    until(lambda: not served.app.state.web.hub.connections, what="the streams to be forgotten")
    for query in ("channel=candles", "channel=x", "channel=gaps&history=-1", "symbol=ES", "channel=gaps&after=x"):
        refused = served.ask(f"/api/v1/stream?{query}")
        assert refused.status == 400, query
        assert refused.json["error"]["message"], query


@pytest.mark.parametrize("timeframe", ["rolling"])
def test_without_history_nothing_of_the_store_is_needed(
    serving: Serving, bus: Bus, tmp_path: Any, timeframe: str
) -> None:
    bus.deploy(4)
    bus.identity()
    (tmp_path / "no.db").write_text("this is no database " * 100)
    served = serving(tapeline_store=f"sqlite:///{tmp_path / 'no.db'}")
    stages = [Stage(bus, p) for p in range(4)]
    with Client(served.ws) as client:
        told = client.subscribe(symbol="ES", timeframe=timeframe)
        assert told.kinds == ["snapshot"]
        assert not told.rows
        began = time.monotonic()
        stages[2].put(second(1))
        until(lambda: told.live, what="a row")
        assert time.monotonic() - began < 5
        waits = client.subscribe("b", symbol="ES", timeframe=timeframe, history=5)
        until(lambda: waits.notices, what="a notice")
        assert waits.notices[0][0] == "waiting"
        assert "no.db cannot be read" in waits.notices[0][1]
        assert not waits.rows


def test_a_store_without_snapshots_says_so_and_is_live(serving: Serving, bus: Bus) -> None:
    bus.deploy(1)
    bus.identity()
    with Client(serving(tapeline_store="bigquery://project/dataset").ws) as client:
        told = client.subscribe(symbol="ES", timeframe="rolling", history=5)
        until(lambda: told.notices, what="a notice")
        assert told.notices[0][0] == "live"
        assert "history is not served" in told.notices[0][1]
        Stage(bus).put(second(1))
        until(lambda: told.live, what="a row")
        assert told.kinds.count("snapshot") == 1
