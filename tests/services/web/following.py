"""A client of the live API that keeps what it is told, and what a client that obeys makes of it."""

from __future__ import annotations

import json
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.wait import until


class Told:
    """One subscription as its client knows it: the rows by key, and everything in the order of its coming."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.live: list[dict[str, Any]] = []
        self.notices: list[tuple[str, str]] = []
        self.id = ""
        self.skipped = 0

    def take(self, message: dict[str, Any]) -> None:
        self.kinds.append(message["op"])
        if message["op"] == "notice":
            self.notices.append((message["code"], message.get("message", "")))
        if message["op"] == "snapshot":
            self.rows, self.live = list(message["rows"]), []
        if message["op"] == "rows":
            self.rows += message["rows"]
            self.live += message["rows"]
            self.skipped += message.get("skipped", 0)
        self.id = message.get("id") or self.id


class Client:
    """A WebSocket whose messages a thread takes; `subs` by name."""

    def __init__(self, url: str, **options: Any) -> None:
        self.subs: dict[str, Told] = {}
        self.others: list[dict[str, Any]] = []
        self.closed: tuple[int, str] | None = None
        self._held = ExitStack()
        self.socket: ClientConnection = self._held.enter_context(
            connect(url, proxy=None, max_size=None, compression=None, **options)
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for text in self.socket:
                message = json.loads(text)
                if message["op"] in ("snapshot", "resumed", "rows", "notice"):
                    self.subs.setdefault(message["sub"], Told()).take(message)
                else:
                    self.others.append(message)
        except ConnectionClosed:
            pass
        frame = self.socket.protocol.close_rcvd
        self.closed = (frame.code, frame.reason) if frame else (1006, "")

    def send(self, op: str, **values: Any) -> None:
        self.socket.send(json.dumps({"op": op, **values}))

    def subscribe(self, sub: str = "a", channel: str = "candles", **values: Any) -> Told:
        """Subscribe, and wait for the first message."""
        self.subs[sub] = told = Told()
        self.send("subscribe", sub=sub, channel=channel, **values)
        until(lambda: told.kinds or self.others or self.closed, what=f"an answer to {sub}")
        return told

    def other(self) -> dict[str, Any]:
        """The next message that is none of a subscription."""
        until(lambda: self.others, what="an answer")
        return self.others.pop(0)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
