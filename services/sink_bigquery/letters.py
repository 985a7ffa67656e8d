"""The dead letters of a BigQuery store. See `shared.dead_letters`.

There is no transaction over two tables. A letter's row is written by a job that is named after the letter as it
stands, its reason included: whoever requeues it again, because a process was killed before the letter was deleted,
finds that job done. A letter that is refused gets another reason, and with it the name of another job.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import Any, TypeVar
from uuid import uuid4

from services.sink_bigquery.clients import BUFFERED, Missing, Refused, Target, bigquery, call, connect, target_of
from services.sink_bigquery.ledger import instant, instant_of, select, us_of
from services.sink_bigquery.method_load import Loads
from services.sink_bigquery.rows import FORM, Ready, letters, sound, text
from services.sink_bigquery.store import BigQueryStore
from services.sink_bigquery.tables import INSTANT, LAYOUTS
from services.sink_bigquery.views import newest_rows
from shared import faults
from shared.batches import DeadLetter
from shared.dead_letters import Outcome, counted
from shared.errors import ConfigError, RowRejected, StoreUnavailable
from shared.frames import iso
from shared.restore import Letter, restore
from shared.settings import Settings
from shared.tables import DEAD_COLUMNS, DEAD_KEY

DROPPED_AT_ONCE = 100
_LAYOUT = LAYOUTS["dead_letters"]
_ID = re.compile(r"([0-9a-f]{1,14})-[0-9a-f]{10}")
_ORDER = ("at", "bus", "topic", "partition", "seq", "stream_id", "table_name", "row_number")
# When a letter was buried (microseconds; queries by it look through one day's partition), and its key.
_Place = tuple[int, tuple[Any, ...]]
_T = TypeVar("_T")


class BigQueryLetters:
    """See `shared.dead_letters.Letters`. A letter's id is when it was buried, in hex, and a hash of its key."""

    def __init__(self, store: BigQueryStore) -> None:
        self._store, self._target = store, store.target
        self.where = store.target.where
        self._table = store.target.named("dead_letters")
        self._places: dict[str, _Place] = {}  # of the letters that were seen

    def find(self, *, table: str = "", since_ns: int | None = None, reason: str = "", last: int = 0) -> list[Letter]:
        tests, parameters = ["TRUE"], []
        if since_ns is not None:
            tests.append("`at` >= @since")
            parameters.append(instant("since", since_ns // 1000))
        if reason:
            tests.append("STRPOS(reason, @reason) > 0")
            parameters.append(bigquery.ScalarQueryParameter("reason", "STRING", reason))
        filters, more = _of_table(table)
        tail = f"WHERE {' AND '.join(tests)} ORDER BY {', '.join(f'`{c}` DESC' for c in _ORDER)}"
        tail += f" LIMIT {int(last)}" if last else ""
        return self._select(filters, [*parameters, *more], tail)[::-1]

    def ids(self, table: str = "") -> list[str]:
        return self._seen(*_of_table(table))

    def get(self, letter: str) -> Letter | None:
        place = self._place(letter)
        return None if place is None else next(iter(self._select(*_at([place]))), None)

    def replace(self, letter: str, row: str) -> None:
        self._set(letter, "row", row)

    def requeue(self, letter: str) -> Outcome | None:
        held = self.get(letter)
        return None if held is None else self._done(lambda loads: self._requeue(loads, held))

    def _requeue(self, loads: Loads, letter: Letter) -> Outcome:
        at_us = time.time_ns() // 1000
        try:
            restored = restore(letter, FORM)
            tables, dead = sound(restored.prepared, restored.batch, at_us)
            stored = counted(restored.prepared, len(dead)) + len(restored.batch.gaps)
            dead = restored.dead + dead
            _fits(letter, stored, dead)
            for rows in tables:
                refused = self._write(loads, letter, rows)
                stored, dead = stored - len(refused), dead + refused
            _fits(letter, stored, dead)
            if dead:
                loads.load(_name(loads, letter, "dead_letters"), letters(dead, at_us))
        except (RowRejected, Refused) as error:
            reason = text(str(error))
            if reason != letter.reason:
                self._set(letter.id, "reason", reason)
            return Outcome(0, 0, reason)
        self.drop([letter.id])
        return Outcome(stored, len(dead), "")

    def _write(self, loads: Loads, letter: Letter, rows: Ready) -> list[DeadLetter]:
        """Rows of a letter into their table; returns those that are refused. A frame's are loaded; a single row is
        not, for the loads of a day are counted, and the sink needs them."""
        name = _name(loads, letter, rows.layout.name)
        if letter.is_frame:
            return loads.load(name, rows)
        (values,) = zip(*rows.columns, strict=True)
        parameters = [
            bigquery.ScalarQueryParameter(
                f"p{i}", field.type, instant_of(value) if field.type == INSTANT and value is not None else value
            )
            for i, (field, value) in enumerate(zip(rows.layout.fields, values, strict=True))
        ]
        columns = ", ".join(f"`{field.name}`" for field in rows.layout.fields)
        marks = ", ".join(f"@{parameter.name}" for parameter in parameters)
        faults.point("bigquery:before-write")
        sql = f"INSERT INTO {self._target.named(rows.layout.name)} ({columns}) VALUES ({marks})"  # noqa: S608
        loads.jobs.query(name, sql, parameters)
        faults.point("bigquery:after-write")
        return []

    def drop(self, letters: Collection[str]) -> int:
        wanted = list(dict.fromkeys(letters))
        return sum(self._drop(wanted[i : i + DROPPED_AT_ONCE]) for i in range(0, len(wanted), DROPPED_AT_ONCE))

    def _drop(self, letters: Sequence[str]) -> int:
        places = [place for letter in letters if (place := self._place(letter)) is not None]
        if not places:
            return 0
        test, parameters = _at(places)
        gone = self._change(f"DELETE FROM {self._table} WHERE {test}", parameters)  # noqa: S608
        for letter in letters:
            self._places.pop(letter, None)
        return min(gone, len(places))  # of one that was buried twice both rows go

    def close(self) -> None:
        self._store.close()

    # -- statements ------------------------------------------------------------------------------

    def _select(self, filters: str, parameters: list[Any], tail: str = "") -> list[Letter]:
        """`filters` must not tell rows of one key apart; `tail` comes behind the letters."""
        rows = newest_rows(self._table, _LAYOUT, DEAD_COLUMNS, filters)
        found = []
        for row in self._rows(f"SELECT * FROM ({rows}) {tail}", parameters):  # noqa: S608
            values = {c: row[c] for c in DEAD_COLUMNS} | {"at": iso(us_of(row["at"]) * 1000)[:26] + "Z"}
            found.append(Letter(self._see(row), **values))
        return found

    def _seen(self, filters: str, parameters: list[Any]) -> list[str]:
        """The ids of letters, oldest first."""
        rows = newest_rows(self._table, _LAYOUT, _ORDER, filters)
        sql = f"SELECT * FROM ({rows}) ORDER BY {', '.join(f'`{c}`' for c in _ORDER)}"  # noqa: S608
        return [self._see(row) for row in self._rows(sql, parameters)]

    def _see(self, row: Any) -> str:
        at_us, key = us_of(row["at"]), tuple(row[c] for c in DEAD_KEY)
        letter = f"{at_us:x}-{blake2b(repr(key).encode(), digest_size=5).hexdigest()}"
        self._places[letter] = (at_us, key)
        return letter

    def _place(self, letter: str) -> _Place | None:
        """Where a letter is; None for an id that is none."""
        match = _ID.fullmatch(letter)
        if match and letter not in self._places:
            self._seen("`at` = @at", [instant("at", int(match[1], 16))])
        return self._places.get(letter)

    def _set(self, letter: str, column: str, value: str) -> None:
        place = self._place(letter)
        if place is not None:
            test, parameters = _at([place])
            parameters.append(bigquery.ScalarQueryParameter("value", "STRING", value))
            self._change(f"UPDATE {self._table} SET `{column}` = @value WHERE {test}", parameters)  # noqa: S608

    def _change(self, sql: str, parameters: list[Any]) -> int:
        """Rows changed."""
        job = self._done(lambda loads: loads.jobs.query(loads.name("", 0, f"letters_{uuid4().hex}"), sql, parameters))
        return int(job.num_dml_affected_rows or 0)

    def _rows(self, sql: str, parameters: list[Any]) -> list[Any]:
        return self._done(lambda loads: select(loads.jobs.client, self._target, sql, parameters))

    def _done(self, work: Callable[[Loads], _T]) -> _T:
        try:
            return work(self._store._ready())
        except Missing as error:
            raise self._store._lost(error) from None
        except StoreUnavailable as error:
            if BUFFERED not in str(error):
                raise
            raise StoreUnavailable(
                f"{self.where}: letters that insert_all wrote cannot be changed for 30 to 90 minutes after: try again "
                "then"
            ) from None


def _fits(letter: Letter, stored: int, dead: Sequence[DeadLetter]) -> None:
    """Raises RowRejected for a letter that stays: a row that is refused, a frame all rows of which are."""
    if dead and not (letter.is_frame and stored):
        raise RowRejected(dead[0].reason)


def _name(loads: Loads, letter: Letter, table: str) -> str:
    """Of the job that writes a letter's rows of a table. No batch has the number 0."""
    digest = blake2b(repr(letter).encode("utf-8", "replace"), digest_size=16).hexdigest()
    return loads.name(letter.bus, 0, f"letter_{digest}_{table}")


def _of_table(table: str) -> tuple[str, list[Any]]:
    return ("table_name = @table", [bigquery.ScalarQueryParameter("table", "STRING", table)]) if table else ("", [])


def _at(places: Sequence[_Place]) -> tuple[str, list[Any]]:
    """The test for letters, with its parameters: all rows of their keys, of which the first counts."""
    tests, parameters = [], []
    for i, (at_us, key) in enumerate(places):
        tests.append(" AND ".join((f"`at` >= @at{i}", *(f"`{c}` = @{c}{i}" for c in DEAD_KEY))))
        parameters.append(instant(f"at{i}", at_us))
        parameters += [
            bigquery.ScalarQueryParameter(f"{c}{i}", _LAYOUT.type_of(c), value)
            for c, value in zip(DEAD_KEY, key, strict=True)
        ]
    return " OR ".join(f"({test})" for test in tests), parameters


def of(settings: Settings) -> BigQueryLetters:
    """The letters of the store of the settings, opened. Raises ConfigError, AuthError, StoreUnavailable."""
    target = target_of(settings)
    _exists(target)
    store = BigQueryStore(target, threading.Event())
    store.open()
    return BigQueryLetters(store)


def _exists(target: Target) -> None:
    client = connect(target)
    try:
        call(target, "look at the dataset", client.get_dataset, target.dataset)
    except Missing:
        raise ConfigError(f"{target.where} does not exist: name the store in TAPELINE_STORE") from None
    finally:
        client.close()
