"""Dataset, tables and views: made where they are missing, and brought up to date; nothing is ever dropped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from services.sink_bigquery.clients import Missing, Target, bigquery, call, google
from services.sink_bigquery.tables import EVERY, LEDGER, Layout
from services.sink_bigquery.views import VIEWS, view_sql
from shared.errors import ConfigError, VersionError

log = logging.getLogger(__name__)

VERSION = 1
LABEL = "tapeline_schema"
VIEW_LABEL = "tapeline_view"  # of which text a view was made
_DAY_MS = 86_400_000
# BigQuery answers with the older names of its types.
_OLDER = {"INTEGER": "INT64", "FLOAT": "FLOAT64", "BOOLEAN": "BOOL"}
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to do: `sql` says it in BigQuery's words (it is done through the API)."""

    name: str
    sql: str
    table: Any = None
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """What is there: the schema's version (0: no dataset, or one without a label) and what is to do, in order."""

    version: int
    dataset: bool
    changes: list[Change]


def look(client: Any, target: Target) -> Found:
    """Compare the dataset with what this program wants.

    Raises VersionError for a dataset that a newer program wrote, ConfigError for a table that cannot be used.
    """
    try:
        dataset = call(target, "look at the dataset", client.get_dataset, target.dataset)
    except Missing:
        return Found(0, False, [_create_dataset(target), *_creations(target), *_views(target)])
    version = int((dataset.labels or {}).get(LABEL, "0"))
    if version > VERSION:
        raise VersionError(
            f"{target.where} is of schema version {version}, this program knows up to {VERSION}: upgrade Tapeline, "
            "or set TAPELINE_STORE to another dataset"
        )
    listed = call(target, "list the tables", lambda **more: list(client.list_tables(target.dataset, **more)))
    names = {item.table_id for item in listed}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        wanted = [name for name in (*EVERY, *VIEWS) if name in names]
        tables = pool.map(lambda n: call(target, f"look at {n}", client.get_table, target.full(n)), wanted)
        held = dict(zip(wanted, tables, strict=True))
    changes: list[Change] = []
    for layout in EVERY.values():
        if layout.name in held:
            changes += _evolve(target, layout, held[layout.name])
        else:
            changes.append(_create(target, layout))
    for change in _views(target):
        there = held.get(change.name)
        if there is None or (there.labels or {}).get(VIEW_LABEL) != change.table.labels[VIEW_LABEL]:
            changes.append(change)
    if version != VERSION:
        changes.append(
            Change("dataset", f"ALTER SCHEMA `{target.dataset}` SET OPTIONS (labels=[('{LABEL}', '{VERSION}')])")
        )
    return Found(version, True, changes)


def ensure(client: Any, target: Target) -> list[str]:
    """Bring the dataset up to date; returns the names of what was changed. Raises as `look` does, StoreUnavailable."""
    found = look(client, target)
    if not found.dataset:
        _make_dataset(client, target)
    changes = [change for change in found.changes if change.table is not None]
    views = [change for change in changes if change.name in VIEWS]
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # tables first: views read them
        list(pool.map(lambda change: _apply(client, target, change), [c for c in changes if c not in views]))
    for change in views:  # in order: some read others
        _apply(client, target, change)
    if found.version != VERSION:
        _mark(client, target)
    return [change.name for change in found.changes]


def ledger_born(client: Any, target: Target) -> int:
    """When the ledger's table was made, ms: jobs of an earlier dataset of that name are none of this one's."""
    table = call(target, "look at the ledger", client.get_table, target.full(LEDGER))
    return int(table.created.timestamp() * 1000) if table.created else 0


def table_of(target: Target, layout: Layout, name: str = "") -> Any:
    """A bigquery.Table as this program makes it."""
    table = bigquery.Table(target.full(name or layout.name), schema=fields_of(layout))
    table.clustering_fields = list(layout.cluster) or None
    if layout.name != LEDGER:
        table.time_partitioning = bigquery.TimePartitioning(
            type_=bigquery.TimePartitioningType.DAY, field=layout.time, expiration_ms=_expiration(target, layout)
        )
    return table


def fields_of(layout: Layout) -> list[Any]:
    """Its columns, all of which may be NULL: so that columns can be added, and loads need no modes."""
    return [bigquery.SchemaField(field.name, field.type) for field in layout.fields]


def _expiration(target: Target, layout: Layout) -> int | None:
    days = target.settings.ticks_expire_days
    return days * _DAY_MS if layout.ticks and days else None


