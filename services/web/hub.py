"""What all live clients share: a reader of each topic that is followed, the store's snapshots, and who is connected."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import msgspec

from services.web.channels import Subject
from services.web.outbox import Bounds, Outbox
from services.web.stream import Stream
from shared import metrics
from shared.api_rows import columns_of, rows_of_store
from shared.batches import Cursor, CursorKey
from shared.errors import TapelineError
from shared.reader_feed import Feed
from shared.settings import Settings
from shared.store_pages import PageAsk, Pages
from shared.stores import parse

log = logging.getLogger(__name__)

STORE_CONNECTIONS = 2
# A snapshot is good for as long as the bus holds its place; many clients ask for the same at once.
SNAPSHOT_SECONDS = 1.0
SNAPSHOTS_BYTES = 32 << 20
GOODBYE = "the server ends; it may be back in a moment"
GOODBYE_SECONDS = 2.0
CHECK_SECONDS = 1.0
PULSE_SECONDS = 1.0


class Connection(Protocol):
    """A live client."""

    outbox: Outbox

    def end(self, reason: str) -> None:
        """Close it, and take it from `Hub.connections` once that is done."""


class Snapshot(NamedTuple):
    """Rows as the inside of a JSON array, and the cursors of the same instant; `cut`: there were older rows."""

    rows: str
    cursors: dict[CursorKey, Cursor]
    cut: bool


class SnapshotAsk(NamedTuple):
    """The newest `last` rows of a subject, `since` an ISO instant where that is given."""

    subject: Subject
    last: int
    since: str = ""


class Hub:
    """For one event loop. `history`: whether the store can tell how far it had got when it was read."""

    def __init__(self, settings: Settings, bounds: Bounds | None = None) -> None:
        """Connects to nothing yet. Raises ConfigError for what is no URL of Redis or of a store."""
        self.settings, self.bounds = settings, bounds or Bounds()
        redis = settings.redis
        self.feed = Feed(redis.url, settings.tapeline.namespace, cluster=redis.cluster)
        self.history = parse(settings.tapeline.store).scheme != "bigquery"
        self.catching_up = asyncio.Semaphore(4)
        self.connections: dict[Connection, None] = {}
        self.pulse = Pulse()
        self._pages = Pages(settings.tapeline.store, STORE_CONNECTIONS)
        self._streams: dict[str, Stream] = {}
        self._snapshots: OrderedDict[SnapshotAsk, tuple[float, asyncio.Task[Snapshot]]] = OrderedDict()
        self._checking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads nothing until somebody follows."""
        self._checking = asyncio.create_task(self._check(), name="web-check")

    async def close(self) -> None:
        """Tell all live clients that it ends, and let go of everything. May be called again."""
        for connection in list(self.connections):
            connection.end(GOODBYE)
        deadline = time.monotonic() + GOODBYE_SECONDS
        while self.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        await self.pulse.close()
        for stream in self._streams.values():
            await stream.close()
        for _, task in self._snapshots.values():
            task.cancel()
        await asyncio.gather(*(task for _, task in self._snapshots.values()), return_exceptions=True)
        await self._pages.close()
        await self.feed.close()

    def stream(self, topic: str) -> Stream:
        """The topic's one reader, which is reading."""
        stream = self._streams.get(topic)
        if stream is None:
            stream = self._streams[topic] = Stream(self.feed, topic, alone=self.settings.redis.cluster)
            stream.open()
        return stream

    async def snapshot(self, ask: SnapshotAsk) -> Snapshot:
        """Of the store, at most SNAPSHOT_SECONDS old. Raises StoreUnavailable, ConfigError."""
        now = time.monotonic()
        at, task = self._snapshots.get(ask, (-SNAPSHOT_SECONDS, None))
        if task is None or now - at >= SNAPSHOT_SECONDS or (task.done() and (task.cancelled() or task.exception())):
            task = asyncio.create_task(self._read(ask))
            self._snapshots[ask] = (now, task)
            self._snapshots.move_to_end(ask)
        return await asyncio.shield(task)

    async def _read(self, ask: SnapshotAsk) -> Snapshot:
        subject = ask.subject
        table = subject.table
        page = await self._pages.page(
            PageAsk(
                table, subject.where, ask.since or None, limit=ask.last, columns=columns_of(table), topic=subject.topic
            )
        )
        rows = rows_of_store(table, page.rows)
        return Snapshot(msgspec.json.encode(rows).decode()[1:-1], page.cursors, page.next is not None)

    def _forget_snapshots(self, now: float) -> None:
        held = 0
        for ask in reversed(list(self._snapshots)):
            at, task = self._snapshots[ask]
            if task.done():
                held += 0 if task.cancelled() or task.exception() else len(task.result().rows)
                if now - at >= SNAPSHOT_SECONDS or held > SNAPSHOTS_BYTES:
                    del self._snapshots[ask]

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now = time.monotonic()
            self._forget_snapshots(now)
            for connection in list(self.connections):
                connection.outbox.check(now)


class Pulse:
    """What is told about each second while somebody wants it: read once for all."""

    def __init__(self) -> None:
        self._followers: dict[Callable[[str], None], None] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, follower: Callable[[str], None], read: Callable[[], Awaitable[Any]]) -> None:
        """`follower` gets what `read` gives, as JSON, soon and from then on."""
        self._followers[follower] = None
        if self._task is None:
            self._task = asyncio.create_task(self._run(read), name="web-pulse")

    def remove(self, follower: Callable[[str], None]) -> None:
        self._followers.pop(follower, None)

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self, read: Callable[[], Awaitable[Any]]) -> None:
        while self._followers:
            try:
                found = msgspec.json.encode(await read()).decode()
            except TapelineError as error:
                log.debug("the pipeline is not told: %s", error)
            except Exception:
                log.exception("the pipeline cannot be told")
                metrics.fault("web.hub")
            else:
                for follower in list(self._followers):
                    follower(found)
            await asyncio.sleep(PULSE_SECONDS)
        self._task = None
