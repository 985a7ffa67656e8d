"""The store as the reader asks it: bars, and with them how far the store has got, all of one instant."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from shared import postgres, store_postgres, store_sqlite
from shared.batches import Cursor, CursorKey
from shared.errors import ConfigError
from shared.reader_bars import Bar, Series, bars_of_rows
from shared.stores import parse

T = TypeVar("T")

TOPIC = "candles"
# From one exchange to the next by the index, not through all rows.
_EXCHANGES = """WITH RECURSIVE held (exchange) AS (
    SELECT min(exchange) FROM candles
    UNION ALL
    SELECT (SELECT min(c.exchange) FROM candles AS c WHERE c.exchange > held.exchange)
    FROM held WHERE held.exchange IS NOT NULL
)
SELECT exchange FROM held WHERE (
    SELECT c.timeframe FROM candles AS c WHERE c.exchange = held.exchange AND c.symbol = $1 AND c.timeframe >= $2
    ORDER BY c.timeframe LIMIT 1
) = $2"""


class Ask(NamedTuple):
    """Which bars: `since` <= time < `until` (ISO texts), and of these the newest `last`."""

    series: Series
    since: str | None = None
    until: str | None = None
    last: int | None = None


class Snapshot(NamedTuple):
    """Bars in the order of their time, and the cursors of the topic `candles` that belong to them."""

    bars: list[Bar]
    cursors: dict[CursorKey, Cursor]


class BarStore(Protocol):
    """A store that the reader can ask. Each call raises StoreUnavailable, ConfigError."""

    async def bars(self, ask: Ask) -> list[Bar]:
        """The bars; [] where the store or its table does not exist yet."""

    async def snapshot(self, ask: Ask) -> Snapshot:
        """The same with the cursors."""

    async def close(self) -> None: ...


async def store_at(url: str, connections: int) -> BarStore:
    """The store of a URL, not connected yet; at most so many queries at once. Raises ConfigError."""
    parsed = parse(url)
    if parsed.scheme == "sqlite":
        return SqliteBars(parsed.path, connections)
    if parsed.scheme == "postgresql":
        return PostgresBars(url, await postgres.pool(url, connections))
    raise ConfigError(f"bars are read from sqlite:/// and postgresql:// stores, not from {parsed.shown}")


def _only(series: Series, exchanges: list[str]) -> Series | None:
    """The series with the exchange that it is on; None where there is none yet."""
    if len(exchanges) > 1:
        raise ConfigError(f"{series.symbol} is on {', '.join(exchanges)}: write exchange:{series.symbol}")
    return series._replace(exchange=exchanges[0]) if exchanges else None


def _cursors(rows: list[dict[str, Any]]) -> dict[CursorKey, Cursor]:
    return {(row["bus"], row["topic"], row["partition"]): Cursor(row["seq"], row["stream_id"]) for row in rows}


class SqliteBars:
    """A SQLite file; its queries are made in threads, each on a connection of its own."""

    def __init__(self, path: Path, connections: int) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(connections, "reader")
        self._running: set[asyncio.Future[Any]] = set()

    async def bars(self, ask: Ask) -> list[Bar]:
        return (await self._ask(ask)).bars

    async def snapshot(self, ask: Ask) -> Snapshot:
        return await self._ask(ask, cursors=True)

    async def _ask(self, ask: Ask, *, cursors: bool = False) -> Snapshot:
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._read, ask, cursors)
        self._running.add(work)
        work.add_done_callback(self._done)
        return await asyncio.shield(work)

    def _done(self, work: asyncio.Future[Any]) -> None:
        self._running.discard(work)
        if not work.cancelled():
            work.exception()  # told to whoever still waits for it

    def _read(self, ask: Ask, cursors: bool) -> Snapshot:
        with store_sqlite.reading(self._path) as connection:
            if connection is None:
                return Snapshot([], {})
            connection.execute("BEGIN")  # in a write-ahead log one instant for all that follows
            held = store_sqlite.select(connection, "sink_cursors", {"topic": TOPIC}) if cursors else []
            series: Series | None = ask.series
            if series is not None and not series.exchange and not series.of_ticker:
                series = _only(series, _exchanges(connection, series))
            if series is None:
                return Snapshot([], _cursors(held))
            rows = store_sqlite.select(
                connection, series.table.name, series.where, since=ask.since, until=ask.until, last=ask.last
            )
        return Snapshot(bars_of_rows(series.table, rows), _cursors(held))

    async def close(self) -> None:
        await asyncio.gather(*self._running, return_exceptions=True)
        self._threads.shutdown()


def _exchanges(connection: sqlite3.Connection, series: Series) -> list[str]:
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'candles'").fetchone():
        return []
    found = connection.execute(_EXCHANGES.replace("$", "?"), (series.symbol, series.timeframe))
    return [exchange for (exchange,) in found]


class PostgresBars:
    """A PostgreSQL database, through one pool of connections."""

    def __init__(self, url: str, pool: Any) -> None:
        self._url, self._pool = url, pool

    async def bars(self, ask: Ask) -> list[Bar]:
        async def read(connection: Any) -> list[Bar]:
            return await _select(connection, ask)

        return await self._transaction("read_committed", read, [])

    async def snapshot(self, ask: Ask) -> Snapshot:
        async def read(connection: Any) -> Snapshot:
            held = await store_postgres.select(connection, "sink_cursors", {"topic": TOPIC})
            return Snapshot(await _select(connection, ask), _cursors(held))

        return await self._transaction("repeatable_read", read, Snapshot([], {}))

    async def _transaction(self, isolation: str, work: Callable[[Any], Awaitable[T]], nothing: T) -> T:
        try:
            with postgres.errors(self._url):
                async with (
                    self._pool.acquire(timeout=postgres.CONNECT_SECONDS) as connection,
                    connection.transaction(isolation=isolation, readonly=True),
                ):
                    return await work(connection)
        except postgres.DatabaseMissing:
            return nothing

    async def close(self) -> None:
        try:
            await asyncio.wait_for(self._pool.close(), postgres.CONNECT_SECONDS)
        except TimeoutError:
            self._pool.terminate()


async def _select(connection: Any, ask: Ask) -> list[Bar]:
    series: Series | None = ask.series
    if series is not None and not series.exchange and not series.of_ticker:
        limit, found = store_postgres.READ_SECONDS, []
        if await connection.fetchval("SELECT to_regclass('candles') IS NOT NULL", timeout=limit):
            found = await connection.fetch(_EXCHANGES, series.symbol, series.timeframe, timeout=limit)
        series = _only(series, [row["exchange"] for row in found])
    if series is None:
        return []
    rows = await store_postgres.select(
        connection, series.table.name, series.where, since=ask.since, until=ask.until, last=ask.last
    )
    return bars_of_rows(series.table, rows)
