"""Connections to a tardis-machine server: reading on a thread of their own, so that a slow bus does not stop it.

What is read waits in bounded queues, one a connection. When a queue is full, reading pauses, and TCP
makes the server wait.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from yarl import URL

from services.ingest.tardis_request import LIVE, REPLAY, STATE_PATIENCE, Request, refusal, refused_upgrade
from shared.errors import ConfigError

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 0.2
PONG_SECONDS = 10.0
FIRST_BACKOFF_SECONDS = 0.25
QUEUE_BYTES = 64 << 20
BATCH_LINES = 20_000
FINISHED = 1000


@dataclass(frozen=True, slots=True)
class Down:
    """The connection ended after the messages before this.

    `absent`: it never stood; `ended`: the server was done; `renewed`: `ask` was called.
    """

    reason: str
    absent: bool = False
    ended: bool = False
    renewed: bool = False


class Up:
    """The connection stands."""


Item = list[bytes] | Up | Down


@dataclass(slots=True)
class Wire:
    """One connection as the reader of its messages sees it."""

    request: Request
    items: deque[Item] = field(default_factory=deque)
    waiting_bytes: int = 0
    paused: bool = False  # not read from: the queue is full
    renew: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)  # asked for no more


class Sockets:
    """Keeps the connections of `requests` up until closed: `with Sockets(…) as sockets: … sockets.take(wire)`.

    `once`: a connection that the server ends in order (code 1000) stays down.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        host: str,
        port: int,
        silence_seconds: float,
        backoff_max_seconds: float,
        *,
        once: bool = False,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.wires = [Wire(request) for request in requests]
        self.where = f"tardis-machine at {host}:{port}"
        self.news = threading.Event()  # something was put into a queue
        self.error: BaseException | None = None
        self._base = f"http://{host}:{port}"
        self._silence, self._backoff_max = silence_seconds, backoff_max_seconds
        self._once, self._queue_bytes = once, queue_bytes
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="tardis-read", daemon=True)

    def __enter__(self) -> Sockets:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._call(self._cancel)
        self._thread.join(10)

    # -- the reader's side -------------------------------------------------------------------

    def take(self, wire: Wire) -> Item | None:
        """The next item of a connection: lines (at most BATCH_LINES), Up or Down.

        Raises what ended the connections for good: ConfigError, AuthError.
        """
        with self._lock:
            item = wire.items.popleft() if wire.items else None
            if isinstance(item, list):
                wire.waiting_bytes -= sum(map(len, item))
            paused = wire.paused
        if paused:
            self._call(wire.room.set)
        if item is None and self.error is not None:
            raise self.error
        return item

    def ask(self, wire: Wire, request: Request | None) -> None:
        """Connect again and ask for something else, or (None) for nothing any more."""
        if request is None:
            self._call(wire.over.set)
        else:
            wire.request = request
        self._call(wire.renew.set)

    def _call(self, function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function)

    # -- the loop's side ---------------------------------------------------------------------

    def _cancel(self) -> None:
        if self._main is not None:
            self._main.cancel()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._main = self._loop.create_task(self._serve())
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # the reader's thread raises it
            self.error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
            self.news.set()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _serve(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
            for wire in self.wires:
                group.create_task(self._keep(session, wire))

    async def _keep(self, session: aiohttp.ClientSession, wire: Wire) -> None:
        """One connection after the other."""
        failures = 0
        while not wire.over.is_set():
            wire.renew.clear()
            heard = False
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    ws = await self._connect(session, wire)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                down = Down(self._absent(error), absent=True)
            else:
                self._put(wire, Up())
                down, heard = await self._session(wire, ws)
            if wire.over.is_set():
                return
            self._put(wire, down)
            if down.ended:
                return
            if down.renewed:
                continue
            failures = 0 if heard else failures + 1
            delay = min(self._backoff_max, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 20))
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _connect(self, session: aiohttp.ClientSession, wire: Wire) -> aiohttp.ClientWebSocketResponse[Any]:
        return await session.ws_connect(
            URL(self._base + wire.request.target(), encoded=True),
            max_msg_size=0,
            timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
            decode_text=False,
        )

    def _absent(self, error: Exception) -> str:
        if isinstance(error, aiohttp.WSServerHandshakeError):
            fatal = refused_upgrade(error.status, self.where)
            if fatal is not None:
                raise fatal from None
            return f"{self.where} answers {error.status}"
        if isinstance(error, TimeoutError):
            return f"{self.where} does not answer"
        why = error.os_error.strerror if isinstance(error, aiohttp.ClientConnectorError) else str(error)
        return f"{self.where} is not there ({why or type(error).__name__})"

    async def _session(self, wire: Wire, ws: aiohttp.ClientWebSocketResponse[Any]) -> tuple[Down, bool]:
        """Read until the connection ends, falls silent or is to be renewed; and whether anything came."""
        loop = asyncio.get_running_loop()
        patience = self._silence * (1 if wire.request.market else STATE_PATIENCE)
        beat = _Beat(loop.time())
        wire.paused = False
        reading = loop.create_task(self._read(wire, ws, beat))
        renewed = loop.create_task(wire.renew.wait())
        try:
            while True:
                left = max(0.001, beat.at + patience - loop.time()) if not wire.paused else patience
                await asyncio.wait({reading, renewed}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    return reading.result(), beat.heard
                if renewed.done():
                    return Down("asked anew", renewed=True), beat.heard
                if not wire.paused and loop.time() - beat.at >= patience:
                    return Down(f"nothing heard for {patience:g} s"), beat.heard
        finally:
            for task in (reading, renewed):
                task.cancel()
            await asyncio.gather(reading, renewed, return_exceptions=True)
            await ws.close()

    async def _read(self, wire: Wire, ws: aiohttp.ClientWebSocketResponse[Any], beat: _Beat) -> Down:
        loop = asyncio.get_running_loop()
        data = (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY)
        while True:
            message = await ws.receive()
            beat.at = loop.time()
            if message.type not in data:
                return self._closed(message)
            beat.heard = True
            self._put_line(wire, message.data)
            if wire.waiting_bytes > self._queue_bytes:
                with self._lock:
                    wire.paused = True
                while wire.waiting_bytes > self._queue_bytes // 2:
                    wire.room.clear()
                    if wire.waiting_bytes > self._queue_bytes // 2:
                        await self._room(wire, ws)
                wire.paused, beat.at = False, loop.time()

    async def _room(self, wire: Wire, ws: aiohttp.ClientWebSocketResponse[Any]) -> None:
        """Wait for the queue, not answering pings; pongs of our own tell the server that we live."""
        try:
            async with asyncio.timeout(PONG_SECONDS):
                await wire.room.wait()
        except TimeoutError:
            with suppress(ConnectionError):
                await ws.pong()

    def _closed(self, message: aiohttp.WSMessage) -> Down:
        if message.type is not aiohttp.WSMsgType.CLOSE:
            return Down("the connection was lost")
        code, reason = message.data, " ".join((message.extra or "").split())
        fatal = refusal(reason, self.where) if code == aiohttp.WSCloseCode.INTERNAL_ERROR else None
        if code == aiohttp.WSCloseCode.POLICY_VIOLATION and not reason:
            fatal = ConfigError(f"{self.where} does not serve {LIVE} and {REPLAY}: update it")
        if fatal is not None:
            raise fatal
        return Down(f"the server closed the connection ({code} {reason})", ended=self._once and code == FINISHED)

    def _put_line(self, wire: Wire, line: bytes) -> None:
        with self._lock:
            last = wire.items[-1] if wire.items else None
            if isinstance(last, list) and len(last) < BATCH_LINES:
                last.append(line)
            else:
                wire.items.append([line])
            wire.waiting_bytes += len(line)
        if not self.news.is_set():
            self.news.set()

    def _put(self, wire: Wire, item: Up | Down) -> None:
        with self._lock:
            wire.items.append(item)
        self.news.set()


@dataclass(slots=True)
class _Beat:
    """When a connection was last heard, and whether it brought any data."""

    at: float
    heard: bool = False
