"""Batches by the older tabledata.insertAll: rows are to be seen at once, exactly once as a rule.

A row's insertId is its batch and its number in it, by which BigQuery leaves out what came within about a minute
before: a best effort, no promise. What it lets through twice the views show once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from services.sink_bigquery.clients import CALL_SECONDS, Refused, Target, errors
from services.sink_bigquery.ledger import Announced
from services.sink_bigquery.rows import Ready, json_row, letters, one, size_of
from services.sink_bigquery.tables import LEDGER
from shared import faults
from shared.batches import DeadLetter
from shared.errors import StoreUnavailable

# BigQuery takes 10 MB and recommends 500 rows a request.
REQUEST_ROWS, REQUEST_BYTES = 500, 8 << 20
LEAST_BYTES = 1024  # of a row, as it is billed
# Not about the row: the table, or a column of it, is not known everywhere yet.
_NOT_YET = ("no such field", "not found")
Spend = Callable[[str, int, int], None]


class Inserts:
    """Announcements and batches by insertAll. See method_load.Loads for what is alike."""

    def __init__(self, client: Any, target: Target, stop: threading.Event, spend: Spend) -> None:
        self._client, self._target, self._stop, self._spend = client, target, stop, spend

    def announce(self, entry: Announced) -> None:
        """Nobody is fenced by it."""
        faults.point("bigquery:before-announce")
        if self._table(entry, one(LEDGER, entry.row())):
            raise Refused(f"{self._target.where} refuses an announcement")
        faults.point("bigquery:after-announce")

    def write(self, entry: Announced, tables: list[Ready], dead: list[DeadLetter]) -> int:
        """All rows of an announced batch; returns the dead letters. Raises StoreUnavailable."""
        for rows in tables:
            dead = dead + self._table(entry, rows)
        if dead:
            self._table(entry, letters(dead, entry.at_us))
        return len(dead)

    def _table(self, entry: Announced, rows: Ready) -> list[DeadLetter]:
        dead: list[DeadLetter] = []
        table = rows.layout.name
        made = [json_row(values, rows.layout) for values in rows.values()]
        for begin, end in _requests(made):
            if self._stop.is_set():
                raise StoreUnavailable("stopped between two requests; the next start writes the batch again")
            left = dict(enumerate(made[begin:end], begin))
            while left:
                faults.point("bigquery:before-write")
                refused = self._insert(table, left, entry)
                faults.point("bigquery:after-write")
                if not refused:
                    break
                if rows.letter is None:
                    raise Refused(f"{self._target.where} refuses a row of {table}: {next(iter(refused.values()))}")
                for i, reason in refused.items():
                    dead.append(rows.letter(i, reason))
                    del left[i]  # and the others, which were held back for it, once more
            self._spend(table, len(left), sum(max(LEAST_BYTES, size_of(row)) for row in left.values()))
        return dead

    def _insert(self, table: str, rows: dict[int, dict[str, Any]], entry: Announced) -> dict[int, str]:
        """Insert all of them or none; what is wrong with those that are refused."""
        index = list(rows)
        ids = [f"{entry.bus}:{entry.n}:{table}:{i}" for i in index]
        with errors(self._target, f"insert into {table}"):
            told = self._client.insert_rows_json(
                self._target.full(table), list(rows.values()), row_ids=ids, retry=None, timeout=CALL_SECONDS
            )
        refused: dict[int, str] = {}
        for row in told:
            faults_of = [e for e in row.get("errors", ()) if e.get("reason") != "stopped"]
            if not faults_of:
                continue
            reason = "; ".join(f"{e.get('reason')}: {e.get('message') or e.get('debugInfo') or ''}" for e in faults_of)
            if any(text in reason.lower() for text in _NOT_YET) or any(e.get("reason") != "invalid" for e in faults_of):
                raise StoreUnavailable(f"{self._target.where} does not take rows of {table} now ({reason[:200]})")
            refused[index[int(row["index"])]] = reason
        if told and not refused:
            raise StoreUnavailable(f"{self._target.where} held back rows of {table} and does not say why")
        return refused


def _requests(rows: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    begin, size = 0, 0
    for i, row in enumerate(rows):
        more = size_of(row)
        if i > begin and (i - begin == REQUEST_ROWS or size + more > REQUEST_BYTES):
            yield begin, i
            begin, size = i, 0
        size += more
    if rows:
        yield begin, len(rows)
