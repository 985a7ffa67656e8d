"""Data frames of every table: the same from a store, of either kind, and from a server over it."""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import polars
import pytest
from pandas.testing import assert_frame_equal
from polars.testing import assert_frame_equal as assert_polars_equal

from services.sink_sqlite.store import SqliteStore
from services.sink_timescale.store import TimescaleStore
from shared.batches import Item, Source, batch_of
from shared.dataframes import read_candles, read_gaps, read_pressure, read_rollups, read_signals
from shared.errors import AuthError, ConfigError, Unavailable
from shared.frames import NS
from shared.instruments import instrument_id
from shared.messages import Instrument
from shared.tables import GAP_COLUMNS, MESSAGE_TABLES, TABLES
from tests.postgres import free_port
from tests.services.sink_sqlite.tape import (
    T0,
    T_WINDOW,
    TOPIC_OF,
    bars,
    candles,
    fixed,
    gap,
    pressure,
    rollup,
    rows,
    said,
    signal,
)  # fmt: skip
from tests.serving import Serving
from tests.shared.streaming import OPTIONS
from tests.shared.test_reader_follow import deploy, publish

TWICE = [("GLBX.MDP3", "ES"), ("MOEX", "ES")]
READS = {
    "rolling": partial(read_candles, symbol="ES", timeframe="rolling"),
    "seconds": partial(read_candles, symbol="ES", timeframe="seconds"),
    "fixed": partial(read_candles, symbol="binance-futures:BTCUSDT", timeframe="60s"),
    "pressure": partial(read_pressure, underlying="NQ"),
    "all pressure": read_pressure,
    "rollups": partial(read_rollups, underlying="NQ"),
    "signals": read_signals,
    "gaps": partial(read_gaps, feed="glbx"),
}
NO_ROWS = {"until": "2001-01-01T00:00Z"}


def fill(store: Any) -> None:
    """Some rows of every table."""
    frames = [
        candles(rows(20)), candles(rows(8), "candle_1s"), bars(fixed(10)), candles(fixed(4), "candle", TWICE),
        said(*(pressure(n) for n in range(8)), pressure(1, underlying="CL")), said(*(rollup(n) for n in range(3))),
        said(*(signal(n) for n in range(4)), signal(4, components=None, moneyness=None)),
        gap(), gap(T0 + 3 * NS + 123_456_789, ("NQH4", "ESH4")),
    ]  # fmt: skip
    items = [
        Item(Source("a", TOPIC_OF.get(frame.kind, "candles"), 0, n, f"{n}-0"), frame) for n, frame in enumerate(frames)
    ]
    store.open()
    store.write(batch_of(items))
    store.close()


@pytest.fixture
def filled(store_url: str) -> str:
    fill(SqliteStore(Path(store_url.removeprefix("sqlite:///"))))
    return store_url


def same(one: Any, other: Any) -> None:
    if isinstance(one, polars.DataFrame):
        assert_polars_equal(one, other)
    else:
        assert_frame_equal(one, other)


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_a_server_gives_what_its_store_gives(filled: str, kind: str, bus: Any, serving: Serving) -> None:
    coin = Instrument(instrument_id("binance-futures", "BTCUSDT"), "binance-futures", "BTCUSDT", "binance-futures:BTC",
                      "tardis", ticker="binance-futures:BTCUSDT")  # fmt: skip
    deploy(bus)
    publish(bus, 0, coin, *OPTIONS)
    web = serving(web_max_rows=3, web_token="t").base  # several pages
    for name, read in READS.items():
        if kind == "polars" and name in ("seconds", "all pressure", "rollups"):
            continue
        stored = read(source=filled, kind=kind)
        assert len(stored) >= 2, name
        same(stored, read(source=web, kind=kind, token="t"))
        part = {"since": T0 - 3600 * NS, "until": T0 + 3 * NS, "columns": ["revision"] if "gap" not in name else None}
        same(read(source=filled, kind=kind, **part), read(source=web, kind=kind, token="t", **part))
        # Without rows it is of the same columns and types.
        nothing = read(source=web, kind=kind, token="t", **NO_ROWS)
        assert len(nothing) == 0, name
        same(nothing, stored[:0])
    assert len(read_candles(web, "BTC-USDT", kind=kind, token="t")) == 5


