"""One follower of bars: history from the store, then the bus from exactly where that history ends.

The store commits rows and its place in the stream together, so one snapshot of both says which frames its bars hold;
what comes behind that place is read from the stream. Whenever that cannot go on (trimmed, emptied, another Redis) a new
snapshot is taken, and what was delivered already is left out.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import NamedTuple

from shared.batches import Cursor
from shared.errors import Unavailable
from shared.frames import iso
from shared.reader_bars import Bar, Series, bars_of_frame, key_ns
from shared.reader_feed import Feed
from shared.reader_store import TOPIC, Ask, BarStore, Snapshot
from shared.sink_tail import START

log = logging.getLogger(__name__)

# Bars whose revision is remembered: a correction of one older than all of these is not delivered.
REMEMBERED = 10_000
PAUSE_SECONDS = 1.0
_FIRST = -(1 << 63)


class Delivered:
    """What a follower has been given: the newest revision of each bar, from `floor_ns` on."""

    def __init__(self, floor_ns: int = _FIRST, remembered: int = REMEMBERED) -> None:
        self.floor_ns = floor_ns
        self._revisions: dict[int, int] = {}
        self._remembered = remembered

    def take(self, at_ns: int, revision: int) -> bool:
        """Whether the bar of this time is new, or a newer revision, to be delivered now."""
        if at_ns < self.floor_ns or revision <= self._revisions.get(at_ns, -1):
            return False
        self._revisions[at_ns] = revision
        if len(self._revisions) > 2 * self._remembered:
            kept = sorted(self._revisions)[-self._remembered :]
            self._revisions = {at: self._revisions[at] for at in kept}
            self.floor_ns = kept[0]
        return True


class _Place(NamedTuple):
    """Where a follower reads: `sure` says whether the partition is known to be the series'."""

    bus: str
    partition: int
    cursor: Cursor
    sure: bool


class Following:
    """`more` gives the next bars; between two calls nothing is held but memory."""

    def __init__(
        self, store: BarStore, feed: Feed, series: Series, *, history: int, since_ns: int | None, closing: asyncio.Event
    ) -> None:
        self._store, self._feed, self._series, self._closing = store, feed, series, closing
        self._history = history
        self._delivered = Delivered() if since_ns is None else Delivered(since_ns)
        self._begun = since_ns is not None  # where the series begins for this follower is decided
        self._snapshot: Snapshot | None = None
        self._place: _Place | None = None
        self._bus = ""  # that it read last
        self._trouble = ""
        self._pause = 0.05

    async def more(self) -> list[Bar]:
        """Bars in the order of delivery; [] when there is none just now.

        Waits while Redis or the store does not answer, or the store is behind the bus. Raises AuthError, ConfigError,
        VersionError.
        """
        try:
            if self._place is not None:
                return await self._read(self._place)
            if self._snapshot is None:
                return await self._look_back()
            await self._attach(self._snapshot)
        except Unavailable as error:
            await self._wait(str(error))
        return []

    async def _look_back(self) -> list[Bar]:
        """What the store has and this follower has not."""
        if self._begun:
            floor = self._delivered.floor_ns
            ask = Ask(self._series, since=None if floor == _FIRST else iso(floor))
        else:
            ask = Ask(self._series, last=max(1, self._history))
        self._snapshot = await self._store.snapshot(ask)
        bars = self._snapshot.bars
        if bars and not self._begun:
            self._delivered.floor_ns = key_ns(self._series.table, bars[0])
        new = self._new(bars)
        # With no history asked for, the newest bar only tells from where on.
        if not self._begun and not self._history:
            new = []
        self._begun = True
        return new

    async def _attach(self, snapshot: Snapshot) -> None:
        """Find the place in the stream up to which the snapshot's bars go."""
        self._snapshot = None
        self._place, why = await self._place_of(snapshot)
        if self._place is None:
            await self._wait(why)

    async def _place_of(self, snapshot: Snapshot) -> tuple[_Place | None, str]:
        """The place, or why there is none yet."""
        deployment = await self._feed.deployment()
        if deployment is None:
            return None, "there is no deployment on the bus yet"
        bus, partitions = deployment
        found = await self._feed.partition(self._series, partitions)
        if found is None:
            return None, f"no feed has published {self._series.name} on the bus yet"
        partition, sure = found
        cursor = snapshot.cursors.get((bus, TOPIC, partition))
        # A sink that comes from another bus may still hold rows of that one; once it stores of this one it has not.
        others = {self._bus, *(other for other, _, _ in snapshot.cursors)} - {"", bus}
        if cursor is None and not others:
            cursor = Cursor(0, START)
        if cursor is None or not await self._feed.holds(partition, cursor):
            return None, "the store is behind the bus (does its sink run?)"
        self._bus = bus
        return _Place(bus, partition, cursor, sure), ""

    async def _read(self, place: _Place) -> list[Bar]:
        """The stream from the place on, if it still goes on from there."""
        frames = await self._feed.read(place.partition, place.cursor.stream_id)
        deployment = await self._feed.deployment()
        same = deployment is not None and deployment[0] == place.bus
        if not same or not await self._feed.holds(place.partition, place.cursor):
            log.warning("bars of %s: the stream does not go on; looking into the store", self._series.name)
            self._place = None
            return []
        self._works()
        bars: list[Bar] = []
        for frame in frames:
            bars += self._new(bars_of_frame(frame, self._series))
            place = place._replace(cursor=Cursor(frame.seq or place.cursor.seq, frame.id))
        # Where it is not sure to be the series' partition, a feed may have published it meanwhile.
        self._place = place if place.sure or bars else None
        return bars

    def _new(self, bars: list[Bar]) -> list[Bar]:
        """Those to be delivered."""
        exchange = getattr(bars[0], "exchange", "") if bars else ""
        if exchange and not self._series.exchange:
            # From now on of this one alone, should another one come to have the same symbol.
            self._series = self._series._replace(exchange=exchange)
        mine = [bar for bar in bars if getattr(bar, "exchange", self._series.exchange) == self._series.exchange]
        return [bar for bar in mine if self._delivered.take(key_ns(self._series.table, bar), bar.revision)]

    def _works(self) -> None:
        if self._trouble:
            log.info("bars of %s: going on", self._series.name)
        self._trouble, self._pause = "", 0.05

    async def _wait(self, why: str) -> None:
        if self._closing.is_set():
            return
        if why != self._trouble:
            log.warning("bars of %s: %s; waiting", self._series.name, why)
        self._trouble = why
        try:
            await asyncio.wait_for(self._closing.wait(), self._pause * random.uniform(0.5, 1.0))
        except TimeoutError:
            self._pause = min(PAUSE_SECONDS, 2 * self._pause)
