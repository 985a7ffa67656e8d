"""Raw records in their tables: what is stored, what is refused, what a lost tail takes with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.sink_sqlite.store import SqliteStore
from shared.batches import Batch, Item, Source, batch_of
from shared.frames import BOOK, CLOCK, LIQUIDATION, OPTION, TICK, TICKER, TRADE, Frame, Rows, tick_frame
from shared.messages import Clock, encode
from shared.stores import read_rows
from shared.tables import TICK_TABLES
from tests.services.sink_sqlite.tape import (
    CALL,
    ETHER,
    INSTRUMENTS,
    T0,
    bars,
    fixed,
    gap,
    mixed,
    query,
    ticks,
)

NAMES = [table.name for table in TICK_TABLES.values()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(path, busy_seconds=0.1)
    made.open()
    yield made
    made.close()


def batch(*frames: Frame | Rows, bus: str = "a", first: int = 1, after: str | None = None) -> Batch:
    items = []
    for i, frame in enumerate(frames):
        whole = frame if isinstance(frame, Frame) else tick_frame(frame, "tardis:deribit")
        source = Source(bus, "ticks", 0, 1, f"1700000000000-{first + i}")
        rewound = after is not None and i == 0
        items.append(Item(source, whole, rewound=rewound, after=after or "0-0", instruments=INSTRUMENTS))
    return batch_of(items)


def counts(path: Path) -> list[int]:
    return [query(path, f"SELECT count(*) FROM {name}")[0][0] for name in NAMES]


def test_one_record_of_each_kind(store: SqliteStore, path: Path) -> None:
    made = batch(mixed(), mixed(1))
    assert made.rows == 10
    assert store.write(made) == 0
    assert counts(path) == [2] * 5
    place = [("a", 0, 1700000000000, 1, n) for n in (1, 2, 7, 8, 9)]  # row 0 is the clock
    for name, want in zip(NAMES, place, strict=True):
        columns = "bus, partition, entry_ms, entry_seq, row"
        assert query(path, f"SELECT {columns} FROM {name} ORDER BY entry_seq LIMIT 1") == [want]
        assert query(path, f"SELECT exchange, timestamp, timestamp_ns, local_timestamp_ns FROM {name}")[0] == (
            "deribit", "2023-12-25T23:01:00.000000007Z", T0 + 7, T0 + 107,
        )  # fmt: skip


def test_trades_and_liquidations(store: SqliteStore, path: Path) -> None:
    made = np.concatenate((ticks(TRADE, 3, instrument=ETHER), ticks(LIQUIDATION, 3)))
    made["bid_px"][0] = np.nan
    store.write(batch(made))
    columns = "symbol, price, amount, side, sequence, bid_price, ask_price, bid_amount, ask_amount"
    assert query(path, f"SELECT {columns} FROM ticks_trades") == [
        ("ETH-PERPETUAL", 100 + n / 4, 200 + n / 4, side, n, 300 + n / 4 if n else None, 400 + n / 4, 500 + n / 4,
         600 + n / 4)
        for n, side in enumerate(("SELL", "UNKNOWN", "BUY"))
    ]  # fmt: skip
    assert query(path, "SELECT price, amount, side FROM ticks_liquidations") == [
        (100 + n / 4, 200 + n / 4, side) for n, side in enumerate(("SELL", "UNKNOWN", "BUY"))
    ]


def test_books_of_several_levels(store: SqliteStore, path: Path) -> None:
    made = np.concatenate((ticks(BOOK, 1, parts=3), ticks(BOOK, 1, 4, parts=2), ticks(BOOK, 1, 8)))
    made["size"] = [5, 0, 0, 2, 0, 1]
    made["bid_px"][4], made["price"][5] = np.nan, np.nan
    store.write(batch(made))
    got = query(path, "SELECT depth, bid_price, ask_amount, book_imbalance_5, bids, asks FROM ticks_book_snapshots")
    assert [r[:4] for r in got] == [(5, 300, 600, 100), (2, 301, 601, 101), (1, 302, 602, None)]
    assert json.loads(got[0][4]) == [[300, 500], [301, 501], [302, 502]]
    assert json.loads(got[0][5]) == [[400, 600], [401, 601], [402, 602]]
    # The second book has two asks and one bid.
    assert got[1][4:] == ("[[301.0,501.0]]", "[[401.0,601.0],[402.0,602.0]]")
    assert json.loads(got[2][4]) == [[302, 502]]


def test_tickers_and_options(store: SqliteStore, path: Path) -> None:
    made = np.concatenate((ticks(TICKER, 2), ticks(OPTION, 1, instrument=CALL, parts=3)))
    made["ask_sz"][1] = np.nan
    store.write(batch(made))
    columns = (
        "last_price, open_interest, mark_price, index_price, funding_rate, predicted_funding_rate, funding_timestamp"
    )
    assert query(path, f"SELECT {columns} FROM ticks_derivative_ticker") == [
        (100, 200, 300, 400, 500, 600, None),
        (100.25, 200.25, 300.25, 400.25, 500.25, None, "2023-12-26T00:01:00Z"),
    ]
    (option,) = read_rows(f"sqlite:///{path}", "ticks_options_chain")
    values = {name: option[name] for name in TICK_TABLES[OPTION].columns[4:-5]}
    assert values == {
        "symbol": "BTC-29MAR24-50000-C", "option_type": "CALL", "strike": 50000, "expiration": "2024-03-29T08:00:00Z",
        "underlying": "BTC-29MAR24", "last_price": 100, "open_interest": 200, "bid_price": 300, "ask_price": 400,
        "bid_amount": 500, "ask_amount": 600, "mark_price": 101, "underlying_price": 201, "bid_iv": 301, "ask_iv": 401,
        "mark_iv": 501, "delta": 601, "gamma": 102, "vega": 202, "theta": 302, "rho": 402,
    }  # fmt: skip


def test_equal_ticks_are_no_duplicates_and_equal_places_are(store: SqliteStore, path: Path) -> None:
    twice = np.concatenate((ticks(TRADE, 1), ticks(TRADE, 1)))
    for _ in range(2):
        store.write(batch(twice, twice))
    assert counts(path)[0] == 4
    store.write(batch(twice, bus="b"))
    assert counts(path)[0] == 6


def test_gaps_come_without_candles_and_other_messages_are_no_rows(store: SqliteStore, path: Path) -> None:
    clock = Frame("clock", 1, 0, 0, "x", encode([Clock("f", T0)]))
    made = batch(gap(T0), clock)
    assert (made.rows, made.ignored) == (1, 0)
    assert store.write(made) == 0
    assert query(path, "SELECT feed, start_ns FROM gaps") == [("glbx", T0)]


def test_rows_that_make_no_record_become_dead_letters(store: SqliteStore, path: Path) -> None:
    made = np.concatenate((
        ticks(TRADE, 1), ticks(TRADE, 1, instrument=5), ticks(TRADE, 1, parts=2), ticks(OPTION, 1, parts=2),
        ticks(BOOK, 1, parts=3)[[0, 2]], ticks(9, 1), ticks(LIQUIDATION, 1), ticks(TRADE, 1),
        ticks(CLOCK, 1, instrument=5), ticks(TRADE, 1),
    ))  # fmt: skip
    made["side"][9] = 7
    made["ts_event_ns"][10] = np.iinfo(np.int64).min
    frame = Frame("tick", 10, T0, T0, "tardis:deribit", made.tobytes())
    assert store.write(batch(frame)) == 9
    assert store.write(batch(frame)) == 9
    got = query(path, "SELECT table_name, row_number, reason FROM dead_letters ORDER BY row_number")
    torn = "a part of no record, or a record that lacks parts"
    impossible = "a time or side that cannot be"
    assert got == [
        ("ticks_trades", 1, "an unknown instrument"), ("ticks_trades", 2, torn), ("ticks_trades", 3, torn),
        ("ticks_options_chain", 4, torn), ("ticks_options_chain", 5, torn), ("ticks_book_snapshots", 7, torn),
        ("ticks", 8, "a kind that no table takes"), ("ticks_liquidations", 9, impossible),
        ("ticks_trades", 10, impossible),
    ]  # fmt: skip
    # The book that lost its second level keeps the first; the good trades are there.
    assert counts(path) == [2, 1, 0, 0, 0]
    row = json.loads(query(path, "SELECT row FROM dead_letters WHERE row_number = 1")[0][0])
    assert row["instrument"] == 5
    assert row["price"] == 100


def test_a_record_does_not_go_on_in_the_next_frame(store: SqliteStore, path: Path) -> None:
    book = ticks(BOOK, 1, parts=4)
    assert store.write(batch(book[:2], book[2:])) == 2
    assert json.loads(query(path, "SELECT bids FROM ticks_book_snapshots")[0][0]) == [[300, 500], [301, 501]]


@pytest.mark.parametrize(
    "frame",
    [
        Frame("trade", 3, 0, 0, "x", b"\xff" * 100),
        Frame("gap", 1, 0, 0, "x", b"\x00not json"),
        bars(fixed(2)),
        Frame("no such kind", 1, 0, 0, "x", b"garbage"),
    ],
)
def test_a_frame_that_is_none_of_ticks_is_a_dead_letter(store: SqliteStore, path: Path, frame: Frame) -> None:
    assert store.write(batch(mixed(), frame)) == 1
    assert counts(path) == [1] * 5
    assert query(path, "SELECT row_number, topic FROM dead_letters") == [(-1, "ticks")]


def test_random_bytes_never_end_the_sink(store: SqliteStore) -> None:
    body = np.random.default_rng(5).bytes(400 * TICK.itemsize)
    clocks = int(np.count_nonzero(np.frombuffer(body, TICK)["kind"] == CLOCK))
    assert store.write(batch(Frame("tick", 400, 0, 0, "x", body))) == 400 - clocks


def test_a_rewind_forgets_what_is_behind_the_surviving_entry(store: SqliteStore, path: Path) -> None:
    store.write(batch(mixed(), mixed(1), mixed(2), first=9))  # entries 9, 10, 11: as text 9 would be the last
    store.write(batch(ticks(TRADE, 1, instrument=5), ticks(TRADE, 1, instrument=5), first=10))  # dead letters
    store.write(batch(mixed(), bus="b", first=11))
    store.write(batch(mixed(7), first=20, after="1700000000000-9"))
    for name in NAMES:
        got = query(path, f"SELECT bus, entry_seq, timestamp_ns FROM {name} ORDER BY 1, 2")
        assert got == [("a", 9, T0 + 7), ("a", 20, T0 + 7007), ("b", 11, T0 + 7)]
    assert query(path, "SELECT count(*) FROM dead_letters") == [(0,)]
    assert store.cursors()["a", "ticks", 0].stream_id == "1700000000000-20"


def test_ticks_are_read_by_their_time(store: SqliteStore, path: Path) -> None:
    store.write(batch(ticks(TRADE, 10)))
    url = f"sqlite:///{path}"
    got = read_rows(url, "ticks_trades", since="2023-12-25T23:01:00.000003", until="2023-12-25T23:01:00.000005")
    assert [r["timestamp_ns"] - T0 for r in got] == [3007, 4007]
    assert [r["timestamp_ns"] - T0 for r in read_rows(url, "ticks_trades", last=2)] == [8007, 9007]
