"""The sink as a process, from Redis into the emulator, beside SQLite's on the same streams: both read the same."""

from __future__ import annotations

import signal
import uuid
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.status import Reader
from shared.stores import read_rows
from tests.bigquery import Endpoints
from tests.fakes.bigquery_sinks import Nursery, Sinks
from tests.services.sink_bigquery.batches import METHODS
from tests.services.sink_sqlite.tape import Feed, Stage, bars, candles, fixed, gap, late, mixed, rows, sinking
from tests.wait import until

# The emulator answers on six connections at once, so tables on streams are few here.
TABLES = ["candles_1m", "candles", "late_trades", "gaps"]
TICKS = ["ticks_trades", "ticks_book_snapshots", "ticks_options_chain"]


def all_stored(bus: Bus, url: str) -> bool:
    """Whether the sink is done with all that it reads."""
    partitions = int(bus.call("hget", bus.keys.deployment, "partitions"))
    name = f"bigquery:{url.removeprefix('bigquery://').replace('/', '.')}"
    found = [c for s in Reader(bus, partitions, 5.0).read().streams for c in s.consumers if c.name == name]
    return bool(found) and not any(consumer.behind_entries for consumer in found)


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
            assert all(read_rows(calm, table) for table in tables)
        # Only the bus is asked until the sink has ended: the emulator's two servers share one connection to its
        # database, which a question amid a stream's rows may hang.
        until(lambda: all_stored(bus, url), 40, f"the sink to store all\n{sink.text}")
        sink.signal(signal.SIGTERM)
        assert sink.ended() == 0, sink.text
        for table in tables:
            assert read_rows(url, table) == read_rows(calm, table), table
    finally:
        sinks.end()
