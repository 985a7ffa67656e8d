"""One connection to a Databento live gateway: columns for the trades, objects for the rest.

The official protocol class does the handshake and the subscriptions. What comes after the session's
metadata is cut by record headers here: runs of TBBO records become one array without an object
each; a record that is not complete waits for its rest.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

import databento_dbn
import numpy as np
from databento.live.protocol import DatabentoLiveProtocol
from numpy.typing import NDArray

from services.ingest.normalize import RECORD

BUFFER_BYTES = 1 << 20
TBBO_WORDS, TBBO_RTYPE = RECORD.itemsize // 4, 1
HEADER_BYTES = 16

# Its errors reach the user as ours; without a handler of its own they would go to stderr, too.
logging.getLogger("databento").addHandler(logging.NullHandler())


class Dropped(Exception):
    """The session is over and a new one must go on where it stopped; the text says why."""


class ReplayTooOld(Dropped):
    """The gateway does not reach back to the start that was asked for."""


class Handler(Protocol):
    """Who takes what a session brings, in wire order. What it raises ends the session."""

    def metadata(self, metadata: Any) -> None:
        """The session's `databento_dbn.Metadata`: always first."""

    def received(self, records: int, nbytes: int) -> None:
        """So many records, and their bytes on the wire, are about to be handed on."""

    def trades(self, records: NDArray[Any]) -> None:
        """RECORD records; a view that holds only during the call."""

    def record(self, record: Any) -> None:
        """Any other record as a `databento_dbn` object of the newest version."""


class Wire(DatabentoLiveProtocol):  # type: ignore[misc]
    """The protocol of one connection. `failed` gets what the handler raised, `heard_at` is loop time."""

    def __init__(self, handler: Handler, api_key: str, dataset: str, heartbeat_seconds: int) -> None:
        super().__init__(api_key, dataset, heartbeat_interval_s=heartbeat_seconds)
        self._loop = asyncio.get_running_loop()
        self._handler = handler
        self._buffer = bytearray(BUFFER_BYTES)
        self._end = 0
        self._objects: Any = None
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self.heard_at = self._loop.time()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the next bytes go: behind the incomplete record."""
        return memoryview(self._buffer)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Hand on what is complete. May block: then TCP pushes back on the gateway."""
        if self.failed.done():
            return
        try:
            if self.authenticated.done():
                self._end += nbytes
                self._consume()
            else:
                self._process_gateway(bytes(self._buffer[:nbytes]))
        except Exception as error:
            # asyncio would log it and close; whoever waits for this session must get it.
            self.failed.set_exception(error)
            self.transport.abort()
        # After the work, so that time spent waiting for the bus is not the gateway's silence.
        self.heard_at = self._loop.time()

    def _consume(self) -> None:
        at = 0 if self._objects is not None else self._metadata()
        if self._objects is None:
            return
        while True:
            before = at
            at = self._others(self._trades(at))
            if at == before:
                break
        left = self._end - at
        self._buffer[:left] = self._buffer[at : self._end]
        self._end = left

    def _metadata(self) -> int:
        """Bytes of the metadata once it is complete, else 0."""
        if self._end < 8:
            return 0
        if self._buffer[:3] != b"DBN":
            raise Dropped("the gateway sent something that is not DBN")
        size = 8 + int.from_bytes(self._buffer[4:8], "little")
        if self._end < size:
            if size > len(self._buffer):
                self._buffer = self._buffer + bytes(size)
            return 0
        metadata = databento_dbn.Metadata.decode(bytes(self._buffer[:size]))
        self._objects = databento_dbn.DBNDecoder(
            has_metadata=False,
            input_version=self._buffer[3],
            upgrade_policy=databento_dbn.VersionUpgradePolicy.UPGRADE_TO_V3,
        )
        self._handler.metadata(metadata)
        return size

    def _is_tbbo(self, at: int) -> bool:
        return self._buffer[at] == TBBO_WORDS and self._buffer[at + 1] == TBBO_RTYPE

    def _trades(self, at: int) -> int:
        count = (self._end - at) // RECORD.itemsize
        if not count or not self._is_tbbo(at):
            return at
        records = np.frombuffer(self._buffer, RECORD, count, at)
        # Right up to the first record of another kind, where the stride ends.
        other = (records["length"] != TBBO_WORDS) | (records["rtype"] != TBBO_RTYPE)
        run = int(other.argmax()) if other.any() else count
        self._handler.received(run, run * RECORD.itemsize)
        self._handler.trades(records[:run])
        return at + run * RECORD.itemsize

    def _others(self, at: int) -> int:
        start, count = at, 0
        while self._end - at >= HEADER_BYTES and not self._is_tbbo(at):
            size = 4 * self._buffer[at]
            if size < HEADER_BYTES:
                raise Dropped("the gateway sent a record without a length")
            if self._end - at < size:
                break
            at, count = at + size, count + 1
        if at > start:
            self._handler.received(count, at - start)
            for record in self._objects.write_and_decode(bytes(self._buffer[start:at])):
                self._handler.record(record)
        return at


def one_line(text: str, secret: str = "") -> str:
    """A vendor's text as part of one line of ours, without the secret."""
    if secret:
        text = text.replace(secret, "***")
    return " ".join(text.split())[:200].rstrip(".")
