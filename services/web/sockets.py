"""The web server's connections, with a way to end one whose client reads nothing, and to send much at once.

A close frame, or the end of an answer, waits behind what the client has not read, which may be for ever. So a
connection can be dropped: it is told, and cut off soon after whether it has read that or not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import HTTPConnection
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

DROP, SEND = "tapeline.drop", "tapeline.send"
GRACE_SECONDS = 5.0

Drop = Callable[[int, str], None]
SendTexts = Callable[[list[str]], Awaitable[None]]


def drop_of(connection: HTTPConnection) -> Drop | None:
    """What drops a connection with a close code and a reason; None on a server that has no such thing."""
    found: dict[str, Any] = connection.scope.get("extensions") or {}
    return found.get(DROP)


def sender_of(connection: HTTPConnection) -> SendTexts | None:
    """What sends texts in one write, once the socket takes them; None on a server that has no such thing."""
    found: dict[str, Any] = connection.scope.get("extensions") or {}
    return found.get(SEND)


class Sockets(WebSocketsSansIOProtocol):
    """WebSockets for `uvicorn.Config(ws=Sockets)`."""

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        scope: Any = getattr(self, "scope", None)
        if scope is not None:
            scope["extensions"] |= {DROP: self._drop, SEND: self._send_texts}

    async def _send_texts(self, texts: list[str]) -> None:
        await self.writable.wait()
        if self.disconnected or self.close_sent:
            raise ClientDisconnected
        try:
            for text in texts:
                self.conn.send_text(text.encode())
        except InvalidState:  # the client is closing it
            raise ClientDisconnected from None
        self.transport.write(b"".join(self.conn.data_to_send()))

    def _drop(self, code: int, reason: str) -> None:
        if self.handshake_complete and not self.close_sent and not self.transport.is_closing():
            self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
        self.loop.call_later(GRACE_SECONDS, self.transport.abort)

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.loop.call_later(GRACE_SECONDS, self.transport.abort)


class Requests(H11Protocol):
    """HTTP for `uvicorn.Config(http=Requests)`."""

    def handle_events(self) -> None:
        super().handle_events()
        scope: Any = getattr(self, "scope", None)
        if scope is not None:
            scope.setdefault("extensions", {})[DROP] = self._drop

    def _drop(self, _code: int, _reason: str) -> None:
        self.loop.call_later(GRACE_SECONDS, self.transport.abort)
