"""Bars for strategies: the newest, a range, or all that come from now on, without a gap and without a double.

    async with MarketReader("postgresql://tapeline@db/market", redis_url="redis://localhost:6390/0") as reader:
        warm = await reader.latest("ES", "1m", n=200)
        async for bar in reader.follow("ES", "1m", history=20):
            print(bar.end, bar.close, bar.cvd_close, bar.revision)

Reads SQLite and PostgreSQL stores; only `follow` needs Redis. For asyncio alone: one reader belongs to one event loop,
any number of tasks may use it at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from types import TracebackType
from typing import NamedTuple

from shared.errors import ConfigError
from shared.frames import iso
from shared.reader_bars import ROLLING, SECONDS, Bar, FixedBar, RollingBar, SecondBar, instant_ns, series_of
from shared.reader_cache import BarCache
from shared.reader_feed import Feed
from shared.reader_follow import Following
from shared.reader_store import Ask, BarStore, store_at
from shared.stores import parse

__all__ = ["ROLLING", "SECONDS", "Bar", "CacheStats", "FixedBar", "MarketReader", "RollingBar", "SecondBar"]

CONNECTIONS = 4
CACHE_BARS = 10_000
CACHE_SECONDS = 1.0


class CacheStats(NamedTuple):
    """Calls that the cache answered, queries that were made, bars held now."""

    hits: int
    misses: int
    bars: int


class MarketReader:
    """An asynchronous reader of one store's bars; see the module for an example.

    `store_url` as TAPELINE_STORE, `redis_url` as REDIS_URL (empty: no `follow`), `namespace` and `cluster` as in the
    settings. At most `connections` queries run at once. Results of `latest` and `bars` are kept in memory: at most
    `cache_bars` bars, each for less than `cache_seconds` (0: none) by `clock`.

    Symbols: a continuous ticker or contract (`ES`, `ESZ6`), or `exchange:symbol` (`binance-futures:BTCUSDT`).
    Timeframes: a length of fixed candles (`15s`, `1m`, `4h`: FixedBar, rows of `candles`), or `rolling` (RollingBar,
    rows of `candles_1m`, which are of tickers: `ES`, and for crypto `exchange:symbol`), or `seconds` (SecondBar, rows
    of `candles_1s`, of tickers too).
    """

    def __init__(
        self,
        store_url: str,
        *,
        redis_url: str = "",
        namespace: str = "md",
        cluster: bool = False,
        connections: int = CONNECTIONS,
        cache_bars: int = CACHE_BARS,
        cache_seconds: float = CACHE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects to nothing yet. Raises ConfigError for what is no URL of a store."""
        parse(store_url)
        if connections < 1:
            raise ConfigError(f"connections = {connections}: at least 1")
        self._url, self._connections = store_url, connections
        self._redis = (redis_url, namespace, cluster)
        self._cache = BarCache(cache_bars, cache_seconds, clock)
        self._closing = asyncio.Event()
        self._store: BarStore | None = None
        self._feed: Feed | None = None

    async def __aenter__(self) -> MarketReader:
        self._store = await store_at(self._url, self._connections)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every `follow`, and let go of threads and connections. May be called again."""
        self._closing.set()
        store, self._store = self._store, None
        feed, self._feed = self._feed, None
        await self._cache.close()
        if feed is not None:
            await feed.close()
        if store is not None:
            await store.close()

    @property
    def stats(self) -> CacheStats:
        return CacheStats(self._cache.hits, self._cache.misses, len(self._cache))

    async def latest(self, symbol: str, timeframe: str = "1m", *, n: int = 1) -> list[Bar]:
        """The newest `n` bars, oldest first; fewer where there are fewer.

        Raises StoreUnavailable, ConfigError (no such timeframe; a symbol that several exchanges have).
        """
        if n < 1:
            raise ConfigError(f"n = {n}: at least 1")
        return await self._ask(Ask(series_of(symbol, timeframe), last=n))

    async def bars(
        self,
        symbol: str,
        timeframe: str = "1m",
        since: datetime | int | str | None = None,
        until: datetime | int | str | None = None,
    ) -> list[Bar]:
        """The bars with `since` <= time < `until` (None: no bound), oldest first.

        The time is that of the bar's key: of a fixed candle its start, of a rolling one its end. Instants are aware
        datetimes, ns, or ISO texts. Raises as `latest` does.
        """
        first, end = (None if at is None else iso(instant_ns(at)) for at in (since, until))
        return await self._ask(Ask(series_of(symbol, timeframe), first, end))

    async def _ask(self, ask: Ask) -> list[Bar]:
        store = self._open()
        return await self._cache.get(ask, lambda: store.bars(ask))

    def _open(self) -> BarStore:
        if self._store is None:
            raise ConfigError("the reader is not open: use it inside `async with MarketReader(...) as reader`")
        return self._store

    async def follow(
        self,
        symbol: str,
        timeframe: str = "1m",
        *,
        history: int = 0,
        since: datetime | int | str | None = None,
    ) -> AsyncIterator[Bar]:
        """Bars from the store (the newest `history`, or all `since` an instant), then each as it is made.

        Every bar from the first one on comes once, and again, with its `revision`, for each correction of it; of
        corrections that came while nobody listened only the newest. Bars of one revision never come twice.

        Goes on by itself: while Redis or the store does not answer, or its sink is behind, it waits (the log says so);
        where the stream no longer holds its place it goes through the store. Ends when the reader is closed. A bar that
        the store refuses is delivered all the same. Raises ConfigError, AuthError, VersionError.
        """
        if history and since is not None:
            raise ConfigError("follow takes history or since, not both")
        url, namespace, cluster = self._redis
        if not url:
            raise ConfigError("follow needs the bus: give the reader a redis_url")
        series, store = series_of(symbol, timeframe), self._open()
        since_ns = None if since is None else instant_ns(since)
        if self._feed is None:
            self._feed = Feed(url, namespace, cluster=cluster)
        closing = self._closing
        following = Following(store, self._feed, series, history=history, since_ns=since_ns, closing=closing)
        while not closing.is_set():
            try:
                bars = await following.more()
            except Exception:
                if closing.is_set():
                    return  # what was open was closed under it
                raise
            for bar in bars:
                yield bar
