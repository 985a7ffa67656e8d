"""Batches as load jobs: free, whole or not at all, and by their names never twice.

A table of a batch is one Parquet file, loaded by the job of that batch and table. Rows that a backfill computed again
(`mend`) are compared with the stored ones first, see mend.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import blake2b

from services.sink_bigquery.clients import Missing, Refused, Target
from services.sink_bigquery.jobs import Jobs, together
from services.sink_bigquery.ledger import REST, Announced, held, refused
from services.sink_bigquery.mend import mend
from services.sink_bigquery.rows import Ready, letters, one
from services.sink_bigquery.tables import LEDGER
from shared import faults
from shared.batches import DeadLetter
from shared.errors import Fenced

log = logging.getLogger(__name__)

Spend = Callable[[str, int, int], None]


class Loads:
    """Writes announcements and batches by jobs. `born`: of the ledger's table, milliseconds. `spend`: see costs.py."""

    def __init__(self, jobs: Jobs, target: Target, born: int, spend: Spend) -> None:
        self.jobs, self._target, self._born, self._spend = jobs, target, born, spend

    def name(self, bus: str, n: int, what: str) -> str:
        """Of a job, without the number of the attempt."""
        digest = blake2b(bus.encode(), digest_size=6).hexdigest()
        return f"tapeline-{self._target.dataset}-{self._born:x}-{digest}-{n}-{what}"

    def announce(self, entry: Announced) -> None:
        """Raises Fenced when another writer has announced a batch of that number."""
        rows = one(LEDGER, entry.row())
        faults.point("bigquery:before-announce")
        job = self.jobs.load(self.name(entry.bus, entry.n, LEDGER), LEDGER, rows.parquet())
        faults.point("bigquery:after-announce")
        if not self.jobs.ours(job):
            raise Fenced(f"{self._target.where}: another sink has announced batch {entry.n} of this bus")

    def write(self, entry: Announced, tables: list[Ready], dead: list[DeadLetter], *, mending: bool) -> int:
        """All rows of an announced batch; returns the dead letters. Raises StoreUnavailable, Fenced."""
        late: list[DeadLetter] = []
        tasks = [lambda rows=rows: late.extend(self._table(entry, rows, mending)) for rows in tables]
        together(tasks)
        dead = dead + late
        if dead:
            self._table(entry, letters(dead, entry.at_us), mending=False)
        return len(dead)

    def close_off(self, entry: Announced) -> None:
        """Nobody writes anything of this batch any more."""
        for table in entry.tables:
            try:
                self.jobs.close_off(self.name(entry.bus, entry.n, table))
            except (Refused, Missing) as error:
                log.debug("a job of a batch that was given up had failed: %s", error)

    def _table(self, entry: Announced, rows: Ready, mending: bool) -> list[DeadLetter]:
        table = rows.layout.name
        if entry.method == REST:
            rows = self._rest(entry, rows)
        if not len(rows):
            return []
        if mending and rows.layout.order == "revision":
            faults.point("bigquery:before-write")
            mend(self.jobs, self._target, self.name(entry.bus, entry.n, table), rows)
            faults.point("bigquery:after-write")
            self._spend(table, len(rows), 0)
            return []
        return self.load(self.name(entry.bus, entry.n, table), rows)

    def _rest(self, entry: Announced, rows: Ready) -> Ready:
        """What is missing of a batch that a session on streams has begun: it appends in order."""
        client, table = self.jobs.client, rows.layout.name
        if rows.letter is not None:
            buried = refused(client, self._target, table, entry.at_us)
            if buried:
                places = [rows.letter(i, "") for i in range(len(rows))]
                rows = rows.only([i for i, d in enumerate(places) if (d.source.id, d.row) not in buried])
        there = held(client, self._target, table, entry.at_us, rows.layout.time, rows.span_us()) if len(rows) else 0
        return rows.part(there, len(rows))

    def load(self, name: str, rows: Ready) -> list[DeadLetter]:
        """Load rows; of those that are refused half by half, until the row is found that is to blame."""
        data = rows.parquet()
        try:
            faults.point("bigquery:before-write")
            self.jobs.load(name, rows.layout.name, data)
            faults.point("bigquery:after-write")
        except Refused as error:
            if rows.letter is None:
                raise
            if len(rows) == 1:
                return [rows.letter(0, str(error))]
            middle = len(rows) // 2
            halves = (rows.part(0, middle), rows.part(middle, len(rows)))
            return [letter for i, half in enumerate(halves) for letter in self.load(f"{name}_{i}", half)]
        self._spend(rows.layout.name, len(rows), len(data))
        return []
