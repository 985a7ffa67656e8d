"""Datasets, tables, jobs and rows of the BigQuery for tests, and what BigQuery accepts of them.

SQL is not BigQuery's: a statement runs in SQLite over the tables that it names in backticks, with its named
parameters. What SQLite does not know is refused, so a test that needs more fails.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import sqlite3
import threading
import time
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from tests.fakes.bigquery import Refuse

Resource = dict[str, Any]
_CANONICAL = {"INT64": "INTEGER", "FLOAT64": "FLOAT", "BOOL": "BOOLEAN"}
TYPES = frozenset({"STRING", "INTEGER", "FLOAT", "BOOLEAN", "TIMESTAMP", "DATE", "JSON", "BYTES"})
_NAMED = re.compile(r"`([\w-]+)\.(\w+)\.(\w+)`")
_SPLIT = re.compile(r"SPLIT\((\w+), ('[^']*')\)\[OFFSET\((\d+)\)\]")
# 0001-01-01 and 9999-12-31T23:59:59.999999, microseconds.
FIRST_US, LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999
_DAY_US = 86_400_000_000
MAX_COLUMNS, MAX_CLUSTERED = 10_000, 4
CLUSTERING = frozenset({"STRING", "INTEGER", "BOOLEAN", "TIMESTAMP", "DATE"})


class Ran(NamedTuple):
    """What a statement gave; `affected`: rows that DML changed."""

    fields: list[Resource]
    rows: list[tuple[Any, ...]]
    affected: int | None
    kind: str


class JobFailed(Exception):
    """A job's errorResult."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Table:
    """A table or view: its resource, and its rows with whether each is still in insertAll's buffer."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.rows: list[dict[str, Any]] = []
        self.streamed: list[bool] = []
        self.insert_ids: set[str] = set()

    @property
    def fields(self) -> dict[str, Resource]:
        return {f["name"]: f for f in self.resource.get("schema", {}).get("fields", ())}

    @property
    def query(self) -> str:
        return str(self.resource.get("view", {}).get("query", ""))

    def add(self, rows: list[dict[str, Any]], *, streamed: bool = False) -> None:
        self.rows += rows
        self.streamed += [streamed] * len(rows)

    def whole(self, given: dict[str, Any]) -> dict[str, Any]:
        """A row with every column."""
        return {name: given.get(name) for name in self.fields}

    def out_of_bounds(self, row: dict[str, Any]) -> bool:
        """Whether streaming would refuse the row's partition: ten years back, one ahead."""
        column = self.resource.get("timePartitioning", {}).get("field")
        at, now = row.get(column), time.time_ns() // 1000
        return at is not None and not now - 3650 * _DAY_US < at < now + 366 * _DAY_US


def checked_schema(schema: Resource) -> Resource:
    """With the older names of the types, as the API answers. Raises Refuse."""
    fields = []
    for given in schema.get("fields", ()):
        f = {"mode": "NULLABLE", **given}
        f["type"] = _CANONICAL.get(f["type"].upper(), f["type"].upper())
        f["mode"] = f["mode"].upper()
        if f["type"] not in TYPES or f["mode"] not in ("NULLABLE", "REQUIRED"):
            raise Refuse(400, "invalid", f"not a field of this server: {given}")
        if not re.fullmatch(r"[A-Za-z_]\w{0,299}", f["name"]):
            raise Refuse(400, "invalid", f'Invalid field name "{f["name"]}"')
        fields.append(f)
    names = [f["name"].lower() for f in fields]
    if len(set(names)) != len(names) or len(names) > MAX_COLUMNS:
        raise Refuse(400, "invalid", "Duplicate column name, or too many columns")
    return {"fields": fields}


