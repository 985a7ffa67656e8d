"""Pressure, signals and usage in their tables: every field, revisions, refusals, mending, and what readers ask."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.sink_sqlite.store import SqliteStore
from shared.batches import Batch, Item, Source, batch_of
from shared.frames import NS, Frame, iso, unreadable
from shared.stores import read_rows
from shared.tables import MESSAGE_TABLES, MessageTable
from tests.services.sink_sqlite.tape import (
    T_WINDOW,
    TOPIC_OF,
    WINDOW,
    candles,
    pressure,
    query,
    rollup,
    rows,
    said,
    signal,
    usage,
)
from tests.shared.test_batches import OF_KIND, raw

TABLES = [(kind, table) for kind, tables in MESSAGE_TABLES.items() for table in tables]
BY_KIND = pytest.mark.parametrize(("kind", "table"), TABLES, ids=[t.name for _, t in TABLES])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(path, busy_seconds=0.1)
    made.open()
    yield made
    made.close()


def batch(*frames: Frame, seq: int = 1, bus: str = "a", mend: bool = False, after: str | None = None) -> Batch:
    items = []
    for i, frame in enumerate(frames):
        topic = "usage" if frame.kind == "usage" else TOPIC_OF.get(frame.kind, "pressure")
        source = Source(bus, topic, 0, seq + i, f"1700000000000-{seq + i}")
        items.append(Item(source, frame, rewound=after is not None and i == 0, after=after or "0-0"))
    return batch_of(items, mend=mend)


def whole(path: Path, table: str) -> list[tuple[Any, ...]]:
    return sorted(query(path, f"SELECT * FROM {table}"), key=repr)


def text(ns: int, name: str) -> str:
    """As a store writes an instant: windows and expiries in seconds, others in microseconds."""
    return iso(ns)[: 19 if name in ("time_window", "expiration") else 26] + "Z"


def expected(table: MessageTable, message: Any) -> dict[str, Any]:
    """The row that a message is, column by column."""
    row: dict[str, Any] = {}
    for name, path, sort, _ in table.columns:
        if name == "latency_ms":
            behind_ns = message.timestamp_out_ns - (message.time_window_ns + message.window_sec * NS)
            row[name] = pytest.approx(behind_ns / 1e6)
            continue
        value = None if path.startswith("components") and not message.components else attrgetter(path)(message)
        row[name] = text(value, name) if sort == "time" else value
    if "top_strikes" in row:
        fields = ("expiration_ns", "strike", "option_type", "log_ratio", "volume")
        row["top_strikes"] = [{name: getattr(top, name) for name in fields} for top in message.top_strikes]
    if "types" in row:
        row["types"] = list(message.types)
    return row


@BY_KIND
def test_rows_equal_messages_field_by_field(store: SqliteStore, path: Path, kind: str, table: MessageTable) -> None:
    messages = [OF_KIND[kind](n) for n in range(12)]
    assert store.write(batch(said(*messages[:5]), said(*messages[5:]))) == 0
    got = read_rows(f"sqlite:///{path}", table.name)
    for row in got:
        for column in table.columns:
            if column.sort == "json":
                row[column.name] = json.loads(row[column.name])
        if table.name == "pressure_metrics":
            assert row.pop("created_at") == row["timestamp_out"]
        assert list(row) == list(table.names)
    latest = {tuple(str(expected(table, m)[k]) for k in table.key): m for m in messages}
    want = sorted((expected(table, m) for m in latest.values()), key=lambda r: [r[name] for name in table.key])
    assert got == want
    assert len(got) == (1 if table.name == "usage_daily" else 12)
    sorts = {c.name: {"real": "real", "integer": "integer", "boolean": "integer"}.get(c.sort, "text")
             for c in table.columns}  # fmt: skip
    kinds = query(path, f"SELECT {', '.join(f'typeof({name})' for name in table.names)} FROM {table.name}")
    assert all(got in (want, "null") for row in kinds for got, want in zip(row, sorts.values(), strict=True))


def test_a_signal_without_components_or_strike(store: SqliteStore, path: Path) -> None:
    bare = signal(components=None, option_type="", expiration_ns=0, strike=0.0, types=(), source="my-plugin")
    store.write(batch(said(bare, signal())))
    columns = "expiration, strike, option_type, source, type, types, raw, cluster_size"
    assert query(path, f"SELECT {columns} FROM signals ORDER BY source") == [
        ("1970-01-01T00:00:00Z", 0, "", "my-plugin", "block", "[]", None, None),
        ("2024-03-29T08:00:00Z", 17000.5, "C", "tapeline", "block", '["block","sweep"]', 0.01, 3),
    ]


# -- one row a key ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pressure", "pressure_rollup", "signal"])
def test_revisions_in_and_across_batches(store: SqliteStore, path: Path, kind: str) -> None:
    (table,) = MESSAGE_TABLES[kind]
    make = OF_KIND[kind]

    def held() -> list[tuple[int, float]]:
        return query(path, f"SELECT revision, underlying_price FROM {table.name}")

    store.write(batch(said(make(revision=1, underlying_price=2.0), make(revision=0, underlying_price=1.0))))
    assert held() == [(1, 2)]
    store.write(batch(said(make(revision=0, underlying_price=3.0)), seq=2))
    assert held() == [(1, 2)]
    store.write(batch(said(make(revision=1, underlying_price=4.0)), seq=3))
    assert held() == [(1, 4)]
    store.write(
        batch(said(make(revision=3, underlying_price=5.0)), said(make(revision=2, underlying_price=6.0)), seq=4)
    )
    assert held() == [(3, 5)]
    store.write(batch(said(make(revision=3, underlying_price=7.0), make(revision=3, underlying_price=8.0)), seq=6))
    assert held() == [(3, 8)]


def test_usage_is_by_its_instant_and_by_day_the_newest(store: SqliteStore, path: Path) -> None:
    store.write(batch(said(usage(2), usage(0)), said(usage(1), usage(1, feed="other"))))
    store.write(batch(said(usage(0, day_events=999)), seq=3))  # said again, late
    assert query(path, "SELECT feed, events FROM usage_log ORDER BY feed, at") == [
        ("databento", 10), ("databento", 11), ("databento", 12), ("other", 11),
    ]  # fmt: skip
    assert query(path, "SELECT feed, day, events, bytes, connected_seconds FROM usage_daily ORDER BY feed") == [
        ("databento", "2023-12-25", 30, 2400, 180), ("other", "2023-12-25", 20, 1600, 120),
    ]  # fmt: skip
    store.write(batch(said(usage(3, state="stopped"), usage(0, day="2023-12-26", at_ns=T_WINDOW + 9000 * NS)), seq=4))
    assert query(path, "SELECT day, state, events FROM usage_daily WHERE feed = 'databento' ORDER BY day") == [
        ("2023-12-25", "stopped", 40), ("2023-12-26", "running", 10),
    ]  # fmt: skip


revised = st.tuples(st.integers(0, 5), st.integers(0, 3))


@settings(max_examples=25, deadline=None)
@given(st.lists(revised, min_size=1, max_size=25), st.lists(st.integers(1, 6), min_size=1, max_size=25))
def test_any_cut_into_frames_and_batches_gives_the_same_rows(found: list[tuple[int, int]], cuts: list[int]) -> None:
    """Revisions come in order, a tail may come again: the rows are those of the newest revisions."""
    newest: dict[int, int] = {}
    messages = []
    for n, value in found:
        newest[n] = newest.get(n, -1) + 1
        messages.append(pressure(n, revision=newest[n], premium=float(value)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.db"
        store = SqliteStore(path)
        store.open()
        at = seq = 0
        for cut in cuts * len(messages):
            if at >= len(messages):
                break
            part = messages[max(0, at - cut // 2) : at + cut]  # a part of what is stored comes again
            frames = [said(*part[i : i + 2]) for i in range(0, len(part), 2)]
            store.write(batch(*frames, seq=seq + 1))
            at, seq = at + cut, seq + len(frames)
        store.close()
        got = query(path, "SELECT strike, option_type, time_window, revision, premium FROM pressure_metrics")
    last = {(m.strike, m.option_type, text(m.time_window_ns, "time_window")): m for m in messages}
    assert sorted(got) == sorted((*key, m.revision, m.premium) for key, m in last.items())


# -- what is refused --------------------------------------------------------------------------


def test_refused_rows_become_dead_letters_and_their_neighbours_are_stored(store: SqliteStore, path: Path) -> None:
    bad = [
        pressure(1, option_type="X"), pressure(2, revision=-1), pressure(3, bid_volume=-1.0),
        pressure(4, dominant_side="UP"), pressure(5, confidence=1.5), pressure(6, window_sec=0),
        pressure(7, first_ns=T_WINDOW + WINDOW * NS, last_ns=T_WINDOW),
    ]  # fmt: skip
    for _ in range(2):
        assert store.write(batch(said(pressure(0), *bad, pressure(8)))) == len(bad)
    assert query(path, "SELECT count(*) FROM pressure_metrics") == [(2,)]
    got = query(path, "SELECT topic, seq, table_name, row_number, reason, row FROM dead_letters ORDER BY row_number")
    assert [r[:4] for r in got] == [("pressure", 1, "pressure_metrics", n + 1) for n in range(len(bad))]
    assert all("CHECK constraint" in r[4] for r in got)
    assert json.loads(got[0][5])["option_type"] == "X"
    assert json.loads(got[0][5])["time_window"] == "2023-12-25T23:00:00Z"


def test_a_refused_revision_does_not_take_its_predecessor_along(store: SqliteStore, path: Path) -> None:
    made = [
        signal(revision=0, volume=1.0),
        signal(revision=2, volume=2.0),
        signal(revision=1, volume=3.0),
        signal(revision=3, score=1.5),
    ]
    assert store.write(batch(said(*made))) == 1
    assert query(path, "SELECT revision, volume FROM signals") == [(2, 2)]


def test_a_refused_usage_is_told_of_both_tables(store: SqliteStore, path: Path) -> None:
    assert store.write(batch(said(usage(0), usage(1, cost_usd=-1.0), usage(2, day_cost_usd=-1.0)))) == 2
    assert query(path, "SELECT table_name, row_number FROM dead_letters ORDER BY 2") == [
        ("usage_log", 1), ("usage_daily", 2),
    ]  # fmt: skip
    assert query(path, "SELECT count(*) FROM usage_log") == [(2,)]
    assert query(path, "SELECT events FROM usage_daily") == [(20,)]


def test_garbage_of_every_sort_and_its_neighbours(store: SqliteStore, path: Path) -> None:
    first = {"type": "pressure", "underlying": "NQ"}
    frames = [
        said(pressure(0)),
        raw("pressure", first, float("nan"), {"type": "pressure", "bid_volume": float("inf")}),
        Frame("pressure", 1, 0, 0, "x", b"\xff garbage"),
        Frame("no such kind", 1, 0, 0, "x", b"garbage"),
        unreadable("no definition", b"\x00"),
        candles(rows(2)),
        said(rollup(0), body=b"{}"),
        said(pressure(1)),
    ]
    assert store.write(batch(*frames)) == 7
    assert query(path, "SELECT count(*) FROM pressure_metrics") == [(2,)]
    assert query(path, "SELECT count(*) FROM candles_1m") == [(2,)]
    got = query(path, "SELECT seq, row_number FROM dead_letters ORDER BY 1, 2")
    assert got == [(2, 0), (2, 1), (2, 2), (3, -1), (4, -1), (5, -1), (7, -1)]


@BY_KIND
def test_no_nan_and_no_infinity_is_ever_stored(store: SqliteStore, path: Path, kind: str, table: MessageTable) -> None:
    """Each number of a message in turn."""
    good = json.loads(said(OF_KIND[kind](0)).body)[0]
    spoiled = []
    for name, value in good.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            spoiled += [good | {name: float(text)} for text in ("nan", "inf", "-inf")]
    for name in good.get("components", {}):
        spoiled.append(good | {"components": good["components"] | {name: float("nan")}})
    assert store.write(batch(raw(kind, *spoiled))) == len(spoiled) > 10
    assert not query(path, f"SELECT * FROM {table.name}")
    assert "NaN" not in str(query(path, "SELECT row FROM dead_letters"))
    assert "Infinity" not in str(query(path, "SELECT row FROM dead_letters"))


# -- a lost tail ------------------------------------------------------------------------------


def test_a_rewind_forgets_dead_letters_and_keeps_rows_with_a_key(store: SqliteStore, path: Path) -> None:
    bad = {"type": "pressure"}
    store.write(batch(said(pressure(0)), raw("pressure", bad), raw("pressure", bad), seq=4))
    store.write(batch(raw("signal", bad), seq=5))
    store.write(batch(raw("pressure", bad), seq=6, bus="b"))
    store.write(batch(said(pressure(1)), seq=6, after="0-0"))  # from sequence 6 on
    left = query(path, "SELECT bus, topic, seq FROM dead_letters ORDER BY 1, 2, 3")
    assert left == [("a", "pressure", 5), ("a", "signals", 5), ("b", "pressure", 6)]
    assert query(path, "SELECT count(*) FROM pressure_metrics") == [(2,)]


def test_a_rewind_of_usage_goes_by_entries(store: SqliteStore, path: Path) -> None:
    bad = {"type": "usage"}
    store.write(batch(*(raw("usage", bad) for _ in range(3)), said(usage(0)), seq=9))  # entries 9, 10, 11
    store.write(batch(raw("pressure", bad), seq=10))
    store.write(batch(said(usage(1)), seq=20, after="1700000000000-9"))
    left = query(path, "SELECT topic, stream_id FROM dead_letters ORDER BY 1, 2")
    assert left == [("pressure", "1700000000000-10"), ("usage", "1700000000000-9")]
    assert query(path, "SELECT count(*) FROM usage_log") == [(2,)]


# -- mending ----------------------------------------------------------------------------------


@BY_KIND
def test_mending_twice_changes_nothing(store: SqliteStore, path: Path, kind: str, table: MessageTable) -> None:
    messages = [OF_KIND[kind](n) for n in range(8)]
    store.write(batch(said(*messages)))
    before = whole(path, table.name)
    later = {} if kind == "usage" else {"timestamp_out_ns": T_WINDOW + 900_000 * NS}
    for turn in range(2):
        store.write(batch(said(*(OF_KIND[kind](n, **later) for n in range(8))), seq=2 + turn, mend=True))
        assert whole(path, table.name) == before


@pytest.mark.parametrize("kind", ["pressure", "pressure_rollup", "signal"])
def test_mending_replaces_what_differs_once_and_never_the_more_complete(
    store: SqliteStore, path: Path, kind: str
) -> None:
    (table,) = MESSAGE_TABLES[kind]
    make = OF_KIND[kind]

    def held() -> list[tuple[Any, ...]]:
        return query(path, f"SELECT complete, revision, underlying_price FROM {table.name}")

    store.write(batch(said(make(complete=False, revision=4, underlying_price=1.0))))
    for turn in range(2):
        store.write(batch(said(make(complete=True, underlying_price=2.0)), seq=2 + turn, mend=True))
        assert held() == [(1, 5, 2)]
    store.write(batch(said(make(complete=False, revision=9, underlying_price=3.0)), seq=4, mend=True))
    assert held() == [(1, 5, 2)]
    store.write(batch(said(make(complete=True, revision=9, underlying_price=None)), seq=5, mend=True))
    assert held() == [(1, 9, None)]


@pytest.mark.parametrize("kind", ["pressure", "pressure_rollup"])
def test_mending_keeps_more_of_an_incomplete_row(store: SqliteStore, path: Path, kind: str) -> None:
    make = OF_KIND[kind]
    store.write(batch(said(make(complete=False, total_trades=30))))
    store.write(batch(said(make(complete=False, total_trades=29)), seq=2, mend=True))
    assert query(path, f"SELECT total_trades, revision FROM {MESSAGE_TABLES[kind][0].name}") == [(30, 0)]
    store.write(batch(said(make(complete=True, total_trades=29)), seq=3, mend=True))
    assert query(path, f"SELECT total_trades, revision FROM {MESSAGE_TABLES[kind][0].name}") == [(29, 1)]


# -- reading ----------------------------------------------------------------------------------


def test_what_readers_of_pressure_and_costs_ask(store: SqliteStore, path: Path) -> None:
    store.write(batch(said(*(pressure(n) for n in range(12))), said(*(usage(n) for n in range(5)))))
    (at_once,) = query(
        path, "SELECT strike, option_type, time_window, pressure_ratio, dominant_side, confidence, created_at "
        "FROM pressure_metrics WHERE strike = 17000.5 AND option_type = 'C' ORDER BY time_window LIMIT 1",
    )  # fmt: skip
    assert at_once == (17000.5, "C", "2023-12-25T23:00:00Z", 1.5, "BUY", 0.0, "2023-12-25T23:05:00.002500Z")
    assert query(path, "SELECT count(*) FROM pressure_metrics WHERE time_window >= '2023-12-25T23:05:00Z'") == [(8,)]
    assert query(path, "SELECT day, sum(events), sum(bytes), round(sum(cost), 6) FROM usage GROUP BY day") == [
        ("2023-12-25", 60, 4010, 0.1)
    ]


def test_baselines_are_read_by_underlying_and_time(store: SqliteStore, path: Path) -> None:
    messages = [pressure(n, underlying=name) for n in range(40) for name in ("NQ", "ES")]
    store.write(batch(said(*messages)))
    url = f"sqlite:///{path}"
    span = {"since": "2023-12-25T23:10:00Z", "until": "2023-12-25T23:20:00Z"}
    columns = ("strike", "option_type", "expiration", "time_window", "log_ratio")
    got = read_rows(url, "pressure_metrics", {"underlying": "NQ"}, **span, columns=columns)
    assert len(got) == 8
    assert {tuple(row) for row in got} == {columns}
    assert {row["time_window"] for row in got} == {"2023-12-25T23:10:00Z", "2023-12-25T23:15:00Z"}
    keys = [(r["expiration"], r["strike"], r["option_type"], r["time_window"]) for r in got]
    assert keys == sorted(keys)
    newest = read_rows(url, "pressure_metrics", {"underlying": "ES"}, last=4)
    assert {row["time_window"] for row in newest} == {"2023-12-25T23:45:00Z"}
    # As read_rows asks it: by the index, not through all of the underlying's rows or all of the time's.
    plan = query(
        path, "EXPLAIN QUERY PLAN SELECT * FROM pressure_metrics WHERE underlying = 'NQ' AND time_window >= ? AND "
        "time_window < ? ORDER BY underlying, expiration, strike, option_type, time_window", tuple(span.values()),
    )  # fmt: skip
    assert "idx_pressure_underlying (underlying=? AND time_window>? AND time_window<?)" in plan[0][3]


def test_the_other_tables_are_read_by_their_time(store: SqliteStore, path: Path) -> None:
    store.write(batch(said(*(signal(n) for n in range(12))), said(*(rollup(n) for n in range(3))), said(usage(0))))
    url = f"sqlite:///{path}"
    window = {"since": "2023-12-25T23:05:00Z", "until": "2023-12-25T23:10:00Z"}
    assert len(read_rows(url, "signals", {"underlying": "NQ"}, **window)) == 4
    assert [r["time_window"] for r in read_rows(url, "pressure_rollups", last=1)] == ["2023-12-25T23:10:00Z"]
    assert [r["events"] for r in read_rows(url, "usage_log", since="2023-12-25T23:01")] == [10]
    assert [r["cost"] for r in read_rows(url, "usage", until="2023-12-26")] == [0.02]
    assert [r["events"] for r in read_rows(url, "usage_daily", {"feed": "databento"}, since="2023-12-25")] == [10]
