"""Rows of a store page by page, and with each page how far the store had got when it was read.

    pages = Pages("sqlite:///market.db", connections=4)
    page = await pages.page(PageAsk("candles", {"symbol": "ES", "timeframe": "1m"}, limit=500, topic="candles"))
    older = await pages.page(PageAsk("candles", {"symbol": "ES", "timeframe": "1m"}, limit=500, cursor=page.next))

A page ends at a row, and the next one begins behind that row's time and key. So none is left out and none comes twice,
however many rows share an instant, and whatever is written meanwhile: it is found if it lies ahead.
"""

from __future__ import annotations

import asyncio
import base64
import sqlite3
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import asyncpg
import msgspec

from shared import store_postgres, store_sqlite
from shared.batches import Cursor, CursorKey
from shared.errors import ConfigError
from shared.store_async import PostgresReads, SqliteReads, cursors_of
from shared.stores import Slice, one_exchange, page_order, parse, read_rows

NEWEST, OLDEST = "newest", "oldest"

_Mark = list[str | int | float]
_marks = msgspec.json.Decoder(_Mark)


class PageAsk(NamedTuple):
    """Which rows: those equal in `where`, greater in `above`, with `since` <= time < `until` (ISO texts of instants).

    Of these at most `limit`: the newest, before `cursor` (a page's `next`), or the oldest behind it; none beyond the
    row that the cursor `upto` names. Only `columns`, where they are given. `topic`: whose cursors of the sinks come
    along; empty: none.
    """

    table: str
    where: Mapping[str, Any] = {}
    since: str | None = None
    until: str | None = None
    limit: int = 1000
    order: str = NEWEST
    cursor: str | None = None
    columns: Sequence[str] | None = None
    topic: str = ""
    above: Mapping[str, float] = {}
    upto: str | None = None


class Page(NamedTuple):
    """Rows, oldest first (time, then the rest of the key), with values as shared.stores.read_rows tells them.

    `next`: the cursor of the page behind this one, None where there is none. `cursors`: those of the sinks, of the
    same instant as the rows.
    """

    rows: list[dict[str, Any]]
    next: str | None
    cursors: dict[CursorKey, Cursor]


class Names(NamedTuple):
    """What there are rows of: (exchange, symbol) of fixed candles, tickers of rolling ones, underlyings of options."""

    series: list[tuple[str, str]]
    tickers: list[str]
    underlyings: list[str]


_NO_NAMES = Names([], [], [])


