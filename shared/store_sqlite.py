"""What is read from a SQLite store, see shared.stores."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared.errors import StoreUnavailable, StoreUnusable
from shared.frames import NS, iso, ns_of
from shared.stores import EXCHANGES, Slice, distinct_sql, in_order, known, not_before, order_of, page_order, parse
from shared.tables import time_column
from shared.timeframes import seconds_of

BUSY_SECONDS = 5.0


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection | None]:
    """A read-only connection in autocommit mode, None where the file does not exist.

    Raises StoreUnavailable, StoreUnusable for a file that is no store.
    """
    if not path.exists():
        yield None
        return
    connection: sqlite3.Connection | None = None
    try:
        target = f"file:{quote(str(path.absolute()))}?mode=ro"
        connection = sqlite3.connect(target, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        yield connection
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(f"SQLite {path} cannot be read now ({error})") from None
    except sqlite3.DatabaseError as error:
        raise StoreUnusable(f"SQLite {path} cannot be read ({error}): name another file in TAPELINE_STORE") from None
    finally:
        if connection is not None:
            connection.close()


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
    """See shared.stores.read_rows."""
    with reading(parse(url).path) as connection:
        if connection is None:
            return []
        return select(connection, table, where or {}, since=since, until=until, last=last, columns=columns)


def select(
    connection: sqlite3.Connection,
    table: str,
    where: Mapping[str, Any],
    *,
    since: str | None = None,
    until: str | None = None,
    last: int | None = None,
    columns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The same over an open connection; names are trusted."""
    time = time_column(table)
    told = connection.execute("SELECT name, pk FROM pragma_table_xinfo(?)", (table,)).fetchall()
    if not told:
        return []
    held = [name for name, _ in told]
    timed = since is not None or until is not None or last is not None
    known(table, [*where, *(columns or ()), *([time] if timed else [])], held)
    filters, values = _filters(_tests(table, where, since, until))
    key = [name for name, place in sorted(told, key=lambda c: int(c[1])) if place]
    ordered = [f'"{column}"' for column in order_of(table, key, held)]
    source = f'"{table}"{filters}'
    if last is not None:
        # The rest of the key decides between rows of one instant.
        newest = ", ".join(f"{column} DESC" for column in (f'"{time}"', *ordered))
        source = f"(SELECT * FROM {source} ORDER BY {newest} LIMIT ?)"  # noqa: S608
        values.append(last)
    wanted = ", ".join(f'"{column}"' for column in columns or held)
    cursor = connection.execute(f"SELECT {wanted} FROM {source} ORDER BY {', '.join(ordered)}", values)  # noqa: S608
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def select_part(
    connection: sqlite3.Connection,
    table: str,
    where: Mapping[str, Any],
    part: Slice,
    *,
    since: str | None = None,
    until: str | None = None,
    columns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """A slice of such rows, the end that it is seen from first, with the columns of their `page_order`."""
    order, time = page_order(table, where), time_column(table)
    held = [name for (name,) in connection.execute("SELECT name FROM pragma_table_xinfo(?)", (table,))]
    if not held:
        return []
    known(table, [*where, *order, *part.above, *(columns or ())], held)
    tests = _tests(table, where, since, until)
    tests += [(f'"{column}" > ?', value) for column, value in part.above.items()]
    filters, values = _filters(tests)
    for sign, row in part.marks:
        tuples = ", ".join(f'"{column}"' for column in order), ", ".join("?" * len(order))
        # The time alone is what an index can be searched by.
        filters += f'{" AND" if filters else " WHERE"} "{time}" {sign[0]}= ? AND ({tuples[0]}) {sign} ({tuples[1]})'
        values += [row[0], *row]
    names = list(dict.fromkeys((*(columns or held), *order)))
    wanted = ", ".join(f'"{column}"' for column in names)
    source, way = f'SELECT {wanted} FROM "{table}"{filters}', " DESC" if part.newest else ""  # noqa: S608

    def fetch(sql: str, *more: Any) -> list[dict[str, Any]]:
        return [dict(zip(names, row, strict=True)) for row in connection.execute(sql, (*values, *more))]

    # In the order of an index, so that no more is read: by the rest of the key it would have to be sorted first.
    rows = fetch(f'{source} ORDER BY "{time}"{way} LIMIT ?', part.limit)
    if len(rows) < part.limit or len(order) == 1:
        return in_order(rows, order, part)
    # All rows of the last instant, of which these may be any.
    together = fetch(f'{source} {"AND" if filters else "WHERE"} "{time}" = ?', rows[-1][time])
    return in_order(rows + together, order, part)


def _tests(table: str, where: Mapping[str, Any], since: str | None, until: str | None) -> list[tuple[str, Any]]:
    time = time_column(table)
    tests = [(f'"{column}" = ?', value) for column, value in where.items()]
    tests += [(f'"{time}" >= ?', not_before(table, since))] if since is not None else []
    tests += [(f'"{time}" < ?', not_before(table, until))] if until is not None else []
    return tests


def _filters(tests: Sequence[tuple[str, Any]]) -> tuple[str, list[Any]]:
    return " WHERE " + " AND ".join(test for test, _ in tests) if tests else "", [value for _, value in tests]


def distinct(connection: sqlite3.Connection, table: str, column: str, exchange: str | None = None) -> list[str]:
    """The values of a column, see shared.stores.distinct_sql; [] where there is no such table."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
        return []
    sql = distinct_sql(table, column, of_exchange=exchange is not None).replace("$", "?")
    return [name for (name,) in connection.execute(sql, () if exchange is None else (exchange,))]


def exchanges(connection: sqlite3.Connection, symbol: str, timeframe: str) -> list[str]:
    """The exchanges that have candles of a symbol in a timeframe."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'candles'").fetchone():
        return []
    return [exchange for (exchange,) in connection.execute(EXCHANGES.replace("$", "?"), (symbol, timeframe))]


def newest_cvds(url: str, names: Mapping[str, int]) -> dict[str, float]:
    """See shared.stores.newest_cvds."""
    found: dict[str, float] = {}
    with reading(parse(url).path) as connection:
        if connection is not None:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for name, before_ns in names.items():
                value = _newest_cvd(connection, tables, name, before_ns)
                if value is not None:
                    found[name] = value
    return found


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
