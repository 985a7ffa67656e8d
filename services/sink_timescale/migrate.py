"""The PostgreSQL store's part of `tapeline migrate`, see shared.migrate."""

from __future__ import annotations

from services.sink_timescale import features, schema
from shared.errors import ConfigError
from shared.migrate import Plan, Step
from shared.postgres import connect, errors, run, where
from shared.settings import Settings
from shared.stores import parse


def migrate(settings: Settings, plan: bool) -> Plan:
    """Migrate the database of the settings and switch its features on, or say what that would do.

    Raises ConfigError, AuthError, VersionError, StoreUnavailable.
    """
    url = parse(settings.tapeline.store)
    if url.scheme != "postgresql":
        raise ConfigError(f"PostgreSQL's tables are for postgresql:// stores, TAPELINE_STORE is {url.shown}")
    done: Plan = run(_migrate(settings, plan))
    return done


async def _migrate(settings: Settings, plan: bool) -> Plan:
    url = settings.tapeline.store
    at = where(url)
    connection = await connect(url)
    try:
        with errors(url):
            held = await schema.version(connection)
            steps = await schema.pending(connection, at)
            if plan:
                notes = await features.plan(connection, settings.timescale)
            else:
                await schema.migrate(connection, at)
                notes = await features.apply(connection, settings.timescale)
    finally:
        await connection.close()
    wanted = schema.migrations()[-1].version
    return Plan(at, held, wanted, [Step(*step) for step in steps], notes, not plan)
