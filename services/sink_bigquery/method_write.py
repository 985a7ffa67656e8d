"""Batches over the Storage Write API: rows are to be seen within the second, each exactly once.

A session has a committed stream for its announcements and one for each table, which it alone writes; an announcement
says at which offsets the rows of its batch are to be. The session begins with an announcement by a job, so that no
other writer's next number can be the same. Whoever takes over finalizes what the announcement names (`finish`), after
which nothing of that session can be stored, and writes what is missing of its last batch by jobs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.sink_bigquery.append import Appender, Encoder, RowErrors, connect_write, create_stream, finalize
from services.sink_bigquery.clients import Target
from services.sink_bigquery.jobs import together
from services.sink_bigquery.ledger import Announced, Part
from services.sink_bigquery.rows import Ready, letters, one
from services.sink_bigquery.tables import EVERY, LEDGER
from shared import faults
from shared.batches import DeadLetter

log = logging.getLogger(__name__)

# BigQuery takes 10 MB a request, of which the schema is a part.
REQUEST_BYTES = 8 << 20
Spend = Callable[[str, int, int], None]


@dataclass(slots=True)
class _Table:
    """The stream of one table; `offset`: where the next rows go."""

    appender: Appender
    offset: int = 0


@dataclass(slots=True)
class Session:
    """The streams of one bus. `stream`: that of the announcements, `base`: the number of the session's own one."""

    stream: str
    base: int
    ledger: Appender
    tables: dict[str, _Table] = field(default_factory=dict)


class Streams:
    """Announcements and batches on streams. See method_load.Loads for what is alike."""

    def __init__(self, target: Target, stop: threading.Event, spend: Spend) -> None:
        self._target, self._stop, self._spend = target, stop, spend
        self._held: Any = None
        self._encoders: dict[str, Encoder] = {}
        self._refused: dict[str, dict[int, str]] = {}  # rows of the running batch, by table
        self._burying = threading.Lock()

    @property
    def _client(self) -> Any:
        if self._held is None:
            self._held = connect_write(self._target)
        return self._held

    def begin(self) -> str:
        """The stream of a new session's announcements."""
        return create_stream(self._client, self._target, LEDGER)

    def session(self, stream: str, base: int) -> Session:
        """The session that was announced with this stream as number `base`."""
        return Session(stream, base, self._appender(stream, LEDGER))

    def parts(self, session: Session, tables: list[Ready], dead: int) -> dict[str, Part]:
        """Where the rows of the next batch go."""
        counts = {rows.layout.name: len(rows) for rows in tables}
        if dead:
            counts["dead_letters"] = dead
        for table in counts.keys() - session.tables.keys():
            stream = create_stream(self._client, self._target, table)
            session.tables[table] = _Table(self._appender(stream, table))
        held = session.tables
        return {t: Part(count, held[t].appender.stream, held[t].offset) for t, count in counts.items()}

    def announce(self, session: Session, entry: Announced) -> None:
        """Raises Fenced when another sink has taken over."""
        row = self._encoder(LEDGER).rows(one(LEDGER, entry.row()).values())
        faults.point("bigquery:before-announce")
        session.ledger.append(entry.n - session.base - 1, row)
        faults.point("bigquery:after-announce")
        self._spend(LEDGER, 1, len(row[0]))

    def write(self, session: Session, entry: Announced, tables: list[Ready], dead: list[DeadLetter]) -> int:
        """All rows of an announced batch; returns the dead letters. Raises StoreUnavailable, Fenced."""
        if dead:
            grave = session.tables["dead_letters"]
            end, size = self._table(session, entry, letters(dead, entry.at_us))
            grave.offset = max(end, grave.offset)
            self._spend("dead_letters", len(dead), size)
        ends: dict[str, tuple[int, int]] = {}

        def table(rows: Ready) -> None:
            ends[rows.layout.name] = self._table(session, entry, rows)

        together([lambda rows=rows: table(rows) for rows in tables])  # type: ignore[misc]
        for rows in tables:
            name = rows.layout.name
            session.tables[name].offset, size = ends[name]
            self._spend(name, len(rows), size)
        refused = sum(len(found) for found in self._refused.values())
        self._refused = {}
        return len(dead) + refused

    def _table(self, session: Session, entry: Announced, rows: Ready) -> tuple[int, int]:
        """Rows where they were announced; returns the offset behind them, and their bytes.

        Which rows go into which request does not depend on what was refused: a request sent again must be the same.
        """
        name = rows.layout.name
        appender, offset = session.tables[name].appender, entry.tables[name].offset
        encoded = self._encoder(name).rows(rows.values())
        refused = self._refused.setdefault(name, {})
        begin = 0
        for end in _requests(encoded):
            while good := [i for i in range(begin, end) if i not in refused]:
                try:
                    faults.point("bigquery:before-write")
                    appender.append(offset, [encoded[i] for i in good])
                    faults.point("bigquery:after-write")
                    break
                except RowErrors as error:
                    if rows.letter is None or not error.rows:
                        raise
                    found = {good[i]: reason for i, reason in sorted(error.rows.items())}
                    self._bury(session, letters([rows.letter(i, reason) for i, reason in found.items()], entry.at_us))
                    refused |= found
            offset += len(good)
            begin = end
        return offset, sum(map(len, encoded))

    def _bury(self, session: Session, rows: Ready) -> None:
        """Rows that were not announced, before the rest of their request: so whoever takes over knows to leave them."""
        with self._burying:
            if "dead_letters" not in session.tables:
                stream = create_stream(self._client, self._target, "dead_letters")
                session.tables["dead_letters"] = _Table(self._appender(stream, "dead_letters"))
            grave = session.tables["dead_letters"]
            grave.appender.append(grave.offset, self._encoder("dead_letters").rows(rows.values()))
            grave.offset += len(rows)

    def finish_announcing(self, entry: Announced) -> int:
        """No more announcements on its session's stream; returns how many there are, 0 if that is not known."""
        faults.point("bigquery:before-finalize")
        count = finalize(self._client, self._target, entry.stream)
        faults.point("bigquery:after-finalize")
        return count

    def finish(self, entry: Announced) -> None:
        """No more rows of the batch."""
        for part in entry.tables.values():
            if part.stream:
                finalize(self._client, self._target, part.stream)

    def close(self, session: Session | None = None) -> None:
        """End the connections of a session; without one, the client."""
        if session is not None:
            for appender in (session.ledger, *(table.appender for table in session.tables.values())):
                appender.close()
            return
        held, self._held = self._held, None
        if held is not None:
            try:
                held.transport.close()
            except Exception as error:  # a farewell
                log.debug("closing the client: %s", error)

    def _appender(self, stream: str, table: str) -> Appender:
        return Appender(self._client, self._target, stream, self._encoder(table), self._stop)

    def _encoder(self, table: str) -> Encoder:
        if table not in self._encoders:
            self._encoders[table] = Encoder(EVERY[table])
        return self._encoders[table]


def _requests(rows: list[bytes]) -> list[int]:
    """Where each request ends, so that none is too large."""
    ends, size = [], 0
    for i, row in enumerate(rows):
        if size and size + len(row) > REQUEST_BYTES:
            ends.append(i)
            size = 0
        size += len(row) + 6
    return [*ends, len(rows)] if rows else []