def _evolve(target: Target, layout: Layout, held: Any) -> Iterator[Change]:
    """What a table lacks. Raises ConfigError where it is another kind of table."""
    if held.table_type != "TABLE":
        raise ConfigError(
            f"{target.where}: {layout.name} is a {held.table_type.lower()}, not a table: drop or rename it"
        )
    types = {field.name: _OLDER.get(field.field_type, field.field_type) for field in held.schema}
    modes = {field.name: field.mode for field in held.schema}
    for field in layout.fields:
        there = types.get(field.name)
        if there not in (None, field.type) or modes.get(field.name) == "REPEATED":
            raise ConfigError(
                f"{target.where}: column {layout.name}.{field.name} is {there}, and must be {field.type}: rename the "
                "table away (it is made anew), or write another dataset"
            )
    missing = [field for field in layout.fields if field.name not in types]
    name = target.named(layout.name)
    if missing:
        held.schema = [*held.schema, *(bigquery.SchemaField(field.name, field.type) for field in missing)]
        columns = ", ".join(f"ADD COLUMN `{field.name}` {field.type}" for field in missing)
        yield Change(layout.name, f"ALTER TABLE {name} {columns}", held, ("schema",))
    partitioning = held.time_partitioning
    if layout.name == LEDGER or not layout.ticks or partitioning is None:
        return
    wanted = _expiration(target, layout)
    if (partitioning.expiration_ms or None) != wanted:
        partitioning.expiration_ms = wanted
        held.time_partitioning = partitioning
        days = target.settings.ticks_expire_days or "NULL"
        sql = f"ALTER TABLE {name} SET OPTIONS (partition_expiration_days={days})"
        yield Change(layout.name, sql, held, ("time_partitioning",))


def _create_dataset(target: Target) -> Change:
    options = f"OPTIONS (location='{target.settings.location}', labels=[('{LABEL}', '{VERSION}')])"
    return Change("dataset", f"CREATE SCHEMA IF NOT EXISTS `{target.dataset}` {options}")


def _creations(target: Target) -> list[Change]:
    return [_create(target, layout) for layout in EVERY.values()]


def _create(target: Target, layout: Layout) -> Change:
    columns = ", ".join(f"`{field.name}` {field.type}" for field in layout.fields)
    more = "" if layout.name == LEDGER else f" PARTITION BY TIMESTAMP_TRUNC(`{layout.time}`, DAY)"
    more += f" CLUSTER BY {', '.join(f'`{name}`' for name in layout.cluster)}" if layout.cluster else ""
    if _expiration(target, layout):
        more += f" OPTIONS (partition_expiration_days={target.settings.ticks_expire_days})"
    sql = f"CREATE TABLE IF NOT EXISTS {target.named(layout.name)} ({columns}){more}"
    return Change(layout.name, sql, table_of(target, layout))


def _views(target: Target) -> list[Change]:
    made = []
    for name in VIEWS:
        table = bigquery.Table(target.full(name))
        table.view_query = view_sql(name, target)
        table.labels = {VIEW_LABEL: blake2b(table.view_query.encode(), digest_size=8).hexdigest()}
        made.append(Change(name, f"CREATE OR REPLACE VIEW {target.named(name)} AS {table.view_query}", table))
    return made


def _make_dataset(client: Any, target: Target) -> None:
    dataset = bigquery.Dataset(f"{target.project}.{target.dataset}")
    dataset.location = target.settings.location
    dataset.labels = {LABEL: str(VERSION)}
    call(target, "create the dataset", client.create_dataset, dataset, exists_ok=True)


def _mark(client: Any, target: Target) -> None:
    dataset = call(target, "look at the dataset", client.get_dataset, target.dataset)
    dataset.labels = {**(dataset.labels or {}), LABEL: str(VERSION)}
    call(target, "label the dataset", client.update_dataset, dataset, ["labels"])


def _apply(client: Any, target: Target, change: Change) -> None:
    if change.fields:
        call(target, f"alter {change.name}", client.update_table, change.table, list(change.fields))
        log.info("%s: %s", target.where, change.sql)
    elif change.name in VIEWS:
        try:
            call(target, f"create {change.name}", client.create_table, change.table)
        except google.Conflict:
            call(target, f"alter {change.name}", client.update_table, change.table, ["view_query", "labels"])
    else:
        call(target, f"create {change.name}", client.create_table, change.table, exists_ok=True)
