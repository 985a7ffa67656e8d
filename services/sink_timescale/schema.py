"""Migrations of the PostgreSQL store: numbered SQL files beside this module, applied in one transaction.

They need plain PostgreSQL alone. What TimescaleDB adds is applied after them, by its own rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg

from shared.errors import ConfigError, VersionError
from shared.migrations import Migration, migrations_of

_LOCK = 0x7461_7065_6C69_6E65  # "tapeline"
_TABLE = """CREATE TABLE schema_version (
    version integer PRIMARY KEY, name text NOT NULL, at timestamptz NOT NULL DEFAULT now()
)"""
# What stands there already, and is not of a Tapeline store: duplicate table, object or function, undefined column.
_NOT_OURS = ("42P07", "42710", "42723", "42703", "42809")
_OWN = "name a database of Tapeline's own in TAPELINE_STORE, or give its user a search_path of its own"


def migrations() -> tuple[Migration, ...]:
    """All migrations of this program, oldest first."""
    return migrations_of("services.sink_timescale")


async def version(connection: Any) -> int:
    """The schema's version, 0 for a database that has none. Raises asyncpg's errors."""
    if await connection.fetchval("SELECT to_regclass('schema_version')") is None:
        return 0
    return int(await connection.fetchval("SELECT coalesce(max(version), 0) FROM schema_version"))


async def pending(connection: Any, where: str, steps: Sequence[Migration] | None = None) -> list[Migration]:
    """The steps that the database lacks, oldest first. Raises VersionError when a newer program wrote it."""
    steps = migrations() if steps is None else steps
    try:
        held = await version(connection)
    except asyncpg.PostgresError as error:
        _not_ours(error, where)
        raise
    if held > steps[-1].version:
        raise VersionError(
            f"{where} is of schema version {held}, this program knows up to {steps[-1].version}: "
            "upgrade Tapeline, or name another database in TAPELINE_STORE"
        )
    return [step for step in steps if step.version > held]


async def migrate(connection: Any, where: str, steps: Sequence[Migration] | None = None) -> list[int]:
    """Bring the schema up to this program's version; returns the versions applied.

    All steps or none are applied. Raises VersionError for a store that a newer program wrote, ConfigError where
    another program has tables of these names, asyncpg's errors (a missing right) for the caller to translate.
    """
    if not await pending(connection, where, steps):
        return []  # without a lock, nor any right but to read
    try:
        async with connection.transaction():
            # Another process may migrate meanwhile, so look again inside. The lock ends with the transaction.
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            todo = await pending(connection, where, steps)
            if todo and todo[0] == (migrations() if steps is None else steps)[0]:
                await connection.execute(_TABLE)
            for step in todo:
                await connection.execute(step.sql)
                await connection.execute(
                    "INSERT INTO schema_version (version, name) VALUES ($1, $2)", step.version, step.name
                )
    except asyncpg.PostgresError as error:
        _not_ours(error, where)
        raise
    return [step.version for step in todo]


def _not_ours(error: asyncpg.PostgresError, where: str) -> None:
    if error.sqlstate in _NOT_OURS:
        line = " ".join(str(error).split())
        raise ConfigError(f"{where} holds what another program has made ({line}): {_OWN}") from None


async def lacking(connection: Any, tables: Sequence[str]) -> list[str]:
    """The tables that this user may not write as a sink does (read, insert, update and delete)."""
    rows = await connection.fetch(
        """SELECT name FROM unnest($1::text[]) AS name, unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS privilege
        WHERE NOT has_table_privilege(name, privilege) GROUP BY name ORDER BY name""",
        list(tables),
    )
    return [row["name"] for row in rows]
