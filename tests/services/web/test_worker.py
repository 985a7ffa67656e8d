"""The web worker: its address, its heartbeat, its end, and its going on without Redis or a store."""

from __future__ import annotations

import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from services.web import pipeline, worker
from shared.bus import Bus
from shared.errors import ConfigError
from shared.heartbeat import living
from shared.live import CLOSE_SHUTDOWN
from shared.redis_server import EmbeddedRedis
from shared.settings import Settings, Web
from shared.supervise import page_url
from tests.services.web.conftest import Serving
from tests.serving import ask, changed
from tests.wait import until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def running(settings: Settings) -> Iterator[tuple[str, threading.Event, threading.Thread]]:
    """`worker.run` in a thread on a port of its own: (base URL, stop, thread)."""
    port, stop = free_port(), threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            worker.run(changed(settings, web_port=port), stop, ())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}", stop, thread
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


def answers(base: str) -> bool:
    try:
        return ask(f"{base}/health").status == 200
    except OSError:
        return False


def _read_on(ws: ClientConnection) -> None:
    while True:
        ws.recv(10)


def test_it_beats_and_says_goodbye(web_settings: Settings, bus: Bus) -> None:
    with running(web_settings) as (base, _, _):
        (beat,) = until(lambda: living(bus, 5000, "web"), what="a heartbeat")
        assert beat.detail == base
        until(lambda: answers(base), what="an answer")
    assert living(bus, 5000, "web") == []


def test_arguments_and_taken_ports_are_refused_in_one_line(web_settings: Settings) -> None:
    with pytest.raises(ConfigError, match="web takes no arguments, got 9000"):
        worker.run(web_settings, threading.Event(), ("9000",))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is taken: set TAPELINE_WEB_PORT"):
            worker.run(changed(web_settings, web_port=port), threading.Event(), ())
    for host in ("203.0.113.7", "no-such-host.invalid"):
        with pytest.raises(ConfigError, match=f"cannot listen at {host}, port 0 .*TAPELINE_WEB_HOST"):
            worker.listen(changed(web_settings, web_host=host))


def test_a_deployment_of_other_partitions_is_refused(web_settings: Settings, bus: Bus) -> None:
    bus.deploy(8)
    with (
        pytest.raises(ConfigError, match="holds a deployment of 8 partitions"),
        running(changed(web_settings, tapeline_partitions=4)) as (_, stop, _),
    ):
        assert stop.wait(10)


@pytest.mark.parametrize(
    ("web", "url"),
    [
        (Web(), "http://127.0.0.1:8000"), (Web(host="0.0.0.0", port=80), "http://127.0.0.1:80"),
        (Web(host="::"), "http://[::1]:8000"), (Web(host="::1"), "http://[::1]:8000"),
        (Web(host="desk.example.com"), "http://desk.example.com:8000"),
    ],
)  # fmt: skip
def test_where_the_page_is(web: Web, url: str) -> None:
    assert page_url(web) == url


def test_the_end_is_told_to_live_clients_and_comes_soon(serving: Serving) -> None:
    served = serving()
    stalled = socket.create_connection(("127.0.0.1", served.port))
    stalled.sendall(b"GET /api/v1/stream?channel=pipeline HTTP/1.1\r\nHost: localhost\r\n\r\n")
    until(lambda: served.app.state.web.hub.connections, what="the stream to begin")
    with connect(served.ws) as ws:
        ws.send('{"op":"subscribe","sub":"p","channel":"pipeline"}')
        ws.recv(10)
        served.stop.set()
        with pytest.raises(ConnectionClosed) as closed:
            _read_on(ws)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == CLOSE_SHUTDOWN
    assert closed.value.rcvd.reason
    served.end()
    stalled.close()


def test_a_client_that_reads_nothing_does_not_hold_up_the_end(serving: Serving) -> None:
    served = serving()
    with closing(socket.create_connection(("127.0.0.1", served.port))) as idle:
        idle.sendall(b"GET /api/v1/meta HTTP/1.1\r\nHost: local")
        other = socket.create_connection(("127.0.0.1", served.port))
        other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert other.recv(100).startswith(b"HTTP/1.1 200")
        served.end()
        other.close()


def test_it_serves_without_redis_and_finds_it_when_it_comes(
    web_settings: Settings, tmp_path: Path, market: str
) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    settings = changed(web_settings, redis_url=server.url, tapeline_store=market)
    with running(settings) as (base, _, _):
        until(lambda: answers(base), what="an answer")
        health = ask(f"{base}/health").json
        assert (health["status"], health["store"]) == ("degraded", "ok")
        assert "does not answer" in health["redis"]
        assert len(ask(f"{base}/api/v1/candles?symbol=ES&timeframe=1m&limit=3").json["rows"]) == 3
        assert ask(f"{base}/api/v1/alerts").status == 503
        server.start()
        try:
            until(lambda: ask(f"{base}/health").json["status"] == "ok", 15, "the server to find Redis")
            with closing(Bus(server.url, settings.tapeline.namespace)) as bus:
                until(lambda: living(bus, 5000, "web"), what="a heartbeat")
        finally:
            server.stop()
        until(lambda: "does not answer" in ask(f"{base}/health").json["redis"], 15, "the loss of Redis to be told")
        assert ask(f"{base}/api/v1/candles?symbol=ES&timeframe=1m&limit=3").status == 200


def test_it_serves_without_a_store_and_finds_it_when_it_comes(
    serving: Serving, market: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "STORE_SECONDS", 0.05)
    served = serving()
    path = Path(served.settings.tapeline.store.removeprefix("sqlite:///"))
    path.write_text("this is no store, and large enough to be looked at as if it were one")
    until(lambda: served.get("/health")["store"] != "ok", what="the damage to be told")
    assert served.get("/health")["status"] == "degraded"
    path.unlink()
    with closing(sqlite3.connect(market.removeprefix("sqlite:///"))) as whole, closing(sqlite3.connect(path)) as own:
        whole.backup(own)
    until(lambda: served.get("/health")["status"] == "ok", what="the store to be found")
    until(lambda: served.get("/api/v1/pipeline")["newest"], what="its newest candle")
