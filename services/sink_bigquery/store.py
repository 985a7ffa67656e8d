"""The BigQuery store of the sink: exactly once without a transaction over several tables.

How: ledger.py. A batch that was begun is written again with the very same rows: by this process when BigQuery did not
answer, by the next one when this one was killed (`redo`). The method is a setting; what one has begun another can end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from services.sink_bigquery import ledger, schema
from services.sink_bigquery.clients import Missing, Refused, Target, connect, google, target_of
from services.sink_bigquery.costs import Spent
from services.sink_bigquery.forget import statements
from services.sink_bigquery.jobs import Attended, Jobs
from services.sink_bigquery.ledger import INSERT, LOAD, REST, SESSION, STREAM, Announced, Part
from services.sink_bigquery.method_insert import Inserts
from services.sink_bigquery.method_load import Loads
from services.sink_bigquery.rows import Ready, ready
from shared import faults
from shared.batches import Batch, Cursor, CursorKey, DeadLetter
from shared.errors import ConfigError, Fenced, StoreUnavailable, TapelineError
from shared.progress import Asked
from shared.settings import Settings

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Bus:
    """Where the store stands with one bus.

    `newest`: its newest announcement, or the one being made; `open`: its batch may not be finished; `ours`: this store
    makes it, `announced`: and has. `taken`: nobody else can write on from `newest`. `session`: the streams of this
    store (True for insertAll, which has none), `starting`: the announcement of one that is being begun.
    """

    newest: Announced | None = None
    open: bool = False
    ours: bool = False
    announced: bool = True
    taken: bool = False
    session: Any = None
    starting: Announced | None = None

    @property
    def cursors(self) -> dict[CursorKey, Cursor]:
        """What is stored, a batch that is still open not."""
        if self.newest is None:
            return {}
        return self.newest.before if self.open else dict(self.newest.ends)

    @property
    def next_n(self) -> int:
        """The number of the next announcement."""
        return self.newest.n + 1 if self.newest else 1


class BigQueryStore:
    """One dataset. See `shared.sink.Store`. Used by one thread; `stop` ends its waits.

    `spent`: rows, bytes and costs so far, see costs.py.
    """

    def __init__(self, target: Target, stop: threading.Event) -> None:
        self.target, self.method = target, target.settings.method
        self.where = f"{target.where} ({self.method})"
        self.name = f"bigquery:{target.project}.{target.dataset}"
        self.sharing, self.redo = "leader", dict[CursorKey, Cursor]()
        self.spent = Spent(self.method)
        self.goes_on: Callable[[], None] = lambda: None  # see shared.sink.Store
        self._stop = Asked(stop, self._asked)
        self._attended = Attended(self.where, stop)
        self._client: Any = None
        self._loads: Loads | None = None
        self._streams: Any = None
        self._buses: dict[str, _Bus] = {}

    def _asked(self) -> None:
        self.goes_on()

    @property
    def detail(self) -> str:
        """What was written, by method, and what it costs: for people."""
        return self.spent.told()

    # -- life --------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, and bring the dataset up to date. Raises ConfigError, VersionError, StoreUnavailable."""
        self._attended.call(self._ready)

    def _ready(self) -> Loads:
        if self._loads is not None:
            return self._loads
        try:
            self._client = self._client or connect(self.target)
            done = schema.ensure(self._client, self.target)
            born = schema.ledger_born(self._client, self.target)
        except Missing as error:
            raise ConfigError(
                f"{error}: check the project's name, or create the dataset and let the sink use it"
            ) from None
        except Refused as error:
            raise ConfigError(str(error)) from None
        except google.Conflict as error:
            raise StoreUnavailable(
                f"{self.target.where}: someone else is changing the dataset ({error.message})"
            ) from None
        if done:
            log.info("%s: made or changed %s", self.target.where, ", ".join(done))
        writer = uuid4().hex
        jobs = Jobs(self._client, self.target, writer, self._stop)
        self._loads = Loads(jobs, self.target, born, lambda *spent: self.spent.add(LOAD, *spent))
        return self._loads

    def close(self) -> None:
        """Close the connections; what it cost is said once."""
        for bus in self._buses.values():
            self._end(bus)
        if self._streams is not None:
            self._streams.close()
        client, self._client, self._loads, self._streams, self._buses = self._client, None, None, None, {}
        if client is not None:
            client.close()
        if self.spent.rows:
            log.info("%s: %s", self.target.where, self.spent.told())

    # -- where it stands -----------------------------------------------------------------------

    def cursors(self) -> dict[CursorKey, Cursor]:
        """How far each stream of each bus is stored for certain; `redo`: how far, if the last batch was finished."""
        return self._attended.call(self._cursors)

    def _cursors(self) -> dict[CursorKey, Cursor]:
        self._ready()
        for bus in self._buses.values():
            self._end(bus)
        try:
            found = ledger.newest(self._client, self.target)
        except Missing as error:
            raise self._lost(error) from None
        self._buses = {name: _Bus(newest, open=bool(newest.begins)) for name, newest in found.items()}
        self.redo = {key: cursor for newest in found.values() for key, cursor in newest.changed.items()}
        return {key: cursor for newest in found.values() for key, cursor in newest.before.items()}

    def _lost(self, error: Missing) -> StoreUnavailable:
        """A table was dropped under us: it is made again."""
        self._loads = None
        return StoreUnavailable(str(error))

    # -- writing -------------------------------------------------------------------------------

    def write(self, batch: Batch) -> int:
        """Announce a batch and write it, or write it again; returns the dead letters.

        Raises StoreUnavailable: the same batch is to be written again; Fenced.
        """
        return self._attended.call(lambda: self._begin_or_go_on(batch))

    def _begin_or_go_on(self, batch: Batch) -> int:
        names = {bus for bus, _, _ in batch.cursors}
        if len(names) != 1:
            raise TapelineError(f"a batch is of one bus, this one of {len(names)}")
        loads = self._ready()
        name = names.pop()
        bus = self._buses.setdefault(name, _Bus())
        try:
            dead = self._write(loads, name, bus, batch)
        except Missing as error:
            raise self._lost(error) from None
        bus.open = False
        self.redo = {key: cursor for key, cursor in self.redo.items() if key[0] != name}
        return dead

    def _write(self, loads: Loads, name: str, bus: _Bus, batch: Batch) -> int:
        if not bus.ours and not any(key[0] == name for key in self.redo):
            bus.open = False  # the loop knows that the batch was finished
        if bus.newest is not None and not bus.ours and not bus.taken:
            self._take_over(name, bus, bus.newest)
        if bus.open and bus.ours and bus.newest is not None and not bus.newest.is_of(batch):
            raise Fenced(f"{self.target.where}: batch {bus.newest.n} was begun and another one came")
        if bus.open and bus.newest is not None and bus.newest.is_of(batch):
            if bus.newest.method == STREAM and not bus.ours:
                # Its streams are final: the rest comes under a number of our own, and the time that tells its rows.
                mine = replace(bus.newest, n=bus.next_n, method=REST, writer=loads.jobs.writer, stream="", base=0)
                bus.newest, bus.ours, bus.announced = mine, True, False
            entry = bus.newest
            tables, dead = ready(batch, entry.at_us)
        else:
            if bus.open and bus.newest is not None:
                self._give_up(loads, bus.newest)
            method = LOAD if batch.mend else self.method
            if method == LOAD:
                self._end(bus)
            elif bus.session is None:
                self._begin(loads, name, bus)
            at_us = ledger.next_at(bus.newest)
            tables, dead = ready(batch, at_us)
            entry = self._entry(loads, name, bus, batch, method, at_us, tables, dead)
            bus.newest, bus.open, bus.ours, bus.announced = entry, True, True, False
        if not bus.announced:
            self._announce(loads, bus, entry)
            bus.announced = True
        for what, sql, parameters in statements(batch, self.target):
            faults.point("bigquery:before-forget")
            loads.jobs.query(loads.name(name, entry.n, what), sql, parameters)
            faults.point("bigquery:after-forget")
        if entry.method == STREAM:
            return int(self._streaming().write(bus.session, entry, tables, dead))
        if entry.method == INSERT:
            return self._inserts().write(entry, tables, dead)
        return loads.write(entry, tables, dead, mending=batch.mend)

    def _entry(
        self, loads: Loads, name: str, bus: _Bus, batch: Batch, method: str, at_us: int, tables: list[Ready],
        dead: list[DeadLetter],
    ) -> Announced:  # fmt: skip
        """The announcement of the next batch."""
        before, stream, base = bus.cursors, "", 0
        parts = {rows.layout.name: Part(len(rows)) for rows in tables} | {"dead_letters": Part(len(dead))}
        if method == STREAM:
            stream, base = bus.session.stream, bus.session.base
            parts = self._streaming().parts(bus.session, tables, len(dead))
        begins = {key: before.get(key) for key in batch.cursors}
        ends = before | batch.cursors
        return Announced(name, bus.next_n, at_us, method, loads.jobs.writer, stream, base, begins, ends, parts)

    def _announce(self, loads: Loads, bus: _Bus, entry: Announced) -> None:
        if entry.method == STREAM:
            self._streaming().announce(bus.session, entry)
        elif entry.method == INSERT:
            self._inserts().announce(entry)
        else:
            loads.announce(entry)

    def _take_over(self, name: str, bus: _Bus, newest: Announced) -> None:
        """See to it that the writer of the newest announcement writes nothing more. Raises Fenced if it has."""
        if newest.stream:
            count = self._streaming().finish_announcing(newest)
            found = ledger.newest(self._client, self.target, name).get(name)
            if found is None or found.n != newest.n:
                raise Fenced(f"{self.target.where}: another sink has written on")
            if found.n < newest.base + count:
                raise StoreUnavailable(f"{self.target.where}: the newest announcement cannot be read yet")
            self._streaming().finish(newest)
        bus.taken = True

    def _give_up(self, loads: Loads, newest: Announced) -> None:
        """The bus has lost what is needed to finish a batch: what of it is stored stays, and no more may come."""
        log.warning("%s: batch %d cannot be finished, the bus has lost it; going on behind it", self.where, newest.n)
        if newest.method in (LOAD, REST):
            loads.close_off(newest)

    def _begin(self, loads: Loads, name: str, bus: _Bus) -> None:
        """A session: from here on the next number is ours alone."""
        if bus.starting is None:
            stream = self._streaming().begin() if self.method == STREAM else ""
            n = bus.next_n
            at_us = ledger.next_at(bus.newest)
            bus.starting = Announced(
                name, n, at_us, SESSION, loads.jobs.writer, stream, n if stream else 0, ends=bus.cursors
            )
        loads.announce(bus.starting)
        entry, bus.starting = bus.starting, None
        bus.newest, bus.open, bus.ours, bus.announced = entry, False, True, True
        bus.session = self._streaming().session(entry.stream, entry.n) if entry.stream else True

    def _end(self, bus: _Bus) -> None:
        if bus.session is not None and bus.session is not True:
            self._streaming().close(bus.session)
        bus.session = None

    def _streaming(self) -> Any:
        """A method_write.Streams; imported only where it is used, for gRPC takes its time."""
        if self._streams is None:
            from services.sink_bigquery.method_write import Streams  # noqa: PLC0415

            self._streams = Streams(self.target, self._stop, lambda *spent: self.spent.add(STREAM, *spent))
        return self._streams

    def _inserts(self) -> Inserts:
        return Inserts(self._client, self.target, self._stop, lambda *spent: self.spent.add(INSERT, *spent))


def of(settings: Settings, stop: threading.Event) -> BigQueryStore:
    """The store of the settings, not yet open. Raises ConfigError."""
    return BigQueryStore(target_of(settings), stop)