class Warehouse:
    """Everything that is stored."""

    def __init__(self, project: str, lock: threading.RLock) -> None:
        self.project, self.lock = project, lock
        self.datasets: dict[str, Resource] = {}
        self.tables: dict[tuple[str, str], Table] = {}
        self.jobs: dict[str, Resource] = {}
        self._tags = itertools.count(1)

    def rows(self, table: str, dataset: str = "") -> list[dict[str, Any]]:
        with self.lock:
            found = [t for (d, name), t in self.tables.items() if name == table and dataset in ("", d)]
            return copy.deepcopy(found[0].rows) if found else []

    def stamp(self, resource: Resource) -> Resource:
        """A changed resource has another etag."""
        resource["etag"] = f'"{next(self._tags)}"'
        resource["lastModifiedTime"] = str(time.time_ns() // 1_000_000)
        resource.setdefault("creationTime", resource["lastModifiedTime"])
        return resource

    def dataset(self, name: str) -> Resource:
        if name not in self.datasets:
            raise Refuse(404, "notFound", f"Not found: Dataset {self.project}:{name}")
        return self.datasets[name]

    def table(self, dataset: str, name: str) -> Table:
        self.dataset(dataset)
        if (dataset, name) not in self.tables:
            raise Refuse(404, "notFound", f"Not found: Table {self.project}:{dataset}.{name}")
        return self.tables[dataset, name]

    def create_table(self, dataset: str, resource: Resource) -> Table:
        self.dataset(dataset)
        name = resource["tableReference"]["tableId"]
        if (dataset, name) in self.tables:
            raise Refuse(409, "duplicate", f"Already Exists: Table {self.project}:{dataset}.{name}")
        made = Table(self.stamp(copy.deepcopy(resource)))
        made.resource["type"] = "VIEW" if "view" in resource else "TABLE"
        if made.query:
            self._check_view(made.query)
        else:
            made.resource["schema"] = checked_schema(resource.get("schema", {}))
            _check_layout(made)
        self.tables[dataset, name] = made
        return made

    def patch_table(self, table: Table, changes: Resource) -> None:
        for name, value in changes.items():
            if name == "schema":
                table.resource["schema"] = self._evolved(table, checked_schema(value))
            elif name == "view":
                self._check_view(value["query"])
                table.resource["view"] = value
            elif name == "labels":
                merged = {**table.resource.get("labels", {}), **value}
                table.resource["labels"] = {k: v for k, v in merged.items() if v is not None}
            elif name == "timePartitioning":
                held = table.resource.get("timePartitioning") or {}
                if (held.get("field"), held.get("type")) != (value.get("field"), value.get("type")):
                    raise Refuse(400, "invalid", "Cannot change partitioning/clustering of a partitioned table")
                table.resource["timePartitioning"] = value
            elif name != "tableReference":
                table.resource[name] = value
        self.stamp(table.resource)

    def _evolved(self, table: Table, schema: Resource) -> Resource:
        """Columns may be added, and be NULLABLE then; nothing else."""
        new = {f["name"]: f for f in schema["fields"]}
        for name, held in table.fields.items():
            if name not in new:
                raise Refuse(
                    400, "invalid", f"Provided Schema does not match Table. Field {name} is missing in new schema"
                )
            if new[name]["type"] != held["type"]:
                raise Refuse(
                    400, "invalid", f"Provided Schema does not match Table. Field {name} has changed type from "
                    f"{held['type']} to {new[name]['type']}",
                )  # fmt: skip
            if new[name]["mode"] == "REQUIRED" != held["mode"]:
                raise Refuse(400, "invalid", f"Field {name} has changed mode from NULLABLE to REQUIRED")
        for name, f in new.items():
            if name not in table.fields and f["mode"] == "REQUIRED":
                raise Refuse(400, "invalid", f"Cannot add required fields to an existing schema. (field: {name})")
        for row in table.rows:
            row.update({name: None for name in new if name not in row})
        return schema

    def _check_view(self, query: str) -> None:
        for project, dataset, name in _NAMED.findall(query):
            if project != self.project:
                raise Refuse(404, "notFound", f"Not found: Project {project}")
            self.table(dataset, name)

    def load(self, config: Resource, data: bytes) -> int:
        """What a load job does; returns the rows. Raises JobFailed."""
        to = config["destinationTable"]
        if config.get("sourceFormat") != "PARQUET":
            raise JobFailed("invalid", "this server loads Parquet only")
        try:
            table = self.table(to["datasetId"], to["tableId"])
        except Refuse as error:
            raise JobFailed("notFound", error.message) from None
        try:
            given = parquet.read_table(pa.BufferReader(data))
        except pa.ArrowException as error:
            raise JobFailed("invalid", f"Error while reading data, error message: {error}") from None
        if "schema" in config:
            try:
                wanted = {f["name"]: f for f in checked_schema(config["schema"])["fields"]}
            except Refuse as error:
                raise JobFailed("invalid", error.message) from None
        else:
            wanted = {f.name: {"name": f.name, "type": _of_parquet(f), "mode": _mode(f)} for f in given.schema}
        replace = config.get("writeDisposition", "WRITE_APPEND") == "WRITE_TRUNCATE"
        held = wanted if replace and "schema" in config else table.fields
        for f in given.schema:
            place = f"{self.project}:{to['datasetId']}.{to['tableId']}"
            if f.name not in held:
                raise JobFailed(
                    "invalid", f"Provided Schema does not match Table {place}. Cannot add fields (field: {f.name})"
                )
            kind = _of_parquet(f)
            if kind != held[f.name]["type"] or wanted.get(f.name, held[f.name])["type"] != held[f.name]["type"]:
                raise JobFailed(
                    "invalid", f"Provided Schema does not match Table {place}. Field {f.name} has changed type from "
                    f"{held[f.name]['type']} to {kind}",
                )  # fmt: skip
            if held[f.name]["mode"] == "REQUIRED" != wanted.get(f.name, {}).get("mode"):
                raise JobFailed(
                    "invalid", f"Provided Schema does not match Table {place}. Field {f.name} has changed mode from "
                    "REQUIRED to NULLABLE",
                )  # fmt: skip
        missing = [n for n, f in held.items() if f["mode"] == "REQUIRED" and n not in given.column_names]
        if missing:
            raise JobFailed("invalid", f"Required field {missing[0]} cannot be null")
        columns = {name: _python(given.column(name)) for name in given.column_names}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for row in rows:
            for name, f in held.items():
                if f["mode"] == "REQUIRED" and row.get(name) is None:
                    raise JobFailed("invalid", f"Required field {name} cannot be null")
                if f["type"] == "TIMESTAMP" and not FIRST_US <= (row.get(name) or 0) <= LAST_US:
                    raise JobFailed("invalid", f"Cannot return an invalid timestamp value of {row[name]} microseconds")
        if replace:
            if "schema" in config:
                table.resource["schema"] = {"fields": list(wanted.values())}
            table.rows, table.streamed = [], []
        table.add([table.whole(row) for row in rows])
        self.stamp(table.resource)
        return len(rows)

    def run(self, sql: str, parameters: list[Resource]) -> Ran:
        """Run a statement. Raises Refuse for what this server does not know, JobFailed."""
        kind = sql.split(None, 1)[0].upper() if sql.strip() else ""
        if kind not in ("SELECT", "WITH", "DELETE", "UPDATE", "INSERT"):
            raise Refuse(400, "invalidQuery", f"this server knows no such statement: {sql[:200]}")
        database = sqlite3.connect(":memory:")
        database.create_function("split_at", 3, lambda text, by, i: None if text is None else text.split(by)[i])
        database.create_function("GREATEST", -1, lambda *given: None if None in given else max(given))
        try:
            named: dict[str, Resource] = {}
            tables: dict[str, Table] = {}
            values = {p["name"]: _parameter(p) for p in parameters}
            try:
                self._bring(database, sql, named, tables)
                cursor = database.execute(_SPLIT.sub(r"split_at(\1, \2, \3)", sql), values)
            except sqlite3.Error as error:
                raise Refuse(400, "invalidQuery", f"SQLite, which is behind this, says {error}: {sql[:300]}") from None
            rows = cursor.fetchall()
            if kind in ("SELECT", "WITH"):
                return Ran(_result(cursor.description, rows, named), rows, None, "SELECT")
            affected = cursor.rowcount
            target = _NAMED.search(sql)
            assert target is not None
            self._take_back(database, ".".join(target.groups()), tables[".".join(target.groups())])
            return Ran([], [], affected, kind)
        finally:
            database.close()

    def _bring(
        self, database: sqlite3.Connection, sql: str, named: dict[str, Resource], tables: dict[str, Table]
    ) -> None:
        for project, dataset, name in _NAMED.findall(sql):
            full = f"{project}.{dataset}.{name}"
            if full in tables:
                continue
            try:
                table = self.table(dataset, name)
            except Refuse as error:
                raise JobFailed("notFound", f"{error.message} was not found in location US") from None
            tables[full] = table
            if table.query:
                self._bring(database, table.query, named, tables)
                database.execute(f"CREATE VIEW `{full}` AS {table.query}")
                continue
            named |= {n: f for n, f in table.fields.items() if n not in named}
            columns = ", ".join(f"`{n}`" for n in table.fields)
            database.execute(f"CREATE TABLE `{full}` ({columns})")
            marks = ", ".join("?" * (len(table.fields) + 1))
            values = ([i, *(row[n] for n in table.fields)] for i, row in enumerate(table.rows))
            database.executemany(f"INSERT INTO `{full}` (rowid, {columns}) VALUES ({marks})", values)

    def _take_back(self, database: sqlite3.Connection, full: str, table: Table) -> None:
        """What DML has left; it may not touch what insertAll wrote a short while ago."""
        names = list(table.fields)
        columns = ", ".join(f"`{n}`" for n in names)
        left = database.execute(f"SELECT rowid, {columns} FROM `{full}` ORDER BY rowid").fetchall()
        made = [_typed(table, dict(zip(names, values, strict=True))) for _, *values in left]
        places = [place for place, *_ in left]
        same = {p for p, row in zip(places, made, strict=True) if p < len(table.rows) and row == table.rows[p]}
        if any(streamed and i not in same for i, streamed in enumerate(table.streamed)):
            raise JobFailed(
                "invalidQuery", f"UPDATE or DELETE statement over table {full} would affect rows in the streaming "
                "buffer, which is not supported",
            )  # fmt: skip
        table.streamed = [place in same and table.streamed[place] for place in places]
        table.rows = made


def _check_layout(table: Table) -> None:
    partitioned, clustered = (
        table.resource.get("timePartitioning"),
        table.resource.get("clustering", {}).get("fields", ()),
    )
    if partitioned and partitioned.get("field"):
        f = table.fields.get(partitioned["field"])
        if f is None or f["type"] not in ("TIMESTAMP", "DATE"):
            raise Refuse(400, "invalid", "The field specified for partitioning must be a TIMESTAMP or DATE column")
    if len(clustered) > MAX_CLUSTERED:
        raise Refuse(400, "invalid", "Too many clustering fields: at most 4")
    for name in clustered:
        if name not in table.fields or table.fields[name]["type"] not in CLUSTERING:
            raise Refuse(400, "invalid", f"The field {name} cannot be used for clustering")


def _of_parquet(f: Any) -> str:
    """BigQuery's type of a Parquet column."""
    kind = f.type
    if pa.types.is_timestamp(kind):
        if kind.tz is None:
            return "DATETIME"
        return "TIMESTAMP" if kind.unit in ("us", "ms") else f"TIMESTAMP({kind.unit})"
    for fits, name in (
        (pa.types.is_integer, "INTEGER"), (pa.types.is_floating, "FLOAT"), (pa.types.is_boolean, "BOOLEAN"),
        (pa.types.is_string, "STRING"), (pa.types.is_large_string, "STRING"), (pa.types.is_binary, "BYTES"),
        (pa.types.is_date32, "DATE"),
    ):  # fmt: skip
        if fits(kind):
            return name
    return str(kind)


def _mode(f: Any) -> str:
    return "NULLABLE" if f.nullable else "REQUIRED"


def _python(column: Any) -> list[Any]:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64())
    out: list[Any] = column.to_pylist()
    return out


