"""Stores read from an event loop: SQLite in threads, PostgreSQL through one pool; each call is one transaction."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from shared import postgres, store_postgres, store_sqlite
from shared.batches import Cursor, CursorKey
from shared.errors import StoreUnavailable

T = TypeVar("T")

# How many steps of SQLite's machine pass between two looks whether a query is still wanted: about a millisecond.
_STEPS = 50_000


class SqliteReads:
    """A SQLite file, read by at most `connections` threads, each time on a connection of its own."""

    def __init__(self, path: Path, connections: int) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(connections, "store")
        self._running: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[sqlite3.Connection], T], nothing: T) -> T:
        """What `work` gives in a transaction, all of one instant; `nothing` where there is no file.

        A query ends when its caller is cancelled. Raises StoreUnavailable, ConfigError.
        """
        unwanted = threading.Event()
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._run, work, nothing, unwanted)
        self._running.add(running)
        running.add_done_callback(self._done)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            unwanted.set()
            raise

    def _done(self, running: asyncio.Future[Any]) -> None:
        self._running.discard(running)
        if not running.cancelled():
            running.exception()  # told to whoever still waits for it

    def _run(self, work: Callable[[sqlite3.Connection], T], nothing: T, unwanted: threading.Event) -> T:
        end = time.monotonic() + store_postgres.READ_SECONDS
        with store_sqlite.reading(self._path) as connection:
            if connection is None:
                return nothing
            connection.set_progress_handler(lambda: unwanted.is_set() or time.monotonic() > end, _STEPS)
            connection.execute("BEGIN")  # in a write-ahead log one instant for all that follows
            try:
                return work(connection)
            except sqlite3.OperationalError:
                if time.monotonic() <= end:
                    raise
                spent = f"SQLite {self._path} was read for {store_postgres.READ_SECONDS:.0f} s in vain"
                raise StoreUnavailable(f"{spent}: ask for a shorter range") from None

    async def close(self) -> None:
        await asyncio.gather(*self._running, return_exceptions=True)
        self._threads.shutdown()


class PostgresReads:
    """A PostgreSQL database, through a pool of at most `connections`, which is made by the first read."""

    def __init__(self, url: str, connections: int) -> None:
        self._url, self._connections = url, connections
        self._pool: Any = None
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Make the pool; connects to nothing yet. Raises ConfigError for a URL that PostgreSQL does not take."""
        async with self._lock:
            if self._pool is None:
                self._pool = await postgres.pool(self._url, self._connections)

    async def run(self, work: Callable[[Any], Awaitable[T]], nothing: T, *, isolation: str = "read_committed") -> T:
        """What `work` gives in a transaction; `nothing` where the server has no such database.

        Raises StoreUnavailable, AuthError, ConfigError.
        """
        await self.open()
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
        if self._pool is None:
            return
        try:
            await asyncio.wait_for(self._pool.close(), postgres.CONNECT_SECONDS)
        except TimeoutError:
            self._pool.terminate()


def cursors_of(rows: list[dict[str, Any]]) -> dict[CursorKey, Cursor]:
    """Rows of `sink_cursors` by stream."""
    return {(row["bus"], row["topic"], row["partition"]): Cursor(row["seq"], row["stream_id"]) for row in rows}
