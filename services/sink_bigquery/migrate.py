"""The BigQuery part of `tapeline migrate`."""

from __future__ import annotations

from services.sink_bigquery import schema
from services.sink_bigquery.clients import Missing, Refused, connect, target_of
from shared.errors import ConfigError
from shared.migrate import Plan, Step
from shared.settings import Settings


def migrate(settings: Settings, plan: bool) -> Plan:
    """See shared.migrate. The version is a label of the dataset; the steps are tables, columns and views."""
    target = target_of(settings)
    try:
        client = connect(target)
        try:
            found = schema.look(client, target)
            if not plan:
                schema.ensure(client, target)
        finally:
            client.close()
    except (Missing, Refused) as error:
        raise ConfigError(f"{error}: check the project's name and what these credentials may do") from None
    steps = [Step(schema.VERSION, change.name, change.sql) for change in found.changes]
    days = target.settings.ticks_expire_days
    notes = [
        f"method {target.settings.method}, location {target.settings.location}",
        f"raw ticks expire after {days} days" if days else "raw ticks do not expire",
    ]
    return Plan(target.where, found.version, schema.VERSION, steps, notes, applied=not plan)
