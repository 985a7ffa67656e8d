"""The PostgreSQL and TimescaleDB store of the sink: rows, dead letters and cursors in one transaction.

Nothing outlives a transaction but what the next one makes anew where it is missing, so a pooler in transaction mode
may stand between.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg

from services.sink_timescale import features
from services.sink_timescale.form import TimescaleForm, unfit
from services.sink_timescale.schema import lacking, migrate
from services.sink_timescale.statements import (
    ADVANCE,
    BEGIN_AT,
    CURSORS,
    DEAD,
    FORGET_DEAD,
    FORGET_DEAD_BEHIND,
    FORGET_LATE,
    FORGET_TICKS,
    GAPS,
    INTO,
    KINDS,
    LOCK,
    WRITTEN,
    Into,
)  # fmt: skip
from shared import faults
from shared.batches import Batch, Cursor, CursorKey, DeadLetter
from shared.errors import ConfigError, Fenced, StoreUnavailable, TapelineError
from shared.postgres import connect, errors
from shared.postgres import where as where_of
from shared.settings import Settings, Timescale
from shared.stages import PRODUCER
from shared.store_rows import Bound, Prepared, gaps, prepare
from shared.stores import parse
from shared.tables import GAP_COLUMNS, GAP_KEY

log = logging.getLogger(__name__)

FORM = TimescaleForm()
# A correction may have to unpack much of a compressed chunk, so a statement has time; the server gives up first.
COMMAND_SECONDS = 120.0
STOP_SECONDS = 2.0
# A sink that stands still in a transaction holds its cursors: its successor must not wait for ever. And what Redis is
# told is stored must outlive a crash of the server.
_BEGIN = f"""BEGIN; SET LOCAL statement_timeout = '{COMMAND_SECONDS - 10:.0f}s';
    SET LOCAL idle_in_transaction_session_timeout = '60s';
    SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"""
_BEGIN_TIMESCALE = f"{_BEGIN}; SET LOCAL timescaledb.max_tuples_decompressed_per_dml_transaction = 0"
# What is raised about rows, not about the database: values, constraints, a key too long for its index; the same key
# twice in one statement, which is no fault of either row; and what the client cannot send.
_REFUSED = (
    asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError,
    asyncpg.CardinalityViolationError, ValueError, TypeError, OverflowError,
)  # fmt: skip


class TimescaleStore:
    """One database, written by one thread over one connection. See `shared.sink.Store`."""

    def __init__(self, url: str, settings: Timescale | None = None, stop: threading.Event | None = None) -> None:
        self.url = url
        self.where = where_of(url)
        self.name = f"postgresql:{blake2b(_identity(url).encode(), digest_size=4).hexdigest()}"
        self.sharing, self.redo = "partitions", dict[CursorKey, Cursor]()
        self._settings, self._stop = settings or Timescale(), stop or threading.Event()
        self._deadline: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Any = None
        self._begin = _BEGIN
        self._known: dict[CursorKey, Cursor] = {}  # as last read or written
        self._doubt: dict[CursorKey, Cursor] = {}  # of a batch whose COMMIT was not answered

    def open(self) -> None:
        """Connect, migrate, and bring TimescaleDB's features in line with the settings.

        Raises ConfigError, AuthError, VersionError, StoreUnavailable.
        """
        try:
            self._run(self._open())
        except TapelineError:
            self.close()
            raise

    async def _open(self) -> None:
        """Over a connection of its own, where a statement may take its time."""
        connection = self._connection = await connect(self.url)
        done = await migrate(connection, self.where)
        if done:
            log.info("%s is at schema version %d", self.where, done[-1])
        for note in await features.apply(connection, self._settings):
            log.info("%s: %s", self.where, note)
        tables = await lacking(connection, WRITTEN)
        if tables:
            raise ConfigError(
                f"{self.where}: the user may not write {', '.join(tables)}: grant it SELECT, INSERT, UPDATE and "
                "DELETE there, or use another user in TAPELINE_STORE"
            )
        await connection.close(timeout=1)
        await self._cursors()

    def cursors(self) -> dict[CursorKey, Cursor]:
        """How far each stream of each bus is stored; writes go on from here."""
        self._run(self._cursors())
        return dict(self._known)

    async def _cursors(self) -> None:
        connection = await self._connected()
        self._known = _cursors(await connection.fetch(CURSORS))
        self._doubt = {}

    def write(self, batch: Batch) -> int:
        """One transaction of rows, dead letters and cursors; returns the dead letters. See `shared.sink.Store`."""
        prepared, unsound = prepare(batch, FORM)
        dead: int = self._run(self._write(batch, prepared, batch.dead + unsound))
        faults.point("sink:after-commit")
        return dead

    async def _write(self, batch: Batch, prepared: list[Prepared], dead: list[DeadLetter]) -> int:
        connection = await self._connected()
        await connection.execute(self._begin)
        await self._advance(connection, batch)
        await _forget(connection, batch)
        faults.point("sink:before-copy")
        for rows in prepared:
            dead = dead + await _insert(connection, rows, mend=batch.mend)
        if batch.gaps:
            await connection.execute(GAPS, *_columns(_gaps(batch)))
        if dead:
            await connection.execute(DEAD, *_columns([_buried(letter) for letter in dead]))
        faults.point("sink:before-commit")
        self._doubt = dict(batch.cursors)
        if await connection.execute("COMMIT") != "COMMIT":
            raise StoreUnavailable(f"{self.where} rolled the batch back")
        self._known.update(batch.cursors)
        self._doubt = {}
        return len(dead)

    async def _advance(self, connection: Any, batch: Batch) -> None:
        """Lock the batch's cursors and set them, if they stand where this store has left them; else raise Fenced.

        They may also stand behind this very batch, where its COMMIT was done but not answered: then it is written
        again, which changes nothing.
        """
        keys = sorted(batch.cursors)
        stored = _cursors(await connection.fetch(LOCK, *_columns(keys, 3)))
        known = {key: self._known[key] for key in keys if key in self._known}
        if stored != known and not (self._doubt == batch.cursors == stored):
            moved = next(key for key in keys if stored.get(key) != known.get(key))
            self._fenced(moved)
        old = [(*key, *batch.cursors[key]) for key in keys if key in stored]
        new = [(*key, *batch.cursors[key]) for key in keys if key not in stored]
        if old:
            await connection.execute(ADVANCE, *_columns(old))
        if new and await connection.execute(BEGIN_AT, *_columns(new)) != f"INSERT 0 {len(new)}":
            self._fenced(new[0][:3])

    def _fenced(self, key: CursorKey) -> None:
        raise Fenced(f"{self.where}: another sink has written '{key[1]}' of partition {key[2]} meanwhile")

    async def _connected(self) -> Any:
        """The open connection, made (again) where there is none."""
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        connection = self._connection = await connect(self.url, command_timeout=COMMAND_SECONDS)
        timescale = await connection.fetchval("SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'")
        self._begin = _BEGIN_TIMESCALE if timescale else _BEGIN
        return connection

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine on this store's own loop; after an error the connection is made anew."""
        self._loop = self._loop or asyncio.new_event_loop()
        try:
            with errors(self.url):
                return self._loop.run_until_complete(self._until_stop(work))
        except asyncpg.PostgresError as error:  # about a value, in a gap or a cursor
            self._drop()
            raise TapelineError(f"{self.where} refuses the batch ({' '.join(str(error).split())})") from None
        except BaseException:
            self._drop()
            raise

    async def _until_stop(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result; soon after `stop` whatever does not come to an end is given up. Raises StoreUnavailable."""
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait({task}, timeout=0.1))[0]:
            if not self._stop.is_set():
                continue
            self._deadline = self._deadline or time.monotonic() + STOP_SECONDS
            if time.monotonic() >= self._deadline:
                task.cancel()
                self._drop()
                await asyncio.wait({task}, timeout=0.1)
                raise StoreUnavailable(f"{self.where} has not answered until the stop")
        return task.result()

    def _drop(self) -> None:
        """End the connection without a word: the server rolls back what was open in it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def close(self) -> None:
        """Close the connection."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.run_until_complete(self._close())
            loop.close()

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                await connection.close(timeout=1)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            log.debug("closing %s: %s", self.where, error)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def of(settings: Settings, stop: threading.Event) -> TimescaleStore:
    """The store of the settings, not yet open. Raises ConfigError for one that is no PostgreSQL."""
    url = parse(settings.tapeline.store)
    if url.scheme != "postgresql":
        raise ConfigError(f"sink-timescale writes postgresql:// stores, TAPELINE_STORE is {url.shown}")
    return TimescaleStore(settings.tapeline.store, settings.timescale, stop)


def _identity(url: str) -> str:
    """Host, port and database: the same for every sink of one database, whoever its user is."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    host = parts.hostname or query.get("host", "localhost")
    try:
        port = parts.port
    except ValueError:  # several hosts
        port = None
    database = unquote(parts.path.lstrip("/")) or query.get("database") or query.get("dbname") or parts.username or ""
    return f"{host.lower()}:{port or query.get('port', 5432)}/{database}"


def _cursors(rows: list[Any]) -> dict[CursorKey, Cursor]:
    return {(bus, topic, partition): Cursor(seq, at) for bus, topic, partition, seq, at in rows}


def _columns(rows: list[tuple[Any, ...]], width: int = 0) -> list[list[Any]]:
    """Rows as columns, for unnest."""
    return [[row[i] for row in rows] for i in range(width or len(rows[0]))]


async def _forget(connection: Any, batch: Batch) -> None:
    """Rows that have no key of their own but their place on the bus, from a tail that Redis has lost."""
    for source, after in batch.rewinds:
        if source.topic not in PRODUCER:
            behind = (source.bus, source.partition, *map(int, after.split("-")))
            for sql in FORGET_TICKS if source.topic == "ticks" else ():
                await connection.execute(sql, *behind)
            await connection.execute(FORGET_DEAD_BEHIND, *behind, source.topic)
            continue
        place = (source.bus, source.partition, source.seq)
        if source.topic == "late":
            await connection.execute(FORGET_LATE, *place)
        await connection.execute(FORGET_DEAD, *place, source.topic)


async def _insert(connection: Any, prepared: Prepared, *, mend: bool) -> list[DeadLetter]:
    """Insert; rows that are refused become dead letters, and what they superseded is tried instead."""
    rows, into = prepared.rows, INTO[prepared.table]
    if not len(rows):
        return []
    await connection.execute(f"{into.create}; SAVEPOINT rows")
    try:
        await _copy(connection, into.temporary, into.columns, rows.columns)
        await connection.execute(into.mend if mend else into.write)
    except _REFUSED:
        await connection.execute("ROLLBACK TO SAVEPOINT rows")
    else:
        return []
    refused = await _singly(connection, into, rows, mend=mend)
    dead = [prepared.dead(rows, i, reason) for i, reason in refused]
    if len(prepared.spare):
        keys = {int(rows.group[i]) for i, _ in refused}
        spare = prepared.spare.only([i for i, key in enumerate(prepared.spare.group.tolist()) if key in keys])
        refused = await _singly(connection, into, spare, mend=mend)
        dead += [prepared.dead(spare, i, reason) for i, reason in refused]
    return dead


async def _singly(connection: Any, into: Into, rows: Bound, *, mend: bool) -> list[tuple[int, str]]:
    """Insert rows one by one but those that are refused: (index, reason)."""
    single = into.singly
    await connection.execute(single.create)
    kinds = dict(await connection.fetch(KINDS, f"pg_temp.{single.temporary}"))
    reasons = {
        i: f"{name}: {reason}"
        for name, column in zip(into.columns, rows.columns, strict=True)
        for i, value in enumerate(column)
        if (reason := unfit(value, kinds[name]))
    }
    fit = [i for i in range(len(rows)) if i not in reasons]
    await _copy(connection, single.temporary, single.columns, [fit, *rows.only(fit).columns])
    await connection.execute(single.mend if mend else single.write)
    reasons |= {i: " ".join(reason.split()) for i, reason in await connection.fetch(single.refused)}
    return sorted(reasons.items())


async def _copy(connection: Any, table: str, names: tuple[str, ...], columns: list[list[Any]]) -> None:
    records = zip(*columns, strict=True)
    await connection.copy_records_to_table(table, schema_name="pg_temp", columns=names, records=records)


def _gaps(batch: Batch) -> list[tuple[Any, ...]]:
    """One row a key, the last that came; every partition tells of a gap, and two sinks may write it at once."""
    rows = [tuple(map(_clean, row)) for row in zip(*gaps(batch, FORM), strict=True)]
    key = [GAP_COLUMNS.index(column) for column in GAP_KEY]
    return [row for _, row in sorted({tuple(row[i] for i in key): row for row in rows}.items())]


def _buried(letter: DeadLetter) -> tuple[Any, ...]:
    at = letter.source
    row = (at.bus, at.topic, at.partition, at.seq, at.id, letter.table, letter.row, letter.reason, letter.body)
    return tuple(map(_clean, row))


def _clean(value: Any) -> Any:
    """A text without what PostgreSQL takes in none: NUL, and halves of characters."""
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\ufffd").encode(errors="replace").decode()
