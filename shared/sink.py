"""The sink loop: streams into a store, each row once.

Rows and cursors go into the store in one transaction, so a crash at any instant neither loses nor
doubles a row. While the store does not answer, the same batch is tried again and the streams hold the
backlog; only what the store has is given free for trimming.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from typing import Protocol

from shared.batches import Batch, Cursor, CursorKey, batch_of
from shared.bus import Bus, worker_id
from shared.errors import BusUnavailable, StoreUnavailable, TapelineError
from shared.heartbeat import beat, leave
from shared.settings import Settings
from shared.sink_reader import MODES, Inbox, Reader

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
STOP_SECONDS = 3.0
BACKOFF_MAX_SECONDS = 5.0


class Store(Protocol):
    """A store. `name` is the consumer's name on the bus, unique per store; `where` is for people."""

    name: str
    where: str

    def open(self) -> None:
        """Connect and migrate. Raises ConfigError, VersionError, StoreUnavailable."""

    def cursors(self) -> dict[CursorKey, Cursor]:
        """How far each stream of each bus is stored."""

    def write(self, batch: Batch) -> int:
        """Write rows, dead letters and cursors in one transaction; returns the dead letters.

        First forgets what `batch.rewinds` names: ticks, late trades and dead letters of that stream
        from there on. Writing a batch again changes nothing, a mending one (Batch.mend) included.
        Raises StoreUnavailable, and then nothing of the batch is stored.
        """

    def close(self) -> None: ...


def open_store(store: Store, stop: threading.Event) -> bool:
    """Open a store, waiting while it does not answer; False when stopped first."""
    wait = 0.1
    told = False
    while not stop.is_set():
        try:
            store.open()
        except StoreUnavailable as error:
            if not told:
                log.warning("%s; waiting for it", error)
                told = True
            stop.wait(wait * random.uniform(0.5, 1.0))
            wait = min(BACKOFF_MAX_SECONDS, 2 * wait)
        else:
            return True
    return False


class SinkLoop:
    """Moves all partitions into one open store until `stop` is set.

    Reads what `settings.sink.modes` names. `mend`: the rows were computed again over complete
    history, see Batch. `counters`: rows, batches, dead_letters, rewinds, missing, ignored, store_waits.
    """

    def __init__(
        self, bus: Bus, store: Store, service: str, settings: Settings, stop: threading.Event, *, mend: bool = False
    ) -> None:
        self.mend = mend
        self.topics = [topic for mode, topics in MODES.items() if mode in settings.sink.modes for topic in topics]
        self.bus, self.store, self.service, self.settings, self.stop = bus, store, service, settings, stop
        self.consumer = store.name
        self.worker = worker_id(service)
        self.counters: Counter[str] = Counter()
        self.cursors: dict[CursorKey, Cursor] = {}
        self.inbox = Inbox(4 * settings.sink.batch_rows)
        self._readers = [Reader(self, p) for p in range(settings.tapeline.partitions)]
        self._lock = threading.Lock()
        self._trouble = ""
        self._gave_up = False
        self._deadline: float | None = None
        self._fatal: TapelineError | None = None

    def run(self) -> None:
        """Raises TapelineError for what waiting cannot mend; leaves within 5 s after `stop`."""
        sink = self.settings.sink
        heart = threading.Thread(target=self._heartbeat, name="sink-heart", daemon=True)
        try:
            self.cursors = self.store.cursors()
            log.info("storing %d partitions into %s as '%s'", len(self._readers), self.store.where, self.consumer)
            for thread in [heart, *(reader.thread for reader in self._readers)]:
                thread.start()
            while not self.stop.is_set():
                self._move(sink.batch_rows, sink.batch_ms / 1000, 0.2)
            for reader in self._readers:
                reader.thread.join(self._left())
            while self._fatal is None and self._move(sink.batch_rows, 0.0, 0.0):
                pass
        finally:
            self.stop.set()
            self._leave(heart)
        if self._fatal is not None:
            raise self._fatal

    def count(self, what: str) -> None:
        """One more of `what` in the counters."""
        with self._lock:
            self.counters[what] += 1

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
        items = self.inbox.take(rows, seconds, patience)
        if not items:
            return False
        batch = batch_of(items, mend=self.mend)
        if not self._write(batch):
            return False
        for item in items:
            self._readers[item.source.partition].stored(item)
        return True

    def _write(self, batch: Batch) -> bool:
        """Write, waiting for the store; False when it did not answer until the stop."""
        wait = 0.05
        while True:
            try:
                dead = self.store.write(batch)
            except StoreUnavailable as error:
                if not self._trouble:
                    log.warning("%s; trying again, the streams hold the backlog", error)
                self._trouble = str(error)
                self.count("store_waits")
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
        if self._trouble:
            log.info("%s answers again", self.store.where)
            self._trouble = ""
        if dead:
            log.warning("%d dead letters in this batch; see the table dead_letters", dead)
        with self._lock:
            self.counters.update(rows=batch.rows, batches=1, dead_letters=dead, ignored=batch.ignored)
        return True

    def _heartbeat(self) -> None:
        """A thread of its own, so that neither a slow store nor a slow Redis holds up the other."""
        bus: Bus | None = None
        while not self.stop.is_set():
            try:
                bus = bus or self.bus.clone()
                with self._lock:
                    counters = dict(self.counters)
                beat(bus, self.worker, self.service, list(range(len(self._readers))), self._detail(), counters)
            except BusUnavailable as error:
                log.debug("no heartbeat: %s", error)
            except TapelineError as error:
                self.failed(error)
            self.stop.wait(BEAT_SECONDS)
        if bus is not None:
            bus.close()

    def _detail(self) -> str:
        with self._lock:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counters.items()) if count)
        return f"{counts or 'rows 0'}{'; waiting: ' + self._trouble if self._trouble else ''}"

    def _leave(self, heart: threading.Thread) -> None:
        for thread in [heart, *(reader.thread for reader in self._readers)]:
            if thread.ident is not None:
                thread.join(self._left())
        for reader in self._readers:
            if not reader.thread.is_alive():
                reader.close()
        try:
            if any(reader.healthy for reader in self._readers):
                leave(self.bus, self.worker)
        except TapelineError as error:
            log.info("could not say goodbye: %s", error)
        self.store.close()
        self.bus.close()
