"""Pages of real stores: none left out, none twice, found by an index, and with the cursors of the same instant."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.sink_sqlite.store import SqliteStore
from services.sink_timescale.store import TimescaleStore
from shared import store_postgres, store_sqlite
from shared.batches import Cursor, Item, Source, batch_of
from shared.errors import ConfigError, StoreUnavailable
from shared.frames import NS, Frame
from shared.postgres import connect
from shared.store_pages import Page, PageAsk, Pages
from shared.stores import Slice, page_order, read_rows
from tests.postgres import free_port
from tests.services.sink_sqlite.tape import (
    FIXED_NAMES,
    T0,
    bars,
    candles,
    fixed,
    gap,
    pressure,
    rollup,
    rows,
    said,
    signal,
)

BOTH = pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
ES = {"exchange": "GLBX.MDP3", "symbol": "ES", "timeframe": "1m"}
BITCOIN = {"exchange": "binance-futures", "symbol": "BTCUSDT", "timeframe": "1m"}


@dataclass
class Written:
    """A store of either kind."""

    url: str
    made: Any
    seqs: dict[str, int] = field(default_factory=dict)

    def put(self, *frames: Frame, topic: str = "candles") -> None:
        """Write frames in one batch."""
        items = []
        for frame in frames:
            seq = self.seqs[topic] = self.seqs.get(topic, 0) + 1
            items.append(Item(Source("a", topic, 0, seq, f"{seq}-0"), frame))
        self.made.write(batch_of(items))


@pytest.fixture
def store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Written]:
    path = tmp_path / "store.db"
    url = request.getfixturevalue("pg_url") if kind == "postgresql" else f"sqlite:///{path}"
    made: Any = TimescaleStore(url) if kind == "postgresql" else SqliteStore(path)
    made.open()
    yield Written(url, made)
    made.close()


def asking(url: str, work: Callable[[Pages], Awaitable[Any]]) -> Any:
    async def inside() -> Any:
        pages = Pages(url, 2)
        try:
            return await work(pages)
        finally:
            await pages.close()

    return asyncio.run(inside())


async def walk(pages: Pages, ask: PageAsk) -> list[Page]:
    found = [await pages.page(ask)]
    while found[-1].next is not None:
        found.append(await pages.page(ask._replace(cursor=found[-1].next)))
    return found


def joined(found: list[Page], order: str) -> list[dict[str, Any]]:
    return [row for page in (found if order == "oldest" else reversed(found)) for row in page.rows]


def filled(store: Written) -> None:
    # Of one second two contracts: rows of one ticker that share their instant.
    seconds = np.concatenate([rows(30), rows(30)])
    seconds["name"][30:] = 2 + np.arange(30) % 2
    names = [("ES", "ESH4"), ("6E", "6EH4"), ("ES", "ESM4"), ("6E", "6EM4")]
    store.put(candles(rows(30)), candles(seconds, "candle_1s", names), bars(fixed(30)), bars(fixed(10, seconds=15)))
    store.put(*(gap(T0 + at // 3, (f"S{at % 3}",)) for at in range(9)))
    store.put(said(*(pressure(n) for n in range(23))), said(*(rollup(n) for n in range(7))), topic="pressure")
    store.put(said(*(signal(n) for n in range(23))), topic="signals")


ASKS = {
    "candles": PageAsk("candles", BITCOIN),
    "fifteen": PageAsk("candles", BITCOIN | {"timeframe": "15s"}),
    "features": PageAsk("features", BITCOIN),
    "rolling": PageAsk("candles_1m", {"ticker": "ES"}),
    "seconds": PageAsk("candles_1s", {"ticker": "ES"}),
    "big": PageAsk("candles_1s", {"ticker": "ES"}, above={"big_trades": 2}),
    "range": PageAsk("candles", BITCOIN, "2023-12-25T23:03:00Z", "2023-12-25T23:11:00Z"),
    "seconds of a range": PageAsk("candles_1s", {"ticker": "ES"}, "2023-12-25T23:01:03Z", "2023-12-25T23:01:09.5Z"),
    "pressure": PageAsk("pressure_metrics", {"underlying": "NQ"}),
    "a strike": PageAsk(
        "pressure_metrics",
        {"underlying": "NQ", "expiration": "2024-03-29T08:00:00Z", "strike": 17000.5, "option_type": "C"},
    ),
    "a strike of any expiration": PageAsk("pressure_metrics", {"underlying": "NQ", "strike": 17000.5}),
    "some pressure": PageAsk("pressure_metrics", {"underlying": "NQ"}, since="2023-12-25T23:10:00Z"),
    "rollups": PageAsk("pressure_rollups", {"underlying": "NQ"}),
    "signals": PageAsk("signals"),
    "signals of one": PageAsk("signals", {"underlying": "NQ", "grade": "HIGH"}),
    "gaps": PageAsk("gaps"),
    "gaps of a feed": PageAsk("gaps", {"feed": "glbx"}, since="2023-12-25T23:01:00.000000001Z"),
}
KEYS = {
    "candles": ("timestamp_in",), "features": ("timestamp_in",), "candles_1m": ("time",),
    "candles_1s": ("time", "symbol"), "pressure_metrics": ("time_window", "expiration", "strike", "option_type"),
    "pressure_rollups": ("time_window",), "signals": ("time_window", "expiration", "strike", "option_type", "source"),
    "gaps": ("start", "feed", "end_ns", "symbols"),
}  # fmt: skip


@BOTH
def test_pages_together_are_the_rows_of_the_table(store: Written, kind: str) -> None:
    filled(store)

    async def look(pages: Pages) -> None:
        for name, ask in ASKS.items():
            told = read_rows(store.url, ask.table, ask.where, since=ask.since, until=ask.until)
            told = [row for row in told if all(row[c] > least for c, least in ask.above.items())]
            told.sort(key=lambda row: [row[column] for column in KEYS[ask.table]])
            assert len(told) > 3, name
            for order in ("newest", "oldest"):
                for limit in (3, len(told)):
                    found = await walk(pages, ask._replace(order=order, limit=limit))
                    assert joined(found, order) == told, (name, order, limit)
                    assert [len(page.rows) for page in found[:-1]] == [limit] * (len(found) - 1)
                    assert found[-1].rows
                half = await pages.page(ask._replace(order=order, limit=2))
                assert (await walk(pages, ask._replace(order=order, limit=1, upto=half.next)))[-1].next is None
                bound = await pages.page(ask._replace(order=order, upto=half.next))
                assert bound == half._replace(next=None)

    asking(store.url, look)


@BOTH
def test_columns_and_cursors_of_the_sinks_come_with_a_page(store: Written, kind: str) -> None:
    filled(store)

    async def look(pages: Pages) -> None:
        ask = PageAsk("candles", BITCOIN, limit=2, columns=("volume", "close", "volume"), topic="candles")
        page = await pages.page(ask)
        whole = await pages.page(ask._replace(columns=None, topic=""))
        assert page.rows == [{"volume": row["volume"], "close": row["close"]} for row in whole.rows]
        assert [list(row) for row in page.rows] == [["volume", "close"]] * 2
        assert (page.cursors, whole.cursors) == ({("a", "candles", 0): Cursor(13, "13-0")}, {})
        signals = await pages.page(PageAsk("signals", {"underlying": "none"}, topic="signals"))
        assert signals == Page([], None, {("a", "signals", 0): Cursor(1, "1-0")})

    asking(store.url, look)


@BOTH
def test_what_is_written_meanwhile_neither_doubles_nor_hides_a_row(store: Written, kind: str) -> None:
    store.put(bars(fixed(20)))

    async def look(pages: Pages) -> None:
        ask = PageAsk("candles", BITCOIN, limit=4)
        first = await pages.page(ask)
        # Newer ones, and corrections of all.
        await asyncio.to_thread(store.put, bars(fixed(20, 10)), bars(fixed(20, revision=1, close=1.0)))
        rest = await walk(pages, ask._replace(cursor=first.next))
        told = joined([first, *rest], "newest")
        assert [row["timestamp_in"][14:16] for row in told] == [f"{minute:02}" for minute in range(1, 11)]
        assert [row["revision"] for row in told] == [1] * 6 + [0] * 4
        ahead = ask._replace(order="oldest", limit=20)
        assert (await pages.page(ahead)).next is None

    asking(store.url, look)


@BOTH
def test_a_symbol_finds_its_exchange(store: Written, kind: str) -> None:
    async def look(pages: Pages) -> None:
        ask = PageAsk("candles", {"symbol": "BTCUSDT", "timeframe": "1m"}, topic="candles", limit=3)
        assert await pages.page(ask) == Page([], None, {("a", "candles", 0): Cursor(1, "1-0")})
        await asyncio.to_thread(store.put, bars(fixed(10)))
        found = await pages.page(ask)
        assert [row["exchange"] for row in found.rows] == ["binance-futures"] * 3
        older = await pages.page(ask._replace(cursor=found.next))
        assert len(older.rows) == 2
        other = candles(fixed(2), "candle", [("bybit", "BTCUSDT"), FIXED_NAMES[1]])
        await asyncio.to_thread(store.put, other)
        with pytest.raises(ConfigError, match=r"^BTCUSDT is on binance-futures, bybit: write exchange:BTCUSDT$"):
            await pages.page(ask)

    store.put(candles(rows(2)))
    asking(store.url, look)


@BOTH
def test_there_is_nothing_in_a_store_that_is_not_there(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue("pg_url") if kind == "postgresql" else f"sqlite:///{tmp_path / 'store.db'}"
    for name in (url, url + "x"):
        for ask in ASKS.values():
            assert asking(name, lambda pages, ask=ask: pages.page(ask._replace(topic="candles"))) == Page([], None, {})
    if kind == "postgresql":
        away = f"postgresql://postgres@127.0.0.1:{free_port()}/x"
        with pytest.raises(StoreUnavailable):
            asking(away, lambda pages: pages.page(ASKS["gaps"]))


@BOTH
def test_what_cannot_be_asked_is_said(store: Written, kind: str) -> None:
    filled(store)

    async def look(pages: Pages) -> None:
        some = ASKS["candles"]._replace(limit=2)
        cursor = (await pages.page(some)).next
        for ask, line in (
            (some._replace(cursor="??"), "'\\?\\?' is no cursor"),
            (some._replace(cursor=""), "'' is no cursor"),
            (some._replace(cursor="é" * 50), "'é{40}' is no cursor"),
            (some._replace(cursor=cursor, order="oldest"), "the cursor is of other rows"),
            (some._replace(cursor=cursor, where=ES), "the cursor is of other rows"),
            (some._replace(order="sideways"), "'sideways' is no order"),
            (some._replace(limit=0), "limit = 0: at least 1"),
            (some._replace(columns=("close", "colour")), "candles has no column 'colour'"),
            (some._replace(where={"colour": "red"}), "candles has no column 'colour'"),
            (some._replace(where={"symbol": "BTCUSDT"}), "candles of a symbol are read with their timeframe"),
            (some._replace(since="yesterday"), "'yesterday' is no instant"),
            (PageAsk("dead_letters"), "'dead_letters' is not read in pages"),
        ):
            with pytest.raises(ConfigError, match=line):
                await pages.page(ask)
        nothing = some._replace(where=BITCOIN | {"symbol": "B\0"})
        if kind == "sqlite":
            assert (await pages.page(nothing)).rows == []
        else:
            with pytest.raises(ConfigError, match="candles cannot be asked for such a value"):
                await pages.page(nothing)

    asking(store.url, look)


def test_a_store_that_has_no_pages_says_so() -> None:
    async def look(pages: Pages) -> None:
        with pytest.raises(ConfigError, match="a bigquery store tells only the newest rows of a range: narrow since"):
            await pages.page(PageAsk("candles", ES, order="oldest"))

    asking("bigquery://project/dataset", look)


NEWEST = {
    "candles": "candles_pkey", "rolling": "candles_1m_pkey", "seconds": "candles_1s_ticker",
    "big": "candles_1s_ticker", "pressure": "idx_pressure_underlying", "a strike": "pressure_metrics_pkey",
    "rollups": "pressure_rollups_pkey", "signals": "signals_time", "signals of one": "signals_underlying",
    "gaps": "gaps_time", "range": "candles_pkey",
}  # fmt: skip


def plan(store: Written, kind: str, ask: PageAsk, part: Slice) -> str:
    """How the store finds a slice."""
    found: list[str] = []
    more = {"since": ask.since, "until": ask.until}
    if kind == "sqlite":
        path = Path(store.url.removeprefix("sqlite:///"))
        with store_sqlite.reading(path) as connection:
            assert connection is not None
            connection.set_trace_callback(found.append)
            store_sqlite.select_part(connection, ask.table, ask.where, part, **more)
            connection.set_trace_callback(None)
            told = (connection.execute(f"EXPLAIN QUERY PLAN {sql}") for sql in found if sql.startswith('SELECT "'))
            return "\n".join(row[3] for rows in told for row in rows)

    async def explain() -> str:
        connection = await connect(store.url)
        fetch = connection.fetch

        class Explaining:
            execute = connection.execute

            async def fetch(self, sql: str, *values: Any, timeout: float) -> list[Any]:
                if sql.startswith("SELECT a.attname"):
                    return list(await fetch(sql, *values))
                told = await fetch(f"EXPLAIN (FORMAT JSON) {sql}", *values)
                found.append(told[0][0])
                return []

        async with connection.transaction():
            await store_postgres.select_part(Explaining(), ask.table, ask.where, part, **more)
        await connection.close()
        return json.dumps(json.loads(found[-1]))

    return asyncio.run(explain())


@BOTH
def test_a_slice_is_found_by_an_index(store: Written, kind: str) -> None:
    many = np.concatenate([rows(1500), rows(1500)])
    many["name"][1500:] = 2 + np.arange(1500) % 2
    names = [("ES", "ESH4"), ("6E", "6EH4"), ("ES", "ESM4"), ("6E", "6EM4")]
    store.put(candles(rows(3000)), candles(many, "candle_1s", names), bars(fixed(3000)))
    store.put(*(gap(T0 + at * NS) for at in range(200)))
    store.put(said(*(pressure(n) for n in range(2000))), said(*(rollup(n) for n in range(1500))), topic="pressure")
    store.put(said(*(signal(n) for n in range(2000))), topic="signals")
    if kind == "sqlite":
        planned = sqlite3.connect(store.url.removeprefix("sqlite:///"))
        planned.execute("PRAGMA optimize")
        planned.close()
    else:

        async def analyze() -> None:
            connection = await connect(store.url)
            await connection.execute("ANALYZE")
            await connection.close()

        asyncio.run(analyze())
    for name, index in NEWEST.items():
        ask = ASKS[name]
        for newest in (True, False):
            for beyond in (None, _middle(store.url, ask)):
                told = plan(store, kind, ask, Slice(newest, 11, beyond, ask.above))
                if kind == "sqlite":
                    used = re.sub(r"^(.*)_pkey$", r"sqlite_autoindex_\1_1", index)
                    assert f"INDEX {used}" in told, (name, told)
                    assert "TEMP B-TREE" not in told, (name, told)
                else:
                    assert f'"Index Name": "{index}"' in told, (name, newest, beyond, told)
                    assert "Seq Scan" not in told, (name, told)
                    assert "Sort" not in told, (name, told)


def _middle(url: str, ask: PageAsk) -> list[Any]:
    order = page_order(ask.table, ask.where)
    found = read_rows(url, ask.table, ask.where, since=ask.since, until=ask.until, columns=order)
    return sorted([row[name] for name in order] for row in found)[len(found) // 2]
