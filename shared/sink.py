"""The sink loop: streams into a store, each row once.

Rows and cursors go into the store in one transaction, so a crash at any instant neither loses nor
doubles a row. Where several sinks write one store they share its partitions by leases, and the store
refuses the batch of one that was overtaken. While the store does not answer, the same batch is tried
again and the streams hold the backlog; only what the store has is given free for trimming.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol, cast

from shared import metrics
from shared.batches import Batch, Cursor, CursorKey, Item, batch_of
from shared.bus import Bus, worker_id
from shared.errors import BusUnavailable, Fenced, StoreUnavailable, TapelineError
from shared.heartbeat import beat, leave
from shared.leases import Leases
from shared.outage import Outage, Seldom
from shared.progress import Progress
from shared.registry import TOOLS, resolve
from shared.settings import Settings
from shared.sink_reader import MODES, Inbox, Reader
from shared.sink_tail import after
from shared.stores import parse
from shared.telemetry import SinkTelemetry
from shared.worker import wait_for_bus

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
STOP_SECONDS = 3.0
BACKOFF_MAX_SECONDS = 5.0


class Store(Protocol):
    """A store. `name` is the consumer's name on the bus, unique per store; `where` is for people.

    `sharing`: how several sinks may write it at once. `none`: one does; `leader`: one at a time, the others stand
    by; `partitions`: each its share. `redo`: where the first batch has to end (and begin at `cursors`), because it
    was begun by a sink that did not finish it; empty but for stores without transactions. The loop takes out what it
    knows to be finished. A store may have a `detail`, one line for the heartbeat; and `goes_on`, which the loop sets,
    to be called in every turn of a wait for work that the store does on its own.
    """

    name: str
    where: str
    sharing: str
    redo: dict[CursorKey, Cursor]

    def open(self) -> None:
        """Connect and migrate. Raises ConfigError, VersionError, StoreUnavailable."""

    def cursors(self) -> dict[CursorKey, Cursor]:
        """How far each stream of each bus is stored. Raises StoreUnavailable."""

    def write(self, batch: Batch) -> int:
        """Write rows, dead letters and cursors in one transaction; returns the dead letters.

        First forgets what `batch.rewinds` names: ticks, late trades and dead letters of that stream
        from there on. Writing a batch again changes nothing, a mending one (Batch.mend) included.
        Raises StoreUnavailable, and then nothing of the batch is stored (or, without transactions, the same batch
        is to be written again); Fenced when another sink has written on from where this one stands.
        """

    def close(self) -> None: ...


MakeStore = Callable[[Settings, threading.Event], Store]


def store_of(settings: Settings, stop: threading.Event) -> Store:
    """The store of the settings, not yet open; a long write in it ends soon after `stop`. Raises ConfigError."""
    return cast("MakeStore", resolve(TOOLS[f"store-{parse(settings.tapeline.store).scheme}"]))(settings, stop)


def serve(settings: Settings, stop: threading.Event, store: Store, service: str, rows: int, milliseconds: int) -> None:
    """A sink service: what `sink.modes` names into the store until stopped; batches of `rows`, or of that age."""
    # The store first: what is wrong with it is said at once, not when Redis comes up.
    if not open_store(store, stop, service):
        return
    bus = wait_for_bus(settings, stop)
    if bus is None:
        store.close()
        return
    SinkLoop(bus, store, service, settings, stop, rows=rows, milliseconds=milliseconds).run()


def open_store(store: Store, stop: threading.Event, service: str = "") -> bool:
    """Open a store, waiting while it does not answer, as the metrics of `service` say; False when stopped first."""
    wait = 0.1
    told = False
    while not stop.is_set():
        try:
            store.open()
        except StoreUnavailable as error:
            if not told:
                log.warning("%s; waiting for it", error)
                told = True
                if service:
                    metrics.STORE_WAITS.labels(service).set(1)
            stop.wait(wait * random.uniform(0.5, 1.0))
            wait = min(BACKOFF_MAX_SECONDS, 2 * wait)
        else:
            if service:
                metrics.STORE_WAITS.labels(service).set(0)
            return True
    return False


class SinkLoop:
    """Moves partitions into one open store until `stop` is set: all, or its share of them.

    Reads what `settings.sink.modes` names; batches as `settings.sink` says unless `rows` and `milliseconds` do.
    `mend`: the rows were computed again over complete history, see Batch. `counters`: rows, batches,
    dead_letters, rewinds, missing, ignored, store_waits, fenced.
    """

    def __init__(
        self,
        bus: Bus,
        store: Store,
        service: str,
        settings: Settings,
        stop: threading.Event,
        *,
        mend: bool = False,
        rows: int = 0,
        milliseconds: int = 0,
    ) -> None:
        self.mend = mend
        self.topics = [topic for mode, topics in MODES.items() if mode in settings.sink.modes for topic in topics]
        self.bus, self.store, self.service, self.settings, self.stop = bus, store, service, settings, stop
        self.consumer = store.name
        self.worker = worker_id(service)
        self.counters: Counter[str] = Counter()
        self._telemetry = SinkTelemetry(service)
        self.cursors: dict[CursorKey, Cursor] = {}
        self._rows = rows or settings.sink.batch_rows
        self._seconds = (milliseconds or settings.sink.batch_ms) / 1000
        self.progress = Progress()
        self.outage, self._dead = Outage(log), Seldom()
        self.inbox = Inbox(4 * self._rows, self._goes_on)
        if hasattr(store, "goes_on"):
            store.goes_on = self._goes_on
        self._readers: dict[int, Reader] = {}
        self._redo: dict[CursorKey, Cursor] = {}
        self._again: list[Item] = []
        self._ahead: list[Item] = []
        ttl_ms = int(settings.redis.lease_seconds * 1000)
        partitions = settings.tapeline.partitions
        self._leases = None
        if store.sharing != "none":
            leader = store.sharing == "leader"
            self._leases = Leases(store.name, self.worker, service, partitions, ttl_ms, leader=leader)
        self._mine = [] if self._leases else list(range(partitions))
        self._handed_over: set[int] = set()
        self._renewed = 0.0  # when the leases were last known to hold
        self._lease_seconds = ttl_ms / 1000
        self._beat_seconds = min(BEAT_SECONDS, ttl_ms / 3000)
        self._lock = threading.Lock()
        self._trouble = ""
        self._gave_up = False
        self._deadline: float | None = None
        self._fatal: TapelineError | None = None

    def run(self) -> None:
        """Raises TapelineError for what waiting cannot mend; leaves within 5 s after `stop`."""
        heart = threading.Thread(target=self._heartbeat, name="sink-heart", daemon=True)
        try:
            log.info("storing into %s as '%s'", self.store.where, self.consumer)
            metrics.follow(self.progress)
            self._goes_on()
            heart.start()
            while not self.stop.is_set():
                self._goes_on()
                if self._tend():
                    self._move(self._rows, self._seconds, 0.2)
                else:
                    self.stop.wait(0.05)
            for reader in self._readers.values():
                reader.thread.join(self._left())
            # What a store without transactions has begun it has to finish, for which there is no time now.
            while self._fatal is None and self.store.sharing != "leader" and self._move(self._rows, 0.0, 0.0):
                pass
        finally:
            self.stop.set()
            self._leave(heart)
        if self._fatal is not None:
            raise self._fatal

    def _goes_on(self) -> None:
        self.progress.mark("the writer")

    def _tend(self) -> bool:
        """Read the partitions that are this sink's; False while it has none, or the store does not say where from."""
        with self._lock:
            mine = [p for p in self._mine if p not in self._handed_over]
        gone = self._readers.keys() - set(mine)
        if gone:
            self._let_go(gone)
        missing = [p for p in mine if p not in self._readers]
        self._telemetry.owned.set(len(mine))
        if missing:
            try:
                self.cursors = self.store.cursors()
                self._answers()
                self._begin_again()
            except StoreUnavailable as error:
                self._waits(error)
                self.stop.wait(0.2)
                return False
            except BusUnavailable as error:
                log.debug("not reading yet: %s", error)
                self.stop.wait(0.2)
                return False
            for partition in missing:
                self._readers[partition] = Reader(self, partition)
                self._readers[partition].thread.start()
            if self._leases:
                log.info("storing partitions %s", ", ".join(map(str, sorted(self._readers))))
        return bool(self._readers)

    def _begin_again(self) -> None:
        """A batch that a sink before this one has begun comes first, as it was."""
        identity = self.bus.identity() if self.store.redo else ""
        self._redo = {}
        for key, cursor in self.store.redo.items():
            bus, topic, partition = key
            if bus != identity or topic not in self.topics or cursor == self.cursors.get(key):
                continue
            told = self.bus.call("hget", self.bus.keys.consumers(partition, topic), self.consumer)
            if told is not None and not after(cursor.stream_id, told.decode()):
                self._was_finished(identity)
                break
            _, before, _ = self.bus.look(partition, topic, cursor.stream_id)
            if before and before[0].decode() == cursor.stream_id:  # else the bus has lost it, and so its like
                self._redo[key] = cursor
        self._again, self._ahead = [], []

    def _was_finished(self, identity: str) -> None:
        """Redis is told only of what is stored: of the batch that was begun, that is all of it."""
        redo = self.store.redo
        self.cursors = self.cursors | {key: cursor for key, cursor in redo.items() if key[0] == identity}
        self.store.redo = {key: cursor for key, cursor in redo.items() if key[0] != identity}
        self._redo = {}

    def _let_go(self, partitions: Collection[int]) -> None:
        """Stop reading these; what is read but not stored is left to the next owner."""
        for partition in partitions:
            self._readers[partition].let_go.set()
        for partition in list(partitions):
            reader = self._readers.pop(partition)
            while reader.thread.is_alive():  # it may wait for room
                self.inbox.drop([partition])
                reader.thread.join(0.05)
            reader.close()
        self.inbox.drop(partitions)
        with self._lock:
            self._handed_over |= set(partitions)

    def count(self, what: str) -> None:
        """One more of `what` in the counters."""
        with self._lock:
            self.counters[what] += 1
        self._telemetry.count(what)

    def failed(self, error: TapelineError) -> None:
        """A reader met something that waiting cannot mend."""
        self._fatal = error
        self.stop.set()

    def _left(self) -> float:
        """Seconds left for stopping, counted from the first call."""
        if self._deadline is None:
            self._deadline = time.monotonic() + STOP_SECONDS
        return max(0.0, self._deadline - time.monotonic())

    def _move(self, rows: int, seconds: float, patience: float) -> bool:
        """One batch from the inbox into the store; False when there was none, or the store gave it up.

        Once a batch is given up nothing may be written behind it: its cursor would pass over the batch.
        """
        if self._gave_up:
            return False
        if self._leases and time.monotonic() - self._renewed > self._lease_seconds:
            self.stop.wait(0.05)  # it was held up, or Redis is away: another sink may have taken over
            return False
        items = self._take(rows, seconds, patience)
        if not items:
            return False
        batch = batch_of(items, mend=self.mend)
        try:
            if not self._write(batch):
                return False
        except Fenced as error:
            # Another sink took over while this one was held up: nothing of the batch is stored by us.
            log.warning("%s; reading on from where the store is", error)
            self.count("fenced")
            self._let_go(list(self._readers))
            return False
        for item in items:
            self._readers[item.source.partition].stored(item)
        return True

    def _take(self, rows: int, seconds: float, patience: float) -> list[Item]:
        """The items of the next batch; of one that is to be written again exactly its own."""
        if not self._redo:
            return self.inbox.take(rows, seconds, patience)
        whole = True
        for item in self.inbox.take(rows, 0.0, patience):
            if item.rewound:  # the bus has lost its tail meanwhile: what was begun cannot be had again
                whole, self._redo = False, {}
            key = (item.source.bus, item.source.topic, item.source.partition)
            target = self._redo.get(key)
            inside = target is not None and not after(item.source.id, target.stream_id)
            (self._again if inside else self._ahead).append(item)
            if target is not None and (not inside or item.source.id == target.stream_id):
                del self._redo[key]
        if self._redo:
            return []
        items = self._again if whole else []
        self.inbox.back(self._ahead if whole else self._again + self._ahead)
        self._again, self._ahead = [], []
        return items

    def _write(self, batch: Batch) -> bool:
        """Write, waiting for the store; False when it did not answer until the stop."""
        wait = 0.05
        while True:
            began = time.perf_counter()
            self._goes_on()
            try:
                dead = self.store.write(batch)
            except StoreUnavailable as error:
                self._waits(error)
            else:
                break
            if self.stop.is_set():
                if self._left() < 0.2:
                    log.warning("%d rows and all behind them are left on the bus for the next start", batch.rows)
                    self._gave_up = True
                    return False
                time.sleep(0.1)
            self.stop.wait(wait * random.uniform(0.5, 1.0))
            wait = min(BACKOFF_MAX_SECONDS, 2 * wait)
        self._answers()
        if told := self._dead.add(dead):
            log.warning("%d new dead letters; see the table dead_letters", told)
        with self._lock:
            self.counters.update(rows=batch.rows, batches=1, dead_letters=dead, ignored=batch.ignored)
        self._telemetry.stored(batch, dead, time.perf_counter() - began)
        return True

    def _answers(self) -> None:
        if self._trouble:
            log.info("%s answers again", self.store.where)
            self._trouble = ""
            self._telemetry.waiting.set(0)

    def _waits(self, error: StoreUnavailable) -> None:
        if not self._trouble:
            log.warning("%s; trying again, the streams hold the backlog", error)
        self._trouble = str(error)
        self._telemetry.waiting.set(1)
        self.count("store_waits")

    def _heartbeat(self) -> None:
        """A thread of its own, so that neither a slow store nor a slow Redis holds up the other."""
        bus: Bus | None = None
        while not self.stop.is_set():
            try:
                bus = bus or self.bus.clone()
                with self._lock:
                    counters = dict(self.counters)
                beat(bus, self.worker, self.service, list(self._mine), self._detail(), counters, self.progress)
                if self._leases:
                    self._share(bus, self._leases)
            except BusUnavailable as error:
                log.debug("no heartbeat: %s", error)
            except TapelineError as error:
                self.failed(error)
            self.stop.wait(self._beat_seconds)
        if bus is not None:
            bus.close()

    def _share(self, bus: Bus, leases: Leases) -> None:
        """Renew and take leases, and give up those whose partitions are handed over."""
        with self._lock:
            done, self._handed_over = self._handed_over, set()
            self._mine = [p for p in self._mine if p not in done]
        leases.release(bus, done)
        asked = time.monotonic()
        spare = leases.tend(bus)
        self._renewed = asked
        with self._lock:
            self._mine = [p for p in leases.mine if p not in spare]

    def _detail(self) -> str:
        with self._lock:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counters.items()) if count)
        more = getattr(self.store, "detail", "")
        trouble = f"; waiting: {self._trouble}" if self._trouble else ""
        return f"{counts or 'rows 0'}{'; ' + more if more else ''}{trouble}"

    def _leave(self, heart: threading.Thread) -> None:
        self._telemetry.owned.set(0)
        readers = list(self._readers.values())
        for thread in [heart, *(reader.thread for reader in readers)]:
            if thread.ident is not None:
                thread.join(self._left())
        for reader in readers:
            if not reader.thread.is_alive():
                reader.close()
        try:
            if not readers or any(reader.healthy for reader in readers):
                if self._leases and not heart.is_alive():
                    self._leases.release(self.bus)
                leave(self.bus, self.worker)
        except TapelineError as error:
            log.info("could not say goodbye: %s", error)
        self.store.close()
        self.bus.close()
