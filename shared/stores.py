"""Store URLs, and the few things that other parts of the program read from a store."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared.errors import ConfigError, StoreUnavailable
from shared.frames import NS, iso, ns_of
from shared.tables import TABLES, time_column
from shared.timeframes import seconds_of

SCHEMES = {
    "sqlite": "sqlite:///relative.db or sqlite:////absolute/path.db",
    "postgresql": "postgresql://user:password@host:5432/database",
    "bigquery": "bigquery://project/dataset",
}
BUSY_SECONDS = 5.0
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", re.DOTALL)
_NAME = re.compile(r"^[a-z_][a-z0-9_]*$")
# A view has no key of its own.
_KEYS_OF_VIEWS = {"features": TABLES["candle"].key, "usage": ("feed", "timestamp")}


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A parsed store URL. `path` is set for sqlite; `shown` is safe to print, and so is repr."""

    scheme: str
    path: Path
    shown: str


def redact(url: str) -> str:
    """The URL without its credentials."""
    match = _URL.match(url)
    if match is None:
        return "***" if "@" in url else url
    scheme, rest = match[1], match[2]
    # A password may hold '/' or '@': whatever stands before the last '@' is taken for credentials.
    if "@" in rest and scheme.lower() != "sqlite":
        head, _, tail = rest.rpartition("@")
        return f"{scheme}://{head.split(':', 1)[0].split('/', 1)[0]}:***@{_query(tail)}"
    return f"{scheme}://{_query(rest)}"


def _query(text: str) -> str:
    return re.sub(r"(?i)\b(password|passwd|pwd|secret|token|key|sslpassword)=[^&]*", r"\1=***", text)


def parse(url: str) -> StoreUrl:
    """Raises ConfigError for an unknown scheme or a URL that names nothing."""
    match = _URL.match(url)
    scheme = {"postgres": "postgresql"}.get(match[1].lower(), match[1].lower()) if match else ""
    if match is None or scheme not in SCHEMES:
        raise ConfigError(f"'{redact(url)}' is not a store URL; there are: {'; '.join(SCHEMES.values())}")
    rest = match[2]
    path = Path()
    if scheme == "sqlite":
        if not rest.startswith("/") or rest in ("/", "/:memory:") or rest.endswith("/") or "?" in rest:
            raise ConfigError(f"'{redact(url)}' names no file; write {SCHEMES['sqlite']}")
        path = Path(rest[1:])
    elif not rest.strip("/"):
        raise ConfigError(f"'{redact(url)}' names no server; write {SCHEMES[scheme]}")
    return StoreUrl(scheme, path, redact(url))


def newest_cvds(url: str, names: Mapping[str, int]) -> dict[str, float]:
    """The newest `cvd_close` of each name whose window ended by its instant (ns); without those that have none.

    A continuous ticker is looked for in candles_1m, then candles_1s; a contract (`exchange:symbol`)
    after these in its fixed candles. A store or table that does not exist yet holds none. Raises
    ConfigError, StoreUnavailable.
    """
    found: dict[str, float] = {}
    with _reader(url) as connection:
        if connection is not None:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for name, before_ns in names.items():
                value = _newest_cvd(connection, tables, name, before_ns)
                if value is not None:
                    found[name] = value
    return found


def newest_cvd(url: str, name: str, before_ns: int) -> float | None:
    """The same for one name; None where there is none."""
    return newest_cvds(url, {name: before_ns}).get(name)


