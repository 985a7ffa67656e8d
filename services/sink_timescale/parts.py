"""What there is to do for each feature of the PostgreSQL store: statements by what they are about.

A part looks and changes nothing; it names only what is not as the settings want it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, NamedTuple

from services.sink_timescale.rollups import LEAST_BUCKETS, ROLLUPS, SOURCE, continuous, interval, plain
from services.sink_timescale.schema import migrations
from services.sink_timescale.server import Server
from shared.settings import Timescale
from shared.tables import MESSAGE_TABLES, PLACE_COLUMNS, TABLES, TICK_TABLES

_NAMES = re.compile(r"^CREATE (?:OR REPLACE )?(?:TABLE|VIEW) (?:IF NOT EXISTS )?(\w+)", re.MULTILINE)


class Layout(NamedTuple):
    """How a table becomes a hypertable: its time column, and the columnstore's segments and order."""

    time: str
    segments: tuple[str, ...]
    order: tuple[str, ...]
    ticks: bool = False


def _layout(time: str, key: tuple[str, ...], segments: tuple[str, ...], *, ticks: bool = False) -> Layout:
    # All of the key is in one or the other, so that an upsert opens few compressed batches.
    return Layout(time, segments, (time, *(c for c in key if c != time and c not in segments)), ticks)


LAYOUTS = {
    **{t.name: _layout(t.time, t.key, tuple(c for c in t.key if c != t.time)) for t in TABLES.values()},
    **{t.name: _layout(t.time, t.key, ("underlying",)) for t in (
        MESSAGE_TABLES["pressure"][0], MESSAGE_TABLES["pressure_rollup"][0], MESSAGE_TABLES["signal"][0],
    )},
    **{t.name: _layout("timestamp", PLACE_COLUMNS, ("exchange", "symbol"), ticks=True) for t in TICK_TABLES.values()},
}  # fmt: skip


Statements = dict[str, list[str]]
Look = Callable[[Any, Server, Timescale], Awaitable[Statements]]


async def extension(_: Any, server: Server, __: Timescale) -> Statements:
    """TimescaleDB, where the server offers it. Without being preloaded it would end the connection."""
    if server.version or not (server.offered and server.preloaded):
        return {}
    return {"timescaledb": ["CREATE EXTENSION IF NOT EXISTS timescaledb"]}


async def _tables(connection: Any, schema: str) -> list[str]:
    """Those of LAYOUTS that exist here."""
    rows = await connection.fetch("SELECT t FROM unnest($1::text[]) AS t WHERE to_regclass($2 || '.' || t) IS NOT NULL",
                                  list(LAYOUTS), schema)  # fmt: skip
    return [row["t"] for row in rows]


async def _hypertables(connection: Any, schema: str) -> dict[str, Any]:
    """Hypertable -> the length of its next chunks."""
    rows = await connection.fetch(
        "SELECT hypertable_name, time_interval FROM timescaledb_information.dimensions "
        "WHERE dimension_number = 1 AND quote_ident(hypertable_schema) = $1 AND hypertable_name = ANY ($2)",
        schema, list(LAYOUTS),
    )  # fmt: skip
    return {row["hypertable_name"]: row["time_interval"] for row in rows}


async def chunks(connection: Any, server: Server, settings: Timescale) -> Statements:
    """Tables that are no hypertable yet, and chunks of another length from now on."""
    held, length = await _hypertables(connection, server.schema), timedelta(days=settings.chunk_days)
    out = {}
    for table in await _tables(connection, server.schema):
        target = f"'{server.schema}.{table}'::regclass"
        if table not in held:
            # Indexes on time come with the migrations.
            out[table] = [
                f"SELECT {server.functions}.create_hypertable({target}, {server.functions}.by_range("
                f"'{LAYOUTS[table].time}', {interval(length)}), if_not_exists => true, migrate_data => true, "
                "create_default_indexes => false)"
            ]
        elif held[table] != length:
            out[table] = [f"SELECT {server.functions}.set_chunk_time_interval({target}, {interval(length)})"]
    return out


