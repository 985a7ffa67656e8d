"""Tables as data frames of pandas or polars, for notebooks: from a store, or from the API of a server.

    frame = read_candles("http://127.0.0.1:8000", "ES", "1m", since="2026-11-20T14:30Z")
    frame = read_candles("sqlite:///market.db", "ES", "1m", columns=["close", "volume", "cvd_close"], kind="polars")

A source is a store's URL (as TAPELINE_STORE), or the http:// address of `tapeline` serving its page, with its `token`
where it has one. Both give the same frame. Calls block, and work where an event loop runs already, as in Jupyter.

Columns are those of the store's tables, in their order (docs/tables.md). Instants are in UTC: in pandas
`datetime64[us, UTC]`, in polars `Datetime("us", "UTC")`; `start` and `end` of gaps are in ns. Flags are bool. What is
undefined is NaN in pandas (so an integer that may be undefined is a float there) and null in polars. Lists are lists.
Rows are in the order of their time; all of a range are read, however many pages that takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.api_rows import columns_of, rows_of_store
from shared.client import Instant, as_text, tapeline_client
from shared.errors import ConfigError
from shared.frames import PACKED
from shared.reader_bars import series_of
from shared.stores import one_exchange, page_order, read_rows
from shared.tables import GAP_COLUMNS, MESSAGE_TABLES, TABLES, instant_unit

PANDAS, POLARS = "pandas", "polars"
NEEDS_POLARS = "data frames of polars need it: pip install 'tapeline[history]'"
# Integers of candles that may be undefined.
_OPEN = frozenset(("divergence", "big_trades"))
_PANDAS = {"text": "str", "real": "float64", "integer": "int64", "integer?": "float64", "boolean": "bool",
           "json": "object"}  # fmt: skip
_POLARS = {"text": "String", "real": "Float64", "integer": "Int64", "integer?": "Int64", "boolean": "Boolean"}
_TOP_STRIKE = {"expiration_ns": "Int64", "strike": "Float64", "option_type": "String", "log_ratio": "Float64",
               "volume": "Float64"}  # fmt: skip


class _Asked(NamedTuple):
    """`path` is the table's in the API, `of` whose rows; `where` are columns that must be equal."""

    path: str
    of: str
    table: str
    where: Mapping[str, Any]
    timeframe: str = ""


def read_candles(
    source: str,
    symbol: str,
    timeframe: str = "1m",
    since: Instant | None = None,
    until: Instant | None = None,
    columns: Sequence[str] | None = None,
    kind: str = PANDAS,
    token: str = "",
) -> Any:
    """Bars of a symbol with `since` <= time < `until`; in pandas the time is the index.

    `timeframe`: a length (`15s`, `1m`, `4h`: rows of `candles`), `rolling` (of `candles_1m`) or `seconds` (of
    `candles_1s`). The time is that of the key: of a fixed candle its start, of a rolling one its end. `symbol`: `ES`,
    `ESZ6`, `exchange:symbol`; of a server also as people write it (`BTC-USDT`).

    Raises ConfigError (a symbol that several exchanges have, no such timeframe or column), AuthError, StoreUnavailable,
    Unavailable.
    """
    series = series_of(symbol, timeframe)
    time = series.table.time
    if columns is not None:
        columns = [time, *(name for name in columns if name != time)]
    frame = _read(
        source, _Asked("candles", symbol, series.table.name, series.where, series.timeframe), since, until, columns,
        kind, token,
    )  # fmt: skip
    return frame.set_index(time) if kind == PANDAS else frame


def read_pressure(
    source: str,
    underlying: str = "",
    since: Instant | None = None,
    until: Instant | None = None,
    columns: Sequence[str] | None = None,
    kind: str = PANDAS,
    token: str = "",
) -> Any:
    """Option pressure by key and window, of one underlying or of all."""
    asked = _Asked("pressure", underlying, "pressure_metrics", _of("underlying", underlying))
    return _read(source, asked, since, until, columns, kind, token)


def read_rollups(
    source: str,
    underlying: str = "",
    since: Instant | None = None,
    until: Instant | None = None,
    columns: Sequence[str] | None = None,
    kind: str = PANDAS,
    token: str = "",
) -> Any:
    """Option pressure by window alone."""
    asked = _Asked("rollups", underlying, "pressure_rollups", _of("underlying", underlying))
    return _read(source, asked, since, until, columns, kind, token)


def read_signals(
    source: str,
    underlying: str = "",
    since: Instant | None = None,
    until: Instant | None = None,
    columns: Sequence[str] | None = None,
    kind: str = PANDAS,
    token: str = "",
) -> Any:
    """Signals of every `status`."""
    asked = _Asked("signals", underlying, "signals", _of("underlying", underlying))
    return _read(source, asked, since, until, columns, kind, token)


