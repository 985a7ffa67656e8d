"""The same batches into SQLite and into BigQuery (the emulator): every store reads the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.sink_bigquery.store import BigQueryStore
from services.sink_sqlite.store import SqliteStore
from shared.batches import Batch
from shared.errors import ConfigError
from shared.frames import NS, TRADE, tick_frame
from shared.stores import newest_cvds, read_rows
from shared.tables import MESSAGE_TABLES, TABLES, TICK_TABLES
from tests.bigquery import Endpoints
from tests.services.sink_bigquery.stores import batch, store_at, target, url_of
from tests.services.sink_sqlite.tape import (
    T0,
    bars,
    candles,
    fixed,
    gap,
    late,
    mixed,
    pressure,
    rollup,
    rows,
    said,
    signal,
    ticks,
    usage,
)  # fmt: skip

CANDLES = [table.name for table in TABLES.values()]
TICKS = [table.name for table in TICK_TABLES.values()]
MESSAGES = [table.name for tables in MESSAGE_TABLES.values() for table in tables]
EVERY = [*CANDLES, *TICKS, *MESSAGES, "late_trades", "gaps", "features", "usage"]


class Both:
    """A SQLite and a BigQuery store that are given the same."""

    def __init__(self, sqlite: SqliteStore, bigquery: BigQueryStore) -> None:
        self.sqlite, self.bigquery = sqlite, bigquery
        self.urls = (f"sqlite:///{sqlite.path}", url_of(bigquery.target))

    def write(self, made: Batch) -> int:
        dead = self.sqlite.write(copy.deepcopy(made))
        assert self.bigquery.write(made) == dead
        return dead

    def same(self, *tables: str) -> None:
        for table in tables:
            one, other = (read_rows(url, table) for url in self.urls)
            assert one, table
            assert other == one, table


@pytest.fixture
def both(tmp_path: Path, bqemulator: Endpoints, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Both]]:
    made: list[Both] = []

    def make(method: str) -> Both:
        sqlite = SqliteStore(tmp_path / "store.db")
        sqlite.open()
        made.append(Both(sqlite, store_at(target(bqemulator, monkeypatch, method))))
        return made[-1]

    yield make
    for stores in made:
        stores.sqlite.close()
        stores.bigquery.close()


@pytest.mark.parametrize(
    ("method", "tables"),
    [("load", EVERY), ("insert_all", ["candles_1m", "ticks_book_snapshots", "signals", "late_trades", "gaps"])],
)
def test_every_table(both: Callable[[str], Both], method: str, tables: list[str]) -> None:
    stores = both(method)
    stores.write(batch(candles(rows(40)), candles(rows(20), "candle_1s"), gap(T0), late(3), bars(fixed(20))))
    stores.write(batch(candles(rows(10, 3, revision=1, close=7.0)), bars(fixed(4, revision=2)), gap(T0), seq=6))
    stores.write(batch(candles(rows(10, 1, close=9.0)), late(2, 5), seq=9))
    stores.write(batch(tick_frame(mixed(), "x"), tick_frame(mixed(1), "x"), topic="ticks"))
    stores.write(batch(said(*(pressure(n) for n in range(4))), said(rollup(), rollup(1)), said(signal(1)), seq=11))
    stores.write(batch(said(pressure(1, revision=1)), said(usage(), usage(1)), said(usage(2, "other")), seq=15))
    stores.same(*tables)
    names = {"ES": T0 + 9 * NS, "6E": T0 - NS, "deribit:BTC-PERPETUAL": T0 + 400 * NS, "none": T0}
    one, other = (newest_cvds(url, names) for url in stores.urls)
    assert one == other
    assert one.keys() == {"ES", "deribit:BTC-PERPETUAL"}


def test_streams(both: Callable[[str], Both]) -> None:
    # The emulator answers on six connections at once: three tables and the announcements are four.
    stores = both("storage_write")
    stores.write(batch(candles(rows(300)), gap(T0), late(3)))
    stores.write(batch(candles(rows(100, 30, revision=1, close=7.0)), late(2, 5), seq=4))
    stores.same("candles_1m", "gaps", "late_trades")
    # The next process takes over: it finds all of the last batch there, and goes on.
    last = batch(candles(rows(50, 7, revision=2, close=8.0)), gap(T0 + NS), seq=6)
    stores.write(last)
    stores.bigquery.close()
    stores.bigquery.open()
    before = stores.bigquery.cursors()
    assert before["a", "candles", 0].seq == 4
    assert stores.bigquery.redo == last.cursors
    stores.write(last)
    stores.write(batch(candles(rows(10)), seq=8))
    stores.same("candles_1m", "gaps", "late_trades")
    assert stores.bigquery.cursors()["a", "late", 0].seq == 5
    held = stores.bigquery.target.named("candles_1m")
    (counted,) = stores.bigquery._client.query(f"SELECT COUNT(*) AS n FROM {held}").result()
    assert counted["n"] == 300 + 100 + 50 + 10


def test_a_row_that_is_refused_leaves_its_neighbours(both: Callable[[str], Both]) -> None:
    stores = both("load")
    made = rows(20)
    made["high"][3] = made["low"][3] - 1
    made["volume"][5] = float("nan")
    made["trades"][7] = -1
    assert stores.write(batch(candles(made), candles(rows(2, revision=1, close=3.0)), seq=1)) == 3
    stores.same("candles_1m")
    one, other = (read_rows(url, "dead_letters") for url in stores.urls)
    keys = ("bus", "topic", "partition", "seq", "stream_id", "table_name", "row_number")
    assert [{k: row[k] for k in keys} for row in one] == [{k: row[k] for k in keys} for row in other]
    assert [row["reason"] for row in other] == [
        "high is below low", "volume is undefined", "volume, trades and revision must be 0 or more",
    ]  # fmt: skip


def test_what_is_computed_again_replaces_what_is_no_better(both: Callable[[str], Both]) -> None:
    stores = both("load")
    partial, sound = rows(8), rows(8, 10)
    partial["complete"] = 0
    stores.write(batch(candles(partial), candles(sound), bars(fixed(6)), said(*(pressure(n) for n in range(4)))))
    again = rows(28)
    again["complete"] = 1
    again["cvd_close"][:4] = float("nan")
    better = batch(candles(again), bars(fixed(6, close=5.0)), said(*(pressure(n, premium=1.0) for n in range(4))),
                   bus="backfill-1", mend=True)  # fmt: skip
    stores.write(better)
    stores.same("candles_1m", "candles", "pressure_metrics")
    held = read_rows(stores.urls[1], "candles_1m")
    stores.write(batch(candles(again), bus="backfill-1", seq=4, mend=True))
    assert read_rows(stores.urls[1], "candles_1m") == held
    names = {item.table_id for item in stores.bigquery._client.list_tables(stores.bigquery.target.dataset)}
    assert not [name for name in names if name.startswith("mending")]


def test_a_lost_tail_takes_along_what_has_no_other_key(both: Callable[[str], Both]) -> None:
    stores = both("load")
    stores.write(batch(*(tick_frame(ticks(TRADE, 3, n * 3), "x") for n in range(3)), topic="ticks"))
    stores.write(batch(late(2), late(3), seq=1))
    bad = candles(rows(2))
    bad.body = bad.body[:-1]
    stores.write(batch(bad, seq=7))
    # Redis had only the first entry of the ticks, and no late trades nor that candle.
    stores.write(batch(tick_frame(ticks(TRADE, 2, 50), "x"), topic="ticks", seq=9, rewound=True, after="1-0"))
    stores.write(batch(late(1, 40), seq=2, rewound=True))
    stores.write(batch(candles(rows(2)), seq=5, rewound=True))
    stores.same("ticks_trades", "late_trades", "candles_1m")
    assert [len(read_rows(stores.urls[1], t)) for t in ("ticks_trades", "late_trades", "dead_letters")] == [5, 3, 0]


def test_readers_ask_alike(both: Callable[[str], Both]) -> None:
    stores = both("load")
    stores.write(batch(candles(rows(60)), candles(rows(8, 2, revision=1, close=1.0)), late(4)))
    asked = [
        ("candles_1m", {"ticker": "ES", "complete": 1}, {"since": "2023-12-25T23:01:03.5Z", "last": 4}),
        ("candles_1m", {"revision": 0}, {"until": "2023-12-25T23:01:20Z", "columns": ["time", "close"]}),
        ("candles_1m", {"time": "2023-12-25T23:01:04Z"}, {}),
        ("late_trades", {"side": "BUY"}, {"since": "2023-12-25T23:01:00.000002Z", "columns": ["ts_event"]}),
        ("late_trades", {}, {"until": "2023-12-25T23:01:00.000001008Z"}),
        ("candles", {}, {}),
    ]
    for table, where, more in asked:
        one, other = (read_rows(url, table, where, **more) for url in stores.urls)  # type: ignore[arg-type]
        assert other == one, (table, where, more)
    with pytest.raises(ConfigError, match="no column 'colour'"):
        read_rows(stores.urls[1], "candles_1m", {"colour": 1})
    assert read_rows(stores.urls[1], "no_such_table") == []
    assert read_rows("bigquery://tests/none", "candles_1m") == []
    assert newest_cvds("bigquery://tests/none", {"ES": T0}) == {}


def test_views(both: Callable[[str], Both]) -> None:
    stores = both("load")
    stores.write(batch(bars(fixed(6)), bars(fixed(2, 2, revision=1, close=9.0))))
    stores.write(batch(tick_frame(ticks(TRADE, 4), "x"), topic="ticks"))
    stores.same("features")
    one, other = (read_rows(url, "ohlc_bars") for url in stores.urls)
    assert [{k: v for k, v in row.items() if k != "id"} for row in one] == other
    url = stores.urls[1]
    minutes = read_rows(url, "v_volume_by_minute")
    held = read_rows(url, "candles")
    assert [(r["symbol"], r["minute"], r["volume"]) for r in minutes] == [
        (r["symbol"], r["timestamp_in"][:19] + ".000000Z", r["volume"]) for r in held
    ]
    latest = {row["symbol"]: row for row in read_rows(url, "v_latest_price")}
    closes = [row["close"] for row in held if row["symbol"] == "BTCUSDT"]
    assert (latest["BTCUSDT"]["price"], latest["BTCUSDT"]["previous_price"]) == (closes[-1], closes[-2])
    assert latest["BTC-PERPETUAL"]["source"] == "candles"  # its last minute ended after the last trade
    stages = {row["stage"]: row for row in read_rows(url, "v_latency")}
    assert stages["candles"]["samples"] == len(held)
    assert stages["candles"]["p50_ms"] == pytest.approx(held[0]["latency_ms"])
    assert stages["store candles"]["avg_ms"] > 0
