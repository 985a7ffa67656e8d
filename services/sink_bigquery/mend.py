"""Rows that were computed again over complete history, beside those that are stored: see shared.batches.Batch.

They are loaded into a table of their own, and one statement appends those that are to replace a stored row, under a
higher revision. Writing the same again finds nothing to append.
"""

from __future__ import annotations

import contextlib
import datetime

from services.sink_bigquery.clients import Missing, Target, bigquery, call
from services.sink_bigquery.jobs import Jobs
from services.sink_bigquery.ledger import instant
from services.sink_bigquery.rows import Ready
from services.sink_bigquery.schema import fields_of
from services.sink_bigquery.tables import STORED_AT, Layout
from services.sink_bigquery.views import newest_rows
from shared.frames import FEATURE_COLUMNS, STATE_COLUMNS
from shared.tables import HISTORY_COLUMNS

_PROCESSING = frozenset(("revision", "timestamp_out", "latency_ms"))
_LEFT_HOURS = 24


def mend(jobs: Jobs, target: Target, name: str, rows: Ready) -> None:
    """Write one table of a mending batch by jobs of this name. Raises StoreUnavailable."""
    table = f"mending_{name.rpartition('-')[0].replace('-', '_')}_{rows.layout.name}"
    made = bigquery.Table(target.full(table), schema=fields_of(rows.layout))
    # What a process leaves that is killed here goes by itself.
    made.expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=_LEFT_HOURS)
    call(target, f"create {table}", jobs.client.create_table, made, exists_ok=True)
    jobs.load(f"{name}-new", table, rows.parquet(), schema=fields_of(rows.layout))
    since, until = rows.span_us()
    jobs.query(name, statement(target, rows.layout, table), [instant("since", since), instant("until", until)])
    with contextlib.suppress(Missing):
        call(target, f"drop {table}", jobs.client.delete_table, target.full(table))


def statement(target: Target, layout: Layout, source: str) -> str:
    """Append what replaces a stored row, or has none: as the other stores' upserts decide it."""
    candles = "trades" in layout.names
    uncompared = _PROCESSING | ({*FEATURE_COLUMNS, *STATE_COLUMNS} if candles else frozenset())
    values = {c: f"n.`{c}`" for c in layout.names}
    if candles:
        values |= {c: f"COALESCE(n.`{c}`, o.`{c}`)" for c in layout.names if c in HISTORY_COLUMNS}
    differs = " OR ".join(
        f"{value} IS DISTINCT FROM o.`{c}`"
        for c, value in values.items()
        if c not in uncompared and c not in layout.key
    )
    values["revision"] = (
        "CASE WHEN o.`revision` IS NULL THEN n.`revision` ELSE GREATEST(n.`revision`, o.`revision` + 1) END"
    )
    trades = "trades" if candles else "total_trades" if "total_trades" in layout.names else ""
    more = f" AND (n.`complete` OR n.`{trades}` >= o.`{trades}`)" if trades else ""
    time = f"`{layout.time}`"
    stored = newest_rows(target.named(layout.name), layout, filters=f"{time} >= @since AND {time} <= @until")
    columns = ", ".join(f"`{c}`" for c in (*layout.names, STORED_AT))
    chosen = ", ".join((*values.values(), f"n.{STORED_AT}"))
    same = " AND ".join(f"n.`{c}` = o.`{c}`" for c in layout.key)
    return (
        f"INSERT INTO {target.named(layout.name)} ({columns}) SELECT {chosen} FROM {target.named(source)} AS n "  # noqa: S608
        f"LEFT JOIN ({stored}) AS o ON {same} WHERE o.`revision` IS NULL "
        f"OR ((n.`complete` OR NOT o.`complete`){more} AND ({differs}))"
    )