class _Store(Protocol):
    async def read(self, ask: PageAsk, part: Slice) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows from the end that they are seen from, and those of sink_cursors."""

    async def names(self) -> Names:
        """See Pages.names."""

    async def close(self) -> None: ...


class Pages:
    """The pages of one store, for asyncio: any number of tasks may ask at once, `connections` of them are served."""

    def __init__(self, store_url: str, connections: int) -> None:
        """Connects to nothing yet. Raises ConfigError for what is no URL of a store."""
        parsed = parse(store_url)
        self._store: _Store
        if parsed.scheme == "sqlite":
            self._store = _Sqlite(SqliteReads(parsed.path, connections))
        elif parsed.scheme == "postgresql":
            self._store = _Postgres(PostgresReads(store_url, connections))
        else:
            self._store = _Newest(store_url, parsed.scheme)

    async def page(self, ask: PageAsk) -> Page:
        """One page; empty where the store or the table does not exist yet.

        A candle's `symbol` without its `exchange` is looked for on all. Raises StoreUnavailable; ConfigError for what
        cannot be asked so: no such table or column, no page of this cursor, a symbol that several exchanges have.
        """
        if ask.order not in (NEWEST, OLDEST):
            raise ConfigError(f"'{ask.order}' is no order; write {NEWEST} or {OLDEST}")
        if ask.limit < 1:
            raise ConfigError(f"limit = {ask.limit}: at least 1")
        order = _order(ask)
        beyond, upto = (None if cursor is None else _row(ask, cursor, len(order)) for cursor in (ask.cursor, ask.upto))
        # One more tells whether there is a next page.
        part = Slice(ask.order == NEWEST, ask.limit + 1, beyond, ask.above, upto)
        try:
            rows, held = await self._store.read(ask, part)
        except (asyncpg.PostgresError, OverflowError, UnicodeError) as error:
            raise ConfigError(
                f"{ask.table} cannot be asked for such a value ({' '.join(str(error).split())})"
            ) from None
        following = None
        if len(rows) > ask.limit:
            rows.pop()
            following = _cursor(ask, [rows[-1][name] for name in order])
        if ask.order == NEWEST:
            rows.reverse()
        if ask.columns is not None:
            wanted = tuple(dict.fromkeys(ask.columns))
            if rows and tuple(rows[0]) != wanted:
                rows = [{name: row[name] for name in wanted} for row in rows]
        return Page(rows, following, cursors_of(held))

    async def names(self) -> Names:
        """Of what the store has rows, found by its indexes. Raises StoreUnavailable, ConfigError."""
        return await self._store.names()

    async def close(self) -> None:
        """Wait for what is being read, and let go of threads and connections."""
        await self._store.close()


class _Sqlite:
    def __init__(self, reads: SqliteReads) -> None:
        self._reads = reads
        self.close = reads.close

    async def read(self, ask: PageAsk, part: Slice) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        def work(connection: sqlite3.Connection) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            held = store_sqlite.select(connection, "sink_cursors", {"topic": ask.topic}) if ask.topic else []
            where: Mapping[str, Any] | None = ask.where
            if (symbol := _unqualified(ask)) is not None:
                where = _only(ask, store_sqlite.exchanges(connection, *symbol))
            if where is None:
                return [], held
            rows = store_sqlite.select_part(
                connection, ask.table, where, part, since=ask.since, until=ask.until, columns=ask.columns
            )
            return rows, held

        return await self._reads.run(work, ([], []))

    async def names(self) -> Names:
        def work(connection: sqlite3.Connection) -> Names:
            def held(table: str, column: str, exchange: str | None = None) -> list[str]:
                return store_sqlite.distinct(connection, table, column, exchange)

            series = [(e, s) for e in held("candles", "exchange") for s in held("candles", "symbol", e)]
            return Names(series, held("candles_1m", "ticker"), held("pressure_rollups", "underlying"))

        return await self._reads.run(work, _NO_NAMES)


class _Postgres:
    def __init__(self, reads: PostgresReads) -> None:
        self._reads = reads
        self.close = reads.close

    async def read(self, ask: PageAsk, part: Slice) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        async def work(connection: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            held = await store_postgres.select(connection, "sink_cursors", {"topic": ask.topic}) if ask.topic else []
            where: Mapping[str, Any] | None = ask.where
            if (symbol := _unqualified(ask)) is not None:
                where = _only(ask, await store_postgres.exchanges(connection, *symbol))
            if where is None:
                return [], held
            rows = await store_postgres.select_part(
                connection, ask.table, where, part, since=ask.since, until=ask.until, columns=ask.columns
            )
            return rows, held

        return await self._reads.run(work, ([], []), isolation="repeatable_read")

    async def names(self) -> Names:
        async def work(connection: Any) -> Names:
            async def held(table: str, column: str, exchange: str | None = None) -> list[str]:
                return await store_postgres.distinct(connection, table, column, exchange)

            series = [(e, s) for e in await held("candles", "exchange") for s in await held("candles", "symbol", e)]
            return Names(series, await held("candles_1m", "ticker"), await held("pressure_rollups", "underlying"))

        return await self._reads.run(work, _NO_NAMES)


class _Newest:
    """A store that is made for other reads than pages (BigQuery): it tells the newest rows of a range, and no more."""

    def __init__(self, url: str, scheme: str) -> None:
        self._url, self._scheme = url, scheme

    async def read(self, ask: PageAsk, part: Slice) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if not part.newest or part.marks or part.above:
            raise ConfigError(f"a {self._scheme} store tells only the newest rows of a range: narrow since and until")
        columns = None
        if ask.columns is not None:
            columns = list(dict.fromkeys((*ask.columns, *_order(ask))))
        rows = await asyncio.to_thread(
            read_rows, self._url, ask.table, ask.where,
            since=ask.since, until=ask.until, last=part.limit, columns=columns,
        )  # fmt: skip
        if (symbol := _unqualified(ask)) is not None:
            found = await asyncio.to_thread(
                read_rows, self._url, ask.table, dict(zip(("symbol", "timeframe"), symbol, strict=True)),
                since=ask.since, until=ask.until, last=part.limit, columns=["exchange"],
            )  # fmt: skip
            _only(ask, sorted({row["exchange"] for row in found}))
        order = _order(ask)
        rows.sort(key=lambda row: [row[name] for name in order], reverse=True)
        return rows, []

    async def names(self) -> Names:
        raise ConfigError(f"a {self._scheme} store does not list its series: they are told by the bus")

    async def close(self) -> None:
        """Nothing is held."""


def _order(ask: PageAsk) -> tuple[str, ...]:
    """The columns that order the rows: all are of one exchange, if it is not said of which."""
    return page_order(ask.table, ask.where if _unqualified(ask) is None else {**ask.where, "exchange": ""})


def _unqualified(ask: PageAsk) -> tuple[str, str] | None:
    """(symbol, timeframe) of candles whose exchange is not said."""
    if ask.table not in ("candles", "features") or "exchange" in ask.where or "symbol" not in ask.where:
        return None
    if "timeframe" not in ask.where:
        raise ConfigError(f"{ask.table} of a symbol are read with their timeframe")
    return ask.where["symbol"], ask.where["timeframe"]


def _only(ask: PageAsk, exchanges: Sequence[str]) -> dict[str, Any] | None:
    """`where` with the exchange that has the symbol; None where none has it yet."""
    exchange = one_exchange(ask.where["symbol"], exchanges)
    return {"exchange": exchange, **ask.where} if exchange else None


def _digest(ask: PageAsk) -> str:
    """What must be the same from page to page."""
    what = (ask.table, sorted(ask.where.items()), sorted(ask.above.items()), ask.order)
    return blake2b(msgspec.json.encode(what), digest_size=6).hexdigest()


def _cursor(ask: PageAsk, values: Sequence[Any]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode([_digest(ask), *values])).rstrip(b"=").decode()


def _row(ask: PageAsk, text: str, count: int) -> _Mark:
    """The row that a cursor names, by the columns of the page's order. Raises ConfigError."""
    try:
        digest, *values = _marks.decode(base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True))
    except ValueError:
        raise ConfigError(f"'{text[:40]}' is no cursor: give the `next` of a page as it was") from None
    if digest != _digest(ask) or len(values) != count:
        raise ConfigError("the cursor is of other rows: ask for the same table, filters and order as the page before")
    return values