def _newest_cvd(connection: sqlite3.Connection, tables: set[str], name: str, before_ns: int) -> float | None:
    for table, to_end_ns in (("candles_1m", 0), ("candles_1s", NS)):
        if table in tables:
            row = connection.execute(
                f"SELECT cvd_close FROM {table} WHERE ticker = ? AND time <= ? AND cvd_close IS NOT NULL "  # noqa: S608
                "ORDER BY time DESC LIMIT 1",
                (name, _second(before_ns - to_end_ns)),
            ).fetchone()
            if row:
                return float(row[0])
    exchange, colon, symbol = name.partition(":")
    if not colon or "candles" not in tables:
        return None
    newest: tuple[int, float] | None = None
    timeframe = ""
    while True:  # from one timeframe to the next by the index, not through all rows
        held = connection.execute(
            "SELECT min(timeframe) FROM candles WHERE exchange = ? AND symbol = ? AND timeframe > ?",
            (exchange, symbol, timeframe),
        ).fetchone()[0]
        if held is None:
            return newest[1] if newest else None
        timeframe, length_ns = held, seconds_of(held) * NS
        row = connection.execute(
            "SELECT timestamp_in, cvd_close FROM candles WHERE exchange = ? AND symbol = ? AND timeframe = ? "
            "AND timestamp_in <= ? AND cvd_close IS NOT NULL ORDER BY timestamp_in DESC LIMIT 1",
            (exchange, symbol, timeframe, _second(before_ns - length_ns)),
        ).fetchone()
        if row:
            newest = max(newest or (0, 0.0), (ns_of(row[0]) + length_ns, float(row[1])), key=lambda n: n[0])


def _second(ns: int) -> str:
    return iso(ns // NS * NS)[:19] + "Z"


def read_rows(
    url: str,
    table: str,
    where: Mapping[str, Any] | None = None,
    *,
    since: str | None = None,
    until: str | None = None,
    last: int | None = None,
    columns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of a table or view as dicts, in the order of its key.

    `where` compares columns for equality; `since` <= time < `until` are ISO texts of the table's time
    column (`candles`: `timestamp_in`); `last` keeps the newest rows by it. `columns`: only these, for
    whoever reads many rows. [] for a store or table that does not exist yet.
    """
    for name in (table, *(where or ()), *(columns or ())):
        if not _NAME.match(name):
            raise ConfigError(f"'{name}' is no table or column of a store")
    tests = [(f'"{column}" = ?', value) for column, value in (where or {}).items()]
    time = time_column(table)
    tests += [(f'"{time}" >= ?', since)] if since is not None else []
    tests += [(f'"{time}" < ?', until)] if until is not None else []
    filters = " WHERE " + " AND ".join(test for test, _ in tests) if tests else ""
    values: list[Any] = [value for _, value in tests]
    key = [c["name"] for c in sorted(_columns(url, table), key=lambda c: c["pk"]) if c["pk"]]
    key = key or list(_KEYS_OF_VIEWS.get(table, ()))
    order = ", ".join(f'"{column}"' for column in key) or "1"
    source = f'"{table}"{filters}'
    if last is not None:
        source = f"(SELECT * FROM {source} ORDER BY {time} DESC LIMIT ?)"  # noqa: S608
        values.append(last)
    wanted = ", ".join(f'"{column}"' for column in columns or ()) or "*"
    return _select(url, table, f"SELECT {wanted} FROM {source} ORDER BY {order}", tuple(values))  # noqa: S608


def _columns(url: str, table: str) -> list[dict[str, Any]]:
    return _select(url, table, "SELECT name, pk FROM pragma_table_info(?)", (table,))


def _select(url: str, table: str, sql: str, values: tuple[Any, ...]) -> list[dict[str, Any]]:
    with _reader(url) as connection:
        if connection is None:
            return []
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
            return []
        cursor = connection.execute(sql, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]


@contextmanager
def _reader(url: str) -> Iterator[sqlite3.Connection | None]:
    """A read-only connection, None where the file does not exist."""
    parsed = parse(url)
    if parsed.scheme != "sqlite":
        raise ConfigError(f"not yet a store of this version: {parsed.scheme}")
    if not parsed.path.exists():
        yield None
        return
    connection: sqlite3.Connection | None = None
    try:
        target = f"file:{quote(str(parsed.path.absolute()))}?mode=ro"
        connection = sqlite3.connect(target, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        yield connection
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(f"SQLite {parsed.path} cannot be read now ({error})") from None
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"SQLite {parsed.path} cannot be read ({error}): name another file in TAPELINE_STORE"
        ) from None
    finally:
        if connection is not None:
            connection.close()
