"""The statements that the PostgreSQL store writes with, made from the tables' columns once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from services.sink_timescale.schema import migrations
from shared.frames import FEATURE_COLUMNS, STATE_COLUMNS
from shared.tables import (
    DEAD_COLUMNS,
    GAP_COLUMNS,
    GAP_KEY,
    HISTORY_COLUMNS,
    LATE_COLUMNS,
    LATE_KEY,
    MESSAGE_TABLES,
    PLACE_COLUMNS,
    TABLES,
    TICK_TABLES,
    MessageTable,
    Table,
)

_MESSAGES = [table for tables in MESSAGE_TABLES.values() for table in tables]
_PROCESSING = frozenset(("revision", "timestamp_out", "latency_ms"))
TICK_KEY = (*PLACE_COLUMNS, "timestamp")


class Into(NamedTuple):
    """How rows get into a table: through a temporary one, `create`d where the session has none.

    A pooler may hand over a session with the one of an older program in it, so its name says the schema's version.
    `write` puts in what lies there, `mend` what was computed again ("" where that is the same).
    """

    table: str
    columns: tuple[str, ...]
    temporary: str
    create: str
    write: str
    mend: str = ""


def _into(table: str, columns: tuple[str, ...], key: Sequence[str], where: str = "", mend: str = "") -> Into:
    temporary = f"tapeline_{migrations()[-1].version}_{table}"
    sets = ", ".join(f'"{c}" = excluded."{c}"' for c in columns if c not in key)
    create = (
        f"CREATE TEMPORARY TABLE IF NOT EXISTS {temporary} ON COMMIT DELETE ROWS AS "  # noqa: S608
        f"SELECT {_names(columns)} FROM {table} WITH NO DATA"
    )
    insert = (
        f"INSERT INTO {table} ({_names(columns)}) SELECT {_names(columns)} FROM pg_temp.{temporary} "  # noqa: S608
        f"ON CONFLICT ({_names(key)}) DO UPDATE SET"
    )
    return Into(table, columns, temporary, create, f"{insert} {sets} {where}", f"{insert} {mend}" if mend else "")


def _names(columns: Sequence[str]) -> str:
    return ", ".join(f'"{c}"' for c in columns)


def _mend_candles(table: Table) -> str:
    """Features and states, which a tape that begins later knows less of, are no reason to write."""
    values = {
        c: f"coalesce(excluded.{c}, {table.name}.{c})" if c in HISTORY_COLUMNS else f"excluded.{c}"
        for c in table.columns
        if c not in table.key
    }
    return _mend(table.name, values, _PROCESSING | {*FEATURE_COLUMNS, *STATE_COLUMNS}, "trades")


def _mend_messages(table: MessageTable) -> str:
    values = {c: f"excluded.{c}" for c in table.names if c not in table.key}
    return _mend(table.name, values, _PROCESSING, "total_trades" if "total_trades" in table.names else "")


def _mend(name: str, values: dict[str, str], uncompared: frozenset[str], trades: str) -> str:
    """See Batch.mend: the same again changes nothing, not even a revision.

    A part of an incomplete row does not replace more of it; `trades` is the column that tells, if there is one.
    """
    differs = " OR ".join(f"{value} IS DISTINCT FROM {name}.{c}" for c, value in values.items() if c not in uncompared)
    values = values | {"revision": f"greatest(excluded.revision, {name}.revision + 1)"}
    sets = ", ".join(f"{c} = {value}" for c, value in values.items())
    more = f"AND (excluded.complete OR excluded.{trades} >= {name}.{trades}) " if trades else ""
    return f"{sets} WHERE excluded.complete >= {name}.complete {more}AND ({differs})"


INTO = {
    into.table: into
    for into in (
        *(
            _into(t.name, t.columns, t.key, f"WHERE excluded.revision >= {t.name}.revision", _mend_candles(t))
            for t in TABLES.values()
        ),
        *(_into(t.name, t.columns, TICK_KEY) for t in TICK_TABLES.values()),
        *(
            _into(
                t.name, t.names, t.key, f"WHERE excluded.{t.order} >= {t.name}.{t.order}",
                _mend_messages(t) if t.order == "revision" else "",
            )
            for t in _MESSAGES
        ),
        _into("late_trades", LATE_COLUMNS, LATE_KEY),
    )
}  # fmt: skip
WRITTEN = (*INTO, "gaps", "dead_letters", "sink_cursors")

CURSORS = "SELECT bus, topic, partition, seq, stream_id FROM sink_cursors"
_KEYS = "unnest($1::text[], $2::text[], $3::integer[])"
# In one order, so that two sinks wait for each other rather than lock each other out.
LOCK = f"""{CURSORS} WHERE (bus, topic, partition) IN (SELECT * FROM {_KEYS})
    ORDER BY bus, topic, partition FOR UPDATE"""  # noqa: S608
_NEW = "unnest($1::text[], $2::text[], $3::integer[], $4::bigint[], $5::text[]) AS n (bus, topic, partition, seq, id)"
ADVANCE = f"""UPDATE sink_cursors AS c SET seq = n.seq, stream_id = n.id FROM {_NEW}
    WHERE c.bus = n.bus AND c.topic = n.topic AND c.partition = n.partition"""  # noqa: S608
BEGIN_AT = f"""INSERT INTO sink_cursors (bus, topic, partition, seq, stream_id)
    SELECT n.bus, n.topic, n.partition, n.seq, n.id FROM {_NEW} ON CONFLICT DO NOTHING"""  # noqa: S608
GAPS = f"""INSERT INTO gaps ({_names(GAP_COLUMNS)})
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::timestamptz[], $6::timestamptz[],
        $7::text[])
    ON CONFLICT ({_names(GAP_KEY)}) DO UPDATE SET {
    ", ".join(f'"{c}" = excluded."{c}"' for c in GAP_COLUMNS if c not in GAP_KEY)
}"""  # noqa: S608
DEAD = f"""INSERT INTO dead_letters ({_names(DEAD_COLUMNS)})
    SELECT now(), * FROM unnest($1::text[], $2::text[], $3::integer[], $4::bigint[], $5::text[], $6::text[],
        $7::integer[], $8::text[], $9::text[])
    ON CONFLICT DO NOTHING"""  # noqa: S608

FORGET_LATE = "DELETE FROM late_trades WHERE bus = $1 AND partition = $2 AND bus_seq >= $3"
FORGET_DEAD = "DELETE FROM dead_letters WHERE bus = $1 AND partition = $2 AND seq >= $3 AND topic = $4"
FORGET_TICKS = [
    f"DELETE FROM {t.name} WHERE bus = $1 AND partition = $2 AND (entry_ms, entry_seq) > ($3, $4)"  # noqa: S608
    for t in TICK_TABLES.values()
]
FORGET_DEAD_BEHIND = """DELETE FROM dead_letters WHERE bus = $1 AND partition = $2 AND topic = $5
    AND (split_part(stream_id, '-', 1)::numeric, split_part(stream_id, '-', 2)::numeric) > ($3, $4)"""
