"""One subscription: history from the store, then the bus from exactly where that history ends.

The store commits rows and its place on the bus together, so a snapshot of both says which frames its rows hold. What
came behind that place is taken from the frames in memory, or read from Redis where they do not reach back so far; then
the subscription is among those that the stream tells. Whenever that cannot go on it waits, says so, and begins anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, replace

import msgspec

from services.web.channels import Subject, rows_of
from services.web.hub import Hub, Snapshot, SnapshotAsk
from services.web.outbox import Outbox
from services.web.places import Place, place_of_store
from services.web.stream import Entry, Stream, next_cursor, order_of
from shared import metrics
from shared.api_rows import Told, key_of
from shared.batches import Cursor
from shared.errors import ConfigError, StoreUnusable, TapelineError, Unavailable
from shared.live import Error, Notice, Resumed
from shared.tables import GAP_KEY, time_column

log = logging.getLogger(__name__)

_row = msgspec.json.Decoder(dict[str, object]).decode
_rows = msgspec.json.Decoder(list[dict[str, object]]).decode
CATCH_UP_ENTRIES = 64
PAUSE_SECONDS = 1.0
REMEMBERED_GAPS = 4096
BEHIND = "the store is behind the bus (does its sink run?)"
NO_HISTORY = "history is not served: this store does not tell how far it had got; rows come from now on"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants of a subject before its rows, see shared.live.Subscribe."""

    history: int = 0
    since: str = ""
    after: Place | None = None