def read_gaps(
    source: str,
    feed: str = "",
    since: Instant | None = None,
    until: Instant | None = None,
    columns: Sequence[str] | None = None,
    kind: str = PANDAS,
    token: str = "",
) -> Any:
    """Stretches of the tape that are lost, by their start."""
    return _read(source, _Asked("gaps", feed, "gaps", _of("feed", feed)), since, until, columns, kind, token)


def _of(column: str, value: str) -> dict[str, str]:
    return {column: value} if value else {}


def _read(
    source: str,
    asked: _Asked,
    since: Instant | None,
    until: Instant | None,
    columns: Sequence[str] | None,
    kind: str,
    token: str,
) -> Any:
    if kind not in (PANDAS, POLARS):
        raise ConfigError(f"kind = '{kind}': pandas or polars")
    held = columns_of(asked.table)
    for name in columns or ():
        if name not in held:
            raise ConfigError(f"{asked.table} has no column '{name}'; it has: {', '.join(held)}")
    make = _polars if kind == POLARS else _pandas
    names = held if columns is None else tuple(dict.fromkeys(columns))
    make(asked.table, names, [])  # before anything is asked for: is it installed?
    first, end = as_text(since), as_text(until)
    web = source.startswith(("http://", "https://"))
    work = (
        partial(asyncio.run, _pages(source, token, asked, first, end, names))
        if web
        else partial(_stored, source, asked, first, end, names)
    )
    with ThreadPoolExecutor(1, "dataframes") as threads:  # a notebook's own event loop runs already
        rows = threads.submit(work).result()
    return make(asked.table, names, rows)


async def _pages(
    url: str, token: str, asked: _Asked, since: str, until: str, names: Sequence[str]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    async with tapeline_client(url, token=token) as client:
        async for page in client.history(
            asked.path, asked.of, asked.timeframe, since=since or None, until=until or None, columns=names
        ):
            rows += page.rows
    return rows


def _stored(source: str, asked: _Asked, since: str, until: str, names: Sequence[str]) -> list[dict[str, Any]]:
    order = page_order(asked.table, asked.where)
    extra = [*order, "exchange"] if asked.table == "candles" else order
    rows = read_rows(
        source, asked.table, asked.where, since=since or None, until=until or None,
        columns=list(dict.fromkeys((*names, *extra))),
    )  # fmt: skip
    if asked.table == "candles":
        one_exchange(asked.of, sorted({row["exchange"] for row in rows}))
    rows.sort(key=lambda row: [row[name] for name in order])
    return rows_of_store(asked.table, rows)


# -- frames --------------------------------------------------------------------------------------


@cache
def _sorts(table: str) -> dict[str, str]:
    """What each column of a table holds: text, real, integer, boolean, json, s, us or ns (an instant); `?` behind an
    integer that may be undefined."""
    if table == "gaps":
        found = {name: "integer" if name.endswith("_ns") else "text" for name in GAP_COLUMNS}
    elif table in (bars := {t.name: kind for kind, t in TABLES.items()}):
        kinds = {name: PACKED[bars[table]][name].kind for name in PACKED[bars[table]].names or ()}
        found = {name: {"f": "real", "i": "integer"}.get(kinds.get(name, ""), "text") for name in columns_of(table)}
        found |= {"complete": "boolean", "latency_ms": "real"}
        found |= dict.fromkeys(_OPEN & found.keys(), "integer?")
    else:
        columns = next(t.columns for tables in MESSAGE_TABLES.values() for t in tables if t.name == table)
        found = {c.name: "integer?" if c.sort == "integer" and c.null else c.sort for c in columns}
    units = {name: instant_unit(table, name) for name in found}
    return found | {name: "ns" if unit == "ns" else "us" for name, unit in units.items() if unit}


def _instants(values: Sequence[str], unit: str) -> NDArray[np.datetime64]:
    return np.array([value.removesuffix("Z") for value in values], f"datetime64[{unit}]")


def _pandas(table: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Any:
    import pandas  # noqa: PLC0415 - takes a while

    made = {}
    for name in names:
        values, sort = [row[name] for row in rows], _sorts(table)[name]
        if sort in ("us", "ns"):
            made[name] = pandas.Series(_instants(values, sort)).dt.tz_localize("UTC")
        else:
            made[name] = pandas.Series(values, dtype=_PANDAS[sort])
    return pandas.DataFrame(made, columns=list(names))


def _polars(table: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Any:
    try:
        import polars as pl  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError(NEEDS_POLARS) from None
    strikes = pl.List(pl.Struct({name: getattr(pl, kind) for name, kind in _TOP_STRIKE.items()}))
    made = []
    for name in names:
        values, sort = [row[name] for row in rows], _sorts(table)[name]
        if sort in ("us", "ns"):
            made.append(pl.Series(name, _instants(values, sort)).dt.replace_time_zone("UTC"))
        elif sort == "json":
            made.append(pl.Series(name, values, dtype=strikes if name == "top_strikes" else pl.List(pl.String)))
        else:
            made.append(pl.Series(name, values, dtype=getattr(pl, _POLARS[sort])))
    return pl.DataFrame(made)
