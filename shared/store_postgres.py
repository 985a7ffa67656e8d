"""What is read from a PostgreSQL store, see shared.stores.

Each read is one transaction, so that a pooler in transaction mode may stand between.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
import numpy as np

from shared.batches import iso_texts
from shared.errors import ConfigError
from shared.frames import NS
from shared.messages import TopStrike
from shared.postgres import CONNECT_SECONDS, DatabaseMissing, connect, errors, run
from shared.stores import EXCHANGES, Slice, distinct_sql, in_order, instant, known, not_before, order_of, page_order
from shared.tables import instant_unit, time_column
from shared.timeframes import seconds_of

# A baseline's history may be a million rows.
READ_SECONDS = 60.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_C_COLLATION = 950
_DESCRIBE = """SELECT a.attname::text, t.typname::text, a.attcollation::bigint AS collation,
    array_position(string_to_array(i.indkey::text, ' ')::int[], a.attnum::int) AS place, c.relhassubclass AS chunks
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_index i ON i.indrelid = a.attrelid AND i.indisprimary
WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"""

# The columns before the time in an index of a table, the most of them first.
_OPTION = ("underlying", "expiration", "strike", "option_type")
_LEADS: dict[str, tuple[tuple[str, ...], ...]] = {
    "candles": (("exchange", "symbol", "timeframe"),),
    "candles_1m": (("ticker",),),
    "candles_1s": (("ticker",),),
    "pressure_metrics": (_OPTION, ("underlying",)),
    "pressure_rollups": (("underlying",),),
    "signals": (_OPTION, ("underlying",)),
}

# For one transaction: the server shall walk an index, whose first rows are all that is wanted. What its statistics take
# for cheaper may read a whole series, and sort it.
_WALK = """SELECT set_config('enable_sort', 'off', true), set_config('enable_bitmapscan', 'off', true),
    set_config('enable_seqscan', 'off', true), set_config('enable_incremental_sort', 'off', true),
    set_config('jit', 'off', true)"""

_levels = msgspec.json.Decoder(list[list[float | None]])
_strikes = msgspec.json.Decoder(list[TopStrike])
_any_json = msgspec.json.Decoder()
# PostgreSQL orders an object's names and writes numbers its own way: as these types they read as they were written.
_JSON: dict[str, msgspec.json.Decoder[Any]] = {"bids": _levels, "asks": _levels, "top_strikes": _strikes}
_json = msgspec.json.Encoder()


class Column(NamedTuple):
    """A column as the catalogue tells it; `place` is its place in the primary key, None outside it."""

    name: str
    type: str
    collation: int
    place: int | None


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

    async def read() -> list[dict[str, Any]]:
        async with _reading(url) as connection:
            return await select(connection, table, where or {}, since=since, until=until, last=last, columns=columns)

    try:
        rows: list[dict[str, Any]] = run(read())
    except DatabaseMissing:
        return []
    return rows


def newest_cvds(url: str, names: Mapping[str, int]) -> dict[str, float]:
    """See shared.stores.newest_cvds."""

    async def read() -> dict[str, float]:
        async with _reading(url) as connection:
            return await _newest_cvds(connection, names)

    try:
        found: dict[str, float] = run(read())
    except DatabaseMissing:
        return {}
    return found


@asynccontextmanager
async def _reading(url: str) -> AsyncIterator[Any]:
    """A connection of its own in a read-only transaction."""
    connection = await connect(url, command_timeout=CONNECT_SECONDS)
    try:
        with errors(url):
            async with connection.transaction(readonly=True):
                yield connection
            await connection.close(timeout=CONNECT_SECONDS)
    finally:
        connection.terminate()  # nothing once it is closed


async def select(
    connection: Any,
    table: str,
    where: Mapping[str, Any],
    *,
    since: str | None = None,
    until: str | None = None,
    last: int | None = None,
    columns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """`read_rows` within a transaction; names are trusted."""
    held, in_chunks = await _describe(connection, table)
    if not held:
        return []
    time = time_column(table)
    timed = since is not None or until is not None or last is not None
    known(table, [*where, *(columns or ()), *([time] if timed else [])], list(held))
    key = [c.name for c in sorted((c for c in held.values() if c.place), key=lambda c: c.place or 0)]
    order = order_of(table, key, list(held))
    # The newest of one series. Of a table without chunks it is found by the key: by the time's own index the server
    # would read all that is newer, and of a series that has nothing the whole table.
    series = key[:-1] if last is not None and key[-1:] == [time] and not in_chunks else []
    between = series[-1] if series and set(series) <= where.keys() else ""
    tests, values = _tests(table, where, since, until, held, between)
    wanted = list(columns or held)
    fetched = _fetched(table, wanted, held)
    filters = " WHERE " + " AND ".join(tests) if tests else ""
    ordered = [_quoted(held[column]) for column in order]
    names = ", ".join(f'"{name}"' for name in fetched)
    sql = f'SELECT {names} FROM "{table}"{filters} ORDER BY {", ".join(ordered)}'  # noqa: S608
    if last is not None:
        # The rest of the key decides between rows of one instant.
        newest = ", ".join(f"{column} DESC" for column in (*([] if between else [f'"{time}"']), *ordered))
        inner = ", ".join(f'"{name}"' for name in dict.fromkeys([*fetched, *order]))
        values.append(last)
        source = f'SELECT {inner} FROM "{table}"{filters} ORDER BY {newest} LIMIT ${len(values)}'  # noqa: S608
        sql = f"SELECT {names} FROM ({source}) AS newest ORDER BY {', '.join(ordered)}"  # noqa: S608
    return _rows(table, wanted, fetched, held, await connection.fetch(sql, *values, timeout=READ_SECONDS))


async def select_part(
    connection: Any,
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
    held, in_chunks = await _describe(connection, table)
    if not held:
        return []
    known(table, [*where, *order, *part.above, *(columns or ())], list(held))
    # A series is found by the index that begins with it, as in `select`: whole tuples are compared, so that the index
    # is entered where the slice begins.
    leads = () if in_chunks else _LEADS.get(table, ())
    lead = next((names[-1] for names in leads if set(names) <= where.keys()), "")
    if not in_chunks:
        await connection.execute(_WALK, timeout=CONNECT_SECONDS)
    bounds = {} if lead else {"since": since, "until": until}
    tests, values = _tests(table, where, bounds.get("since"), bounds.get("until"), held, lead)

    def mark(name: str, value: Any) -> str:
        values.append(_value(held[name], value))
        return f"${len(values)}"

    def compare(sign: str, told: Sequence[Any]) -> None:
        names = (*([lead] if lead else ()), *order)[: len(told)]
        marks = ", ".join(mark(name, value) for name, value in zip(names, told, strict=True))
        tests.append(f"({', '.join(_quoted(held[name]) for name in names)}) {sign} ({marks})")

    head = [where[lead]] if lead else []
    for sign, text in ((">=", since), ("<", until)):
        if lead and text is not None:
            compare(sign, [*head, not_before(table, text)])
    tests += [f'"{column}" > {mark(column, value)}' for column, value in part.above.items()]
    for sign, row in part.marks:
        if not lead:
            tests.append(f'"{time}" {sign[0]}= {mark(time, row[0])}')
        compare(sign, [*head, *row])
    wanted = list(dict.fromkeys((*(columns or held), *order)))
    fetched = _fetched(table, wanted, held)
    filters = " WHERE " + " AND ".join(tests) if tests else ""
    way = " DESC" if part.newest else ""
    ordered = ", ".join(_quoted(held[name]) + way for name in ([lead] if lead else []) + [time])
    names = ", ".join(f'"{name}"' for name in fetched)
    source = f'SELECT {names} FROM "{table}"{filters}'  # noqa: S608

    async def fetch(sql: str) -> list[dict[str, Any]]:
        return _rows(table, wanted, fetched, held, await connection.fetch(sql, *values, timeout=READ_SECONDS))

    rows = await fetch(f"{source} ORDER BY {ordered} LIMIT {int(part.limit)}")
    if len(rows) < part.limit or len(order) == 1:
        return in_order(rows, order, part)
    # All rows of the last instant, of which these may be any.
    tests = [
        f'"{name}" = {mark(name, value)}' for name, value in ((lead, where.get(lead)), (time, rows[-1][time])) if name
    ]
    together = " AND ".join(tests)
    return in_order(rows + await fetch(f"{source}{' AND' if filters else ' WHERE'} {together}"), order, part)


async def _describe(connection: Any, table: str) -> tuple[dict[str, Column], bool]:
    """A table's columns, none where there is no such table; and whether it is in chunks."""
    described = await connection.fetch(_DESCRIBE, f'"{table}"', timeout=CONNECT_SECONDS)
    return {row["attname"]: Column(*row[:4]) for row in described}, bool(described and described[0]["chunks"])


