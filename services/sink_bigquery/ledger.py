"""The announcements: what makes up for the transaction that BigQuery does not have.

Batch n of a bus is announced as a row of `sink_batches` before any of it is written, with the cursors that it leads
to. Only one announcement of each n can be: by a job whose name holds the number, or on a stream that its session
alone writes (offset n - base - 1), which whoever takes over finalizes first. So the newest announcement of a bus
says where the store is, but for whether that very batch was finished: it is written again, under the same number, and
what of it is there stays as it is (see method_load, method_write).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from services.sink_bigquery.clients import Target, bigquery, errors
from services.sink_bigquery.tables import INSTANT, LEDGER, LEDGER_LAYOUT, STORED_AT
from shared.batches import Batch, Cursor, CursorKey

LOAD, STREAM, INSERT = "load", "storage_write", "insert_all"
# What a session on streams did not finish, written to its end by jobs.
REST = "rest"
# The start of a session on streams (or of insertAll): no rows, but a number that is nobody else's any more.
SESSION = "session"
_EPOCH = datetime(1970, 1, 1)


class Part(NamedTuple):
    """What a batch holds for one table: rows, and the stream and offset that they are to be at (empty: none)."""

    rows: int
    stream: str = ""
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Announced:
    """An announcement. `at_us`: its time, which every row of the batch bears, however often it is written.

    `begins`: the cursors before the batch of the streams in it (none where it is the first of a stream);
    `ends`: all cursors of the bus after it. `stream`, `base`: the stream of its session, and the session's own n.
    """

    bus: str
    n: int
    at_us: int
    method: str
    writer: str
    stream: str = ""
    base: int = 0
    begins: Mapping[CursorKey, Cursor | None] = field(default_factory=dict)
    ends: Mapping[CursorKey, Cursor] = field(default_factory=dict)
    tables: Mapping[str, Part] = field(default_factory=dict)

    @property
    def before(self) -> dict[CursorKey, Cursor]:
        """All cursors before the batch."""
        found = {key: cursor for key, cursor in self.ends.items() if key not in self.begins}
        return found | {key: cursor for key, cursor in self.begins.items() if cursor is not None}

    @property
    def changed(self) -> dict[CursorKey, Cursor]:
        """The cursors that the batch sets."""
        return {key: self.ends[key] for key in self.begins}

    def is_of(self, batch: Batch) -> bool:
        """Whether this announces that very batch."""
        return bool(self.begins) and self.changed == batch.cursors

    def row(self) -> dict[str, Any]:
        """Its row of `sink_batches`."""
        return {
            "bus": self.bus,
            "n": self.n,
            "method": self.method,
            "writer": self.writer,
            "stream": self.stream or None,
            "base": self.base,
            "begins": _text(self.begins),
            "ends": _text(self.ends),
            "tables": json.dumps({name: list(part) for name, part in self.tables.items()}),
            STORED_AT: self.at_us,
        }


def next_at(newest: Announced | None) -> int:
    """The time of a new announcement: later than the last one, even if the clock was set back."""
    return max(time.time_ns() // 1000, newest.at_us + 1 if newest else 0)


def newest(client: Any, target: Target, bus: str = "") -> dict[str, Announced]:
    """The newest announcement of each bus, or of one. Raises StoreUnavailable, Missing."""
    table = target.named(LEDGER)
    columns = ", ".join(f"a.`{f.name}` AS `{f.name}`" for f in LEDGER_LAYOUT.fields)
    only = " WHERE a.bus = @bus" if bus else ""
    sql = (
        f"SELECT {columns} FROM {table} AS a JOIN (SELECT bus, MAX(n) AS n FROM {table} GROUP BY bus) AS b "  # noqa: S608
        f"ON a.bus = b.bus AND a.n = b.n{only}"
    )
    parameters = [bigquery.ScalarQueryParameter("bus", "STRING", bus)] if bus else []
    return {found.bus: found for found in map(_announced, select(client, target, sql, parameters))}


def held(client: Any, target: Target, table: str, at_us: int, time_column: str, span_us: tuple[int, int]) -> int:
    """Rows of one batch in a table. `span_us`: their times, so that few partitions are looked through."""
    sql = (
        f"SELECT COUNT(*) AS held FROM {target.named(table)} WHERE {STORED_AT} = @at "  # noqa: S608
        f"AND `{time_column}` >= @since AND `{time_column}` <= @until"
    )
    values = {"at": at_us, "since": span_us[0], "until": span_us[1]}
    return int(select(client, target, sql, [instant(name, us) for name, us in values.items()])[0]["held"])


def refused(client: Any, target: Target, table: str, at_us: int) -> set[tuple[str, int]]:
    """(stream id, row) of what is in the dead letters of a batch's table."""
    sql = (
        f"SELECT stream_id, row_number FROM {target.named('dead_letters')} "  # noqa: S608
        f"WHERE {STORED_AT} = @at AND `at` = @at AND table_name = @table"
    )
    parameters = [instant("at", at_us), bigquery.ScalarQueryParameter("table", "STRING", table)]
    return {(str(row["stream_id"]), int(row["row_number"])) for row in select(client, target, sql, parameters)}


def select(client: Any, target: Target, sql: str, parameters: list[Any]) -> list[Any]:
    """The rows of a query. Raises what `clients.errors` does."""
    with errors(target, "query", "bigquery.jobs.create and bigquery.tables.getData"):
        config = bigquery.QueryJobConfig(query_parameters=parameters, use_query_cache=False)
        job = client.query(sql, job_config=config, retry=None, job_retry=None, timeout=60.0)
        return list(job.result(retry=None, timeout=120.0))


def instant(name: str, us: int) -> Any:
    """A query parameter."""
    return bigquery.ScalarQueryParameter(name, INSTANT, instant_of(us))


def instant_of(us: int) -> str:
    """Microseconds as the text of a TIMESTAMP."""
    whole, part = divmod(us, 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{part:06}Z"


def us_of(value: Any) -> int:
    """Microseconds of a TIMESTAMP as the client gives it."""
    since = value.replace(tzinfo=None) - _EPOCH
    return int((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds)


def _announced(row: Any) -> Announced:
    bus = str(row["bus"])
    tables = {name: Part(*part) for name, part in msgspec.json.decode(row["tables"] or b"{}").items()}
    ends = {key: cursor for key, cursor in _cursors(bus, row["ends"]).items() if cursor is not None}
    return Announced(
        bus, int(row["n"]), us_of(row[STORED_AT]), str(row["method"]), str(row["writer"]), row["stream"] or "",
        int(row["base"] or 0), _cursors(bus, row["begins"]), ends, tables,
    )  # fmt: skip


def _text(cursors: Mapping[CursorKey, Cursor | None]) -> str:
    named = {f"{topic}:{partition}": cursor for (_, topic, partition), cursor in cursors.items()}
    return json.dumps({name: list(named[name] or ()) for name in sorted(named)})


def _cursors(bus: str, text: str | None) -> dict[CursorKey, Cursor | None]:
    out: dict[CursorKey, Cursor | None] = {}
    for name, value in msgspec.json.decode(text or "{}").items():
        topic, _, partition = name.rpartition(":")
        out[bus, topic, int(partition)] = Cursor(int(value[0]), str(value[1])) if value else None
    return out
