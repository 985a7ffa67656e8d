"""Whether a store can be used, before anything is started for it.

Of BigQuery only the URL is looked at here, and by `doctor` more.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path
from typing import Any, cast

from shared.errors import ConfigError, VersionError
from shared.migrations import migrations_of
from shared.registry import TOOLS, resolve
from shared.stores import parse
from shared.tables import MESSAGE_TABLES, TABLES, TICK_TABLES

CHECK_SECONDS = 10.0
_WRITTEN = (
    *(table.name for table in TABLES.values()), *(table.name for table in TICK_TABLES.values()),
    *(table.name for tables in MESSAGE_TABLES.values() for table in tables),
    "late_trades", "gaps", "dead_letters", "sink_cursors",
)  # fmt: skip
_SERVER = """SELECT current_setting('server_version') AS version, current_user AS role, current_schema() AS schema,
    (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb') AS timescale,
    current_setting('timescaledb.license', true) AS license, current_database() AS database,
    EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb') AS offered,
    pg_is_in_recovery() AS standby, has_database_privilege(current_database(), 'TEMPORARY') AS temporary,
    has_schema_privilege(current_schema(), 'CREATE') AS may_create,
    ARRAY(SELECT name FROM unnest($1::text[]) AS n (name) WHERE to_regclass(name) IS NOT NULL) AS tables"""


def check_store(store: str) -> str:
    """Look whether rows could be written, and write none; returns one line about the store.

    Takes 10 s at most. Raises ConfigError or AuthError with the remedy, VersionError for a store that a newer program
    wrote, StoreUnavailable.
    """
    parsed = parse(store)
    if parsed.scheme == "sqlite":
        return _check_sqlite(parsed.path)
    return _check_postgres(store) if parsed.scheme == "postgresql" else parsed.shown


def _check_postgres(url: str) -> str:
    from shared.postgres import connect, errors, run  # noqa: PLC0415 - a moment that other stores need not wait

    async def look() -> str:
        with errors(url):
            async with asyncio.timeout(CHECK_SECONDS):
                connection = await connect(url)
                try:
                    async with connection.transaction(readonly=True):
                        return await _looked(url, connection)
                finally:
                    connection.terminate()

    return cast("str", run(look()))


async def _looked(url: str, connection: Any) -> str:
    from shared.postgres import where  # noqa: PLC0415

    at = where(url)
    has = await connection.fetchrow(_SERVER, list(_WRITTEN))
    if has["standby"]:
        raise ConfigError(f"{at} is a standby that takes no rows: name the primary in TAPELINE_STORE")
    if has["schema"] is None:
        raise ConfigError(f"{at}: no schema of the user's search_path exists: create one, or set another search_path")
    refused = await cast("Any", resolve(TOOLS["lacking-postgresql"]))(connection, has["tables"])
    if refused:
        raise ConfigError(
            f"{at}: {has['role']} may not write {', '.join(refused)}: "
            f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "{has["schema"]}" TO "{has["role"]}"'
        )
    # Raises VersionError for a store of a newer program.
    steps = await cast("Any", resolve(TOOLS["pending-postgresql"]))(connection, at)
    if steps and not has["may_create"]:
        raise ConfigError(
            f"{at}: {has['role']} may not create the tables that are missing: "
            f'GRANT CREATE ON SCHEMA "{has["schema"]}" TO "{has["role"]}", or run `tapeline migrate` as another user'
        )
    if not has["temporary"]:
        raise ConfigError(
            f"{at}: {has['role']} may not use temporary tables, which rows are copied into: "
            f'GRANT TEMPORARY ON DATABASE "{has["database"]}" TO "{has["role"]}"'
        )
    kind = "plain PostgreSQL" + (" (TimescaleDB could be installed)" if has["offered"] else "")
    if has["timescale"]:
        kind = f"TimescaleDB {has['timescale']} {'Apache' if has['license'] == 'apache' else 'Community'}"
    return f"{at} is {has['version'].split()[0]}, {kind}, {await _schema(connection, steps)}"


async def _schema(connection: Any, steps: list[Any]) -> str:
    if steps and steps[0].version == 1:
        return f"no tables yet: the sink or `tapeline migrate` makes them (schema version {steps[-1].version})"
    held = await connection.fetchval("SELECT max(version) FROM schema_version")
    if steps:
        return f"schema version {held}: will be migrated to {steps[-1].version} by the sink or `tapeline migrate`"
    return f"schema version {held}"


def _check_sqlite(path: Path) -> str:
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"the store {path} is a folder: name a file in it, such as sqlite:///{path}/tapeline.db")
    if not folder.is_dir():
        raise ConfigError(f"the store {path} has no folder {folder}: make it, or set TAPELINE_STORE")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the store {path} cannot be written: {folder} is not writable; set TAPELINE_STORE")
    if not path.exists():
        return f"{path} (will be made, by SQLite {sqlite3.sqlite_version})"
    if not os.access(path, os.W_OK):
        raise ConfigError(f"the store {path} is not writable: check its permissions, or set TAPELINE_STORE")
    try:
        connection = sqlite3.connect(path, timeout=5, isolation_level=None)
        try:
            about = _about_sqlite(connection, path)
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return f"{path} (in use)"
        raise ConfigError(f"the store {path} cannot be opened ({error}): set TAPELINE_STORE") from None
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"the store {path} is no SQLite database ({error}): set TAPELINE_STORE") from None
    return about


def _about_sqlite(connection: sqlite3.Connection, path: Path) -> str:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    wanted = migrations_of("services.sink_sqlite")[-1].version
    wal = connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    kind = f"{path}: SQLite {sqlite3.sqlite_version}, {'WAL' if wal else 'no WAL yet, the sink switches it on'}"
    if "schema_version" not in tables:
        made = f"no tables yet: the sink or `tapeline migrate` makes them (schema version {wanted})"
        return f"{kind}, {made}"
    held = int(connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()[0])
    if held > wanted:
        raise VersionError(
            f"SQLite {path} is of schema version {held}, this program knows up to {wanted}: "
            "upgrade Tapeline, or name another file in TAPELINE_STORE"
        )
    later = f": will be migrated to {wanted} by the sink or `tapeline migrate`" if held < wanted else ""
    return f"{kind}, schema version {held}{later}"
