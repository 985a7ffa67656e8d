"""The SQLite store alone: what it writes, what it refuses, what it does when it cannot write."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.sink_sqlite.store import SqliteStore
from shared.batches import Batch, Item, Source, batch_of
from shared.errors import ConfigError, StoreUnavailable, TapelineError
from shared.frames import NS, Frame, Rows
from shared.messages import Gap, encode
from tests.services.sink_sqlite.tape import NAMES, T0, candles, gap, late, query, rows, table


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(path, busy_seconds=0.1)
    made.open()
    yield made
    made.close()


def batch(*frames: Frame, bus: str = "a", seq: int = 1, rewound: bool = False) -> Batch:
    items = []
    for i, frame in enumerate(frames):
        topic = "late" if frame.kind == "late_trade" else "candles"
        items.append(Item(Source(bus, topic, 0, seq + i, f"{seq + i}-0"), frame, rewound=rewound and i == 0))
    return batch_of(items)


def one(**values: float) -> Rows:
    made = rows(1)
    for name, value in values.items():
        made[name] = value
    return made


def test_a_row_as_it_is_stored(store: SqliteStore, path: Path) -> None:
    made = one(time_ns=T0, timestamp_out_ns=T0 + 123_456_789, vwap=np.nan, revision=2, close=5001.75)
    store.write(batch(candles(made), candles(made, "candle_1s")))
    columns = "time, ticker, symbol, close, vwap, complete, revision, timestamp_out, latency_ms, typeof(trades)"
    same = ("ES", "ESH4", 5001.75, None, 1, 2, "2023-12-25T23:01:00.123456Z")
    assert query(path, f"SELECT {columns} FROM candles_1m") == [("2023-12-25T23:01:00Z", *same, 123.456789, "integer")]
    # The second 23:01:00 ends at 23:01:01.
    assert query(path, f"SELECT {columns} FROM candles_1s") == [
        ("2023-12-25T23:01:00Z", *same, pytest.approx(-876.543211), "integer")
    ]


def test_every_column_arrives_in_its_place(store: SqliteStore, path: Path) -> None:
    made = rows(40)
    store.write(batch(candles(made)))
    got = query(path, "SELECT * FROM candles_1m ORDER BY time, ticker DESC")
    assert len(got) == 40
    for row, want in zip(got, made.tolist(), strict=True):
        assert row[3:-2] == tuple(None if np.isnan(v) else v for v in want[2:-1])
        assert row[1:3] == NAMES[want[1]]


def test_gaps_and_late_trades(store: SqliteStore, path: Path) -> None:
    store.write(batch(gap(T0), gap(T0, ("ESH4", "6EH4")), late(3)))
    store.write(batch(gap(T0), gap(T0, ("ESH4", "6EH4")), late(3)))
    assert query(path, 'SELECT symbols, start, "end", reason, end_ns FROM gaps ORDER BY symbols') == [
        (s, "2023-12-25T23:01:00.000000000Z", "2023-12-25T23:01:01.000000000Z", "replay refused", T0 + NS)
        for s in ("", "6EH4,ESH4")
    ]
    got = query(path, "SELECT bus_seq, row, symbol, ts_event, price, size, side, watermark_ns FROM late_trades")
    assert got == [
        (3, i, "ESH4", f"2023-12-25T23:01:00.00000{i}007Z", 5000.5, 2, side, T0 + 300 * NS)
        for i, side in enumerate(("SELL", "UNKNOWN", "BUY"))
    ]
    assert query(path, "SELECT symbol, trades, volume FROM late_counts") == [("ESH4", 3, 6)]


def test_a_lower_revision_never_replaces(store: SqliteStore, path: Path) -> None:
    def closes() -> list[float]:
        return [r[0] for r in query(path, "SELECT close FROM candles_1m")]

    store.write(batch(candles(one(revision=1, close=2))))
    store.write(batch(candles(one(revision=0, close=1)), seq=2))
    assert closes() == [2]
    store.write(batch(candles(one(revision=1, close=3)), seq=3))
    assert closes() == [3]
    store.write(batch(candles(one(revision=2, close=4)), candles(one(revision=1, close=5)), seq=4))
    assert closes() == [4]


def test_within_a_batch_the_last_of_the_highest_revision_wins(store: SqliteStore, path: Path) -> None:
    made = [one(revision=r, close=c) for r, c in ((0, 1), (2, 2), (2, 3), (1, 4))]
    store.write(batch(candles(np.concatenate(made))))
    assert query(path, "SELECT close, revision FROM candles_1m") == [(3, 2)]


def test_one_ticker_over_two_symbols_keeps_one_row_a_time(store: SqliteStore, path: Path) -> None:
    names = [("ES", "ESH4"), ("ES", "ESM4")]
    made = np.concatenate((one(), one(name=1)))
    store.write(batch(candles(made, names=names), candles(made, "candle_1s", names=names)))
    assert query(path, "SELECT symbol FROM candles_1m") == [("ESM4",)]
    assert query(path, "SELECT symbol FROM candles_1s ORDER BY symbol") == [("ESH4",), ("ESM4",)]


def test_refused_rows_become_dead_letters_and_all_others_are_stored(store: SqliteStore, path: Path) -> None:
    made = rows(5000)
    for at, (name, value) in {
        0: ("revision", -1),
        1: ("volume", np.nan),
        2500: ("trades", -1),
        4999: ("low", 1e9),
    }.items():
        made[name][at] = value
    made["name"][77] = 9
    made["time_ns"][78] = np.iinfo(np.int64).min
    assert store.write(batch(candles(made))) == 6
    assert store.write(batch(candles(made))) == 6
    assert query(path, "SELECT count(*) FROM candles_1m") == [(4994,)]
    got = query(path, "SELECT topic, partition, seq, table_name, row_number, reason, row FROM dead_letters ORDER BY 5")
    assert [r[4] for r in got] == [0, 1, 77, 78, 2500, 4999]
    assert {r[:4] for r in got} == {("candles", 0, 1, "candles_1m")}
    assert "CHECK constraint" in got[0][5]
    assert "NOT NULL constraint failed: candles_1m.volume" in got[1][5]
    assert json.loads(got[1][6])["volume"] is None
    assert json.loads(got[4][6])["trades"] == -1
    assert store.cursors()["a", "candles", 0] == (1, "1-0")


def test_a_refused_correction_does_not_take_its_predecessor_along(store: SqliteStore, path: Path) -> None:
    made = [one(revision=0, close=1), one(revision=1, close=2), one(revision=2, close=3, volume=-1)]
    assert store.write(batch(candles(np.concatenate(made)))) == 1
    assert query(path, "SELECT close, revision FROM candles_1m") == [(2, 1)]


@pytest.mark.parametrize(
    "frame",
    [
        Frame("candle_1m", 3, 0, 0, "x", b"\xff" * 100),
        Frame("gap", 1, 0, 0, "x", b"\x00not json"),
        Frame("gap", 1, 0, 0, "x", encode([Gap("f", 0, 2**63 + 5, "no such time")])),
        Frame("trade", 0, 0, 0, "x", b""),
        Frame("no such kind", 1, 0, 0, "x", b"garbage"),
    ],
)
def test_a_frame_that_cannot_be_decoded_is_a_dead_letter(store: SqliteStore, path: Path, frame: Frame) -> None:
    assert store.write(batch(candles(rows(4)), frame)) == 1
    assert query(path, "SELECT count(*) FROM candles_1m") == [(4,)]
    ((number, row),) = query(path, "SELECT row_number, row FROM dead_letters")
    assert number == -1
    assert json.loads(row)["kind"] == frame.kind
    assert json.loads(row)["bytes"] == len(frame.body)


def test_random_bytes_never_end_the_sink(store: SqliteStore) -> None:
    random = np.random.default_rng(5)
    for kind, size in (("candle_1m", candles(rows(1)).body), ("late_trade", late(1).body)):
        body = random.bytes(20 * len(size))
        assert store.write(batch(Frame(kind, 20, 0, 0, "x", body, names=NAMES))) == 20


def test_rewound_streams_lose_what_only_the_lost_tail_had(store: SqliteStore, path: Path) -> None:
    store.write(batch(late(2), late(2, 10), bus="a", seq=5))
    store.write(batch(late(2), bus="b", seq=6))
    store.write(batch(late(1, 10), bus="a", seq=6, rewound=True))
    assert query(path, "SELECT bus, bus_seq, row FROM late_trades ORDER BY 1, 2, 3") == [
        ("a", 5, 0), ("a", 5, 1), ("a", 6, 0), ("b", 6, 0), ("b", 6, 1),
    ]  # fmt: skip


def test_a_locked_store_is_unavailable_and_then_takes_the_same_batch(store: SqliteStore, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match=r"does not take rows now .*locked"):
        store.write(batch(candles(rows(10))))
    other.execute("ROLLBACK")
    other.close()
    store.write(batch(candles(rows(10))))
    assert len(table(path)) == 10


def test_a_full_disk_stores_nothing_of_the_batch(store: SqliteStore, path: Path) -> None:
    store.write(batch(candles(rows(10))))
    pages = store.connection().execute("PRAGMA page_count").fetchone()[0]
    store.connection().execute(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(StoreUnavailable, match="database or disk is full"):
        store.write(batch(candles(rows(5000)), seq=2))
    assert len(table(path)) == 10
    assert store.cursors()["a", "candles", 0].seq == 1
    store.connection().execute("PRAGMA max_page_count = 1000000")
    store.write(batch(candles(rows(5000)), seq=2))
    assert len(table(path)) == 5000


def test_paths_that_cannot_hold_a_store(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"this is no database" * 500)
    foreign = tmp_path / "foreign.db"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE candles_1m (a)")
    connection.close()
    for path, message in (
        (tmp_path / "none" / "s.db", "folder .*none does not exist: create it"),
        (tmp_path, "is a folder: name a file"),
        (garbage, "not a Tapeline store .*name another file"),
        (foreign, "not a Tapeline store .*candles_1m already exists"),
        (Path("/proc/s.db"), "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            SqliteStore(path).open()
        assert "\n" not in str(error.value)


def test_a_removed_file_is_not_written_on(store: SqliteStore, path: Path) -> None:
    path.unlink()
    with pytest.raises(TapelineError, match="removed or replaced"):
        store.write(batch(candles(rows(1))))


def test_stores_have_names_of_their_own(tmp_path: Path) -> None:
    assert SqliteStore(tmp_path / "a.db").name != SqliteStore(tmp_path / "b.db").name
    (tmp_path / "d").mkdir()
    assert SqliteStore(tmp_path / "a.db").name == SqliteStore(tmp_path / "d" / ".." / "a.db").name


def test_a_batch_may_be_empty(store: SqliteStore) -> None:
    assert store.write(batch(dataclasses.replace(candles(rows(1)), count=0, body=b""))) == 0
    assert store.cursors()["a", "candles", 0].seq == 1
