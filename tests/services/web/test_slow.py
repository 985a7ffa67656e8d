"""Clients that do not keep up: coalesced, then dropped with a reason; nobody else notices."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame as WireFrame
from websockets.uri import parse_uri

from services.web import sockets
from services.web.outbox import Bounds, Message, Outbox
from shared.api_rows import Told
from shared.bus import Bus
from shared.live import CLOSE_TOO_SLOW, Pong
from tests.services.sink_sqlite.tape import Stage, candles, rows
from tests.services.web.following import Client
from tests.serving import Served, Serving
from tests.wait import until


class Sending:
    """An outbox whose socket takes messages only while `open` is set."""

    def __init__(self, bounds: Bounds) -> None:
        self.reasons: list[str] = []
        self.taken: list[Any] = []
        self.outbox = Outbox(self.reasons.append, bounds)
        self.open = asyncio.Event()
        self._task = asyncio.create_task(self.outbox.send_all(self._send))

    async def _send(self, messages: list[Message]) -> None:
        await self.open.wait()
        self.taken += [json.loads(message.text) for message in messages]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0)

    async def stuck(self) -> None:
        """Wait until a message is being sent, and stays."""
        self.outbox.event(Pong(0))
        await self.until(lambda: self.outbox._sending_since is not None)

    def rows(self, sub: str, *values: tuple[int, int]) -> None:
        """Rows (key, value) of a subscription."""
        texts = [json.dumps({"key": key, "value": value, "fill": "x" * 80}) for key, value in values]
        self.outbox.rows(sub, Told([(key,) for key, _ in values], texts), f"place {values[-1][1]}")

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def told(message: dict[str, Any]) -> list[tuple[int, int]]:
    return [(row["key"], row["value"]) for row in message["rows"]]


def test_rows_that_wait_go_together_in_their_order() -> None:
    async def steps() -> None:
        sending = Sending(Bounds())
        await sending.stuck()
        sending.rows("a", (1, 1), (2, 2))
        sending.rows("b", (1, 3))
        sending.rows("a", (1, 4))
        sending.outbox.event(Pong(9), "a")
        sending.rows("a", (1, 5))
        sending.open.set()
        await sending.until(lambda: len(sending.taken) == 5)
        first, a, b, pong, more = sending.taken
        assert told(a) == [(1, 1), (2, 2), (1, 4)]
        assert a["id"] == "place 4"
        assert "skipped" not in a
        assert told(b) == [(1, 3)]
        assert told(more) == [(1, 5)]
        assert first["op"] == pong["op"] == "pong"
        assert not sending.reasons
        await sending.end()

    asyncio.run(steps())


def test_beyond_a_bound_the_newest_of_each_key_is_kept_and_the_others_are_counted() -> None:
    async def steps() -> None:
        sending = Sending(Bounds(coalesce=2000, drop=100_000))
        await sending.stuck()
        for n in range(300):
            sending.rows("ab"[n % 2], (n % 3, n), (7, n))
        assert not sending.reasons
        assert sending.outbox._size < 3000
        sending.open.set()
        await sending.until(lambda: len(sending.taken) == 3)
        for message, newest in zip(sending.taken[1:], (298, 299), strict=True):
            assert sorted(told(message)) == sorted(
                [*((n % 3, n) for n in (newest, newest - 2, newest - 4)), (7, newest)]
            )
            assert message["skipped"] == 300 - 4
            assert message["id"] == f"place {newest}"
        # Caught up: nothing is left out any more.
        sending.taken.clear()
        sending.rows("a", (1, 1), (1, 2))
        await sending.until(lambda: bool(sending.taken))
        assert told(sending.taken[0]) == [(1, 1), (1, 2)]
        assert "skipped" not in sending.taken[0]
        assert sending.outbox._size == sending.outbox._rows == 0
        await sending.end()

    asyncio.run(steps())


def test_who_cannot_be_sent_even_that_is_dropped_once() -> None:
    async def steps() -> None:
        sending = Sending(Bounds(coalesce=1000, drop=5000, seconds=3.0))
        await sending.stuck()
        for n in range(100):
            sending.rows("a", (n, n))
        assert len(sending.reasons) == 1
        assert "keep up" in sending.reasons[0]
        assert sending.outbox.closed
        assert not sending.outbox._size
        await sending.end()
        sending = Sending(Bounds(seconds=3.0))
        sending.outbox.check(time.monotonic() + 100)
        await sending.stuck()
        sending.outbox.check(time.monotonic() + 2)
        assert not sending.reasons
        sending.outbox.check(time.monotonic() + 4)
        assert len(sending.reasons) == 1
        assert "3 s" in sending.reasons[0]
        await sending.end()

    asyncio.run(steps())


def test_a_subscription_that_ended_leaves_nothing_behind() -> None:
    async def steps() -> None:
        sending = Sending(Bounds())
        await sending.stuck()
        sending.rows("a", (1, 1))
        sending.rows("b", (1, 2))
        sending.outbox.forget("a")
        sending.outbox.forget("none")
        sending.open.set()
        await sending.until(lambda: len(sending.taken) == 2)
        assert told(sending.taken[1]) == [(1, 2)]
        assert not sending.outbox._size
        await sending.end()

    asyncio.run(steps())


class Raw:
    """A WebSocket client that reads only when it is told to, through a small window."""

    def __init__(self, served: Served) -> None:
        self.plain = socket.socket()
        self.plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.plain.settimeout(10)
        self.plain.connect(("127.0.0.1", served.port))
        self.protocol = ClientProtocol(parse_uri(served.ws))
        self.protocol.send_request(self.protocol.connect())
        self._flush()
        while not self.protocol.handshake_exc and self.protocol.state.name == "CONNECTING":
            self.read()

    def send(self, **request: Any) -> None:
        self.protocol.send_text(json.dumps(request).encode())
        self._flush()

    def _flush(self) -> None:
        for data in self.protocol.data_to_send():
            self.plain.sendall(data)

    def read(self) -> list[dict[str, Any]]:
        """What the next bytes hold."""
        data = self.plain.recv(1 << 16)
        if data:
            self.protocol.receive_data(data)
        else:
            self.protocol.receive_eof()
        events = self.protocol.events_received()
        return [json.loads(e.data) for e in events if isinstance(e, WireFrame) and e.opcode.name == "TEXT"]


MANY = 1500


def many(at: int, revision: int = 0) -> Any:
    """A frame of many rows of ES."""
    made = rows(2 * MANY, at, revision=revision)
    return candles(made[made["name"] == 0])


def subscribe(served: Served, raw: Raw) -> None:
    raw.send(op="subscribe", sub="a", channel="candles", symbol="ES", timeframe="rolling")
    while not any(message["op"] == "snapshot" for message in raw.read()):
        pass


@pytest.fixture
def one(serving: Serving, bus: Bus) -> Served:
    bus.deploy(1)
    bus.identity()
    return serving()


@pytest.mark.parametrize("reads_on", [True, False])
def test_a_stalled_client_is_dropped_and_harms_nobody(
    one: Served, bus: Bus, reads_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "GRACE_SECONDS", 8.0 if reads_on else 0.1)
    hub = one.app.state.web.hub
    hub.bounds = Bounds(coalesce=256 << 10, drop=3 << 20, seconds=60.0)
    stage = Stage(bus)
    with Client(one.ws) as good:
        fine = good.subscribe(symbol="ES", timeframe="rolling")
        raw = Raw(one)
        subscribe(one, raw)
        assert len(hub.connections) == 2
        stalled = next(c for c in hub.connections if c is not next(iter(hub.connections)))
        sent = 0
        while not stalled.outbox.closed:
            assert sent < 100
            stage.put(many(sent * MANY))
            sent += 1
            until(lambda: len(fine.live) == sent * MANY, what="all rows for who reads")  # noqa: B023
        assert not fine.skipped
        assert fine.kinds.count("snapshot") == 1
        assert not good.closed
        if reads_on:
            # Behind what was on its way comes the reason.
            while raw.protocol.close_rcvd is None:
                raw.read()
            assert raw.protocol.close_rcvd.code == CLOSE_TOO_SLOW
            assert "keep up" in raw.protocol.close_rcvd.reason
        until(lambda: len(hub.connections) == 1, what="the connection to be gone")
        # Its socket, too, though it never reads.
        until(lambda: connected(one.port) == 1, what="its socket to be gone")
        raw.plain.close()
        stage.put(many(0, 1))
        until(lambda: len(fine.live) == (sent + 1) * MANY, what="rows afterwards")


def connected(port: int) -> int:
    """Established connections of this process at a port of its own."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    count = 0
    with open("/proc/self/net/tcp") as lines:
        for line in list(lines)[1:]:
            fields = line.split()
            if int(fields[1].split(":")[1], 16) == port and fields[3] == "01":
                count += f"socket:[{fields[9]}]" in inodes
    return count


def test_a_client_that_pauses_gets_the_newest_of_each_key(one: Served, bus: Bus) -> None:
    one.app.state.web.hub.bounds = Bounds(coalesce=64 << 10, drop=64 << 20, seconds=60.0)
    stage, raw = Stage(bus), Raw(one)
    subscribe(one, raw)
    stalled = next(iter(one.app.state.web.hub.connections))
    sent = 0
    # Until its socket takes no more, and then the same rows again and again.
    while not stalled.outbox._congested or sent < 12:
        assert sent < 100
        stage.put(many(0, sent))
        sent += 1
        until(lambda: one.app.state.web.hub.stream("candles").positions[0].seq == sent, what="the row")  # noqa: B023
    newest, skipped, count = dict[str, int](), 0, 0
    while newest.get("2023-12-25T23:01:00Z") != sent - 1:
        for message in raw.read():
            skipped += message.get("skipped", 0)
            count += len(message["rows"])
            newest |= {row["time"]: row["revision"] for row in message["rows"]}
    assert set(newest.values()) == {sent - 1}
    assert len(newest) == MANY
    assert skipped > 0
    assert skipped + count == sent * MANY
    raw.plain.close()
