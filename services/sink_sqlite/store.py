"""The SQLite store of the sink: rows, dead letters and cursors in one transaction.

WAL with synchronous=NORMAL: a killed process loses nothing that was committed; a power cut may take
the newest transactions, rows and cursors alike, and the streams' debugging window gives them again.
"""

from __future__ import annotations

import logging
import operator
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

import numpy as np

from services.sink_sqlite.form import SqliteForm
from services.sink_sqlite.schema import migrate
from services.sink_sqlite.statements import (
    BARS_OF_KEY,
    BARS_OF_NEW,
    CURSORS,
    DEAD,
    FORGET_DEAD,
    FORGET_DEAD_BEHIND,
    FORGET_LATE,
    FORGET_TICKS,
    GAPS,
    MEND,
    WRITE,
)  # fmt: skip
from shared import faults
from shared.batches import Batch, Cursor, CursorKey, DeadLetter, iso_texts
from shared.errors import ConfigError, StoreUnavailable, TapelineError
from shared.settings import Settings
from shared.stages import PRODUCER
from shared.store_rows import Bound, Prepared, gaps, prepare
from shared.stores import parse
from shared.tables import TABLES

log = logging.getLogger(__name__)

BUSY_SECONDS = 1.0
FORM = SqliteForm()
CACHE_KIB = 65536
# What SQLite raises about one row, not about the database.
_REFUSED = (
    sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError,
    OverflowError, UnicodeEncodeError,
)  # fmt: skip
_WAIT = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_INTERRUPT,
}  # fmt: skip
_KEEP_CONNECTION = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL}


class SqliteStore:
    """One database file, written by one thread. See `shared.sink.Store`.

    `ohlc_bars`: keep that table in step with `candles`.
    """

    def __init__(self, path: str | Path, busy_seconds: float = BUSY_SECONDS, *, ohlc_bars: bool = True) -> None:
        self.path = Path(path)
        self.where = f"SQLite {self.path}"
        self.name = f"sqlite:{blake2b(os.fsencode(self.path.resolve()), digest_size=4).hexdigest()}"
        self.sharing, self.redo = "none", dict[CursorKey, Cursor]()
        self._busy_seconds, self._ohlc_bars = busy_seconds, ohlc_bars
        self._held: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def open(self) -> None:
        """Open or create the file and migrate it.

        Raises ConfigError for a path that cannot hold a store, VersionError, StoreUnavailable.
        """
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"the store's folder {folder} does not exist: create it, or change TAPELINE_STORE")
        if self.path.is_dir():
            raise ConfigError(f"the store {self.path} is a folder: name a file in TAPELINE_STORE")
        self.connection()

    def connection(self) -> sqlite3.Connection:
        """The open connection, made (again) where there is none."""
        if self._held is not None:
            return self._held
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(
                self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
            )
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                log.warning(
                    "%s cannot use a write-ahead log here (%s): readers and the sink block each other", self.where, mode
                )
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            done = migrate(connection, self.where)
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            self._cannot_open(error)
        except TapelineError:
            if connection is not None:
                connection.close()
            raise
        if done:
            log.info("%s is at schema version %d", self.where, done[-1])
        self._held, self._file = connection, _identity(self.path)
        return connection

    def _cannot_open(self, error: sqlite3.Error) -> NoReturn:
        code = _code(error)
        if code in _WAIT:
            raise StoreUnavailable(f"{self.where} does not open ({error})") from None
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            raise ConfigError(
                f"{self.where} cannot be written ({error}): give this user the right to write the file and its folder, "
                "or change TAPELINE_STORE"
            ) from None
        raise ConfigError(
            f"{self.where} is not a Tapeline store ({error}): name another file in TAPELINE_STORE"
        ) from None

    def cursors(self) -> dict[CursorKey, Cursor]:
        """How far each stream of each bus is stored."""
        rows = self.connection().execute("SELECT bus, topic, partition, seq, stream_id FROM sink_cursors")
        return {(bus, topic, partition): Cursor(seq, at) for bus, topic, partition, seq, at in rows}

    def write(self, batch: Batch) -> int:
        """One transaction of rows, dead letters and cursors; returns the dead letters. See `shared.sink.Store`."""
        self.connection()
        if _identity(self.path) != self._file:
            # SQLite would go on writing into the unlinked file; a new start begins with the new file's cursors.
            raise TapelineError(
                f"{self.where} was removed or replaced while the sink had it open: start the sink again"
            )
        prepared, unsound = prepare(batch, FORM)
        dead = batch.dead + unsound
        with self.transaction() as connection:
            _forget(connection, batch)
            dead += self.put(prepared, batch, mend=batch.mend)
            bury(connection, dead)
            connection.executemany(CURSORS, [(*key, *cursor) for key, cursor in batch.cursors.items()])
            faults.point("sink:before-commit")
        faults.point("sink:after-commit")
        return len(dead)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done inside is stored, or nothing of it. Raises StoreUnavailable, TapelineError."""
        connection = self.connection()
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._undo(error)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def put(self, prepared: Iterable[Prepared], of: Batch, *, mend: bool = False) -> list[DeadLetter]:
        """Rows, and the gaps of a batch, into their tables, inside a transaction; returns the rows that are refused."""
        connection, dead = self.connection(), []
        for rows in prepared:
            sql = MEND.get(rows.table) if mend else None
            newest = _newest(connection) if rows.table == "candles" else 0
            dead += _insert(connection, sql or WRITE[rows.table], rows)
            if rows.table == "candles" and self._ohlc_bars:
                _follow(connection, rows, newest)
        connection.executemany(GAPS, zip(*gaps(of, FORM), strict=True))
        return dead

    def _undo(self, error: sqlite3.Error) -> NoReturn:
        """Nothing of the batch stays; raises what happens next."""
        connection, code = self._held, _code(error)
        try:
            if connection is not None and connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            code = None  # closing rolls back as well
        if code not in _KEEP_CONNECTION:
            self.close()
        if _code(error) in _WAIT or _code(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise StoreUnavailable(f"{self.where} does not take rows now ({error})") from None
        raise TapelineError(
            f"{self.where} refuses the batch ({error}): check the file (PRAGMA integrity_check)"
        ) from None

    def close(self) -> None:
        """Close the file; the write-ahead log is folded in."""
        connection, self._held = self._held, None
        if connection is not None:
            connection.close()


def of(settings: Settings, stop: threading.Event) -> SqliteStore:  # noqa: ARG001
    """The store of the settings, not yet open. Raises ConfigError for one that is no SQLite."""
    url = parse(settings.tapeline.store)
    if url.scheme != "sqlite":
        raise ConfigError(f"sink-sqlite writes sqlite:/// stores, TAPELINE_STORE is {url.shown}")
    return SqliteStore(url.path, ohlc_bars=settings.sink.ohlc_bars)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _code(error: sqlite3.Error) -> int | None:
    """Primary result code; None for what the Python module itself found."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _forget(connection: sqlite3.Connection, batch: Batch) -> None:
    """Rows that have no key of their own but their place on the bus, from a tail that Redis has lost."""
    for source, after in batch.rewinds:
        if source.topic not in PRODUCER:
            behind = (source.bus, source.partition, *map(int, after.split("-")))
            for sql in FORGET_TICKS if source.topic == "ticks" else ():
                connection.execute(sql, behind)
            connection.execute(FORGET_DEAD_BEHIND, (*behind, source.topic))
            continue
        place = (source.bus, source.partition, source.seq)
        if source.topic == "late":
            connection.execute(FORGET_LATE, place)
        connection.execute(FORGET_DEAD, (*place, source.topic))


