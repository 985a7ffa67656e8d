"""The client of the live API against the real server, a real store and a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from shared import client_rows, client_stream
from shared.bus import Bus
from shared.client import Client, GapRow, PressureRow, RollupRow, SignalRow, tapeline_client
from shared.client_rows import Given
from shared.client_stream import CLOSED, LIVE, WAITING
from shared.errors import AuthError, ConfigError, Unavailable, VersionError
from shared.frames import NS, Frame
from shared.messages import Instrument
from shared.reader import FixedBar, MarketReader, RollingBar, SecondBar
from shared.stores import read_rows
from shared.tables import GAP_COLUMNS, MESSAGE_TABLES
from tests.postgres import free_port
from tests.services.sink_sqlite.tape import (
    T0,
    Stage,
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
from tests.serving import Served, Serving
from tests.shared.streaming import OPTIONS, NotedClient, Taker
from tests.shared.test_reader_follow import Place, deploy, publish, second
from tests.wait import until


def test_a_row_has_every_column_of_its_table() -> None:
    for made, (table, *_) in (
        (PressureRow, MESSAGE_TABLES["pressure"]),
        (RollupRow, MESSAGE_TABLES["pressure_rollup"]),
        (SignalRow, MESSAGE_TABLES["signal"]),
    ):
        assert made.__struct_fields__ == table.names
        hints = get_type_hints(made)
        assert {c.name for c in table.columns if c.null} == {n for n, h in hints.items() if type(None) in get_args(h)}
    assert GapRow.__struct_fields__ == GAP_COLUMNS


def bar(second: int, revision: int = 0) -> dict[str, Any]:
    return {"ticker": "ES", "time": f"2023-12-25T23:{second // 60:02}:{second % 60:02}Z", "revision": revision}


def test_each_row_is_given_once_and_again_for_each_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_rows, "REMEMBERED", 10)
    given = Given("candles_1m")
    assert given.take([bar(5), bar(6)]) == [bar(5), bar(6)]
    assert given.first == bar(5)["time"]
    assert given.take([bar(4), bar(5), bar(6, 2), bar(6, 1), bar(7)]) == [bar(6, 2), bar(7)]
    given.take([bar(n) for n in range(8, 26)])
    # Of more than twice as many as are remembered the newer half is.
    assert given.first == bar(16)["time"]
    assert given.take([bar(15, 9), bar(16), bar(16, 1)]) == [bar(16, 1)]


def test_of_many_series_a_row_is_given_however_late_it_comes() -> None:
    def gap(start: int) -> dict[str, Any]:
        return {"feed": "glbx", "start": f"2023-12-25T23:{start:02}:00.000000000Z", "start_ns": start, "end_ns": 9,
                "symbols": ""}  # fmt: skip

    given = Given("gaps")
    assert given.take([gap(5)]) == [gap(5)]
    assert given.first == "2023-12-25T22:05:00.000000000Z"
    assert given.take([gap(4), gap(5), gap(4)]) == [gap(4)]


def test_rows_of_another_version_are_not_guessed() -> None:
    row = {"feed": "glbx", "symbols": "", "start_ns": 1, "end_ns": 2, "start": "2023-12-25T23:00:00.000000001Z",
           "end": "2023-12-25T23:00:00.000000002Z", "reason": "x"}  # fmt: skip
    assert client_rows.typed("gaps", row | {"new": 1}).reason == "x"
    with pytest.raises(VersionError, match="reason"):
        client_rows.typed("gaps", {name: value for name, value in row.items() if name != "reason"})


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://h", "http://", "http://h:port", "sqlite:///x.db"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server"):
        tapeline_client(url)
    with pytest.raises(ConfigError) as told:
        tapeline_client("ftp://me:secret@h")
    assert "secret" not in str(told.value)


# -- against a server ----------------------------------------------------------------------------


@pytest.fixture
def place(bus: Bus, tmp_path: Path) -> Place:
    """One partition with ES and a coin, and a store that a test runs sinks for."""
    deploy(bus)
    publish(bus, 0, *OPTIONS)
    path = tmp_path / "store.db"
    return Place(f"sqlite:///{path}", path, bus)


def put(stage: Stage, *frames: Frame) -> Awaitable[int]:
    return asyncio.to_thread(stage.put, *frames)


def seconds(bars_: list[Any]) -> list[tuple[int, int]]:
    """(second of the row behind T0, revision) of each."""
    return [((b.end_ns - T0) // NS, b.revision) for b in bars_]


def test_history_and_live_are_one(place: Place, bus: Bus, served: Served) -> None:
    stage = Stage(bus)
    stage.put(*(second(n) for n in range(5)), candles(rows(4), "candle_1s"), bars(fixed(10)))

    async def follow() -> None:
        client = tapeline_client(served.base)
        async with (
            client,
            Taker(client.candles("ES", "rolling", history=3)) as rolling,
            Taker(client.candles("es", "rolling", since=T0 + NS)) as since,
            Taker(client.candles("BTC-USDT", history=2)) as fixed_ones,
            Taker(client.candles("ES", "seconds", history=1)) as short,
            Taker(client.candles("ES", "rolling")) as new_ones,
        ):
            assert seconds(await rolling.reaches(3)) == [(2, 0), (3, 0), (4, 0)]
            assert seconds(await since.reaches(4)) == [(n, 0) for n in range(1, 5)]
            await fixed_ones.reaches(2)
            await short.reaches(1)
            await new_ones.live()
            # New rows, the same again, a correction of an old one and of one from before, an old revision.
            await put(stage, second(5), second(4), second(3, revision=1, close=1.0), second(0, revision=7))
            await put(stage, bars(fixed(2, 5)), candles(rows(2, 2), "candle_1s"))
            await put(stage, second(3, revision=1, close=1.0), second(4, revision=1), second(6))
            new = [(5, 0), (3, 1), (4, 1), (6, 0)]
            assert seconds(await rolling.reaches(7)) == [(2, 0), (3, 0), (4, 0), *new]
            assert seconds(await since.reaches(8)) == [*((n, 0) for n in range(1, 5)), *new]
            # Of the newest bar, which it was not given, it gets the correction; of those before nothing.
            assert seconds(await new_ones.reaches(3)) == [(5, 0), (4, 1), (6, 0)]
            await fixed_ones.reaches(3)
            await short.reaches(2)
            kinds = [type(taker.rows[0]) for taker in (rolling, fixed_ones, short)]
            assert kinds == [RollingBar, FixedBar, SecondBar]
            await asyncio.to_thread(place.stored, stage.seq)
            # What came is what a reader of the store gets.
            async with MarketReader(place.url) as reader:
                newest = {b.end_ns: b for b in rolling.rows}
                assert await reader.bars("ES", "rolling", T0 + 2 * NS) == [newest[at] for at in sorted(newest)]
                assert await reader.latest("BTCUSDT", "1m", n=3) == fixed_ones.rows
                assert await reader.latest("ES", "seconds", n=2) == short.rows

    with place.sinking():
        place.stored(7)
        asyncio.run(follow())


def test_pressure_rollups_signals_and_gaps(place: Place, bus: Bus, served: Served) -> None:
    stage, options = Stage(bus), Stage(bus, name="pressure")
    verdicts = Stage(bus, name="signals")

    async def follow() -> None:
        client = tapeline_client(served.base)
        async with (
            client,
            Taker(client.pressure("NQ", history=3)) as pressed,
            Taker(client.rollups(history=9)) as rolled,
            Taker(client.signals("NQH4", history=9)) as signals,
            Taker(client.gaps(history=9)) as gaps_,
        ):
            for taker, count in ((pressed, 3), (rolled, 2), (signals, 2), (gaps_, 1)):
                await taker.reaches(count)
            await put(options, said(pressure(8), pressure(7, revision=1, complete=False)), said(rollup(2)))
            await put(options, said(pressure(1, underlying="CL")))
            await put(verdicts, said(signal(8), signal(0, revision=1, status="withdrawn")))
            await put(stage, gap(T0 - 9 * NS, ("ESH4", "NQH4")), gap(), gap(T0 + 5 * NS))
            (*_, fourth, fifth) = await pressed.reaches(5)
            assert isinstance(fourth, PressureRow)
            assert (fourth.strike, fifth.revision, fifth.complete) == (pressure(8).strike, 1, False)
            assert fourth.time_window == datetime.fromtimestamp(pressure(8).time_window_ns / NS, UTC)
            last = (await rolled.reaches(3))[-1]
            assert (type(last), last.top_strikes) == (RollupRow, rollup(2).top_strikes)
            await signals.reaches(4)
            one = signals.rows[2]
            assert (type(one), one.types, one.raw, one.cluster_size) == (SignalRow, ("block", "sweep"), 8.01, 3)
            assert signals.rows[1].raw is None
            assert signals.rows[3].status == "withdrawn"
            # One that comes late is as good as any; one that comes again is none.
            assert [g.start_ns for g in await gaps_.reaches(3)] == [T0, T0 - 9 * NS, T0 + 5 * NS]
            assert (type(gaps_.rows[1]), gaps_.rows[1].symbols) == (GapRow, "ESH4,NQH4")

    options.put(said(*(pressure(n) for n in range(8))), said(rollup(0), rollup(1)))
    verdicts.put(said(signal(0), signal(1, components=None)))
    stage.put(gap())
    with place.sinking():
        until(lambda: len(read_rows(place.url, "signals")) == 2 and len(read_rows(place.url, "pressure_rollups")) == 2)
        until(lambda: len(read_rows(place.url, "gaps")) == 1)
        asyncio.run(follow())


def test_it_waits_for_its_server_and_goes_on(
    place: Place, bus: Bus, serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    stage, port = Stage(bus), free_port()
    stage.put(second(0), second(1))

    async def follow() -> None:
        # There is no server yet; and the stream opens and closes its client.
        async with Taker(tapeline_client(f"http://127.0.0.1:{port}").candles("ES", "rolling", history=9)) as taker:
            await asyncio.to_thread(until, lambda: taker.stream.state == WAITING)
            assert "does not answer" in taker.stream.detail
            first = await asyncio.to_thread(serving, web_port=port)
            assert seconds(await taker.reaches(2)) == [(0, 0), (1, 0)]
            await put(stage, second(2))
            await taker.reaches(3)
            first.stop.set()
            await asyncio.to_thread(until, lambda: taker.stream.state == WAITING)
            await put(stage, second(3), second(1, revision=1))
            await asyncio.to_thread(serving, web_port=port)
            assert seconds(await taker.reaches(5)) == [(0, 0), (1, 0), (2, 0), (3, 0), (1, 1)]
            await put(stage, second(4))
            assert seconds(await taker.reaches(6))[-1] == (4, 0)
            assert (taker.stream.state, taker.stream.detail, taker.stream.skipped) == (LIVE, "", 0)
            there = taker.stream.id
        assert taker.stream.state == CLOSED
        # Another process goes on where this one was.
        await put(stage, second(5))
        client = tapeline_client(f"http://127.0.0.1:{port}")
        async with Taker(client.candles("ES", "rolling", after=there)) as another:
            assert seconds(await another.reaches(1)) == [(5, 0)]

    with caplog.at_level("INFO", "shared.client_stream"), place.sinking():
        place.stored(2)
        asyncio.run(follow())
    told = [r.message.rpartition(";")[2].strip() for r in caplog.records if r.name == "shared.client_stream"]
    assert told == ["waiting", "candles ES rolling: going on"] * 2


def failing(client: Client, work: Callable[[Client], Awaitable[Any]], kind: type[Exception], match: str) -> None:
    """What a call, or a stream, raises."""

    async def inside() -> None:
        async with client:
            await work(client)

    with pytest.raises(kind, match=match):
        asyncio.run(inside())


async def first(stream: Any) -> Any:
    async with stream, asyncio.timeout(10):
        return await anext(stream)


def test_what_cannot_be_asked_for(place: Place, bus: Bus, served: Served) -> None:
    client = tapeline_client(served.base)
    swaps = ((1, "okex-swap"), (2, "gate"))
    name = "ETH-USDT-SWAP"
    publish(bus, 0, *(Instrument(n, v, name, f"{v}:ETH", f"tardis:{v}", ticker=f"{v}:{name}") for n, v in swaps))
    for work, match in (
        (lambda c: first(c.candles("XX", "1m")), "has no symbol 'XX'"),
        (lambda c: first(c.pressure("XX")), "has no underlying 'XX'"),
        (lambda c: first(c.candles("eth/usdt", "1m")), "gate:ETH-USDT-SWAP or okex-swap:ETH-USDT-SWAP"),
        (lambda c: first(c.candles("ESH4", "rolling")), "ESH4 has no rolling bars"),
        (lambda c: c.page("trades"), "is no table of the API; there are: candles"),
        (lambda c: c.page("candles", "ES", "1m", columns=["opne"]), "opne"),
        (lambda c: c.page("candles", "ES", "7x"), "7x"),
        (lambda c: c.page("candles", "ES", "1m", since="yesterday"), "yesterday"),
    ):  # fmt: skip
        failing(client, work, ConfigError, match)
    with pytest.raises(ConfigError, match="7x"):
        client.candles("ES", "7x")
    with pytest.raises(ConfigError, match="history or since"):
        client.candles("ES", history=1, since=0)
    with pytest.raises(ConfigError, match="at least 0"):
        client.gaps(history=-1)
    with pytest.raises(ConfigError, match="async with"):
        asyncio.run(anext(client.candles("ES")))
    with pytest.raises(ConfigError, match="async with"):
        asyncio.run(client.meta())
    away = tapeline_client(f"http://127.0.0.1:{free_port()}")
    failing(away, lambda c: c.meta(), Unavailable, "does not answer")


def test_the_token(place: Place, bus: Bus, serving: Serving) -> None:
    old = serving(web_token="let me in")
    for token in ("", "wrong"):
        for work in (lambda c: c.instruments(), lambda c: first(c.signals())):
            failing(tapeline_client(old.base, token=token), work, AuthError, "refused the token")
    stage = Stage(bus)
    stage.put(second(0))

    async def work() -> None:
        async with (
            tapeline_client(old.base, token="let me in\n") as client,
            Taker(client.candles("ES", "rolling", history=1)) as taker,
        ):
            assert (await client.pipeline())["redis"] == "ok"
            assert seconds(await taker.reaches(1)) == [(0, 0)]
            # It is changed while somebody is connected.
            await asyncio.to_thread(old.end)
            await asyncio.to_thread(serving, web_token="another", web_port=old.port)
            with pytest.raises(AuthError, match="refused the token"):
                await taker.reaches(2)

    with place.sinking():
        place.stored(1)
        asyncio.run(work())


def test_pages_of_history_and_what_comes_behind_them(place: Place, bus: Bus, served: Served) -> None:
    stage = Stage(bus)
    stage.put(*(second(n) for n in range(7)), bars(fixed(10)))

    async def work() -> None:
        async with tapeline_client(served.base) as client:
            pages = [page async for page in client.history("candles", "ES", "rolling", limit=3, since=T0 + NS)]
            assert [len(page.rows) for page in pages] == [3, 3]
            assert (pages[0].table, pages[-1].next) == ("candles_1m", "")
            stored = read_rows(place.url, "candles_1m", {"ticker": "ES"})
            told = [row | {"complete": int(row["complete"])} for page in pages for row in page.rows]
            assert told == stored[1:]
            newest = await client.page("candles", "btc/usdt", "1m", limit=2, columns=["close", "symbol"])
            assert [list(row) for row in newest.rows] == [["close", "symbol"]] * 2
            older = await client.page(
                "candles", "btc/usdt", "1m", limit=2, columns=["close", "symbol"], cursor=newest.next
            )
            assert older.rows[-1]["close"] < newest.rows[0]["close"]
            await put(stage, second(7), second(2, revision=1))
            async with Taker(client.candles("ES", "rolling", after=pages[0].id)) as taker:
                assert seconds(await taker.reaches(2)) == [(7, 0), (2, 1)]
            assert [i["name"] for i in await client.instruments("btc usdt")] == ["binance-futures:BTCUSDT"]

    with place.sinking():
        place.stored(8)
        asyncio.run(work())


def test_a_slow_consumer_gets_the_newest_of_each_row(
    place: Place, bus: Bus, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_stream, "BUFFER", 1)
    stage, often = Stage(bus), 24
    stage.put(second(0))
    with place.sinking():
        place.stored(1)
    hub = served.app.state.web.hub

    async def work() -> None:
        async with Taker(NotedClient(served.base, 1 << 16).candles("ES", "rolling", since=0)) as taker:
            await taker.reaches(1)
            taker.gate.clear()
            for revision in range(1, often + 1):  # more than all buffers between here and there hold
                await put(stage, candles(rows(2000, revision=revision)))
                await asyncio.to_thread(until, lambda: hub.stream("candles").positions[0].seq == stage.seq)
            taker.gate.set()
            newest = {(n, often) for n in range(1000)}
            await taker.until(lambda taken: newest <= set(seconds(taken[-1000:])), "all at their newest")
            told = seconds(taker.rows)
            assert taker.stream.skipped > 0
            assert len(told) + taker.stream.skipped == 1 + often * 1000
            of_one = [revision for n, revision in told if n == 999]
            assert of_one == sorted(set(of_one))

    asyncio.run(work())