def _fetched(table: str, wanted: Sequence[str], held: Mapping[str, Column]) -> list[str]:
    """What is asked for to tell these columns: an instant in ns is told by the integer beside it."""
    return list(dict.fromkeys([*wanted, *(beside for c in wanted if (beside := _beside(table, held[c], held)))]))


def _rows(
    table: str, wanted: Sequence[str], fetched: Sequence[str], held: Mapping[str, Column], records: Sequence[Any]
) -> list[dict[str, Any]]:
    made = dict(zip(fetched, zip(*records, strict=True), strict=True)) if records else {}
    told = [_told(table, held[name], made, held) for name in wanted] if records else []
    return [dict(zip(wanted, row, strict=True)) for row in zip(*told, strict=True)]


def _quoted(column: Column) -> str:
    text = column.type in ("text", "varchar", "bpchar", "name") and column.collation != _C_COLLATION
    return f'"{column.name}"' + (' COLLATE "C"' if text else "")


def _beside(table: str, column: Column, held: Mapping[str, Column]) -> str:
    """The column of integers that tells this one's instants in ns; empty where there is none."""
    name = f"{column.name}_ns"
    exact = column.type == "timestamptz" and instant_unit(table, column.name) == "ns"
    return name if exact and name in held else ""


async def distinct(connection: Any, table: str, column: str, exchange: str | None = None) -> list[str]:
    """The values of a column, see shared.stores.distinct_sql; [] where there is no such table."""
    if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", table, timeout=READ_SECONDS):
        return []
    sql = distinct_sql(table, column, of_exchange=exchange is not None)
    found = await connection.fetch(sql, *(() if exchange is None else (exchange,)), timeout=READ_SECONDS)
    return [row["name"] for row in found]


