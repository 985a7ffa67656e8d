"""A consumer of a stream of the client, beside the test in one event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any

import aiohttp

from shared.client import Client, Stream
from shared.client_stream import LIVE
from shared.instruments import instrument_id
from shared.messages import Instrument
from tests.wait import until

SECONDS = 20.0
# What has options, and one of them.
OPTIONS = [
    Instrument(instrument_id("GLBX.MDP3", "NQH4"), "GLBX.MDP3", "NQH4", "NQ", "databento"),
    Instrument(instrument_id("GLBX.MDP3", "NQH4 C17000"), "GLBX.MDP3", "NQH4 C17000", "NQ", "databento", kind="C",
               strike=17000.0, expiration_ns=1_711_699_200_000_000_000, underlying="NQH4"),
]  # fmt: skip


class NotedClient(Client):
    """A client whose newest connection a test can lay hands on."""

    def __init__(self, url: str, receive_bytes: int = 0) -> None:
        super().__init__(url, "")
        self._socket: socket.socket | None = None
        self._receive_bytes = receive_bytes

    @asynccontextmanager
    async def websocket(self) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        async with super().websocket() as connection:
            self._socket = connection.get_extra_info("socket")
            if self._receive_bytes and self._socket is not None:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
            yield connection

    def cut(self) -> None:
        """As a network does."""
        held, self._socket = self._socket, None
        if held is not None and held.fileno() >= 0:
            with suppress(OSError):  # it has ended by itself
                held.shutdown(socket.SHUT_RDWR)


class Taker:
    """Takes rows from a stream in a task of its own. While `gate` is not set, it takes no further one."""

    def __init__(self, stream: Stream[Any]) -> None:
        self.stream, self.rows = stream, list[Any]()
        self.gate, self._changed = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def __aenter__(self) -> Taker:
        await self.stream.__aenter__()
        self._task = asyncio.create_task(self._take())
        self._task.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.set()
        told = self._task.done() or error is not None
        await self.stream.close()
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(self._task, return_exceptions=told)

    async def _take(self) -> None:
        async for row in self.stream:
            await self.gate.wait()
            self.rows.append(row)
            self._changed.set()

    async def until(self, condition: Callable[[list[Any]], bool], what: str) -> list[Any]:
        """The rows, once they are as wanted."""
        try:
            async with asyncio.timeout(SECONDS):
                while not condition(self.rows):
                    if self._task.done():
                        await self._task  # raises what ended it
                        raise AssertionError(f"the stream ended before {what}")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"no {what}: {len(self.rows)} rows, {self.stream.state}") from None
        return self.rows

    async def reaches(self, count: int) -> list[Any]:
        return await self.until(lambda rows: len(rows) >= count, f"{count} rows")

    async def live(self) -> None:
        """Wait until the stream goes on, of one without history: has begun."""
        stream = self.stream
        try:
            await asyncio.to_thread(until, lambda: self._task.done() or stream.state == LIVE, SECONDS)
        except AssertionError:
            raise AssertionError(f"{stream.state}: {stream.detail}") from None
