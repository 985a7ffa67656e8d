"""What waits to be sent over one connection: bounded, so that a client that does not keep up costs nobody anything.

Messages go out in their order. Rows of a subscription that wait are told together; once more waits than fits, of one
key only the newest row is kept, and the others are counted. Who cannot be sent even that in time is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from shared import live
from shared.api_rows import Told

_text = msgspec.json.Encoder().encode
# Sent at once, if so many wait: a write to the socket costs more than a message.
BURST_MESSAGES, BURST_SIZE = 64, 64 << 10


class Bounds(NamedTuple):
    """Characters that may wait before rows are coalesced, and at all; seconds that one message may take to leave."""

    coalesce: int = 256 << 10
    drop: int = 8 << 20
    seconds: float = 20.0


@dataclass(slots=True)
class Message:
    """One message: what kind of event, its place, its JSON."""

    event: str
    id: str
    text: str

    @property
    def size(self) -> int:
        return len(self.text)


@dataclass(slots=True)
class _Rows:
    """Rows of one subscription that wait: as they came (`parts`), or the newest of each key (`newest`)."""

    sub: str
    id: str = ""
    size: int = 0
    parts: list[Told] = field(default_factory=list)
    newest: dict[Any, str] | None = None
    skipped: int = 0

    def add(self, told: Told) -> int:
        """By how much it has grown."""
        before = self.size
        if self.newest is None:
            self.parts.append(told)
            self.size += len(told.joined)
        else:
            for key, text in zip(told.keys, told.texts, strict=True):
                older = self.newest.pop(key, None)
                if older is not None:
                    self.skipped += 1
                    self.size -= len(older)
                self.newest[key] = text
                self.size += len(text)
        return self.size - before

    def coalesce(self) -> None:
        """From now on only the newest row of each key."""
        parts, self.parts, self.size, self.newest = self.parts, [], 0, {}
        for part in parts:
            self.add(part)

    def message(self) -> Message:
        """What is sent."""
        rows = ",".join([part.joined for part in self.parts] if self.newest is None else self.newest.values())
        skipped = f',"skipped":{self.skipped}' if self.skipped else ""
        text = f'{{"op":"rows","sub":{quoted(self.sub)},"rows":[{rows}],"id":"{self.id}"{skipped}}}'
        return Message("rows", self.id, text)


def quoted(text: str) -> str:
    """A text as JSON."""
    return _text(text).decode()


class Outbox:
    """The messages of one connection. `dropped` is called once, with the reason, when the client is too slow.

    Rows are put whenever they come; whoever puts anything else first waits for `room`, one snapshot at a time (`turn`).
    """

    def __init__(self, dropped: Callable[[str], None], bounds: Bounds) -> None:
        self._dropped, self._bounds = dropped, bounds
        self._queue: deque[Message | _Rows] = deque()
        self._open: dict[str, _Rows] = {}
        self._size = 0  # of all that waits
        self._rows = 0  # of the rows that wait
        self._congested = False
        self._wake, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._sending_since: float | None = None
        self.turn = asyncio.Lock()
        self.closed = False

    # -- what is to be sent ------------------------------------------------------------------

    def snapshot(self, sub: str, rows: str, place: str) -> None:
        """`rows`: the JSON of an array, without its brackets."""
        text = f'{{"op":"snapshot","sub":{quoted(sub)},"rows":[{rows}],"id":"{place}"}}'
        self._put(Message("snapshot", place, text), sub)

    def event(self, event: live.Event, sub: str = "") -> None:
        """Any other message; of a subscription behind its rows."""
        name, place = str(event.__struct_config__.tag), getattr(event, "id", "")
        self._put(Message(name, place, _text(event).decode()), sub)

    def alive(self) -> None:
        """An empty message, unless something waits: so that nobody between takes the connection for dead."""
        if not self._queue:
            self._put(Message("", "", ""), "")

    def _put(self, message: Message, sub: str) -> None:
        if not self.closed:
            self._open.pop(sub, None)
            self._queue.append(message)
            self._grow(len(message.text))

    def rows(self, sub: str, told: Told, place: str) -> None:
        """Rows as they were made."""
        if self.closed:
            return
        item = self._open.get(sub)
        if item is None:
            item = self._open[sub] = _Rows(sub, newest={} if self._congested else None)
            self._queue.append(item)
        item.id = place
        size = item.add(told)
        self._rows += size
        self._grow(size)
        if self._sending_since is None:
            return  # nothing holds it up
        if self._size > self._bounds.coalesce and not self._congested:
            self._coalesce()
        if self._rows > self._bounds.drop:
            self._drop(f"more than {self._bounds.drop >> 10} KiB wait for this client, which does not keep up")

    def _grow(self, size: int) -> None:
        self._size += size
        self._wake.set()
        if self._size > self._bounds.coalesce:
            self._room.clear()

    def _coalesce(self) -> None:
        self._congested = True
        for item in self._queue:
            if isinstance(item, _Rows):
                before = item.size
                item.coalesce()
                self._size += item.size - before
                self._rows += item.size - before

    def forget(self, sub: str) -> None:
        """A subscription has ended: what waits of it need not be sent."""
        item = self._open.pop(sub, None)
        if item is not None:
            self._queue.remove(item)
            self._taken(item)

    async def room(self) -> None:
        """Wait until little waits."""
        await self._room.wait()

    # -- sending -----------------------------------------------------------------------------

    async def send_all(self, send: Callable[[list[Message]], Awaitable[None]]) -> None:
        """Sends what comes, some messages after the other, until cancelled or `send` fails."""
        while True:
            while not self._queue:
                self._congested = False
                self._wake.clear()
                await self._wake.wait()
            self._sending_since = time.monotonic()
            await send(self._some())
            self._sending_since = None
            if self._queue:
                await asyncio.sleep(0)  # others' turn: while the socket takes it, sending waits for nothing

    def _some(self) -> list[Message]:
        """The next messages, at least one."""
        some: list[Message] = []
        size = 0
        while self._queue and len(some) < BURST_MESSAGES and size < BURST_SIZE:
            item = self._queue.popleft()
            self._taken(item)
            size += item.size
            if isinstance(item, _Rows):
                if self._open.get(item.sub) is item:
                    del self._open[item.sub]
                item = item.message()
            some.append(item)
        return some

    def _taken(self, item: Message | _Rows) -> None:
        self._size -= item.size
        if isinstance(item, _Rows):
            self._rows -= item.size
        if self._size <= self._bounds.coalesce:
            self._room.set()

    def check(self, now: float) -> None:
        """Drops the client whose socket has not taken a message for too long; to be called now and then."""
        if self._sending_since is not None and now - self._sending_since > self._bounds.seconds:
            self._drop(f"this client has read nothing for {self._bounds.seconds:g} s")

    def _drop(self, reason: str) -> None:
        if not self.closed:
            self.close()
            self._dropped(reason)

    def close(self) -> None:
        """Takes nothing more."""
        self.closed = True
        self._queue.clear()
        self._open.clear()
        self._size = self._rows = 0
        self._room.set()
