"""The store as the reader asks it: bars, and with them how far the store has got, all of one instant."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shared import store_postgres, store_sqlite
from shared.batches import Cursor, CursorKey
from shared.errors import ConfigError
from shared.reader_bars import Bar, Series, bars_of_rows
from shared.store_async import PostgresReads, SqliteReads, cursors_of
from shared.stores import one_exchange, parse

TOPIC = "candles"


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
        reads = PostgresReads(url, connections)
        await reads.open()
        return PostgresBars(reads)
    raise ConfigError(f"bars are read from sqlite:/// and postgresql:// stores, not from {parsed.shown}")


def _only(series: Series, exchanges: list[str]) -> Series | None:
    """The series with the exchange that it is on; None where there is none yet."""
    exchange = one_exchange(series.symbol, exchanges)
    return series._replace(exchange=exchange) if exchange else None


class SqliteBars:
    """A SQLite file."""

    def __init__(self, path: Path, connections: int) -> None:
        self._reads = SqliteReads(path, connections)

    async def bars(self, ask: Ask) -> list[Bar]:
        return (await self._ask(ask)).bars

    async def snapshot(self, ask: Ask) -> Snapshot:
        return await self._ask(ask, cursors=True)

    async def _ask(self, ask: Ask, *, cursors: bool = False) -> Snapshot:
        def read(connection: sqlite3.Connection) -> Snapshot:
            held = store_sqlite.select(connection, "sink_cursors", {"topic": TOPIC}) if cursors else []
            series: Series | None = ask.series
            if series is not None and not series.exchange and not series.of_ticker:
                series = _only(series, store_sqlite.exchanges(connection, series.symbol, series.timeframe))
            if series is None:
                return Snapshot([], cursors_of(held))
            rows = store_sqlite.select(
                connection, series.table.name, series.where, since=ask.since, until=ask.until, last=ask.last
            )
            return Snapshot(bars_of_rows(series.table, rows), cursors_of(held))

        return await self._reads.run(read, Snapshot([], {}))

    async def close(self) -> None:
        await self._reads.close()


class PostgresBars:
    """A PostgreSQL database."""

    def __init__(self, reads: PostgresReads) -> None:
        self._reads = reads

    async def bars(self, ask: Ask) -> list[Bar]:
        async def read(connection: Any) -> list[Bar]:
            return await _select(connection, ask)

        return await self._reads.run(read, [])

    async def snapshot(self, ask: Ask) -> Snapshot:
        async def read(connection: Any) -> Snapshot:
            held = await store_postgres.select(connection, "sink_cursors", {"topic": TOPIC})
            return Snapshot(await _select(connection, ask), cursors_of(held))

        return await self._reads.run(read, Snapshot([], {}), isolation="repeatable_read")

    async def close(self) -> None:
        await self._reads.close()


async def _select(connection: Any, ask: Ask) -> list[Bar]:
    series: Series | None = ask.series
    if series is not None and not series.exchange and not series.of_ticker:
        series = _only(series, await store_postgres.exchanges(connection, series.symbol, series.timeframe))
    if series is None:
        return []
    rows = await store_postgres.select(
        connection, series.table.name, series.where, since=ask.since, until=ask.until, last=ask.last
    )
    return bars_of_rows(series.table, rows)
