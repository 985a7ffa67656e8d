"""What a source pushes into: frames on the bus, each row exactly once.

Every partition has a sequence and a cursor of its own, stored with its frames in one script. Rows
wait in a partition's buffer until they fill a frame or have lingered long enough; what waits is
not covered by the cursor, so it comes again after a crash. What a restarted source pushes again is
dropped by its ordinal, and so are gaps and disconnects between such rows: told of long after, they
would touch windows that can no longer be made anew. Other messages (instruments, clocks) may come
again: readers take them twice without harm.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from services.ingest.source import RECEIVED, Grouped, Resume
from services.ingest.status import Status
from services.ingest.telemetry import FeedTelemetry
from services.ingest.usage import Account
from shared.bus import Bus, sound
from shared.errors import BusUnavailable, Fenced
from shared.frames import CLOCK, TICK, TICK_FRAMES, TRADE, Frame, Rows, iso, tick_frame
from shared.instrument_days import DAY_NS, decoded, new_versions, outdated
from shared.instruments import is_spread, partition_of
from shared.log import names
from shared.messages import Clock, Disconnect, Gap, Instrument, encode
from shared.outage import Seldom
from shared.settings import Ingest

log = logging.getLogger(__name__)

TOPIC = "ticks"
CALL_BYTES = 960 << 10  # of one publishing call, so that the script does not hold Redis for long
CALL_FRAMES = 256
INSTRUMENTS_A_FRAME = 500
READ_BACK = 32
NOWHERE = -1


class Held(msgspec.Struct, frozen=True):
    """The cursor a partition holds, for sources whose rows have ordinals.

    `resume` is the source's cursor of the chunk with the oldest row that is not published, `done`
    the ordinal behind the last published row, `tape` which tape both speak of.
    """

    tape: str
    resume: msgspec.Raw
    done: int


@dataclass(slots=True)
class _Partition:
    number: int
    seq: int = 0
    done: int = 0
    cursor: bytes = b""  # as stored with the newest frame
    last_ns: int = 0
    buffer: Rows = field(default_factory=lambda: np.empty(0, TICK))
    waiting: int = 0  # rows in the buffer
    waiting_cursor: bytes = b""  # of the chunk of the oldest of them
    waiting_last: int = 0  # ordinal of the newest of them
    due: float = 0.0  # when they must go (monotonic)
    free_at: float = 0.0  # before this, rows linger
    announced: dict[int, Instrument] = field(default_factory=dict)
    versions_day: int = 0  # on which old versions were last dropped
    home: bool = False  # has an instrument of this feed


class PublisherOutput:
    """An Output on the bus. One source thread pushes; a small thread flushes what lingers and reports.

    `live`: rows linger at most `settings.linger_ms`, and not at all where nothing was published for
    so long; otherwise only full frames go out until something flushes. `by_ordinal`: rows carry
    ordinals that are the same in every run of the tape named `tape`; without, cursors are stored as
    the source gives them and nothing is dropped. `account`: where usage is counted; closing it is up to its owner.
    """

    def __init__(
        self,
        bus: Bus,
        feed: str,
        owner: str,
        partitions: int,
        settings: Ingest,
        stop: threading.Event,
        live: bool,
        *,
        by_ordinal: bool = True,
        tape: str = "",
        account: Account | None = None,
    ) -> None:
        self.bus, self.feed, self.owner, self.partitions = bus, feed, owner, partitions
        self.live, self.by_ordinal, self.tape = live, by_ordinal, tape
        self._stop = stop
        self._records = settings.frame_records
        self._linger = settings.linger_ms / 1000
        self._parts = [_Partition(p) for p in range(partitions)]
        self._newest = NOWHERE  # ordinal of the rows pushed since `attach`
        self._lock = threading.RLock()
        self._armed = threading.Event()
        self._closed = threading.Event()
        self._failed: Exception | None = None
        self._halted = False
        self.account, self._tells = account, False  # whether the source tells what it receives
        self._watermark_ns = self._grace_ns = 0
        self._thread: threading.Thread | None = None
        self.status = Status(bus, feed, owner)
        self._waits = Seldom()
        self._telemetry = FeedTelemetry(feed, partitions, live=live)

    # -- life --------------------------------------------------------------------------------

    def attach(self) -> Resume:
        """Own the feed from now on and forget what was pending; where the source must resume.

        Partitions that never took part in this tape are not in the answer. Whoever published
        before gets Fenced. Raises BusUnavailable.
        """
        self.status.write()  # whoever is fenced off by this looks whether we live
        if self.account is not None:
            self.account.attach()
        with self._lock:
            resume = Resume()
            for p in range(self.partitions):
                part = self._parts[p] = _Partition(p)
                part.seq, part.cursor = self.bus.attach(p, self.feed, self.owner)
                part.home = self._is_home(p)
                if part.seq:
                    self._open(part, resume)
            self._failed, self._halted = None, False
            self._newest = NOWHERE
            self._armed.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._tend, name=f"ingest-{self.feed}", daemon=True)
            self._thread.start()
        return resume

    def _open(self, part: _Partition, resume: Resume) -> None:
        if not self.by_ordinal:
            resume.cursors[part.number] = part.cursor
            return
        held = msgspec.json.decode(part.cursor, type=Held) if part.cursor else None
        if held is None or held.tape != self.tape:
            part.cursor = b""
            return
        part.done = held.done
        resume.cursors[part.number] = b"" if bytes(held.resume) == b"null" else bytes(held.resume)

    def _is_home(self, partition: int) -> bool:
        held = self.bus.call("hvals", self.bus.keys.instruments(partition))
        return any(self._mine(msgspec.json.decode(body, type=Instrument).feed) for body in held)

    def _mine(self, feed: str) -> bool:
        """A producer of several feeds names them `<producer>:<feed>`."""
        return feed == self.feed or feed.startswith(f"{self.feed}:")

    def stop_at(self, stop: threading.Event) -> None:
        """From now on, waiting for the bus ends (and nothing goes out any more until `attach`) once this is set."""
        self._stop = stop

    @property
    def halted(self) -> bool:
        """Whether something could not be published before a stop."""
        return self._halted

    @property
    def reached_ns(self) -> int:
        """How far the feed is known to the consumers: its newest Clock or trade."""
        return max(self._watermark_ns, self.status.last_event_ns)

    def check_owner(self) -> None:
        """Raises Fenced when another process owns the feed: whoever publishes nothing would not learn it."""
        owner = self.bus.call("hget", self.bus.keys.producers(0), f"{self.feed}:owner")
        if owner is not None and owner.decode() != self.owner:
            raise Fenced(f"another process publishes {self.feed} now ({owner.decode()})")

    def close(self) -> None:
        """End the helper thread and say the last word; publishes nothing (call `flush` before)."""
        self._closed.set()
        self._armed.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
        self.status.leave()

    # -- Output ------------------------------------------------------------------------------

    def instruments(self, messages: Iterable[Instrument]) -> None:
        """See Output. Spreads are left out; what this process has published unchanged is not repeated."""
        groups: dict[int, list[Instrument]] = {}
        for message in messages:
            if is_spread(message.symbol, message.kind, message.root):
                continue
            p = partition_of(message.root, self.partitions)
            if self._parts[p].announced.get(message.id) != message:
                groups.setdefault(p, []).append(message)
        with self._lock:
            self._check()
            for p, group in groups.items():
                part = self._parts[p]
                self._flush(part)
                for at in range(0, len(group), INSTRUMENTS_A_FRAME):
                    piece = group[at : at + INSTRUMENTS_A_FRAME]
                    defined = max((i.defined_ns or 0 for i in piece), default=0)
                    self._message(part, "instrument", len(piece), defined, encode(piece))
                    if self._halted:
                        return
                    self._keep(part, piece)

    def _keep(self, part: _Partition, piece: list[Instrument]) -> None:
        """What was published becomes the newest known; and a version of its day, first, if it says something new."""
        key, versions = self.bus.keys.instruments(part.number), self.bus.keys.instrument_days(part.number)
        ids = sorted({i.id for i in piece} - part.announced.keys())
        held: dict[str, bytes] = {}

        def ask() -> None:
            held.update({str(n): body for n, body in zip(ids, self.bus.call("hmget", key, ids), strict=True) if body})

        if ids and not self._patiently(ask):
            return
        known = {i.id: part.announced[i.id] for i in piece if i.id in part.announced}
        days = new_versions(piece, known | {i.id: i for _, i in decoded(held)})
        if days:
            self._patiently(lambda: self.bus.call("hset", versions, mapping=days))
        fields = {str(i.id): msgspec.json.encode(i) for i in piece}
        self._patiently(lambda: self.bus.call("hset", key, mapping=fields))
        part.announced.update((i.id, i) for i in piece)
        part.home = True
        self._drop_versions(part, max((i.defined_ns or 0 for i in piece), default=0))

    def _drop_versions(self, part: _Partition, now_ns: int) -> None:
        """Once a day of the tape: versions of this feed's instruments that expired long ago."""
        if now_ns // DAY_NS <= part.versions_day:
            return
        key, gone = self.bus.keys.instrument_days(part.number), list[str]()

        def look() -> None:
            held = {name.decode(): body for name, body in self.bus.call("hgetall", key).items()}
            mine = {name: held[name] for name, i in decoded(held) if self._mine(i.feed)}
            gone.extend(outdated(mine, now_ns))

        if self._patiently(look):
            part.versions_day = now_ns // DAY_NS
        if gone:
            self._patiently(lambda: self.bus.call("hdel", key, *gone))

    def broadcast(self, message: Clock | Gap | Disconnect) -> None:
        """See Output."""
        kind = type(message).__name__.lower()
        at = message.watermark_ns if isinstance(message, Clock) else 0
        body = encode([message])
        with self._lock:
            self._check()
            self._watermark_ns = max(self._watermark_ns, at)
            if isinstance(message, Clock) and message.watched_from_ns is not None:
                self._grace_ns = message.grace_ns
            news = False
            for part in self._parts:
                if part.home and not (self._told(part) and isinstance(message, Gap | Disconnect)):
                    self._flush(part)
                    self._message(part, kind, 1, at, body)
                    news = not self._halted
            if news and isinstance(message, Gap):
                self._telemetry.gaps.inc()
            if news and isinstance(message, Gap | Disconnect):
                self._log(message)
            self._telemetry.reached(self.status.last_event_ns, self._known_ns())

    def _log(self, message: Gap | Disconnect) -> None:
        about = {"symbol": names(message.symbols)}
        if isinstance(message, Gap):
            span = f"from {iso(message.start_ns)} to {iso(message.end_ns)}"
            log.warning("%s has a gap %s: %s", self.feed, span, message.reason, extra=about)
        else:
            log.warning("%s was disconnected at %s: %s", self.feed, iso(message.at_ns), message.reason, extra=about)

    def _known_ns(self) -> int:
        """The feed's watermark: what its clocks said, or its newest record less its grace."""
        return max(self._watermark_ns, self.status.last_event_ns - self._grace_ns)

    def _told(self, part: _Partition) -> bool:
        """Whether a partition holds rows from behind this place of the tape, and so all messages up to here."""
        return self.by_ordinal and NOWHERE < self._newest < part.done - 1

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        """See Output."""
        with self._lock:
            self._check()
            if (grouped.rows["kind"] != CLOCK).any():
                self.status.heard()
            if len(grouped.ordinals):
                self._newest = max(self._newest, int(grouped.ordinals.max()))
            for g, p in enumerate(grouped.partitions):
                part = self._parts[p]
                start, end = grouped.starts[g], grouped.starts[g + 1]
                ordinals = grouped.ordinals[start:end]
                skip = 0
                if self.by_ordinal and end > start and ordinals[0] < part.done:
                    skip = int(np.searchsorted(ordinals, part.done))
                if skip < end - start:
                    self._put(part, grouped.rows[start + skip : end], ordinals[skip:], cursor)

    def flush(self) -> None:
        """See Output."""
        with self._lock:
            self._check()
            for part in self._parts:
                self._flush(part)
        self.status.write()

    def count(self, reason: str, records: int, usage_bytes: int = 0) -> None:
        """See Output. At least once: records read again after a crash are counted again."""
        if reason == RECEIVED:
            self._tells = True
            if self.account is not None:
                self.account.received(records, usage_bytes)
            records = 0
        self.status.count(reason, records, usage_bytes)
        self._telemetry.count(reason, records, usage_bytes)

    def connection(self, state: str, detail: str = "") -> None:
        """See Output."""
        if self.account is not None:
            self.account.connection(state == "connected")
        self.status.connection(state, detail)
        self._telemetry.connection(state)

    def published(self, partition: int, since_ns: int) -> Rows:
        """This feed's trades of a partition from the newest frame back to `since_ns`, in stream order.

        Reads until a frame holds nothing younger; `ts_event_ns < since_ns` is left out.
        """
        found: list[Rows] = []
        stream, edge = self.bus.keys.stream(partition, TOPIC), "+"
        while True:
            page = self.bus.call("xrevrange", stream, max=edge, count=READ_BACK)
            for entry_id, fields in page:
                frame = sound(entry_id, fields)
                if frame.source != self.feed or frame.kind not in TICK_FRAMES:
                    continue
                rows = frame.rows()
                fresh = rows["ts_event_ns"] >= since_ns
                if not fresh.any():
                    page = []
                    break
                found.append(rows[fresh & (rows["kind"] == TRADE)])
            if len(page) < READ_BACK:
                return np.concatenate(found[::-1]) if found else np.empty(0, TICK)
            edge = "(" + page[-1][0].decode()

    # -- packing -----------------------------------------------------------------------------

    def _put(self, part: _Partition, rows: Rows, ordinals: Rows, cursor: bytes) -> None:
        """Rows behind what waits: full frames go out, the rest waits (until it is due, live)."""
        if not len(part.buffer):
            part.buffer = np.empty(self._records, TICK)
        at, done = 0, part.waiting_last + 1
        frames: list[Frame] = []
        if part.waiting:
            at = _cut(rows, 0, self._records - part.waiting)
            part.buffer[part.waiting : part.waiting + at] = rows[:at]
            part.waiting += at
            if at:
                part.waiting_last = int(ordinals[at - 1])
            if at < len(rows) or part.waiting == self._records:
                frames.append(self._frame(part.buffer[: part.waiting]))
                part.waiting, done = 0, part.waiting_last + 1
        a_call = min(CALL_FRAMES, max(1, CALL_BYTES // (self._records * TICK.itemsize)))
        while len(rows) - at >= self._records:
            end = _cut(rows, at, self._records) or _record_end(rows, at)
            frames.append(self._frame(rows[at:end]))
            at, done = end, int(ordinals[end - 1]) + 1
            if len(frames) >= a_call:
                self._publish(part, frames, self._cursor(part, cursor, done))
                frames = []
        if frames:
            self._publish(part, frames, self._cursor(part, cursor, done))
        if at < len(rows):
            part.waiting = len(rows) - at
            part.buffer[: part.waiting] = rows[at:]
            part.waiting_cursor, part.waiting_last = cursor, int(ordinals[-1])
            part.due = part.free_at
        if part.waiting and self.live:
            if time.monotonic() >= part.due:
                self._flush(part)
            else:
                self._armed.set()

    def _flush(self, part: _Partition) -> None:
        if part.waiting:
            frame = self._frame(part.buffer[: part.waiting])
            cursor = self._cursor(part, part.waiting_cursor, part.waiting_last + 1)
            part.waiting = 0
            self._publish(part, [frame], cursor)

    def _cursor(self, part: _Partition, cursor: bytes, done: int) -> bytes:
        if not self.by_ordinal:
            return cursor
        part.done = done
        return msgspec.json.encode(Held(self.tape, msgspec.Raw(cursor or b"null"), done))

    def _frame(self, rows: Rows) -> Frame:
        return tick_frame(rows, self.feed)

    def _message(self, part: _Partition, kind: str, count: int, at_ns: int, body: bytes) -> None:
        """A JSON frame; the cursor stays where it is."""
        at_ns = max(at_ns, part.last_ns)
        if self.by_ordinal and not part.cursor:
            part.cursor = msgspec.json.encode(Held(self.tape, msgspec.Raw(b"null"), 0))
        self._publish(part, [Frame(kind, count, at_ns, at_ns, self.feed, body)], part.cursor)

    # -- publishing --------------------------------------------------------------------------

    def _publish(self, part: _Partition, frames: list[Frame], cursor: bytes) -> None:
        """Put frames on the bus, waiting as long as it takes; gives up for good once stopped."""
        if self._halted:
            return
        try:
            done = self._patiently(lambda: self._send(part, frames, cursor), part.number)
        except Exception as error:
            # These rows are in no buffer any more: nothing may follow them before `attach` starts anew.
            self._failed = error
            raise
        if not done:
            return
        part.seq += len(frames)
        part.cursor = cursor
        part.last_ns = max(part.last_ns, frames[-1].last_ns)
        part.free_at = time.monotonic() + self._linger
        ticks = frames[-1].kind in TICK_FRAMES
        self._telemetry.published(part.number, frames)
        if ticks:
            self.status.published(sum(f.count for f in frames), part.last_ns)
            self._telemetry.reached(self.status.last_event_ns, self._known_ns())
        if self.account is not None:
            if ticks and not self._tells:
                self.account.received(sum(f.count for f in frames), 0)
            if ticks or frames[-1].kind == "gap":
                self.account.went_on()

    def _send(self, part: _Partition, frames: list[Frame], cursor: bytes) -> bool:
        with self._telemetry.publish_seconds.time():
            return self.bus.publish(part.number, self.feed, self.owner, part.seq + 1, frames, cursor)

    def _patiently(self, call: Callable[[], object], partition: int | None = None) -> bool:
        """Repeat a harmless call until it is done; False when stopped first, and then nothing more goes out."""
        wait, told, logged, began = 0.005, False, False, time.monotonic()
        while not self._halted:
            self.status.went_on()
            try:
                if call() is not False:
                    if told:
                        self.status.waits("")
                        self._telemetry.waiting.set(0)
                    if logged:
                        log.info("%s goes on, after %.1f s", self.feed, time.monotonic() - began)
                    return True
                why = f"partition {partition} is full: consumers are behind"
                if partition is not None and self.bus.trim(partition, TOPIC):
                    continue
            except BusUnavailable as error:
                why = str(error)
            if not told:
                logged = self._waits.add() > 0
                if logged:
                    log.warning("%s waits: %s", self.feed, why, extra={"partition": partition})
                self.status.waits(why)
                self._telemetry.waiting.set(1)
                told = True
            self.status.tick()  # the thread that waits may be the one that beats
            if self._stop.wait(wait):
                self._halted = True
            wait = min(0.1, 2 * wait)
        return False

    def _check(self) -> None:
        """First in every call of the source's."""
        self.status.went_on()
        if self._failed is not None:
            raise self._failed

    def _tend(self) -> None:
        """Flush what is due, beat and report, until closed."""
        while not self._closed.is_set():
            if self._armed.wait(0.25) and self.live:
                due = min((part.due for part in self._parts if part.waiting), default=0.0)
                self._closed.wait(max(0.0, due - time.monotonic()))
                if self._lock.acquire(timeout=0.25):
                    try:
                        self._flush_due()
                    finally:
                        self._lock.release()
            self.status.tick()

    def _flush_due(self) -> None:
        now = time.monotonic()
        try:
            for part in self._parts:
                if part.waiting and part.due <= now and self._failed is None:
                    self._flush(part)
        except Exception as error:
            # Whatever it is must not end with this thread: the source's thread raises it at its next call.
            if self._failed is None:
                self._failed = error
            log.debug("a flush of %s failed", self.feed, exc_info=True)
        if self._failed is not None or not any(part.waiting for part in self._parts):
            self._armed.clear()


def _cut(rows: Rows, at: int, most: int) -> int:
    """The end of at most `most` rows from `at` on, with no record torn; 0 when not even one record fits."""
    end = min(at + most, len(rows))
    while at < end < len(rows) and rows["part"][end]:
        end -= 1
    return end if end > at else 0


def _record_end(rows: Rows, at: int) -> int:
    """The end of the record at `at`."""
    end = at + 1
    while end < len(rows) and rows["part"][end]:
        end += 1
    return end