def test_every_store_gives_the_same(filled: str, pg_url: str) -> None:
    fill(TimescaleStore(pg_url))
    for read in READS.values():
        same(read(source=filled), read(source=pg_url))


def test_columns_and_their_types(filled: str) -> None:
    tables = {"rolling": TABLES["candle_1m"].columns, "fixed": TABLES["candle"].columns, "gaps": GAP_COLUMNS,
              "signals": MESSAGE_TABLES["signal"][0].names}  # fmt: skip
    for name, columns in tables.items():
        assert tuple(READS[name](source=filled, kind="polars").columns) == columns
    rolling = READS["rolling"](source=filled)
    assert (rolling.index.name, str(rolling.index.dtype)) == ("time", "datetime64[us, UTC]")
    assert rolling.index[0] == pandas.Timestamp("2023-12-25T23:01:00Z")
    kinds = {name: str(rolling.dtypes[name]) for name in ("close", "trades", "divergence", "complete", "timestamp_out")}
    assert kinds == {"close": "float64", "trades": "int64", "divergence": "float64", "complete": "bool",
                     "timestamp_out": "datetime64[us, UTC]"}  # fmt: skip
    assert rolling["vwap"].isna().any()
    gaps = READS["gaps"](source=filled)
    assert str(gaps.dtypes["start"]) == "datetime64[ns, UTC]"
    assert gaps["start"].astype("int64").tolist() == gaps["start_ns"].tolist()

    signals = read_signals(filled, "NQ", kind="polars")
    assert signals.schema["time_window"] == polars.Datetime("us", "UTC")
    assert signals.schema["types"] == polars.List(polars.String)
    assert signals.schema["cluster_size"] == polars.Int64
    assert signals["raw"].null_count() == 1
    assert read_signals(filled, "NQ")["types"][0] == ["block", "sweep"]
    rollups = read_rollups(filled, "NQ", kind="polars")
    assert rollups["top_strikes"][0][0]["strike"] == 17000.5
    windows = read_pressure(filled, since=T_WINDOW, columns=["time_window", "strike"])["time_window"]
    assert windows.is_monotonic_increasing
    assert list(read_candles(filled, "ES", "rolling", columns=["close", "time", "open"])) == ["close", "open"]


def test_it_works_where_an_event_loop_runs(filled: str, serving: Serving, bus: Any) -> None:
    deploy(bus)
    web = serving().base

    async def cell() -> list[int]:
        return [len(read_signals(source)) for source in (filled, web)]

    assert asyncio.run(cell()) == [5, 5]


def test_what_cannot_be_read(filled: str, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    for work, match in (
        (lambda: read_candles(filled, "ES", "1m"), "ES is on GLBX.MDP3, MOEX: write exchange:ES"),
        (lambda: read_candles(filled, "ES", "7x"), "is no timeframe"),
        (lambda: read_candles(filled, "ES", columns=["opne"]), "candles has no column 'opne'; it has: exchange"),
        (lambda: read_signals(filled, kind="numpy"), "pandas or polars"),
        (lambda: read_signals(filled, since="yesterday"), "is no instant"),
        (lambda: read_signals("mysql://h/db"), "is not a store URL"),
    ):
        with pytest.raises(ConfigError, match=match):
            work()
    assert len(read_candles(filled, "MOEX:ES", "1m")) == 2
    with pytest.raises(AuthError):
        read_gaps(serving(web_token="t").base)
    with pytest.raises(Unavailable):
        read_gaps(f"http://127.0.0.1:{free_port()}")
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ConfigError, match=r"pip install 'tapeline\[history\]'"):
        read_signals(filled, kind="polars")
