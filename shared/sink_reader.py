"""The reading half of a sink: one thread per partition, from the store's cursor into the inbox.

The store, not Redis, knows what is stored. When Redis has lost its tail (a power cut) or is another
one (a wiped server, another replay), the reader sees it by the bus's identity and by the sequences, or
where a topic has several producers by the entries' ids; it reads the stream again, and the store
upserts and forgets what was only in the lost tail.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from shared import metrics
from shared.batches import Cursor, CursorKey, Item, Source
from shared.bus import Bus
from shared.errors import BusUnavailable, TapelineError
from shared.frames import parse
from shared.keys import TOPICS
from shared.known_instruments import KnownInstruments
from shared.outage import Outage
from shared.progress import Progress
from shared.settings import Settings
from shared.sink_tail import START, after, entry, lost_entries, lost_tail, older, was_free
from shared.stages import PRODUCER, readers

log = logging.getLogger(__name__)

# What a sink reads in each of its modes; gaps come on `candles` and on `ticks` alike.
MODES = {"candles": ("candles", "late", "pressure", "signals", "usage"), "ticks": ("ticks",)}
READ_ENTRIES = 16
TRIM_SECONDS = 1.0
MAX_SEQ = (1 << 63) - 1


class Inbox:
    """Items between the readers and the writer, bounded by rows; a full inbox stops the readers.

    `waiting` is called every second or so while the writer waits for a batch to close.
    """

    def __init__(self, max_rows: int, waiting: Callable[[], None] = lambda: None) -> None:
        self._max, self._waiting = max_rows, waiting
        self._items: deque[tuple[float, Item]] = deque()
        self._rows = 0
        self._changed = threading.Condition()

    def put(self, item: Item, timeout: float) -> bool:
        """False when it stayed full for `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._rows < self._max, timeout):
                return False
            self._items.append((time.monotonic(), item))
            self._rows += item.weight
            self._changed.notify_all()
            return True

    def take(self, rows: int, seconds: float, patience: float) -> list[Item]:
        """A batch: closed by `rows` or once its first item is `seconds` old; [] after `patience` without one.

        A rewound item only ever comes first, so that what the store forgets is not in the same batch; and a batch is
        of one bus.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items, patience):
                return []
            close_at = self._items[0][0] + seconds
            while self._rows < rows and (left := close_at - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))
                self._waiting()
            taken: list[Item] = []
            weight = 0
            while self._items and weight < rows:
                item = self._items[0][1]
                if taken and (item.rewound or item.source.bus != taken[0].source.bus):
                    break
                self._items.popleft()
                weight += item.weight
                taken.append(item)
            self._rows -= weight
            self._changed.notify_all()
            return taken

    def back(self, items: list[Item]) -> None:
        """Put what was taken back in front."""
        with self._changed:
            self._items.extendleft((time.monotonic(), item) for item in reversed(items))
            self._rows += sum(item.weight for item in items)
            self._changed.notify_all()

    def drop(self, partitions: Collection[int]) -> None:
        """Forget what is here of these partitions: the store has not got it, so it is read again."""
        with self._changed:
            kept = [entry for entry in self._items if entry[1].source.partition not in partitions]
            self._items = deque(kept)
            self._rows = sum(item.weight for _, item in kept)
            self._changed.notify_all()


class Hub(Protocol):
    """What the readers of a sink share."""

    bus: Bus
    consumer: str
    settings: Settings
    topics: list[str]
    inbox: Inbox
    stop: threading.Event
    cursors: dict[CursorKey, Cursor]
    progress: Progress
    outage: Outage

    def count(self, what: str) -> None: ...

    def failed(self, error: TapelineError) -> None: ...


@dataclass(slots=True)
class Place:
    """Where the reader stands in one stream.

    `acked` is what Redis has been told, `stored` what the writer says. `rewound`, `after`: the next
    item's, see Item.
    """

    seq: int = 0
    id: str = START
    acked: str = START
    stored: tuple[int, str] = (0, START)
    epoch: int = 0
    rewound: bool = False
    after: str = START
    trimmed: float = 0.0


class Reader:
    """Reads one partition's topics until `stop` or `let_go`; also tells Redis what is stored, and trims.

    `healthy`: Redis answered when last asked.
    """

    def __init__(self, hub: Hub, partition: int) -> None:
        self.hub, self.partition = hub, partition
        self.places = {topic: Place() for topic in hub.topics}
        self._known = KnownInstruments(partition)
        self._bus: Bus | None = None
        self._identity = ""
        self.healthy = False
        self.let_go = threading.Event()
        self._part = f"the reader of partition {partition}"
        self.thread = threading.Thread(target=self._run, name=f"sink-{partition}", daemon=True)

    def stored(self, item: Item) -> None:
        """The writer has this item in the store (called from its thread)."""
        self.places[item.source.topic].stored = (item.epoch, item.source.id)

    def _done(self) -> bool:
        """Asked in every turn of every loop here, and so the reader goes on."""
        self.hub.progress.mark(self._part)
        return self.let_go.is_set() or self.hub.stop.is_set()

    def close(self) -> None:
        """After the thread has ended: tell Redis the last of what is stored, if it answers."""
        bus, self._bus = self._bus, None
        if bus is not None:
            try:
                if self.healthy:
                    self._acknowledge(bus)
            except TapelineError as error:
                # The next start finds the cursor in the store; until then the streams just hold more.
                about = {"partition": self.partition}
                log.info("partition %d: Redis was not told the last position: %s", self.partition, error, extra=about)
            finally:
                bus.close()

    def _run(self) -> None:
        try:
            self._read()
        finally:
            self.hub.progress.rest(self._part)
            self.hub.outage.leaves(self.partition)

    def _read(self) -> None:
        wait = 0.05
        while not self._done():
            try:
                self._bus = self._bus or self.hub.bus.clone()
                self._attach(self._bus)
                self.healthy = True
                self.hub.outage.works(self.partition)
                wait = 0.05
                while not self._done():
                    self._turn(self._bus)
            except BusUnavailable as error:
                self.healthy = False
                self.hub.outage.fails(self.partition, error)
                self.hub.stop.wait(wait)
                wait = min(2.0, 2 * wait)
            except TapelineError as error:
                self.hub.failed(error)
            except Exception as error:
                # A fault of the program: the sink ends with it in the open. Nothing is lost, the store has the cursor.
                log.exception("reading partition %d failed", self.partition)
                metrics.fault("sink.reader")
                self.hub.failed(TapelineError(f"the sink failed on partition {self.partition}: {error!r}; see the log"))

    # -- where to read from ------------------------------------------------------------------

    def _attach(self, bus: Bus) -> None:
        """Find the place in each stream, after a start, a reconnect or a sequence that went backwards."""
        identity = bus.identity()
        if identity != self._identity:
            if self._identity:
                log.warning("partition %d: this is another bus now; reading it from its start", self.partition)
                self.hub.count("rewinds")
            self._known = KnownInstruments(self.partition)
            self._leave_others(bus)
            for topic, place in self.places.items():
                cursor = self.hub.cursors.get((identity, topic, self.partition), Cursor(0, START))
                place.seq, place.id = cursor
                place.acked, place.epoch, place.rewound = cursor.stream_id, place.epoch + 1, False
            self._identity = identity
        for topic, place in self.places.items():
            self._check(bus, topic, place)

    def _leave_others(self, bus: Bus) -> None:
        """A topic that the store took in an earlier mode must not be held for it any more."""
        for topic in TOPICS:
            if topic not in self.places and bus.call(
                "hdel", bus.keys.consumers(self.partition, topic), self.hub.consumer
            ):
                log.info("partition %d: '%s' is no longer held for this store", self.partition, topic)

    def _check(self, bus: Bus, topic: str, place: Place) -> None:
        """Whether the stream goes on from our place; also registers the store as its consumer."""
        answer = bus.call("hget", bus.keys.consumers(self.partition, topic), self.hub.consumer)
        told = answer.decode() if answer else None
        # The stages that read it, too, may be slower to start: nothing is trimmed before they have read.
        for stage in readers(topic, self.hub.settings):
            bus.register(self.partition, topic, stage)
        # First of all hold back trimming where the store needs the stream, but say nothing newer than Redis
        # knows: what it knows is what it has not lost.
        bus.done_with(self.partition, topic, self.hub.consumer, older(place.acked, told or place.acked))
        *seen, trimmed = bus.look(self.partition, topic, place.id)
        first, before = map(entry, seen)
        if topic in PRODUCER:
            out_seq = bus.call("hget", bus.keys.meta(self.partition, PRODUCER[topic]), "out_seq")
            why = lost_tail(place.seq, place.id, before, first, int(out_seq) if out_seq else None)
            lost = (why, START) if why else None
            follows = first is not None and first.seq == place.seq + 1
        else:
            lost, follows = lost_entries(place.id, before, told, trimmed), before is not None
        if lost:
            why, restart = lost
            log.warning(
                "partition %d: Redis has lost the end of '%s': %s; reading it again", self.partition, topic, why
            )
            self.hub.count("rewinds")
            place.seq, place.id, place.acked, place.after = 0, restart, restart, restart
            place.epoch, place.rewound = place.epoch + 1, True
        elif first and not follows and after(first.id, place.id) and was_free(told, place.id) and trimmed:
            # Only a store deleted, put back from a copy, or dropped as a consumer gets here.
            log.error(
                "partition %d: '%s' was trimmed beyond this store (which holds up to entry %s, sequence %d; the stream "
                "begins at %s, sequence %s): rows between may be missing; replay the tape to fill them",
                self.partition, topic, place.id, place.seq, first.id, first.seq,
            )  # fmt: skip
            self.hub.count("missing")
        bus.done_with(self.partition, topic, self.hub.consumer, place.acked)

    # -- reading -----------------------------------------------------------------------------

    def _turn(self, bus: Bus) -> None:
        streams = {bus.keys.stream(self.partition, topic): topic for topic in self.places}
        positions = {stream: self.places[topic].id for stream, topic in streams.items()}
        reply = bus.xread(positions, READ_ENTRIES, bus.limits.block_ms)
        if reply and self._is_another(bus):
            self._attach(bus)
            return
        for stream, entries in _streams(reply):
            topic = streams[stream.decode()]
            for entry_id, fields in entries:
                if not self._take(bus, topic, entry_id, fields):
                    return
        self._acknowledge(bus)

    def _is_another(self, bus: Bus) -> bool:
        """Whether Redis was emptied under us: where sequences say nothing, only the bus's identity tells."""
        if all(topic in PRODUCER for topic in self.places):
            return False
        held = bus.call("hget", bus.keys.deployment, "id")
        return held is None or held.decode() != self._identity

    def _take(self, bus: Bus, topic: str, entry_id: bytes, fields: dict[bytes, bytes]) -> bool:
        """Put one entry into the inbox; False when the reading has to start again elsewhere."""
        place = self.places[topic]
        frame, problem = None, ""
        try:
            frame = parse(entry_id, fields)
        except (KeyError, ValueError, msgspec.DecodeError) as error:
            problem = f"not a frame ({error!r})"
        if frame is not None and not 0 < frame.seq <= MAX_SEQ:
            problem = f"a frame with the impossible sequence {frame.seq}"
            frame = None
        if frame is not None and topic in PRODUCER and frame.seq <= place.seq:
            epochs = [p.epoch for p in self.places.values()]
            self._attach(bus)
            if [p.epoch for p in self.places.values()] != epochs:
                return False
            log.warning(
                "partition %d: '%s' goes back from sequence %d to %d though nothing was lost; going on",
                self.partition, topic, place.seq, frame.seq,
            )  # fmt: skip
            self.hub.count("sequence_steps_back")
        seq = frame.seq if frame is not None else place.seq
        source = Source(self._identity, topic, self.partition, seq, entry_id.decode())
        item = Item(
            source, frame, fields.get(b"body", b"") if problem else b"", problem, place.rewound, place.epoch,
            place.after, self._known.learn(bus, frame) if frame is not None and topic == "ticks" else {},
        )  # fmt: skip
        while not self.hub.inbox.put(item, 0.2):
            if self._done():
                return False
            self._acknowledge(bus)
        place.seq, place.id, place.rewound = seq, source.id, False
        return True

    def _acknowledge(self, bus: Bus) -> None:
        """Tell Redis how far the store has got, and trim about once a second."""
        now = time.monotonic()
        for topic, place in self.places.items():
            epoch, stored = place.stored
            moved = epoch == place.epoch and stored != place.acked
            if moved:
                bus.done_with(self.partition, topic, self.hub.consumer, stored)
                place.acked = stored
            if now - place.trimmed > TRIM_SECONDS or (moved and self._is_large(bus, topic)):
                bus.trim(self.partition, topic)
                place.trimmed = now

    def _is_large(self, bus: Bus, topic: str) -> bool:
        held = bus.call("hget", bus.keys.info(self.partition, topic), "bytes")
        return int(held or 0) > bus.limits.stream_max_bytes // 2


def _streams(reply: Any) -> Iterator[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """(stream, entries) of an XREAD reply in either protocol version."""
    if isinstance(reply, dict):
        for stream, groups in reply.items():
            yield stream, [entry for group in groups for entry in group]
    else:
        yield from reply or ()
