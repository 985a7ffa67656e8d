"""Migrations of the SQLite store: numbered SQL files beside this module, applied in one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

from shared.errors import VersionError
from shared.migrations import Migration, migrations_of


def migrations() -> tuple[Migration, ...]:
    """All migrations of this program, oldest first."""
    return migrations_of("services.sink_sqlite")


def version(connection: sqlite3.Connection) -> int:
    """The schema's version, 0 for a database that has none."""
    if not connection.execute(
        "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'schema_version'"
    ).fetchone():
        return 0
    return int(connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()[0])


def check(held: int, where: str, steps: Sequence[Migration]) -> None:
    """Raises VersionError for a store that a newer program wrote."""
    if held > steps[-1].version:
        raise VersionError(
            f"{where} is of schema version {held}, this program knows up to {steps[-1].version}: "
            "upgrade Tapeline, or set TAPELINE_STORE to another file"
        )


def migrate(connection: sqlite3.Connection, where: str, steps: Sequence[Migration] | None = None) -> list[int]:
    """Bring the schema up to this program's version; returns the versions applied.

    The connection is in autocommit mode. All steps or none are applied. Raises VersionError for a
    store that a newer program wrote, sqlite3.Error when a step fails.
    """
    steps = migrations() if steps is None else steps
    held = version(connection)
    if held == steps[-1].version:
        return []
    # Another process may have migrated while this one waited for the lock, so look again inside.
    connection.execute("BEGIN IMMEDIATE")
    try:
        held = version(connection)
        check(held, where, steps)
        if held == 0:
            connection.execute(
                "CREATE TABLE schema_version (version INTEGER PRIMARY KEY, name TEXT NOT NULL, at TEXT NOT NULL)"
            )
        pending = [step for step in steps if step.version > held]
        for step in pending:
            for statement in _statements(step.sql):
                connection.execute(statement)
            connection.execute(
                "INSERT INTO schema_version VALUES (?, ?, strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))",
                (step.version, step.name),
            )
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return [step.version for step in pending]


def _statements(script: str) -> Iterator[str]:
    """Single statements, for sqlite3's own executescript would commit first."""
    text = ""
    for line in script.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            yield text
            text = ""
    if text.strip():
        yield text