async def columnstore(connection: Any, server: Server, settings: Timescale) -> Statements:
    """Compression, and the policy that does it. Switched off, what is compressed stays so and readable."""
    rows = await connection.fetch(
        "SELECT relname, segmentby, orderby FROM timescaledb_information.hypertable_columnstore_settings "
        "JOIN pg_class ON pg_class.oid = hypertable JOIN pg_namespace n ON n.oid = relnamespace "
        "WHERE quote_ident(nspname) = $1",
        server.schema,
    )
    held = {row["relname"]: (_listed(row["segmentby"]), _listed(row["orderby"])) for row in rows}
    policies = await _policies(connection, server, "policy_compression", "compress_after")
    out, wanted = {}, timedelta(days=settings.compress_after_days)
    for table in await _hypertables(connection, server.schema):
        layout, target, statements = LAYOUTS[table], f"'{server.schema}.{table}'::regclass", list[str]()
        if wanted and held.get(table) != (layout.segments, layout.order):
            by, order = (", ".join(map(quoted, columns)) for columns in (layout.segments, layout.order))
            statements.append(
                f"ALTER TABLE {server.schema}.{table} SET (timescaledb.enable_columnstore, "
                f"timescaledb.segmentby = '{by}', timescaledb.orderby = '{order}')"
            )
        if policies.get(table, timedelta()) != wanted:
            if table in policies:
                statements.append(f"CALL {server.functions}.remove_columnstore_policy({target}, if_exists => true)")
            if wanted:
                statements.append(
                    f"CALL {server.functions}.add_columnstore_policy({target}, after => {interval(wanted)})"
                )
        if statements:
            out[table] = statements
    return out


def _listed(columns: str | None) -> tuple[str, ...]:
    return tuple(column.strip().strip('"') for column in (columns or "").split(","))


async def retention(connection: Any, server: Server, settings: Timescale) -> Statements:
    """Policies that drop old chunks."""
    policies = await _policies(connection, server, "policy_retention", "drop_after")
    out = {}
    for table in await _hypertables(connection, server.schema):
        days = settings.ticks_retention_days if LAYOUTS[table].ticks else settings.retention_days
        target = f"'{server.schema}.{table}'::regclass"
        if policies.get(table, timedelta()) != timedelta(days=days):
            out[table] = [f"SELECT {server.functions}.remove_retention_policy({target}, if_exists => true)"]
            if days:
                after = interval(timedelta(days=days))
                out[table].append(f"SELECT {server.functions}.add_retention_policy({target}, drop_after => {after})")
    return out


async def _policies(connection: Any, server: Server, procedure: str, key: str) -> dict[str, Any]:
    """Hypertable -> the interval of its policy."""
    rows = await connection.fetch(
        "SELECT hypertable_name, (config ->> $3)::interval AS after FROM timescaledb_information.jobs "
        "WHERE quote_ident(hypertable_schema) = $1 AND proc_name = $2",
        server.schema, procedure, key,
    )  # fmt: skip
    return {row["hypertable_name"]: row["after"] for row in rows}


async def aggregates(connection: Any, server: Server, settings: Timescale) -> Statements:
    """Roll-ups that are no continuous aggregate yet; a plain view of the name gives way."""
    if not settings.rollups or SOURCE not in await _hypertables(connection, server.schema):
        return {}
    there, stored = await _there(connection, server.schema), await _stored(connection, server.schema)
    return {
        name: [
            *([f"DROP VIEW {server.schema}.{name}"] if name in there else []),
            *continuous(server.schema, name, server.functions),
        ]
        for name in ROLLUPS
        if name not in stored
    }


