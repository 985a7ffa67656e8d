"""The dead letters of a PostgreSQL store. See `shared.dead_letters`."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import asyncpg

from services.sink_timescale.statements import DEAD, GAPS
from services.sink_timescale.store import FORM, TimescaleStore, _buried, _columns, _gaps, _insert
from shared.batches import DeadLetter
from shared.dead_letters import Outcome, counted
from shared.errors import ConfigError, RowRejected
from shared.restore import Letter, restore
from shared.settings import Settings
from shared.store_rows import Prepared
from shared.stores import parse
from shared.tables import DEAD_COLUMNS

_SELECT = f"SELECT id::text, {', '.join(DEAD_COLUMNS)} FROM dead_letters"  # noqa: S608
_FIND = f"""SELECT * FROM ({_SELECT} WHERE ($1 = '' OR table_name = $1) AND ($2 = '' OR strpos(reason, $2) > 0)
    AND ($3::timestamptz IS NULL OR at >= $3) ORDER BY dead_letters.id DESC LIMIT $4) AS newest
    ORDER BY newest.id::bigint"""  # noqa: S608
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

T = TypeVar("T")


class TimescaleLetters:
    """See `shared.dead_letters.Letters`."""

    def __init__(self, store: TimescaleStore) -> None:
        self._store = store
        self.where = store.where

    def find(self, *, table: str = "", since_ns: int | None = None, reason: str = "", last: int = 0) -> list[Letter]:
        since = None if since_ns is None else _EPOCH + timedelta(microseconds=since_ns // 1000)

        async def work(connection: Any) -> list[Letter]:
            return [_letter(row) for row in await connection.fetch(_FIND, table, reason, since, last or None)]

        return self._done(work)

    def ids(self, table: str = "") -> list[str]:
        async def work(connection: Any) -> list[str]:
            sql = "SELECT id::text FROM dead_letters WHERE $1 = '' OR table_name = $1 ORDER BY dead_letters.id"
            return [row[0] for row in await connection.fetch(sql, table)]

        return self._done(work)

    def get(self, letter: str) -> Letter | None:
        async def work(connection: Any) -> Letter | None:
            return await _get(connection, letter)

        return self._done(work)

    def replace(self, letter: str, row: str) -> None:
        async def work(connection: Any) -> None:
            await connection.execute("UPDATE dead_letters SET row = $2 WHERE id = $1", _number(letter), row)

        self._done(work)

    def requeue(self, letter: str) -> Outcome | None:
        async def work(connection: Any) -> Outcome | None:
            held = await _get(connection, letter, " FOR UPDATE")
            return None if held is None else await _requeue(connection, held)

        return self._done(work)

    def drop(self, letters: Collection[str]) -> int:
        async def work(connection: Any) -> int:
            numbers = [number for number in map(_number, letters) if number is not None]
            done = await connection.execute("DELETE FROM dead_letters WHERE id = ANY($1::bigint[])", numbers)
            return int(done.split()[-1])

        return self._done(work)

    def _done(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """The result of a transaction."""

        async def whole() -> T:
            connection = await self._store._connected()
            await connection.execute(self._store._begin)
            result = await work(connection)
            await connection.execute("COMMIT")
            return result

        done: T = self._store._run(whole())
        return done

    def close(self) -> None:
        self._store.close()


async def _requeue(connection: Any, letter: Letter) -> Outcome:
    await connection.execute("SAVEPOINT letter")
    try:
        restored = restore(letter, FORM)
        dead = list(restored.dead)
        for rows in restored.prepared:
            dead += await _put(connection, rows)
        if restored.batch.gaps:
            await connection.execute(GAPS, *_columns(_gaps(restored.batch)))
        stored = counted(restored.prepared, len(dead) - len(restored.dead)) + len(restored.batch.gaps)
        if dead and not (letter.is_frame and stored):
            raise RowRejected(dead[0].reason)
    except RowRejected as error:
        await connection.execute("ROLLBACK TO SAVEPOINT letter")
        reason = str(error).replace("\0", "\ufffd")
        await connection.execute("UPDATE dead_letters SET reason = $2 WHERE id = $1", int(letter.id), reason)
        return Outcome(0, 0, reason)
    await connection.execute("DELETE FROM dead_letters WHERE id = $1", int(letter.id))
    if dead:
        await connection.execute(DEAD, *_columns([_buried(each) for each in dead]))
    return Outcome(stored, len(dead), "")


async def _put(connection: Any, rows: Prepared) -> list[DeadLetter]:
    if rows.table != "gaps":
        return await _insert(connection, rows, mend=False)
    try:
        await connection.execute(GAPS, *rows.rows.columns)
    except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, TypeError, OverflowError) as error:
        raise RowRejected(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    return []


async def _get(connection: Any, letter: str, lock: str = "") -> Letter | None:
    row = await connection.fetchrow(f"{_SELECT} WHERE id = $1{lock}", _number(letter))
    return _letter(row) if row else None


def _letter(row: Any) -> Letter:
    identity, at, *others = row
    return Letter(identity, at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"), *others)


def _number(letter: str) -> int | None:
    """The id as its column has it; None for a text that is none."""
    return int(letter) if letter.isdecimal() and len(letter) < 19 else None


def of(settings: Settings) -> TimescaleLetters:
    """The letters of the store of the settings, opened. Raises ConfigError, AuthError, StoreUnavailable."""
    url = parse(settings.tapeline.store)
    if url.scheme != "postgresql":
        raise ConfigError(f"{url.shown} is no PostgreSQL store")
    store = TimescaleStore(settings.tapeline.store, settings.timescale, threading.Event())
    store.open()
    return TimescaleLetters(store)