def _parameter(parameter: Resource) -> Any:
    kind, value = parameter["parameterType"]["type"], parameter.get("parameterValue", {}).get("value")
    if value is None:
        return None
    kind = _CANONICAL.get(kind, kind)
    return from_json(value, kind)


def from_json(value: Any, kind: str) -> Any:
    """A JSON value as a column of that type holds it. Raises ValueError."""
    if kind == "STRING":
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(value)
        return str(value)
    if kind == "JSON":
        if not isinstance(value, str):
            raise ValueError(value)
        json.loads(value)
        return value
    if kind == "BOOLEAN":
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ValueError(value)
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(value)
    if kind == "INTEGER":
        number = int(value)
        if number != float(value) or not -(1 << 63) <= number < 1 << 63:
            raise ValueError(value)
        return number
    if kind == "FLOAT":
        return float(value)
    if kind == "TIMESTAMP":
        return _micros(value)
    return value


def _micros(value: str | float) -> int:
    if not isinstance(value, str):
        return round(value * 1_000_000)
    digits = re.search(r"\.(\d+)", value)
    if digits and len(digits[1]) > 6:
        raise ValueError(value)
    at = datetime.fromisoformat(value.replace("Z", "+00:00").replace(" UTC", "+00:00"))
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    since = at - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _typed(table: Table, row: dict[str, Any]) -> dict[str, Any]:
    """SQLite knows no booleans."""
    return {n: bool(v) if v is not None and table.fields[n]["type"] == "BOOLEAN" else v for n, v in row.items()}


def _result(description: Any, rows: list[tuple[Any, ...]], named: dict[str, Resource]) -> list[Resource]:
    out = []
    for i, (name, *_) in enumerate(description):
        kind = named[name]["type"] if name in named else ""
        if not kind:
            first = next((row[i] for row in rows if row[i] is not None), None)
            kind = {int: "INTEGER", float: "FLOAT"}.get(type(first), "STRING")
        out.append({"name": name, "type": kind, "mode": "NULLABLE"})
    return out