async def refresh(connection: Any, server: Server, settings: Timescale) -> Statements:
    """Policies that store what has settled, and again where candles were corrected or came late.

    They look as far back as candles are kept, and no farther: a refresh would take the roll-ups of dropped candles
    away, too. A roll-up whose buckets are too long for that has no policy, and is computed when it is read.
    """
    if not settings.rollups:
        return {}
    # Which of the two a job names depends on TimescaleDB's version.
    rows = await connection.fetch(
        "SELECT view_name, (config ->> 'start_offset')::interval AS start, "
        "(config ->> 'end_offset')::interval AS until, schedule_interval AS every "
        "FROM timescaledb_information.jobs AS j JOIN timescaledb_information.continuous_aggregates AS a "
        "ON (j.hypertable_schema, j.hypertable_name) IN ("
        "(view_schema, view_name), (materialization_hypertable_schema, materialization_hypertable_name)) "
        "WHERE quote_ident(view_schema) = $1 AND proc_name = 'policy_refresh_continuous_aggregate'",
        server.schema,
    )
    held = {row["view_name"]: (row["start"], row["until"], row["every"]) for row in rows}
    out = {}
    for name in await _stored(connection, server.schema):
        rollup, target = ROLLUPS[name], f"'{server.schema}.{name}'::regclass"
        kept = timedelta(days=settings.retention_days)
        possible = not kept or kept >= rollup.settled + LEAST_BUCKETS * rollup.length
        wanted = (kept or None, rollup.settled, rollup.every) if possible else None
        if held.get(name) == wanted:
            continue
        out[name] = [f"SELECT {server.functions}.remove_continuous_aggregate_policy({target}, if_exists => true)"]
        if wanted:
            out[name].append(
                f"SELECT {server.functions}.add_continuous_aggregate_policy({target}, "
                f"start_offset => {interval(kept) if kept else 'NULL'}, end_offset => {interval(rollup.settled)}, "
                f"schedule_interval => {interval(rollup.every)})"
            )
    return out


async def views(connection: Any, server: Server, settings: Timescale) -> Statements:
    """Views for the roll-ups that are nothing yet."""
    there = await _there(connection, server.schema) if settings.rollups else list(ROLLUPS)
    return {name: plain(server.schema, name) for name in ROLLUPS if name not in there}


async def _there(connection: Any, schema: str) -> list[str]:
    """Roll-ups that are there, in either form."""
    rows = await connection.fetch(
        "SELECT viewname FROM pg_views WHERE quote_ident(schemaname) = $1 AND viewname = ANY ($2)",
        schema, list(ROLLUPS),
    )  # fmt: skip
    return [row["viewname"] for row in rows]


async def _stored(connection: Any, schema: str) -> list[str]:
    """Roll-ups that are continuous aggregates."""
    rows = await connection.fetch(
        "SELECT view_name FROM timescaledb_information.continuous_aggregates "
        "WHERE quote_ident(view_schema) = $1 AND view_name = ANY ($2)",
        schema, list(ROLLUPS),
    )  # fmt: skip
    return [row["view_name"] for row in rows]


async def role(connection: Any, _: Server, settings: Timescale) -> Statements:
    """The reader's role, for a user to be made a member of it."""
    name = settings.reader_role
    if not name or await role_exists(connection, name):
        return {}
    return {name: [f"CREATE ROLE {quoted(name)} NOLOGIN"]}


async def grants(connection: Any, server: Server, settings: Timescale) -> Statements:
    """Rights on what is Tapeline's in the schema; another program may have tables of its own there."""
    name = settings.reader_role
    if not name or not await role_exists(connection, name):
        return {}
    out = {}
    if not await connection.fetchval(
        "SELECT has_schema_privilege($1, oid, 'USAGE') FROM pg_namespace WHERE quote_ident(nspname) = $2",
        name, server.schema,
    ):  # fmt: skip
        out["the schema"] = [f"GRANT USAGE ON SCHEMA {server.schema} TO {quoted(name)}"]
    rows = await connection.fetch(
        "SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
        "WHERE quote_ident(nspname) = $2 AND relname = ANY ($3) AND relkind IN ('r', 'p', 'v', 'm') "
        "AND NOT has_table_privilege($1, pg_class.oid, 'SELECT')",
        name, server.schema, [*_own_names(), *LAYOUTS, *ROLLUPS],
    )  # fmt: skip
    for row in rows:
        out[row["relname"]] = [f"GRANT SELECT ON {server.schema}.{quoted(row['relname'])} TO {quoted(name)}"]
    return out


def _own_names() -> list[str]:
    """Tables and views that the migrations make."""
    return [name for migration in migrations() for name in _NAMES.findall(migration.sql)]


def quoted(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


async def role_exists(connection: Any, name: str) -> bool:
    """Roles are the server's, not the database's."""
    return bool(await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name))
