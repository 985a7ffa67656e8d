"""Rows as JSON, CSV or Parquet: which of them a request wants, the columns of the tables, and files written as they go.

A file holds only a page of rows in memory. What goes wrong in the middle of it breaks the connection, so that half a
file is never taken for a whole one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from services.web.problems import Problem, bad
from shared.frames import CANDLE, FIXED
from shared.tables import GAP_COLUMNS, MESSAGE_TABLES, TABLES, instant_unit, time_column

JSON, CSV, PARQUET = "json", "csv", "parquet"
MEDIA = {JSON: "application/json", CSV: "text/csv", PARQUET: "application/vnd.apache.parquet"}
_ACCEPTED = {**{media: name for name, media in MEDIA.items()}, "application/x-parquet": PARQUET, "text/*": CSV}
_SURE = frozenset(("volume", "trades", "complete", "revision", "latency_ms"))

Rows = Sequence[Mapping[str, Any]]


class Sort(NamedTuple):
    """What a column holds: `text`, `instant`, `real`, `integer`, `boolean`, or `json` (a list), and whether null."""

    name: str
    null: bool = False


@cache
def columns_of(table: str) -> dict[str, Sort]:
    """The columns of a table of the API, in its order."""
    if table == "gaps":
        sorts = {"start_ns": "integer", "end_ns": "integer", "start": "instant", "end": "instant"}
        return {name: Sort(sorts.get(name, "text")) for name in GAP_COLUMNS}
    for messages in MESSAGE_TABLES.values():
        for some in messages:
            if some.name == table:
                return {c.name: Sort("instant" if c.sort == "time" else c.sort, c.null) for c in some.columns}
    found = next(t for t in TABLES.values() if t.name == table)
    return {name: _candle_sort(table, name) for name in found.columns}


def _candle_sort(table: str, name: str) -> Sort:
    if name in (time_column(table), "timestamp_out"):
        return Sort("instant")
    packed = FIXED if table == "candles" else CANDLE
    if name == "complete":
        return Sort("boolean")
    if name == "latency_ms":
        return Sort("real")
    if name not in (packed.names or ()):
        return Sort("text")
    return Sort("real" if packed[name].kind == "f" else "integer", name not in _SURE)


_TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "instant": {"type": "string"},
    "real": {"type": "number"},
    "integer": {"type": "integer"},
    "boolean": {"type": "boolean"},
    "json": {"type": "array", "items": {}},
}
_DIGITS = {"s": "2026-11-21T14:31:00Z", "us": "2026-11-21T14:31:00.123456Z", "ns": "2026-11-21T14:31:00.123456789Z"}


def row_schema(table: str, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """A row as JSON Schema; none of its columns is required, for a request may want only some."""
    made: dict[str, Any] = {}
    for name, sort in columns_of(table).items():
        if columns is not None and name not in columns:
            continue
        made[name] = dict(_TYPES[sort.name])
        if sort.name == "instant":
            made[name] |= {"format": "date-time", "examples": [_DIGITS[instant_unit(table, name) or "us"]]}
        if sort.null:
            made[name]["type"] = [made[name]["type"], "null"]
    return {"type": "object", "title": f"Row of {table}", "properties": made, "additionalProperties": False}


def format_of(request: Request, asked: str | None) -> str:
    """The format that a request wants: what it says, else the best of its Accept header, else JSON.

    Raises Problem (406) for an Accept header that takes none of them.
    """
    if asked:
        return asked
    accept = request.headers.get("accept", "")
    best, found = 0.0, ""
    for part in accept.split(","):
        kind, *options = (piece.strip().lower() for piece in part.split(";"))
        weight = _weight(options)
        name = JSON if kind in ("*/*", "application/*") else _ACCEPTED.get(kind, "")
        if name and weight > best:
            best, found = weight, name
    if not found and accept.strip():
        raise Problem(406, "not_acceptable", f"there is {', '.join(MEDIA.values())}: name one in Accept, or a format=")
    return found or JSON


def _weight(options: Sequence[str]) -> float:
    for option in options:
        if option.startswith("q="):
            try:
                return min(1.0, float(option[2:]))
            except ValueError:
                return 0.0
    return 1.0


def columns_asked(table: str, text: str | None, among: Sequence[str] | None = None) -> tuple[str, ...]:
    """The columns of `columns=a,b`, all of the table (or those `among` them) without it. Raises Problem (400)."""
    held = tuple(among or columns_of(table))
    if text is None:
        return held
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in held:
            raise bad(f"columns: there is no '{name[:60]}'; there are {', '.join(held)}")
    return names


def file_name(parts: Sequence[str], format_: str) -> str:
    """A name for a file on any system."""
    words = (re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts)
    return f"{'_'.join(word for word in words if word)[:120]}.{format_}"


class Writer(Protocol):
    """Makes a file of pages of rows, as shared.stores tells them."""

    def rows(self, rows: Rows) -> bytes:
        """What the file goes on with."""

    def end(self) -> bytes:
        """What it ends with."""


async def written(pages: AsyncIterator[Rows], writer: Writer) -> AsyncIterator[bytes]:
    """A file, a page at a time. What `pages` raises is raised here, in the middle of the answer."""
    async for rows in pages:
        made = await run_in_threadpool(writer.rows, rows)
        if made:
            yield made
    yield await run_in_threadpool(writer.end)


def writer_of(format_: str, table: str, columns: Sequence[str]) -> Writer:
    """A new file of these columns."""
    if format_ == CSV:
        return _Csv(table, columns)
    # Half a second's import, which only those wait for who want such a file.
    made: Writer = import_module("services.web.parquet").Parquet(table, columns)
    return made


_FLAGS = {0: "false", 1: "true"}


class _Csv:
    """RFC 4180: a header, CRLF, UTF-8. Undefined is empty, a flag true or false, a list JSON text."""

    def __init__(self, table: str, columns: Sequence[str]) -> None:
        sorts = columns_of(table)
        self._columns = columns
        self._flags = [at for at, name in enumerate(columns) if sorts[name].name == "boolean"]
        self._headed = False

    def rows(self, rows: Rows) -> bytes:
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\r\n")
        if not self._headed:
            out.writerow(self._columns)
            self._headed = True
        for row in rows:
            values = [row[name] for name in self._columns]
            for at in self._flags:
                values[at] = _FLAGS.get(values[at], values[at])
            # A line of one empty field would be an empty line.
            out.writerow(values) if values != [None] else text.write('""\r\n')
        return text.getvalue().encode()

    def end(self) -> bytes:
        return b"" if self._headed else self.rows(())
