"""Fixed candles, the views and bars beside them, and what a mending batch may replace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.sink_sqlite.store import SqliteStore
from shared.batches import Batch, Item, Source, batch_of
from shared.frames import FEATURE_COLUMNS, FIXED, NS, Frame, Rows
from shared.stores import read_rows
from shared.timeframes import name_of
from tests.services.sink_sqlite.tape import FIXED_NAMES, T0, bars, candles, fixed, query, rows, table


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(path, busy_seconds=0.1)
    made.open()
    yield made
    made.close()


def batch(*frames: Frame, seq: int = 1, mend: bool = False) -> Batch:
    items = [Item(Source("a", "candles", 0, seq + i, f"{seq + i}-0"), frame) for i, frame in enumerate(frames)]
    return batch_of(items, mend=mend)


def one(seconds: int = 60, **values: float) -> Rows:
    made = fixed(1, seconds=seconds)
    for name, value in values.items():
        made[name] = value
    return made


def whole(path: Path) -> list[tuple[Any, ...]]:
    return query(path, "SELECT * FROM candles ORDER BY exchange, symbol, timeframe, timestamp_in")


def in_step(path: Path) -> bool:
    """Whether ohlc_bars says what candles does."""
    units = {"s": 1, "m": 2, "h": 3, "d": 4, "w": 5}
    want = [
        (f"{exchange}:{symbol}", at, *values, units[timeframe[-1]], int(timeframe[:-1]))
        for exchange, symbol, timeframe, at, *values in query(
            path, "SELECT exchange, symbol, timeframe, timestamp_in, open, high, low, close, volume FROM candles"
        )
    ]
    columns = "contract_id, timestamp, open, high, low, close, volume, timeframe_unit, timeframe_value"
    return sorted(query(path, f"SELECT {columns} FROM ohlc_bars")) == sorted(want) != []


def test_a_row_as_it_is_stored(store: SqliteStore, path: Path) -> None:
    made = one(timestamp_out_ns=T0 + 60 * NS + 2_500_000, rsi_5=np.nan, revision=2, close=5000.25)
    store.write(batch(bars(made)))
    columns = "exchange, symbol, timeframe, timestamp_in, close, rsi_5, trades, typeof(trades), revision, timestamp_out"
    assert query(path, f"SELECT {columns}, latency_ms FROM candles") == [
        ("binance-futures", "BTCUSDT", "1m", "2023-12-25T23:01:00Z", 5000.25, None, 0, "integer", 2,
         "2023-12-25T23:02:00.002500Z", 2.5)
    ]  # fmt: skip


def test_every_column_arrives_in_its_place(store: SqliteStore, path: Path) -> None:
    made = fixed(40)
    store.write(batch(bars(made)))
    got = query(path, "SELECT * FROM candles ORDER BY timestamp_in, exchange")
    assert len(got) == 40
    for row, want in zip(got, made.tolist(), strict=True):
        assert row[:3] == (*FIXED_NAMES[want[2]], "1m")
        assert row[4:-2] == tuple(None if np.isnan(v) else v for v in want[3:-1])
        assert row[-1] == 1.5


@pytest.mark.parametrize("seconds", [1, 15, 60, 90, 300, 3600, 14400, 86400, 604800])
def test_the_latency_of_every_timeframe_counts_from_its_end(store: SqliteStore, path: Path, seconds: int) -> None:
    store.write(batch(bars(one(seconds))))
    assert query(path, "SELECT timeframe, latency_ms FROM candles") == [(name_of(seconds), 1.5)]
    assert in_step(path)


def test_one_key_one_row_whatever_the_timeframe(store: SqliteStore, path: Path) -> None:
    """Equal starts of other timeframes or exchanges are other rows; of one key the highest revision wins."""
    made = np.concatenate([
        one(), one(15), one(name=1), one(revision=2, close=5000.25), one(revision=2, close=5001), one(revision=1),
    ])  # fmt: skip
    names = [("a", "B"), ("c", "B")]
    store.write(batch(candles(made, "candle", names)))
    columns = "exchange, symbol, timeframe, revision, close"
    assert query(path, f"SELECT {columns} FROM candles ORDER BY 1, 2, 3") == [
        ("a", "B", "15s", 0, 5000), ("a", "B", "1m", 2, 5001), ("c", "B", "1m", 0, 5000),
    ]  # fmt: skip
    store.write(batch(candles(one(revision=1, close=1), "candle", names), seq=2))
    assert query(path, "SELECT close FROM candles WHERE exchange = 'a' AND timeframe = '1m'") == [(5001,)]
    assert in_step(path)


def test_bars_follow_refusals_revisions_and_both_in_one_batch(store: SqliteStore, path: Path) -> None:
    store.write(batch(bars(fixed(20)), bars(fixed(20, seconds=15))))
    assert in_step(path)
    again = fixed(30, revision=1, close=1)
    again["volume"][3] = -1  # refused: the stored row stays
    again["high"][25] = -1  # refused, and none was stored
    assert store.write(batch(bars(again), seq=3)) == 2
    assert in_step(path)
    assert query(path, "SELECT count(*), sum(close = 1) FROM ohlc_bars") == [(49, 28)]
    store.write(batch(bars(fixed(30, close=2)), seq=4))  # an older revision, but for the refused rows
    assert in_step(path)
    assert query(path, "SELECT sum(close = 2) FROM ohlc_bars") == [(2,)]
    before = query(path, "SELECT * FROM ohlc_bars")
    store.write(batch(bars(fixed(30, close=2)), seq=4))
    assert query(path, "SELECT * FROM ohlc_bars") == before


def test_without_bars(path: Path) -> None:
    store = SqliteStore(path, ohlc_bars=False)
    store.open()
    store.write(batch(bars(fixed(4))))
    store.close()
    assert len(whole(path)) == 4
    assert query(path, "SELECT count(*) FROM ohlc_bars") == [(0,)]


def test_features_are_of_the_short_candles(store: SqliteStore, path: Path) -> None:
    store.write(batch(bars(one(15)), bars(one(60, sma_5=1.5)), bars(one(300))))
    assert query(path, "SELECT timeframe, sma_5 IS NOT NULL FROM features ORDER BY 1") == [("15s", 1), ("1m", 1)]
    assert query(path, "SELECT sma_5 FROM features WHERE timeframe = '1m'") == [(1.5,)]


def test_refused_and_impossible_rows_become_dead_letters(store: SqliteStore, path: Path) -> None:
    made = fixed(5000)
    made["revision"][0], made["volume"][1], made["low"][4999] = -1, np.nan, 1e9
    made["name"][77], made["timeframe_sec"][78], made["timeframe_sec"][79] = 9, 0, 1 << 40
    assert store.write(batch(bars(made))) == 6
    assert query(path, "SELECT count(*) FROM candles") == [(4994,)]
    got = query(path, "SELECT row_number, table_name FROM dead_letters ORDER BY 1")
    assert got == [(n, "candles") for n in (0, 1, 77, 78, 79, 4999)]
    body = np.random.default_rng(7).bytes(20 * FIXED.itemsize)
    assert store.write(batch(Frame("candle", 20, 0, 0, "x", body, names=FIXED_NAMES), seq=2)) == 20


def test_reading_candles_goes_by_their_time(store: SqliteStore, path: Path) -> None:
    store.write(batch(bars(fixed(20)), bars(fixed(20, seconds=15))))
    url = f"sqlite:///{path}"
    where = {"exchange": "deribit", "timeframe": "1m"}
    got = read_rows(url, "candles", where, since="2023-12-25T23:02:00Z", until="2023-12-25T23:04:00Z")
    assert [r["timestamp_in"] for r in got] == ["2023-12-25T23:02:00Z", "2023-12-25T23:03:00Z"]
    newest = ["2023-12-25T23:09:00Z", "2023-12-25T23:10:00Z"]
    assert [r["timestamp_in"] for r in read_rows(url, "candles", where, last=2)] == newest
    assert [r["timestamp_in"] for r in read_rows(url, "features", where, last=2)] == newest
    keys = [(r["exchange"], r["symbol"], r["timeframe"], r["timestamp_in"]) for r in read_rows(url, "candles")]
    assert keys == sorted(keys)
    assert [r["timestamp"] for r in read_rows(url, "ohlc_bars", {"timeframe_unit": 2}, last=1)] == newest[1:]


# -- mending ----------------------------------------------------------------------------------


def test_mending_replaces_what_a_gap_left_incomplete(store: SqliteStore, path: Path) -> None:
    store.write(batch(bars(one(complete=0, revision=1, close=1, cvd_close=7, sma_5=3))))
    store.write(batch(bars(one(complete=1, close=2, cvd_close=np.nan, sma_5=np.nan, ema_5=9)), seq=2, mend=True))
    columns = "complete, revision, close, cvd_close, sma_5, ema_5"
    assert query(path, f"SELECT {columns} FROM candles") == [(1, 2, 2, 7, 3, 9)]
    assert in_step(path)


def test_mending_again_changes_nothing(store: SqliteStore, path: Path) -> None:
    made = fixed(20)
    store.write(batch(bars(made)))
    before = whole(path)
    made["timestamp_out_ns"] += NS
    for name in ("cvd_open", "cvd_high", "cvd_low", "cvd_close", *FEATURE_COLUMNS):
        made[name] = np.nan
    store.write(batch(bars(made), seq=2, mend=True))
    assert whole(path) == before
    made["volume"] += 1
    store.write(batch(bars(made), seq=3, mend=True))
    mended = whole(path)
    assert query(path, "SELECT DISTINCT revision, cvd_close IS NULL FROM candles") == [(1, 0)]
    made["timestamp_out_ns"] += NS
    for n in range(3):
        store.write(batch(bars(made), seq=4 + n, mend=True))
    assert whole(path) == mended
    assert in_step(path)


def test_mending_never_makes_a_row_less_complete(store: SqliteStore, path: Path) -> None:
    store.write(batch(bars(one(complete=1, close=1))))
    store.write(batch(bars(one(complete=0, close=2, revision=9)), seq=2, mend=True))
    assert query(path, "SELECT complete, revision, close FROM candles") == [(1, 0, 1)]
    store.write(batch(bars(one(complete=1, close=3, revision=9)), seq=3, mend=True))
    assert query(path, "SELECT complete, revision, close FROM candles") == [(1, 9, 3)]


def test_mending_adds_what_was_missing(store: SqliteStore, path: Path) -> None:
    store.write(batch(bars(fixed(4)), mend=True))
    assert query(path, "SELECT count(*), max(revision) FROM candles") == [(4, 0)]


@pytest.mark.parametrize("kind", ["candle_1m", "candle_1s"])
def test_rolling_candles_are_mended_alike(store: SqliteStore, path: Path, kind: str) -> None:
    name = {"candle_1m": "candles_1m", "candle_1s": "candles_1s"}[kind]
    made = rows(4)
    made["complete"][0] = 0
    store.write(batch(candles(made, kind)))
    made["complete"], made["volume"][0], made["session_cvd_close"], made["cvd_open"] = 1, 55, np.nan, np.nan
    store.write(batch(candles(made, kind), seq=2, mend=True))
    after = table(path, name)
    got = query(
        path, f"SELECT complete, revision, volume, session_cvd_close IS NULL FROM {name} ORDER BY revision DESC"
    )
    assert got[0] == (1, 1, 55, 0)
    assert {row[1] for row in got[1:]} == {0}
    store.write(batch(candles(made, kind), seq=3, mend=True))
    assert table(path, name) == after
