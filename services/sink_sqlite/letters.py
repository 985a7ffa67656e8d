"""The dead letters of a SQLite store. See `shared.dead_letters`."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection

import numpy as np

from services.sink_sqlite.store import FORM, SqliteStore, bury
from shared.batches import iso_texts
from shared.dead_letters import Outcome, counted
from shared.errors import ConfigError, RowRejected
from shared.restore import Letter, restore
from shared.settings import Settings
from shared.stores import parse
from shared.tables import DEAD_COLUMNS

# A sink writes at the same time: its transactions are waited for.
BUSY_SECONDS = 30.0
_SELECT = f"SELECT CAST(id AS TEXT), {', '.join(DEAD_COLUMNS)} FROM dead_letters"  # noqa: S608


class SqliteLetters:
    """See `shared.dead_letters.Letters`."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.where = store.where

    def find(self, *, table: str = "", since_ns: int | None = None, reason: str = "", last: int = 0) -> list[Letter]:
        tests = ["(? = '' OR table_name = ?)", "(? = '' OR instr(reason, ?))"]
        values: list[object] = [table, table, reason, reason]
        if since_ns is not None:
            tests.append("at >= ?")
            values += iso_texts(np.array([since_ns], np.int64), "us")
        sql = f"{_SELECT} WHERE {' AND '.join(tests)} ORDER BY id DESC LIMIT ?"
        with self._store.transaction() as connection:
            return [Letter(*row) for row in connection.execute(sql, (*values, last or -1))][::-1]

    def ids(self, table: str = "") -> list[str]:
        sql = "SELECT CAST(id AS TEXT) FROM dead_letters WHERE ? = '' OR table_name = ? ORDER BY id"
        with self._store.transaction() as connection:
            return [found for (found,) in connection.execute(sql, (table, table))]

    def get(self, letter: str) -> Letter | None:
        with self._store.transaction() as connection:
            return _get(connection, letter)

    def replace(self, letter: str, row: str) -> None:
        with self._store.transaction() as connection:
            connection.execute("UPDATE dead_letters SET row = ? WHERE id = ?", (row, letter))

    def requeue(self, letter: str) -> Outcome | None:
        with self._store.transaction() as connection:
            held = _get(connection, letter)
            return None if held is None else self._requeue(connection, held)

    def _requeue(self, connection: sqlite3.Connection, letter: Letter) -> Outcome:
        connection.execute("SAVEPOINT letter")
        try:
            restored = restore(letter, FORM)
            dead = restored.dead + self._store.put(restored.prepared, restored.batch)
            stored = counted(restored.prepared, len(dead) - len(restored.dead)) + len(restored.batch.gaps)
            if dead and not (letter.is_frame and stored):
                raise RowRejected(dead[0].reason)
        except RowRejected as error:
            connection.execute("ROLLBACK TO letter")
            connection.execute("UPDATE dead_letters SET reason = ? WHERE id = ?", (str(error), letter.id))
            return Outcome(0, 0, str(error))
        connection.execute("DELETE FROM dead_letters WHERE id = ?", (letter.id,))
        bury(connection, dead)
        return Outcome(stored, len(dead), "")

    def drop(self, letters: Collection[str]) -> int:
        with self._store.transaction() as connection:
            return sum(
                connection.execute("DELETE FROM dead_letters WHERE id = ?", (letter,)).rowcount for letter in letters
            )

    def close(self) -> None:
        self._store.close()


def _get(connection: sqlite3.Connection, letter: str) -> Letter | None:
    row = connection.execute(f"{_SELECT} WHERE id = ?", (letter,)).fetchone()
    return Letter(*row) if row else None


def of(settings: Settings) -> SqliteLetters:
    """The letters of the store of the settings, opened. Raises ConfigError for a file that is not there."""
    url = parse(settings.tapeline.store)
    if not url.path.exists():
        raise ConfigError(f"SQLite {url.path} does not exist: name the store in TAPELINE_STORE")
    store = SqliteStore(url.path, BUSY_SECONDS, ohlc_bars=settings.sink.ohlc_bars)
    store.open()
    return SqliteLetters(store)
