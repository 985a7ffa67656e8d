"""A topic of the bus as it is now: one reader for all who follow it, and its newest frames in memory.

It begins with what is made next and goes on for good: through a restart of Redis from where it stood. Where that cannot
be (trimmed, emptied, another deployment) it tells everyone who follows, and begins again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, Protocol

from services.web.channels import Followed, Subject
from services.web.places import Place
from shared import metrics
from shared.api_rows import Told
from shared.batches import Cursor
from shared.errors import BusUnavailable, TapelineError, Unavailable
from shared.frames import Frame
from shared.reader_feed import Feed
from shared.sink_tail import START

log = logging.getLogger(__name__)

READ_ENTRIES = 32
# What is kept of a topic, so that a snapshot of the store is joined to it without asking Redis.
KEPT_BYTES = 4 << 20
KEPT_SECONDS = 30.0
PAUSE_SECONDS = 1.0
LOOKING = "the bus is being looked at"


class Entry(NamedTuple):
    """A frame in its place."""

    partition: int
    cursor: Cursor
    frame: Frame
    at: float


class Follower(Protocol):
    """Who follows a subject of the topic."""

    subject: Subject

    def rows(self, entry: Entry, told: Told) -> None:
        """Rows of it in the order of their making."""

    def lost(self) -> None:
        """Nothing more comes: it is to be followed anew."""

    def told(self, trouble: str) -> None:
        """The bus does not answer (why), or does again (empty)."""


class _Lost(Exception):
    """The topic does not go on from where it was read."""


class Stream:
    """Reads from `open` to `close`; for one event loop. `trouble`: why nothing comes, empty while all is well."""

    def __init__(self, feed: Feed, topic: str, *, alone: bool) -> None:
        """`alone`: each partition is read for itself (of a cluster)."""
        self.topic, self.bus, self.partitions = topic, "", 0
        self.was = ""  # the bus before this one
        self.positions: dict[int, Cursor] = {}
        self.trouble = LOOKING
        self._feed, self._alone = feed, alone
        self._followed = Followed()
        self._followers: dict[Subject, dict[Follower, None]] = {}
        self._kept: deque[Entry] = deque()
        self._kept_bytes = 0
        self._floor: dict[int, Cursor] = {}  # behind these `_kept` is whole
        self._moved = asyncio.Event()
        self._place: Place | None = None
        self._place_text = ""
        self._text_of: tuple[Cursor, str] | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to read; may be called again."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"web-{self.topic}")

    async def close(self) -> None:
        """End reading."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # -- for those who follow ----------------------------------------------------------------

    def add(self, follower: Follower) -> None:
        """It gets all that comes from now on."""
        some = self._followers.setdefault(follower.subject, {})
        if follower not in some:
            some[follower] = None
            self._followed.add(follower.subject)

    def remove(self, follower: Follower) -> None:
        """Nothing, if it did not follow."""
        some = self._followers.get(follower.subject, {})
        if follower in some:
            del some[follower]
            self._followed.remove(follower.subject)
            if not some:
                del self._followers[follower.subject]

    @property
    def ready(self) -> bool:
        """Whether it is known where the topic stands."""
        return bool(self.positions)

    async def settled(self, seconds: float = 0.0) -> None:
        """Wait up to so long until it is known where the topic stands. Raises BusUnavailable: at once in trouble."""
        until = time.monotonic() + seconds
        while not self.ready and self.trouble == LOOKING and (left := until - time.monotonic()) > 0:
            await self.moved(left)
        if not self.ready:
            raise BusUnavailable(self.trouble)

    @property
    def begun(self) -> list[int]:
        """The partitions that have, or had, an entry."""
        return [p for p, cursor in self.positions.items() if cursor.stream_id != START]

    @property
    def place(self) -> Place:
        """Up to where all partitions were read."""
        if self._place is None:
            self._place = Place(self.bus, self.topic, dict(self.positions))
            self._place_text = self._place.text()
        return self._place

    @property
    def place_text(self) -> str:
        """The text of `place`; made once for all who send it."""
        _ = self.place
        return self._place_text

    def text_of(self, entry: Entry) -> str:
        """The text of the place behind an entry, of its partition alone; made once for all who send it."""
        if self._text_of is None or self._text_of[0] is not entry.cursor:
            text = Place(self.bus, self.topic, {entry.partition: entry.cursor}).text()
            self._text_of = (entry.cursor, text)
        return self._text_of[1]

    def keeps(self, partition: int, cursor: Cursor) -> bool:
        """Whether all that came behind a cursor is kept."""
        if partition not in self._floor:
            return False
        if self._floor[partition].stream_id == cursor.stream_id:
            return True
        return any(e.cursor.stream_id == cursor.stream_id for e in self._kept if e.partition == partition)

    def behind(self, cursors: dict[int, Cursor]) -> Iterator[Entry]:
        """What came behind cursors of some partitions, all of them kept."""
        orders = {p: order_of(c) for p, c in cursors.items()}
        for entry in list(self._kept):
            if entry.partition in orders and order_of(entry.cursor) > orders[entry.partition]:
                yield entry

    async def moved(self, seconds: float = 1.0) -> None:
        """Wait until something comes, or changes, or for so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), seconds)

    def all_followers(self) -> list[Follower]:
        return [follower for some in self._followers.values() for follower in some]

    # -- reading -----------------------------------------------------------------------------

    async def _run(self) -> None:
        pause = 0.05
        while True:
            try:
                await self._attach()
                pause = 0.05
                await self._read_all()
            except _Lost as error:
                log.warning("%s: %s; beginning again with what is there now", self.topic, error)
                self._reset()
                continue
            except Unavailable as error:
                self._say(str(error))
            except TapelineError as error:
                self._say(str(error))
                pause = PAUSE_SECONDS
            except Exception:
                log.exception("reading %s failed", self.topic)
                metrics.fault("web.stream")
                self._say("the server failed at reading the bus; its log has the reason")
                pause = PAUSE_SECONDS
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(PAUSE_SECONDS, 2 * pause)

    async def _attach(self) -> None:
        """Find where the topic stands; or, coming back to it, whether it goes on from where it was read."""
        deployment = await self._feed.deployment()
        if deployment is None:
            if self.positions:
                raise _Lost("Redis has lost its data")
            raise BusUnavailable("there is no deployment on the bus yet (does a sink run?)")
        if not self.positions:
            bus, partitions = deployment
            positions = {p: await self._feed.newest(self.topic, p) for p in range(partitions)}
            if await self._feed.deployment() != deployment:
                raise BusUnavailable("the deployment on the bus is being changed")
            self.bus, self.partitions, self.positions = bus, partitions, positions
            self._floor = dict(positions)
            self._place = None
        elif deployment != (self.bus, self.partitions):
            raise _Lost("this is another bus now")
        else:
            for partition, cursor in self.positions.items():
                if not await self._feed.holds(partition, cursor, self.topic):
                    raise _Lost(f"partition {partition} does not go on from entry {cursor.stream_id}")
        self._say("")
        self._wake()

    async def _read_all(self) -> None:
        groups: Iterable[list[int]] = [[p] for p in self.positions] if self._alone else [list(self.positions)]
        tasks = [asyncio.create_task(self._read(group)) for group in groups]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, group: list[int]) -> None:
        while True:
            at = {p: self.positions[p].stream_id for p in group}
            read = await self._feed.read_all(self.topic, at, READ_ENTRIES)
            if await self._feed.deployment() != (self.bus, self.partitions):
                raise _Lost("this is another bus now")
            for partition, frames in read.items():
                # What a stage commits counts on; a sequence that does not may only be a foreign entry's.
                position = self.positions[partition]
                if frames[0].seq != position.seq + 1 and not await self._feed.holds(partition, position, self.topic):
                    raise _Lost(f"partition {partition} does not go on from entry {position.stream_id}")
                for frame in frames:
                    self._take(partition, frame)
            if read:
                self._wake()

    def _take(self, partition: int, frame: Frame) -> None:
        entry = Entry(partition, next_cursor(self.positions[partition], frame), frame, time.monotonic())
        self.positions[partition] = entry.cursor
        self._place = None
        self._kept.append(entry)
        self._kept_bytes += len(frame.body)
        while self._kept_bytes > KEPT_BYTES or self._kept[0].at < entry.at - KEPT_SECONDS:
            gone = self._kept.popleft()
            self._kept_bytes -= len(gone.frame.body)
            self._floor[gone.partition] = gone.cursor
        if not self._followers:
            return
        try:
            found = self._followed.rows_of(frame)
        except Exception:
            log.exception("entry %s of %s cannot be told", frame.id, self.topic)
            metrics.fault("web.stream")
            return
        for subject, told in found.items():
            for follower in list(self._followers.get(subject, ())):
                try:
                    follower.rows(entry, told)
                except Exception:
                    log.exception("entry %s of %s could not be told to one", frame.id, self.topic)
                    metrics.fault("web.stream")
                    self.remove(follower)
                    follower.lost()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _say(self, trouble: str) -> None:
        if trouble == self.trouble:
            return
        if trouble:
            log.warning("%s: %s; waiting", self.topic, trouble)
        self.trouble = trouble
        self._wake()
        for follower in self.all_followers():
            follower.told(trouble)

    def _reset(self) -> None:
        """Let go of everyone who follows."""
        self.was = self.bus
        followers = self.all_followers()
        for follower in followers:
            self.remove(follower)
            follower.lost()
        self.positions, self._floor, self._place = {}, {}, None
        self._kept.clear()
        self._kept_bytes = 0
        self.trouble = LOOKING
        self._wake()


def next_cursor(before: Cursor, frame: Frame) -> Cursor:
    """The cursor of the frame behind another one; what somebody else wrote there has no sequence."""
    return Cursor(frame.seq if frame.seq > 0 else before.seq, frame.id)


def order_of(cursor: Cursor) -> tuple[int, int]:
    """Entries of a stream in their order."""
    ms, _, n = cursor.stream_id.partition("-")
    return int(ms), int(n)