def _newest(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(rowid), 0) FROM candles").fetchone()[0])


def _follow(connection: sqlite3.Connection, candles: Prepared, newest: int) -> None:
    """Bring ohlc_bars in step with the candles just written; `newest`: the newest rowid before them.

    What stands in `candles` is copied, not what was to be written: a row may have been refused, or
    have been older than the stored one.
    """
    if _newest(connection) - newest == len(candles.rows):
        connection.execute(BARS_OF_NEW, (newest,))  # every row was new, as most are
    else:
        key = [candles.names.index(column) for column in TABLES["candle"].key]
        connection.executemany(BARS_OF_KEY, zip(*(candles.rows.columns[i] for i in key), strict=True))


def _insert(connection: sqlite3.Connection, sql: str, prepared: Prepared) -> list[DeadLetter]:
    """Insert; rows that SQLite refuses become dead letters, and what they superseded is tried instead."""
    rows = prepared.rows
    refused = _each(connection, sql, rows)
    dead = [prepared.dead(rows, i, reason) for i, reason in refused]
    if refused and len(prepared.spare):
        keys = {int(rows.group[i]) for i, _ in refused}
        spare = prepared.spare.only([i for i, key in enumerate(prepared.spare.group.tolist()) if key in keys])
        dead += [prepared.dead(spare, i, reason) for i, reason in _each(connection, sql, spare)]
    return dead


def _each(connection: sqlite3.Connection, sql: str, rows: Bound) -> list[tuple[int, str]]:
    """Insert all rows but those that are refused: (index, reason).

    A refused row undoes only itself and executemany has taken just that one from the iterator, so
    the next call goes on behind it.
    """
    refused: list[tuple[int, str]] = []
    if not len(rows):
        return refused
    first, *others = rows.columns
    counted = iter(first)
    left = zip(counted, *others, strict=True)
    while True:
        try:
            connection.executemany(sql, left)
        except _REFUSED:
            at = len(rows) - operator.length_hint(counted) - 1
            try:
                connection.execute(sql, rows.row(at))  # alone, for the module may name the fault of the row before
            except _REFUSED as error:
                refused.append((at, f"{type(error).__name__}: {error}"))
        else:
            return refused


def bury(connection: sqlite3.Connection, dead: list[DeadLetter]) -> None:
    """Dead letters into their table, each once."""
    if dead:
        now = iso_texts(np.array([time.time_ns()]), "us")[0]
        rows = [(now, *d.source[:3], d.source.seq, d.source.id, d.table, d.row, d.reason, d.body) for d in dead]
        connection.executemany(DEAD, rows)
