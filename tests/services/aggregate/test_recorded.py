"""Candles of recorded crypto against a plain aggregation of the file's trades."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard

from services.aggregate.core import PartitionState
from services.ingest.source import Resume
from services.ingest.tardis_file import TardisFiles
from shared.frames import NS, Rows
from tests.services.aggregate.market import ToFrames, config

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "tardis"
Candles = dict[tuple[str, int, int], Rows]

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the recorded data is not beside the project")


def replayed(path: Path) -> tuple[Candles, ToFrames]:
    """{(symbol, timeframe, start second): row} as finally emitted, and what went over the bus."""
    out = ToFrames()
    TardisFiles([path], 1).run(out, Resume(), threading.Event())
    state, kept = PartitionState(config()), {}
    for frame in out.frames:
        result = state.step([frame])
        for row in (r for chunk in result.fixed for r in chunk):
            symbol = result.fixed_names[int(row["name"])][1]
            kept[symbol, int(row["timeframe_sec"]), int(row["time_ns"]) // NS] = row.copy()
    return kept, out


def messages(path: Path) -> pl.DataFrame:
    text = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    return pl.read_ndjson(io.BytesIO(text), infer_schema_length=None).with_row_index()


def plain(path: Path, seconds: int) -> pl.DataFrame:
    """The candles of the file's trades that ended before its last trade."""
    trades = (
        messages(path)
        .filter(pl.col("type") == "trade")
        .with_columns(at=pl.col("timestamp").str.to_datetime(time_unit="us", time_zone="UTC").dt.timestamp("us"))
        .with_columns(start=pl.col("at") // 1_000_000 // seconds * seconds)
        .sort("at", "index")
    )
    last = trades["at"].max() // 1_000_000
    buy = pl.col("side") == "buy"
    return (
        trades.group_by("symbol", "start", maintain_order=True)
        .agg(
            pl.col("price").first().alias("open"), pl.col("price").max().alias("high"),
            pl.col("price").min().alias("low"), pl.col("price").last().alias("close"),
            pl.col("amount").sum().alias("volume"), pl.len().alias("trades"),
            pl.col("amount").filter(buy).sum().alias("ask_volume"),
            pl.col("amount").filter(~buy).sum().alias("bid_volume"),
            ((pl.col("price") * pl.col("amount")).sum() / pl.col("amount").sum()).alias("vwap"),
        )
        .filter(pl.col("start") + seconds <= last)
    )  # fmt: skip


@pytest.fixture(scope="module")
def binance() -> tuple[Path, Candles]:
    path = DATA / "binance-futures_2024-08-08.ndjson.zst"
    return path, replayed(path)[0]


@needs_data
@pytest.mark.parametrize("seconds", [15, 60, 300])
def test_every_candle_equals_a_plain_aggregation(binance: tuple[Path, Candles], seconds: int) -> None:
    path, candles = binance
    expected = plain(path, seconds)
    mine = {key: row for key, row in candles.items() if key[1] == seconds}
    assert {(symbol, start) for symbol, _, start in mine} == set(expected.select("symbol", "start").iter_rows())
    assert len(mine) > (20 if seconds < 60 else 2)
    for want in expected.iter_rows(named=True):
        row = mine[want["symbol"], seconds, want["start"]]
        for column in ("open", "high", "low", "close", "trades"):
            assert row[column] == want[column], (want, column)
        for column in ("volume", "ask_volume", "bid_volume", "vwap"):
            assert row[column] == pytest.approx(want[column], rel=1e-13, abs=1e-12), (want, column)


@needs_data
def test_each_timeframe_is_the_sum_of_the_one_below(binance: tuple[Path, Candles]) -> None:
    _, candles = binance
    checked = 0
    for fine, coarse in ((15, 60), (60, 300)):
        for (symbol, seconds, start), row in candles.items():
            if seconds != coarse:
                continue
            parts = [candles.get((symbol, fine, at)) for at in range(start, start + coarse, fine)]
            held = [p for p in parts if p is not None]
            assert row["open"] == held[0]["open"]
            assert row["close"] == held[-1]["close"]
            assert row["high"] == max(p["high"] for p in held)
            assert row["low"] == min(p["low"] for p in held)
            assert row["trades"] == sum(p["trades"] for p in held)
            assert row["volume"] == pytest.approx(sum(p["volume"] for p in held), rel=1e-13)
            assert row["cvd_close"] == held[-1]["cvd_close"]
            assert row["cvd_high"] == pytest.approx(max(p["cvd_high"] for p in held), rel=1e-9)
            assert row["liquidated_long_volume"] == pytest.approx(sum(p["liquidated_long_volume"] for p in held))
            assert row["complete"] == min(p["complete"] for p in held)
            checked += 1
    assert checked >= 12


@needs_data
def test_books_and_tickers_stand_beside_the_candle(binance: tuple[Path, Candles]) -> None:
    path, candles = binance
    books = messages(path).filter((pl.col("type") == "book_snapshot") & (pl.col("symbol") == "BTCUSDT"))
    books = books.with_columns(
        at=pl.col("timestamp").str.to_datetime(time_unit="us", time_zone="UTC").dt.timestamp("us")
    )
    checked = 0
    for (symbol, seconds, start), row in candles.items():
        if symbol != "BTCUSDT" or seconds != 60:
            continue
        last = books.filter(pl.col("at") < (start + 60) * 1_000_000).sort("at", maintain_order=True).tail(1)
        if len(last):
            best = last["bids"][0][0]
            assert row["bid_price"] == best["price"]
            bids = sum(level["amount"] for level in last["bids"][0])
            asks = sum(level["amount"] for level in last["asks"][0])
            assert row["book_imbalance_5"] == pytest.approx((bids - asks) / (bids + asks), rel=1e-12)
            assert np.isfinite([row["mark_price"], row["index_price"], row["funding_rate"]]).all()
            checked += 1
    assert checked >= 5


@needs_data
def test_only_the_windows_that_a_disconnect_touches_are_incomplete() -> None:
    """From the newest event of the exchange before it to the first trade or book after it, nothing is complete."""
    for name in ("deribit_2024-06-01.ndjson.zst", "stream_with_disconnect_and_error.ndjson.zst"):
        path = DATA / name
        candles, _ = replayed(path)
        spans = outages(messages(path))
        begun = first_event(messages(path))
        seen = set()
        for (symbol, seconds, start), row in candles.items():
            end = start + seconds
            touched = any(s == symbol and a < end * 1_000_000 and b > start * 1_000_000 for s, a, b in spans)
            late_watch = start * 1_000_000 < begun[symbol]
            assert bool(row["complete"]) == (not touched and not late_watch), (symbol, seconds, start)
            seen.add(bool(row["complete"]))
        assert False in seen


def first_event(frame: pl.DataFrame) -> dict[str, int]:
    """Symbol -> when its exchange's first record is from, µs."""
    timed = frame.filter(pl.col("symbol").is_not_null()).with_columns(
        at=pl.col("timestamp").str.to_datetime(time_unit="us", time_zone="UTC").dt.timestamp("us")
    )
    first = dict(timed.sort("index").group_by("exchange", maintain_order=True).agg(pl.col("at").first()).iter_rows())
    return {s: first[e] for s, e in timed.select("symbol", "exchange").unique().iter_rows()}


def outages(frame: pl.DataFrame) -> list[tuple[str, int, int]]:
    """(symbol, from, until) in µs, looked up record by record."""
    out, high, down = [], {}, {}
    of: dict[str, set[str]] = {}
    for m in frame.iter_rows(named=True):
        exchange = m["exchange"]
        if m["type"] == "disconnect":
            known = {s.upper() for s in (m.get("symbols") or of[exchange])}
            for symbol in known:
                down.setdefault((exchange, symbol), high[exchange])
            if not m.get("symbols"):
                down[exchange, ""] = high[exchange]
        if m["symbol"] is None:
            continue
        of.setdefault(exchange, set()).add(m["symbol"])
        if m["type"] not in ("trade", "book_snapshot", "book_ticker"):
            continue
        at = int(np.datetime64(m["timestamp"].removesuffix("Z"), "us").astype(np.int64))
        whole = down.pop((exchange, ""), None)
        for symbol in of[exchange] if whole is not None else [m["symbol"]]:
            since = down.pop((exchange, symbol), None)
            if since is not None:
                out.append((symbol, since, max(at, since + 1)))
        high[exchange] = max(high.get(exchange, 0), at)
    ends = dict(high.items())
    out += [(symbol, since, max(ends[e], since + 1)) for (e, symbol), since in down.items() if symbol]
    return out
