"""The sink as a process, from Redis into the emulator, beside SQLite's on the same streams: both read the same."""

from __future__ import annotations

import signal
import uuid
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.stores import read_rows
from tests.bigquery import Endpoints
from tests.fakes.bigquery_sinks import Nursery, Sinks
from tests.services.sink_bigquery.batches import METHODS
from tests.services.sink_sqlite.tape import Feed, Stage, bars, candles, fixed, gap, late, mixed, rows, sinking
from tests.wait import until

# The emulator answers on six connections at once, so tables on streams are few here.
TABLES = ["candles_1m", "candles", "late_trades", "gaps"]
TICKS = ["ticks_trades", "ticks_book_snapshots", "ticks_options_chain"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_sqlite(
    method: str, bqemulator: Endpoints, bigquery_nursery: Nursery, bus: Bus, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On streams with a `kill -9` in the middle of a batch; the emulator's jobs have no names that would fence it."""
    monkeypatch.setenv("TAPELINE_BIGQUERY_ENDPOINT", bqemulator.url)
    url, calm = f"bigquery://tests/e{uuid.uuid4().hex[:10]}", f"sqlite:///{tmp_path / 'calm.db'}"
    modes = ("candles",) if method == "storage_write" else ("candles", "ticks")
    stage, feed = Stage(bus), Feed(bus)
    stage.put(candles(rows(40)), bars(fixed(20)), late(3), gap())
    stage.put(candles(rows(10, 3, revision=1, close=7.0)), bars(fixed(4, revision=2)))
    feed.put(mixed(), mixed(1))
    sinks = Sinks(
        bigquery_nursery, bus, tmp_path,
        {
            "TAPELINE_STORE": url, "TAPELINE_BIGQUERY_ENDPOINT": bqemulator.url,
            "TAPELINE_BIGQUERY_GRPC_ENDPOINT": bqemulator.grpc, "TAPELINE_BIGQUERY_METHOD": method,
            "TAPELINE_BIGQUERY_BATCH_ROWS": "90", "TAPELINE_BIGQUERY_BATCH_MS": "20",
            "TAPELINE_SINK_MODES": ",".join(modes),
        },
    )  # fmt: skip
    try:
        if method == "storage_write":
            assert sinks.start(TAPELINE_TEST_FAULT="bigquery:before-write:2").ended() == -9
        sink = sinks.start()
        tables = TABLES + (TICKS if "ticks" in modes else [])
        with sinking(bus, tmp_path / "calm.db", modes=modes):
            stage.put(late(2, 5), candles(rows(10, 20, revision=2, close=9.0)))
            until(lambda: len(read_rows(calm, "candles_1m", {"revision": 2})) == 10, what="SQLite")
            until(lambda: len(read_rows(calm, "late_trades")) == 5, what="SQLite")
        for table in tables:
            expected = read_rows(calm, table)
            assert expected
            until(lambda t=table, e=expected: read_rows(url, t) == e, 20, f"{table} as in SQLite\n{sink.text}")
        sink.signal(signal.SIGTERM)
        assert sink.ended() == 0, sink.text
        for table in tables:
            assert read_rows(url, table) == read_rows(calm, table), table
    finally:
        sinks.end()
