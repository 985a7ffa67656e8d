"""What other parts of the program read from a BigQuery store: see shared.stores, whose answers these are.

Each key once, instants as ISO text, flags as 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from services.sink_bigquery.clients import Missing, Target, bigquery, call, connect, target_at
from services.sink_bigquery.ledger import instant, select, us_of
from services.sink_bigquery.tables import FLAG, INSTANT, INTEGER, LAYOUTS, REAL, TEXT, Layout
from services.sink_bigquery.views import VIEW_KEYS, VIEW_TYPES, newest_rows, types_of
from shared.errors import AuthError, ConfigError
from shared.frames import iso
from shared.settings import BigQuery, load
from shared.stores import instant as instant_of
from shared.stores import known, not_before, order_of
from shared.tables import instant_unit, time_column
from shared.timeframes import UNITS

_WIDTH = {"s": 19, "us": 26, "ns": 29}
_PYTHON = {TEXT: str, INTEGER: int, REAL: float, FLAG: bool}
_SECONDS = " ".join(f"WHEN '{unit}' THEN {seconds}" for unit, seconds in UNITS.items())


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
    """Rows of a table or view as dicts, in the order of its key; [] for one that does not exist yet.

    As `shared.stores.read_rows`. Raises ConfigError, AuthError, StoreUnavailable.
    """
    types = types_of(LAYOUTS[table]) if table in LAYOUTS else VIEW_TYPES.get(table, {})
    if not types:
        return []
    target = _target(url)
    client = connect(target)
    try:
        known(table, (*(where or ()), *(columns or ())), tuple(types))
        sql, parameters, wanted = _statement(target, table, types, dict(where or {}), since, until, last, columns)
        found = _select(client, target, table, sql, parameters)
        return [_row(table, types, wanted, row) for row in found]
    except Missing:
        return []
    finally:
        client.close()


def newest_cvds(url: str, names: Mapping[str, int]) -> dict[str, float]:
    """As `shared.stores.newest_cvds`, with three queries at most. Raises ConfigError, AuthError, StoreUnavailable."""
    target = _target(url)
    client = connect(target)
    found: dict[str, float] = {}
    try:
        for sql in _cvd_statements(target):
            left = {name: before for name, before in names.items() if name not in found}
            if not left:
                break
            parameters = [
                bigquery.ArrayQueryParameter("names", "STRING", list(left)),
                bigquery.ArrayQueryParameter("befores", "INT64", [before // 1000 for before in left.values()]),
            ]
            try:
                rows = _select(client, target, "candles", sql, parameters)
                found |= {str(row["name"]): float(row["cvd_close"]) for row in rows}
            except Missing:
                continue
        return found
    finally:
        client.close()


def _select(client: Any, target: Target, table: str, sql: str, parameters: list[Any]) -> list[Any]:
    """Of a dataset that does not exist BigQuery says that it may not be queried, "or perhaps it does not exist"."""
    try:
        return select(client, target, sql, parameters)
    except AuthError:
        call(target, f"look at {table}", client.get_table, target.full(table))
        raise


def _target(url: str) -> Target:
    """The endpoint of a local server is a setting, and no part of the URL."""
    try:
        section = load().bigquery
    except ConfigError:
        section = BigQuery()
    return target_at(url, section)


def _statement(
    target: Target, table: str, types: dict[str, str], where: dict[str, Any], since: str | None, until: str | None,
    last: int | None, columns: Sequence[str] | None,
) -> tuple[str, list[Any], tuple[str, ...]]:  # fmt: skip
    layout = LAYOUTS.get(table)
    wanted = tuple(columns or types)
    time = time_column(table)
    # An instant finer than BigQuery keeps it is told by the integers beside it.
    beside = tuple(f"{c}_ns" for c in wanted if instant_unit(table, c) == "ns" and f"{c}_ns" not in wanted)
    inside, outside = list[str](), list[str]()
    parameters: list[Any] = []
    for i, (name, value) in enumerate(where.items()):
        test, parameter = _equals(table, types, name, value, f"w{i}")
        (inside if layout is None or name in layout.key else outside).append(test)
        parameters += parameter
    for sign, text, name in ((">=", since, "since"), ("<", until, "until")):
        if text is not None:
            test, parameter = _compares(table, types, time, sign, not_before(table, text), name)
            inside.append(test)
            parameters += parameter
    filters = " AND ".join(inside)
    source = target.named(table)
    names = tuple(dict.fromkeys((*wanted, *beside, *(layout.key if layout else types), *where, time)))
    names = tuple(name for name in names if name in types)
    rows = newest_rows(source, layout, names, filters) if layout else _plain(source, names, filters)
    if outside:
        rows = f"SELECT * FROM ({rows}) WHERE {' AND '.join(outside)}"  # noqa: S608
    if last is not None:
        rows = f"SELECT * FROM ({rows}) ORDER BY `{time}` DESC LIMIT {int(last)}"  # noqa: S608
    key = layout.key if layout else VIEW_KEYS.get(table, ())
    order = ", ".join(f"`{c}`" for c in order_of(table, key, tuple(types)))
    chosen = ", ".join(f"`{c}`" for c in (*wanted, *beside))
    return f"SELECT {chosen} FROM ({rows}) ORDER BY {order}", parameters, wanted  # noqa: S608


def _plain(source: str, names: Sequence[str], filters: str) -> str:
    where = f" WHERE {filters}" if filters else ""
    return f"SELECT {', '.join(f'`{c}`' for c in names)} FROM {source}{where}"  # noqa: S608


def _equals(table: str, types: dict[str, str], name: str, value: Any, parameter: str) -> tuple[str, list[Any]]:
    if value is None:
        return "FALSE", []  # as everywhere: nothing equals NULL
    if types[name] == INSTANT:
        return _compares(table, types, name, "=", str(value), parameter)
    kind = types[name]
    return f"`{name}` = @{parameter}", [bigquery.ScalarQueryParameter(parameter, kind, _PYTHON[kind](value))]


def _compares(
    table: str, types: dict[str, str], name: str, sign: str, text: str, parameter: str
) -> tuple[str, list[Any]]:
    """A column of instants (or of days, which are text) against an ISO text."""
    if types[name] != INSTANT:
        return f"`{name}` {sign} @{parameter}", [bigquery.ScalarQueryParameter(parameter, TEXT, text)]
    at_ns = instant_of(text)
    tests, parameters = [], []
    if instant_unit(table, name) == "ns" and f"{name}_ns" in types:
        tests.append(f"`{name}_ns` {sign} @{parameter}_ns")
        parameters.append(bigquery.ScalarQueryParameter(f"{parameter}_ns", INTEGER, at_ns))
        sign = {"<": "<="}.get(sign, sign)  # microseconds only narrow down the partitions
    tests.append(f"`{name}` {sign} @{parameter}")
    parameters.append(instant(parameter, at_ns // 1000))
    return " AND ".join(tests), parameters


def _row(table: str, types: dict[str, str], wanted: Sequence[str], row: Any) -> dict[str, Any]:
    return {name: _value(table, types, name, row) for name in wanted}


def _value(table: str, types: dict[str, str], name: str, row: Any) -> Any:
    value = row[name]
    if value is None:
        return None
    if types[name] == INSTANT:
        unit = instant_unit(table, name) or "us"
        at_ns = int(row[f"{name}_ns"]) if unit == "ns" and f"{name}_ns" in types else us_of(value) * 1000
        return iso(at_ns)[: _WIDTH[unit]] + "Z"
    return int(value) if types[name] == FLAG else value


def _cvd_statements(target: Target) -> Iterator[str]:
    """The newest `cvd_close` by name that ended by its instant: of rolling candles, then of fixed ones."""
    for table, length_us in (("candles_1m", 0), ("candles_1s", 1_000_000)):
        end = f"UNIX_MICROS(`time`) + {length_us}"
        yield _cvd(target, LAYOUTS[table], "ticker", end, "ticker IN UNNEST(@names)", "end_us DESC")
    length = f"CAST(SUBSTR(timeframe, 1, LENGTH(timeframe) - 1) AS INT64) * CASE SUBSTR(timeframe, -1) {_SECONDS} END"
    name = "CONCAT(exchange, ':', symbol)"
    end = f"UNIX_MICROS(timestamp_in) + {length} * 1000000"
    yield _cvd(target, LAYOUTS["candles"], name, end, f"{name} IN UNNEST(@names)", "end_us DESC, timeframe")


def _cvd(target: Target, layout: Layout, name: str, end: str, filters: str, order: str) -> str:
    columns = tuple(dict.fromkeys((*layout.key, layout.time, "cvd_close", *layout.cluster)))
    rows = newest_rows(target.named(layout.name), layout, columns, filters)
    return (
        "SELECT name, cvd_close FROM (SELECT name, cvd_close, "  # noqa: S608
        f"ROW_NUMBER() OVER (PARTITION BY name ORDER BY {order}) AS newest FROM ("
        f"SELECT c.*, k.name FROM (SELECT *, {name} AS known_as, {end} AS end_us FROM ({rows})) AS c "
        "JOIN (SELECT name, before FROM UNNEST(@names) AS name WITH OFFSET AS i "
        "JOIN UNNEST(@befores) AS before WITH OFFSET AS j ON i = j) AS k ON c.known_as = k.name "
        "WHERE c.cvd_close IS NOT NULL AND c.end_us <= k.before)) WHERE newest = 1"
    )