async def exchanges(connection: Any, symbol: str, timeframe: str) -> list[str]:
    """The exchanges that have candles of a symbol in a timeframe, within a transaction."""
    if not await connection.fetchval("SELECT to_regclass('candles') IS NOT NULL", timeout=READ_SECONDS):
        return []
    return [row["exchange"] for row in await connection.fetch(EXCHANGES, symbol, timeframe, timeout=READ_SECONDS)]


# -- from ours into PostgreSQL's -------------------------------------------------------------


def _tests(
    table: str,
    where: Mapping[str, Any],
    since: str | None,
    until: str | None,
    held: Mapping[str, Column],
    between: str,
) -> tuple[list[str], list[Any]]:
    """Conditions and their values; the column `between` is not asked to be equal, but neither less nor more."""
    tests, values = [], list[Any]()

    def test(name: str, operator: str, value: Any) -> None:
        values.append(value)
        tests.append(f'"{name}" {operator} ${len(values)}')

    for name, value in where.items():
        beside = _beside(table, held[name], held)
        if beside:
            test(beside, "=", instant(str(value)))
        elif name == between:
            test(name, ">=", _value(held[name], value))
            test(name, "<=", _value(held[name], value))
        else:
            test(name, "=", _value(held[name], value))
    time = time_column(table)
    for operator, text in ((">=", since), ("<", until)):
        if text is None:
            continue
        column, first = held[time], not_before(table, text)
        if column.type != "timestamptz":
            test(time, operator, first)
            continue
        ns = instant(first)
        beside = _beside(table, column, held)
        if not beside:
            test(time, operator, _datetime(ns))
        elif operator == ">=":
            test(time, ">=", _datetime(ns))
            test(beside, ">=", ns)
        else:
            test(time, "<=", _datetime(ns + 999))
            test(beside, "<", ns)
    return tests, values