class Subscription:
    """From `start` to `close`. Of a subject's rows none is left out, and none comes twice."""

    def __init__(self, hub: Hub, outbox: Outbox, sub: str, subject: Subject, wish: Wish) -> None:
        self.sub, self.subject = sub, subject
        self.failed = False  # it was refused, and is none
        self._hub, self._outbox, self._wish = hub, outbox, wish
        self._stream: Stream = hub.stream(subject.topic)
        self._partition: int | None = None  # the only one that has rows of it
        self._exchange = ""
        self._place: Place | None = None  # up to where it was told, while it does not follow the stream
        self._shown = False
        self._first_time = ""
        self._waiting = ""
        self._gaps: dict[tuple[object, ...], None] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; nothing is sent before the caller waits for something."""
        self._task = asyncio.create_task(self._begin(), name=f"web-{self.sub}")

    def close(self) -> None:
        """Nothing more is sent."""
        self._stream.remove(self)
        if self._task is not None:
            self._task.cancel()

    # -- beginning ---------------------------------------------------------------------------

    async def _begin(self) -> None:
        pause = 0.05
        while True:
            try:
                if await self._join():
                    self.told(self._stream.trouble)
                    return
                why = BEHIND
            except (Unavailable, StoreUnusable) as error:
                why = str(error)
            except ConfigError as error:
                self.failed = True
                self._outbox.event(Error("bad_request", str(error), self.sub), self.sub)
                return
            except Exception:
                log.exception("subscription to %s failed", self.subject)
                metrics.fault("web.seam")
                why = "the server failed at this subscription; its log has the reason"
            await self._show_what_there_is()
            self.told(why)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(PAUSE_SECONDS, 2 * pause)

    async def _join(self) -> bool:
        """Become one of those that the stream tells, without a gap; False if the store or the place does not do."""
        await self._stream.settled(1.0)
        place = self._place or self._wish.after
        if place is not None:
            if await self._follow(place, None):
                return True
            self._place, self._wish = None, replace(self._wish, after=None)
        wants = self._wish.history or self._wish.since or self._first_time
        if not wants or not self._hub.history:
            # From now on; there is nothing to wait for between here and there.
            await self._stream.settled()
            self._send_snapshot("", self._stream.place_text)
            self._stream.add(self)
            if wants:
                self._outbox.event(Notice(self.sub, "live", NO_HISTORY), self.sub)
            return True
        async with self._outbox.turn:
            await self._outbox.room()
            snapshot = await self._snapshot()
            stream = self._stream
            await stream.settled()
            place = place_of_store(
                snapshot.cursors, stream.topic, stream.bus, stream.partitions, stream.begun, was=stream.was
            )
            return place is not None and await self._follow(place, snapshot)

    async def _snapshot(self) -> Snapshot:
        most = self._hub.settings.web.max_rows
        since = self._wish.since or ("" if self._wish.history else self._first_time)
        ask = SnapshotAsk(self.subject, most if since else min(most, self._wish.history), since)
        snapshot = await self._hub.snapshot(ask)
        if snapshot.cut and self._wish.since and not self._shown:
            raise ConfigError(
                f"there are more than {most} rows since {since}: read them page by page over REST, then subscribe "
                "`after` the first page's id"
            )
        return snapshot

    async def _follow(self, place: Place, snapshot: Snapshot | None) -> bool:
        """Tell what came behind a place, then follow; False, with nothing told, if the bus does not go on from it."""
        stream, cursors = self._stream, dict(place.cursors)
        if place.bus != stream.bus or any(p >= stream.partitions for p in cursors):
            return False
        begun = False
        while missing := [p for p, c in cursors.items() if not stream.keeps(p, c)]:
            async with self._hub.catching_up:
                for partition in missing:
                    behind = await self._catch_up(partition, cursors[partition])
                    if behind is None or stream.bus != place.bus:
                        if begun:
                            self._place = None  # what was told is void: the next snapshot says so
                        return False
                    if not begun:
                        self._open(snapshot, place)
                        begun = True
                    for entry in behind:
                        cursors[partition] = entry.cursor
                        self._tell(entry, replace(place, cursors=dict(cursors)))
                    # Should Redis not answer now, it goes on from here.
                    self._place = replace(place, cursors=dict(cursors))
            await self._outbox.room()
        # From here on nothing waits, so that nothing can come between.
        if place.bus != stream.bus:
            self._place = None
            return False
        if not begun:
            self._open(snapshot, place)
        if len(cursors) == 1 and self.subject.series is not None:
            self._partition = next(iter(cursors))
        for entry in stream.behind(cursors):
            cursors[entry.partition] = entry.cursor
            self._tell(entry, replace(place, cursors=dict(cursors)))
        self._place = None
        stream.add(self)
        return True

    async def _catch_up(self, partition: int, cursor: Cursor) -> list[Entry] | None:
        """Some entries behind a cursor, from Redis; None if it does not hold all of them."""
        stream = self._stream
        await stream.settled()
        if order_of(cursor) > order_of(stream.positions[partition]):
            # The store, or the client, is ahead of this reader, which comes there in a moment.
            if not await self._hub.feed.holds(partition, cursor, stream.topic):
                return None
            await stream.moved()
            await stream.settled()
            return []
        frames = await self._hub.feed.behind(stream.topic, partition, cursor.stream_id, CATCH_UP_ENTRIES)
        # Looked at afterwards, so that what was read is known to follow.
        if not await self._hub.feed.holds(partition, cursor, stream.topic):
            return None
        deployment = await self._hub.feed.deployment()
        await stream.settled()
        if deployment != (stream.bus, stream.partitions):
            return None
        entries = []
        for frame in frames:
            cursor = next_cursor(cursor, frame)
            entries.append(Entry(partition, cursor, frame, 0.0))
        return entries

    def _open(self, snapshot: Snapshot | None, place: Place) -> None:
        text = place.text()
        if snapshot is None:
            self._outbox.event(Resumed(self.sub, text), self.sub)
            self._shown = True
        else:
            self._send_snapshot(snapshot.rows, text)

    def _send_snapshot(self, rows: str, place: str) -> None:
        self._outbox.snapshot(self.sub, rows, place)
        self._shown, self._partition = True, None
        if self.subject.table == "gaps":
            self._gaps = dict.fromkeys(tuple(row[name] for name in GAP_KEY) for row in _rows(f"[{rows}]"))

    async def _show_what_there_is(self) -> None:
        """History can be seen though the bus does not answer; once it does, a new snapshot comes."""
        if self._shown or self._wish.after is not None or not self._hub.history:
            return
        if not self._wish.history and not self._wish.since:
            return
        try:
            async with self._outbox.turn:
                await self._outbox.room()
                self._send_snapshot((await self._snapshot()).rows, "")
        except TapelineError as error:
            log.debug("no history of %s: %s", self.subject, error)

    # -- following ---------------------------------------------------------------------------

    def rows(self, entry: Entry, told: Told) -> None:
        """See services.web.stream.Follower."""
        self._send(entry, told, None)

    def _tell(self, entry: Entry, place: Place) -> None:
        told = rows_of(entry.frame, self.subject)
        if told is not None:
            self._send(entry, told, place)

    def _send(self, entry: Entry, told: Told, place: Place | None) -> None:
        series = self.subject.series
        if series is not None:
            if self._partition is None:
                self._partition = entry.partition
            elif self._partition != entry.partition:
                return
            if not series.of_ticker and not series.exchange:
                told = self._of_one_exchange(told)
        elif self.subject.table == "gaps":
            told = self._new_gaps(told)
        if not told:
            return
        if not self._first_time:
            self._first_time = str(_row(told.texts[0])[time_column(self.subject.table)])
        self._outbox.rows(self.sub, told, self._text_of(entry, place))

    def _text_of(self, entry: Entry, place: Place | None) -> str:
        if self._partition is not None:
            return self._stream.text_of(entry)
        return self._stream.place_text if place is None else place.text()

    def _of_one_exchange(self, told: Told) -> Told:
        """Of a symbol without its exchange: from the first row on only that one's, should another come to have it."""
        at = key_of(self.subject.table).index("exchange")
        self._exchange = self._exchange or str(told.keys[0][at])
        if all(key[at] == self._exchange for key in told.keys):
            return told
        mine = [i for i, key in enumerate(told.keys) if key[at] == self._exchange]
        return Told([told.keys[i] for i in mine], [told.texts[i] for i in mine])

    def _new_gaps(self, told: Told) -> Told:
        """Every partition of a feed has its gaps: the first one counts."""
        new = [i for i, key in enumerate(told.keys) if key not in self._gaps]
        for i in new:
            self._gaps[told.keys[i]] = None
        while len(self._gaps) > REMEMBERED_GAPS:
            del self._gaps[next(iter(self._gaps))]
        return told if len(new) == len(told) else Told([told.keys[i] for i in new], [told.texts[i] for i in new])

    def lost(self) -> None:
        """See services.web.stream.Follower."""
        stream = self._stream
        cursors = stream.positions if self._partition is None else {self._partition: stream.positions[self._partition]}
        self._place = Place(stream.bus, stream.topic, dict(cursors))
        self.told("the bus does not go on from where it was")
        self.start()

    def told(self, trouble: str) -> None:
        """See services.web.stream.Follower."""
        if not trouble:
            self._goes_on()
        elif trouble != self._waiting:
            self._waiting = trouble
            self._outbox.event(Notice(self.sub, "waiting", trouble), self.sub)

    def _goes_on(self) -> None:
        if self._waiting:
            self._waiting = ""
            self._outbox.event(Notice(self.sub, "live"), self.sub)
