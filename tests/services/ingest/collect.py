"""An Output in memory, and a source running in a thread."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from services.ingest.source import Grouped, Resume, Source
from shared.frames import TICK, TRADE, Rows
from shared.messages import Clock, Disconnect, Gap, Instrument
from tests.wait import until


class Killed(Exception):
    """The process dies here."""


class Store:
    """What outlives a process: rows and the cursor of each partition, and messages in order."""

    def __init__(self) -> None:
        self.rows: dict[int, list[Rows]] = {}
        self.cursors: dict[int, bytes] = {}
        self.messages: list[Any] = []
        self.counts: Counter[str] = Counter()
        self.states: list[tuple[str, str]] = []

    def of(self, kind: type) -> list[Any]:
        return [m for m in list(self.messages) if isinstance(m, kind)]

    def all_rows(self, partition: int) -> Rows:
        return np.concatenate([np.empty(0, TICK), *self.rows.get(partition, [])])

    def trades(self, partition: int) -> Rows:
        rows = self.all_rows(partition)
        return rows[rows["kind"] == TRADE]

    def total(self) -> int:
        return sum(len(self.trades(p)) for p in list(self.rows))

    def published(self, partition: int, since_ns: int) -> Rows:
        rows = self.trades(partition)
        return rows[rows["ts_event_ns"] >= since_ns]


class Collect:
    """Everything is stored at once, as it comes."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store()

    def instruments(self, messages: Iterable[Instrument]) -> None:
        self.store.messages += messages

    def broadcast(self, message: Clock | Gap | Disconnect) -> None:
        self.store.messages.append(message)

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        assert not grouped.ordinals.any()
        for g, p in enumerate(grouped.partitions):
            self.put(p, grouped.rows[grouped.starts[g] : grouped.starts[g + 1]].copy(), cursor)

    def put(self, partition: int, rows: Rows, cursor: bytes) -> None:
        self.store.rows.setdefault(partition, []).append(rows)
        self.store.cursors[partition] = cursor

    def flush(self) -> None:
        pass

    def count(self, reason: str, records: int, usage_bytes: int = 0) -> None:
        self.store.counts[reason] += records
        self.store.counts["usage_bytes"] += usage_bytes

    def connection(self, state: str, detail: str = "") -> None:
        self.store.states.append((state, detail))


class Crashing(Collect):
    """Each partition lingers on its own; after `life` rows the process dies and what lingers is lost."""

    def __init__(self, store: Store, life: int, seed: float) -> None:
        super().__init__(store)
        self.dead = False
        self._life = life
        self._random = random.Random(seed)
        self._waiting: dict[int, tuple[list[Rows], bytes]] = {}

    def put(self, partition: int, rows: Rows, cursor: bytes) -> None:
        if self.dead:
            raise Killed
        waiting, since = self._waiting.get(partition, ([], cursor))
        cut = self._random.randint(0, len(rows))
        self._life -= len(rows)
        if self._random.random() < 0.4:
            if waiting:
                super().put(partition, np.concatenate(waiting), since)
            if cut:
                super().put(partition, rows[:cut], cursor)
            waiting, since, rows = [], cursor, rows[cut:]
        self._waiting[partition] = ([*waiting, rows], since)
        if self._life < 0:
            raise Killed


class Running:
    """A source in a thread of its own: `with Running(source, out): …` stops and joins it."""

    def __init__(self, source: Source, out: Any, resume: Resume | None = None) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(source, out, resume or Resume()), daemon=True)

    def _run(self, source: Source, out: Any, resume: Resume) -> None:
        try:
            source.run(out, resume, self.stop)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, tb: Any) -> None:
        self.stop.set()
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()
        if kind is None and self.error is not None:
            raise self.error

    def ended(self, timeout: float = 10) -> BaseException | None:
        """Wait for the source's end; its error."""
        until(lambda: not self._thread.is_alive(), timeout, "the end of the source")
        error, self.error = self.error, None
        return error