def _value(column: Column, value: Any) -> Any:
    """A value as the column wants it. Raises ConfigError."""
    try:
        if column.type == "timestamptz":
            return _datetime(instant(str(value)))
        if column.type == "bool":
            return bool(float(value))
        if column.type in ("float8", "float4"):
            return float(value)
        if column.type in ("int2", "int4", "int8"):
            if float(value) % 1:
                raise ValueError
            return int(value)
    except ValueError:
        raise ConfigError(f"{column.name} wants a number, not '{value}'") from None
    return str(value)


def _datetime(ns: int) -> datetime:
    return _EPOCH + timedelta(microseconds=ns // 1000)


# -- from PostgreSQL's into ours -------------------------------------------------------------


def _told(table: str, column: Column, made: Mapping[str, Sequence[Any]], held: Mapping[str, Column]) -> Sequence[Any]:
    """A column's values as every store tells them."""
    values = made[column.name]
    beside = _beside(table, column, held)
    if beside:
        return iso_texts(np.asarray(made[beside], np.int64), "ns")
    if column.type == "timestamptz":
        return _each(values, _seconds if instant_unit(table, column.name) == "s" else _microseconds)
    if column.type in ("jsonb", "json"):
        decode = _JSON.get(column.name, _any_json).decode
        return _each(values, lambda text: _json.encode(decode(text)).decode())
    if column.type == "bool":
        return _each(values, int)
    if column.type == "numeric":
        return _each(values, _number)
    if column.type == "date":
        return _each(values, str)
    return values


def _each(values: Sequence[Any], convert: Callable[[Any], Any]) -> list[Any]:
    """Each different value is converted once: a batch has few of them."""
    told = {value: convert(value) for value in set(values) if value is not None}
    return [told.get(value) for value in values]


def _seconds(at: datetime) -> str:
    return at.isoformat(timespec="seconds")[:19] + "Z"


def _microseconds(at: datetime) -> str:
    return at.isoformat(timespec="microseconds")[:26] + "Z"


def _number(value: Decimal) -> int | float:
    """What a view has summed: integers stay such."""
    return int(value) if value == value.to_integral_value() else float(value)


# -- the newest CVD --------------------------------------------------------------------------

_CHUNKS = "SELECT name, relhassubclass FROM unnest($1::text[]) AS name JOIN pg_class c ON c.oid = to_regclass(name)"
# One name's newest: by the key alone (see `select`), or in a hypertable from chunk to chunk, the newest first, once the
# name is known to be there at all.
_OF_TICKERS = """SELECT n.name, newest.cvd_close FROM unnest($1::text[], $2::timestamptz[]) AS n (name, at)
CROSS JOIN LATERAL (
    SELECT c.cvd_close FROM {table} AS c
    WHERE c.ticker >= n.name AND c.ticker <= n.name AND (c.ticker, c.time) <= (n.name, n.at) AND c.cvd_close IS NOT NULL
    ORDER BY c.ticker DESC, c.time DESC LIMIT 1
) AS newest"""
_OF_TICKERS_IN_CHUNKS = """SELECT n.name, newest.cvd_close
FROM (
    SELECT name, at FROM unnest($1::text[], $2::timestamptz[]) AS n (name, at)
    WHERE (SELECT c.ticker FROM {table} AS c WHERE c.ticker >= n.name ORDER BY c.ticker LIMIT 1) = name OFFSET 0
) AS n
CROSS JOIN LATERAL (
    SELECT c.cvd_close FROM {table} AS c WHERE c.ticker = n.name AND c.time <= n.at AND c.cvd_close IS NOT NULL
    ORDER BY c.time DESC LIMIT 1
) AS newest"""
# From one timeframe to the next by the index, not through all rows.
_TIMEFRAMES = """SELECT n.name, h.timeframe
FROM unnest($1::text[], $2::text[], $3::text[]) AS n (name, exchange, symbol)
CROSS JOIN LATERAL (
    WITH RECURSIVE held (timeframe) AS (
        SELECT min(timeframe) FROM candles WHERE exchange = n.exchange AND symbol = n.symbol
        UNION ALL
        SELECT (SELECT min(timeframe) FROM candles
            WHERE exchange = n.exchange AND symbol = n.symbol AND timeframe > held.timeframe)
        FROM held WHERE held.timeframe IS NOT NULL
    )
    SELECT timeframe FROM held WHERE timeframe IS NOT NULL
) AS h"""
_OF_CONTRACTS = """SELECT n.name, n.timeframe, newest.timestamp_in, newest.cvd_close
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamptz[])
    AS n (name, exchange, symbol, timeframe, at)
CROSS JOIN LATERAL (
    SELECT c.timestamp_in, c.cvd_close FROM candles AS c
    WHERE c.exchange = n.exchange AND c.symbol = n.symbol AND c.cvd_close IS NOT NULL AND {which} LIMIT 1
) AS newest"""
_BY_KEY = """c.timeframe >= n.timeframe AND c.timeframe <= n.timeframe
    AND (c.timeframe, c.timestamp_in) <= (n.timeframe, n.at) ORDER BY c.timeframe DESC, c.timestamp_in DESC"""
_IN_CHUNKS = "c.timeframe = n.timeframe AND c.timestamp_in <= n.at ORDER BY c.timestamp_in DESC"


async def _newest_cvds(connection: Any, names: Mapping[str, int]) -> dict[str, float]:
    async def fetch(sql: str, *columns: Sequence[Any]) -> list[Any]:
        rows: list[Any] = await connection.fetch(sql, *columns, timeout=READ_SECONDS)
        return rows

    tables = ("candles_1m", "candles_1s", "candles")
    chunks: dict[str, bool] = dict(await fetch(_CHUNKS, tables))
    found: dict[str, float] = {}
    for table, to_end_ns in (("candles_1m", 0), ("candles_1s", NS)):
        left = [name for name in names if name not in found]
        if table in chunks and left:
            before = [_second(names[name] - to_end_ns) for name in left]
            sql = _OF_TICKERS_IN_CHUNKS if chunks[table] else _OF_TICKERS
            found |= dict(await fetch(sql.format(table=table), left, before))
    split = [(name, *name.split(":", 1)) for name in names if name not in found and ":" in name]
    if "candles" not in chunks or not split:
        return found
    of = {name: (exchange, symbol) for name, exchange, symbol in split}
    asked = [
        (name, *of[name], timeframe, _second(names[name] - seconds_of(timeframe) * NS))
        for name, timeframe in await fetch(_TIMEFRAMES, *zip(*split, strict=True))
    ]
    newest: dict[str, tuple[datetime, float]] = {}
    sql = _OF_CONTRACTS.format(which=_IN_CHUNKS if chunks["candles"] else _BY_KEY)
    for name, timeframe, start, cvd in await fetch(sql, *zip(*asked, strict=True)) if asked else ():
        end = start + timedelta(seconds=seconds_of(timeframe))
        if name not in newest or end > newest[name][0]:
            newest[name] = (end, cvd)
    return found | {name: cvd for name, (_, cvd) in newest.items()}


def _second(ns: int) -> datetime:
    return _datetime(ns // NS * NS)
