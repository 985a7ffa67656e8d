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
JSON = frozenset(("bids", "asks", *(c.name for table in _MESSAGES for c in table.columns if c.sort == "json")))


class Into(NamedTuple):
    """How rows get into a table: through a temporary one, `create`d where the session has none.

    A pooler may hand over a session with the one of an older program in it, so its name says the schema's version.
    `write` puts in what lies there, `mend` what was computed again. `singly` is for rows of which some are refused.
    """

    table: str
    columns: tuple[str, ...]
    temporary: str
    create: str
    write: str
    mend: str
    singly: Singly


class Singly(NamedTuple):
    """The same row by row, in the order of `n`: `create`, copy (n and the columns), `write` or `mend`, and `refused`
    gives what the server did not take: n and the reason."""

    temporary: str
    create: str
    columns: tuple[str, ...]
    write: str
    mend: str
    refused: str


def _into(table: str, columns: tuple[str, ...], key: Sequence[str], where: str = "", mend: str = "") -> Into:
    temporary = f"tapeline_{migrations()[-1].version}_{table}"
    single = f"{temporary}_single"
    names = ", ".join(f'"{c}"' for c in columns)
    # As text until it is put in: text that is no JSON is then refused with its row, not while it is copied.
    texts = ", ".join(f'"{c}"::text AS "{c}"' if c in JSON else f'"{c}"' for c in columns)
    values = ", ".join(f'"{c}"::jsonb' if c in JSON else f'"{c}"' for c in columns)
    sets = ", ".join(f'"{c}" = excluded."{c}"' for c in columns if c not in key)

    def put(source: str, sets: str) -> str:
        into = f"INSERT INTO {table} ({names}) SELECT {values} FROM pg_temp.{source}"  # noqa: S608
        return f"{into} ON CONFLICT ({_names(key)}) DO UPDATE SET {sets}"

    write, mend = f"{sets} {where}", mend or f"{sets} {where}"
    return Into(
        table, columns, temporary,
        f"CREATE TEMPORARY TABLE IF NOT EXISTS {temporary} ON COMMIT DELETE ROWS AS "  # noqa: S608
        f"SELECT {texts} FROM {table} WITH NO DATA",
        put(temporary, write), put(temporary, mend),
        Singly(
            single,
            f"DROP TABLE IF EXISTS pg_temp.{single}; CREATE TEMPORARY TABLE {single} ON COMMIT DROP AS "  # noqa: S608
            f"SELECT 0 AS _n, {texts}, ''::text AS _reason FROM {table} WITH NO DATA",
            ("_n", *columns),
            _one_by_one(single, put(f"{single} WHERE ctid = here.at", write)),
            _one_by_one(single, put(f"{single} WHERE ctid = here.at", mend)),
            f"SELECT _n, _reason FROM pg_temp.{single} WHERE _reason <> '' ORDER BY _n",  # noqa: S608
        ),
    )  # fmt: skip


def _one_by_one(single: str, put: str) -> str:
    """A row that the server refuses undoes only itself. The classes are those of _REFUSED in the store."""
    return f"""DO $$
        DECLARE here record;
        BEGIN
            FOR here IN SELECT ctid AS at FROM pg_temp.{single} ORDER BY _n LOOP
                BEGIN
                    {put};
                EXCEPTION WHEN data_exception OR integrity_constraint_violation OR program_limit_exceeded THEN
                    UPDATE pg_temp.{single} SET _reason = SQLERRM || ' (SQLSTATE ' || SQLSTATE || ')'
                    WHERE ctid = here.at;
                END;
            END LOOP;
        END $$"""  # noqa: S608


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

# Types of a table's columns.
KINDS = """SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
    WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped"""
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
