"""Store URLs, and the few things that other parts of the program read from a store, the same from every store."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from shared.errors import ConfigError
from shared.frames import iso, ns_of
from shared.registry import TOOLS, resolve
from shared.tables import GAP_KEY, LATE_KEY, MESSAGE_TABLES, TABLES, instant_unit, time_column

SCHEMES = {
    "sqlite": "sqlite:///relative.db or sqlite:////absolute/path.db",
    "postgresql": "postgresql://user:password@host:5432/database",
    "bigquery": "bigquery://project/dataset",
}
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", re.DOTALL)
_NAME = re.compile(r"^[a-z_][a-z0-9_]*$")
_BARS = ("contract_id", "timeframe_unit", "timeframe_value", "timestamp")
# A view has no key of its own, and what is a view in one store may be a table in another.
_ORDERS = {"features": TABLES["candle"].key, "usage": ("feed", "timestamp"), "ohlc_bars": _BARS}
# What pages are made of: a table's key.
_PAGED = {
    **{table.name: table.key for table in TABLES.values()},
    **{table.name: table.key for tables in MESSAGE_TABLES.values() for table in tables},
    "gaps": GAP_KEY, "late_trades": LATE_KEY, "features": TABLES["candle"].key,
}  # fmt: skip
# From one exchange to the next by the index, not through all rows; takes a symbol and a timeframe.
EXCHANGES = """WITH RECURSIVE held (exchange) AS (
    SELECT min(exchange) FROM candles
    UNION ALL
    SELECT (SELECT min(c.exchange) FROM candles AS c WHERE c.exchange > held.exchange)
    FROM held WHERE held.exchange IS NOT NULL
)
SELECT exchange FROM held WHERE (
    SELECT c.timeframe FROM candles AS c WHERE c.exchange = held.exchange AND c.symbol = $1 AND c.timeframe >= $2
    ORDER BY c.timeframe LIMIT 1
) = $2"""
# From one value of a column to the next by the index; of one exchange where `one` is filled so.
_DISTINCT = """WITH RECURSIVE held (name) AS (
    SELECT min({column}) FROM {table}{one}
    UNION ALL
    SELECT (SELECT min(c.{column}) FROM {table} AS c WHERE {of}c.{column} > held.name)
    FROM held WHERE held.name IS NOT NULL
)
SELECT name FROM held WHERE name IS NOT NULL"""
# How long a text of an instant is, without its Z, and how many ns its last digit counts.
_UNITS = {"s": (19, 1_000_000_000), "us": (26, 1_000), "ns": (29, 1)}


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A parsed store URL. `path` is set for sqlite; `shown` is safe to print, and so is repr."""

    scheme: str
    path: Path
    shown: str


class Slice(NamedTuple):
    """At most `limit` rows in the order of `page_order`, from its end (`newest`) or its start.

    `beyond`: those columns' values of a row, behind which the slice begins, as seen from that end; `upto`: of the row
    that it ends with at the latest. `above`: columns that must be greater than a number.
    """

    newest: bool
    limit: int
    beyond: Sequence[Any] | None = None
    above: Mapping[str, float] = {}
    upto: Sequence[Any] | None = None

    @property
    def marks(self) -> list[tuple[str, Sequence[Any]]]:
        """How its rows compare with other rows of the table, in its order."""
        signs = ("<", ">=") if self.newest else (">", "<=")
        return [(sign, row) for sign, row in zip(signs, (self.beyond, self.upto), strict=True) if row is not None]


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
    ConfigError, StoreUnavailable (a server that is down within about 10 s).
    """
    return cast("dict[str, float]", resolve(TOOLS[f"cvds-{parse(url).scheme}"])(url, names))


def newest_cvd(url: str, name: str, before_ns: int) -> float | None:
    """The same for one name; None where there is none."""
    return newest_cvds(url, {name: before_ns}).get(name)


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
    """Rows of a table or view as dicts, in the order of its key (text bytewise).

    `where` compares columns for equality; `since` <= time < `until` are ISO texts of instants, of the table's
    time column (`candles`: `timestamp_in`); `last` keeps the newest rows by it. `columns`: only these, for
    whoever reads many rows. [] for a store or table that does not exist yet.

    Every store gives the same values: an instant as ISO text (how fine, says `shared.tables.instant_unit`), a boolean
    as 0 or 1, a list as JSON text, what is undefined as None. Raises as `newest_cvds` does, and ConfigError for a
    column that the table has not.
    """
    for name in (table, *(where or ()), *(columns or ())):
        if not _NAME.match(name):
            raise ConfigError(f"'{name}' is no table or column of a store")
    rows = resolve(TOOLS[f"read-{parse(url).scheme}"])(
        url, table, where, since=since, until=until, last=last, columns=columns
    )
    return cast("list[dict[str, Any]]", rows)


def order_of(table: str, key: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """By which columns rows of a table are ordered: its primary key; of a view those that name its rows."""
    return _ORDERS.get(table) or tuple(key) or tuple(columns[:1])


def page_order(table: str, where: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that order a page: time, in ns where the table has that, then the rest of the key.

    Columns that `where` holds fast are left out. Raises ConfigError for a table that is not read in pages.
    """
    if table not in _PAGED:
        raise ConfigError(f"'{table}' is not read in pages; these are: {', '.join(_PAGED)}")
    time = time_column(table)
    exact = (f"{time}_ns",) if instant_unit(table, time) == "ns" else ()
    return tuple(dict.fromkeys((time, *exact, *(name for name in _PAGED[table] if name not in where))))


def in_order(rows: Sequence[dict[str, Any]], order: Sequence[str], part: Slice) -> list[dict[str, Any]]:
    """The rows that are of the slice, in its order; a row may be there twice."""
    found = {tuple(row[name] for name in order): row for row in rows}
    return [found[key] for key in sorted(found, reverse=part.newest)[: part.limit]]


def known(table: str, named: Sequence[str], columns: Sequence[str]) -> None:
    """Raises ConfigError for the first name that is no column of the table."""
    for name in named:
        if name not in columns:
            raise ConfigError(f"{table} has no column '{name}'; it has: {', '.join(columns)}")


def distinct_sql(table: str, column: str, *, of_exchange: bool) -> str:
    """Asks for the values of a column that an index begins with, behind the exchange ($1) or not; names are trusted."""
    one, of = (" WHERE exchange = $1", "c.exchange = $1 AND ") if of_exchange else ("", "")
    return _DISTINCT.format(table=table, column=column, one=one, of=of)


def one_exchange(symbol: str, exchanges: Sequence[str]) -> str | None:
    """The exchange of a symbol that was written without one; None where none has it. Raises ConfigError for several."""
    if len(exchanges) > 1:
        raise ConfigError(f"{symbol} is on {', '.join(exchanges)}: write exchange:{symbol}")
    return exchanges[0] if exchanges else None


def not_before(table: str, text: str) -> str:
    """The first value of the table's time column that is not before an ISO text, as text.

    Raises ConfigError for a text that is no instant.
    """
    unit = instant_unit(table, time_column(table))
    if unit is None:
        return text  # a day
    digits, step = _UNITS[unit]
    return iso(-(-instant(text) // step) * step)[:digits] + "Z"


def instant(text: str) -> int:
    """The instant of an ISO text in UTC, ns. Raises ConfigError."""
    try:
        return ns_of(text)
    except ValueError:
        raise ConfigError(f"'{text}' is no instant; write 2023-12-25T23:01:00Z") from None
