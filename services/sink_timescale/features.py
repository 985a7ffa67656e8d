"""What the PostgreSQL store does beyond tables: hypertables, columnstore, retention, roll-ups and a reader's role.

Each is looked at and, where it is not as the settings want it, put right in a transaction of its own; what a server
lacks or refuses is left out and named, and the sink works without it. TimescaleDB may be installed later: the next
start turns the plain tables into hypertables, with their rows, and the views into continuous aggregates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import asyncpg

from services.sink_timescale import parts
from services.sink_timescale.parts import Look, quoted
from services.sink_timescale.rollups import ROLLUPS
from services.sink_timescale.server import MEANING, Server, look
from shared.settings import Timescale

# Of pg_advisory_xact_lock: sinks that start together take turns. Any number that nobody else uses.
LOCK = 0x7461_7065_6665_6174
ATTEMPTS = 3
PATIENCE_SECONDS = 86_400
# A transaction that another one has overtaken: serialization and deadlock; a role, table or catalog row of that name
# has come into being meanwhile (roles are the server's, and the lock is the database's).
_AGAIN = ("40001", "40P01", "42710", "42P07", "23505", "XX000")
# The connection, or the server, is gone.
_GONE = ("08", "57P")
ROLL = "continuous aggregates"
_PARTS: tuple[tuple[str, Look], ...] = (
    ("hypertables", parts.chunks),
    ("columnstore", parts.columnstore),
    ("retention", parts.retention),
    (ROLL, parts.aggregates),
    (ROLL, parts.refresh),
    ("roll-ups", parts.views),
    ("reader role", parts.role),
    ("reader role", parts.grants),
)


async def apply(connection: Any, settings: Timescale) -> list[str]:
    """Bring every feature to what the settings say; run after the migrations. Returns what is off, a line each.

    A second time changes nothing. Raises asyncpg's errors only when the connection is lost.
    """
    server = await look(connection)
    refused = await _settle(connection, parts.extension, server, settings)
    if server.offered and not server.version:
        server = await look(connection)
    missing = _by_reason({feature: why for feature, why in server.lacks.items() if settings.rollups or feature != ROLL})
    notes = [f"{why}: {', '.join(MEANING[feature] for feature in features)}" for why, features in missing.items()]
    notes += [f"CREATE EXTENSION is refused: {reason}" for reason in refused.values()]
    for feature, part in _PARTS:
        if feature not in server.lacks:
            refused = await _settle(connection, part, server, settings)
            notes += [f"{feature} off for {', '.join(n)}: {why}" for why, n in _by_reason(refused).items()]
    return notes


async def plan(connection: Any, settings: Timescale) -> list[str]:
    """What `apply` would have on and off here, a line each; changes nothing."""
    server = await look(connection)
    lacks = server.lacks
    if server.version:
        lines = [f"TimescaleDB {server.told}"]
    elif not (server.offered and server.preloaded):
        lines = []
    elif await connection.fetchval("SELECT has_database_privilege(current_database(), 'CREATE')"):
        lines, lacks = ["TimescaleDB: to be installed; of its Apache build only hypertables will be on"], {}
    else:
        lines = ["TimescaleDB: this user may not install it; let one who may run CREATE EXTENSION timescaledb"]
    wanted = {
        "hypertables": f"on, chunks of {_days(settings.chunk_days)}",
        "columnstore": _policy(settings.compress_after_days, "on, for chunks older than {}"),
        "retention": f"candles, pressure and signals {_policy(settings.retention_days, 'of {}')}, "
        f"ticks {_policy(settings.ticks_retention_days, 'of {}')}",
        ROLL: f"on, {', '.join(ROLLUPS)}" if settings.rollups else "off by the settings",
    }
    for feature, text in wanted.items():
        off = feature in lacks and (feature != ROLL or settings.rollups)
        lines.append(f"{feature}: {f'off, {MEANING[feature]}: {lacks[feature]}' if off else text}")
    return [*lines, f"reader role: {await _reader(connection, settings.reader_role)}"]


async def _reader(connection: Any, role: str) -> str:
    if not role:
        return "off by the settings"
    if await parts.role_exists(connection, role):
        return role
    if await connection.fetchval("SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"):
        return f"{role}, to be made"
    return f"off: this user may not make roles; let one who may run CREATE ROLE {quoted(role)} NOLOGIN"


def _days(count: int) -> str:
    return f"{count} day{'s' * (count != 1)}"


def _policy(days: int, text: str) -> str:
    return text.format(_days(days)) if days else "off by the settings"


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> what it is the reason of."""
    out: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        out.setdefault(reason, []).append(name)
    return out


async def _settle(connection: Any, part: Look, server: Server, settings: Timescale) -> dict[str, str]:
    """Do what a part finds to be done, each thing alone; returns what was refused, with the reason."""
    refused = {}
    try:
        pending = list(await part(connection, server, settings))
    except asyncpg.PostgresError as error:
        return {"all": _reason(connection, error)}
    for name in pending:
        for attempt in range(ATTEMPTS):
            try:
                async with connection.transaction():
                    # A big table takes its time to become a hypertable.
                    await connection.execute("SET LOCAL statement_timeout = 0")
                    await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK, timeout=PATIENCE_SECONDS)
                    # Another sink may have done it while this one waited for the lock.
                    for statement in (await part(connection, server, settings)).get(name, ()):
                        await connection.execute(statement, timeout=PATIENCE_SECONDS)
            except asyncpg.PostgresError as error:
                reason = _reason(connection, error)
                if error.sqlstate in _AGAIN and attempt + 1 < ATTEMPTS:
                    continue
                refused[name] = reason
            break
    return refused


def _reason(connection: Any, error: asyncpg.PostgresError) -> str:
    """One line; raises the error when it is the connection's."""
    if connection.is_closed() or (error.sqlstate or "").startswith(_GONE):
        raise error
    return " ".join(str(error).split())
