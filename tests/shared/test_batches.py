"""JSON messages as rows of a batch: what is sound, what becomes a dead letter, and who wins a key."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.batches import Batch, Item, MessageRow, Source, batch_of
from shared.frames import Frame, unreadable
from shared.message_records import message_records
from shared.messages import Clock, Gap, decode, encode
from shared.tables import MESSAGE_TABLES
from tests.services.sink_sqlite.tape import T_WINDOW, pressure, rollup, said, signal, usage

OF_KIND = {"pressure": pressure, "pressure_rollup": rollup, "signal": signal, "usage": usage}
TOPIC = {"pressure": "pressure", "pressure_rollup": "pressure", "signal": "signals", "usage": "usage"}


def batch(*frames: Frame, topic: str = "pressure") -> Batch:
    return batch_of([Item(Source("a", topic, 0, i + 1, f"{i + 1}-0"), frame) for i, frame in enumerate(frames)])


def raw(kind: str, *values: Any) -> Frame:
    """A frame with values as the standard writer puts them: NaN and Infinity, too."""
    return Frame(kind, len(values), T_WINDOW, T_WINDOW, "test", json.dumps(list(values)).encode())


@pytest.mark.parametrize("kind", OF_KIND)
def test_messages_are_rows_of_their_tables(kind: str) -> None:
    messages = [OF_KIND[kind](n) for n in range(3)]
    made = batch(said(*messages[:2]), said(messages[2]), topic=TOPIC[kind])
    tables = MESSAGE_TABLES[kind]
    assert set(made.messages) == {table.name for table in tables}
    for table in tables:
        assert [(r.source.seq, r.row, r.message) for r in made.messages[table.name]] == [
            (1, 0, messages[0]), (1, 1, messages[1]), (2, 0, messages[2]),
        ]  # fmt: skip
    assert (made.rows, made.dead, made.ignored) == (3 * len(tables), [], 0)


def test_a_message_counts_by_its_own_kind() -> None:
    """Whatever the frame is called; what no table takes is counted and not kept."""
    odd = Frame("pressure", 4, 0, 0, "x", encode([pressure(), rollup(), Clock("f", 5), Gap("f", 1, 2, "x")]))
    made = batch(odd)
    assert {name: len(rows) for name, rows in made.messages.items()} == {"pressure_metrics": 1, "pressure_rollups": 1}
    assert (len(made.gaps), made.rows, made.ignored, made.dead) == (1, 3, 1, [])


@pytest.mark.parametrize("kind", OF_KIND)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "text", [1], {}, 10**400])
def test_a_number_that_is_none_takes_only_its_own_row_along(kind: str, value: Any) -> None:
    good = [msgspec.to_builtins(OF_KIND[kind](n)) for n in range(3)]
    name = {"pressure": "log_ratio", "pressure_rollup": "net_premium", "signal": "score", "usage": "cost_usd"}[kind]
    made = batch(raw(kind, good[0], good[1] | {name: value}, good[2]), topic=TOPIC[kind])
    for table in MESSAGE_TABLES[kind]:
        assert [(r.row, r.message) for r in made.messages[table.name]] == [
            (0, OF_KIND[kind](0)), (2, OF_KIND[kind](2)),
        ]  # fmt: skip
    (dead,) = made.dead
    assert (dead.table, dead.row, dead.source.seq) == (MESSAGE_TABLES[kind][0].name, 1, 1)
    assert name in dead.reason or "out of range" in dead.reason
    told = json.loads(dead.body, parse_constant=pytest.fail)
    assert told["type"] == kind
    assert told[name] == (None if isinstance(value, float) else value)


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        ("pressure", {"time_window_ns": -1}, "time_window_ns cannot be"),
        ("pressure", {"time_window_ns": T_WINDOW + 1}, "time_window_ns is no whole second"),
        ("pressure", {"expiration_ns": 1 << 63}, "expiration_ns cannot be"),
        ("pressure", {"last_ns": -(1 << 63)}, "last_ns cannot be"),
        ("pressure", {"timestamp_out_ns": 1 << 70}, "timestamp_out_ns cannot be"),
        ("pressure", {"total_trades": 1 << 63}, "total_trades cannot be"),
        ("pressure", {"total_trades": 1.5}, "Expected `int`, got `float`"),
        ("pressure", {"total_trades": True}, "Expected `int`, got `bool`"),
        ("pressure", {"complete": 1}, "Expected `bool`, got `int`"),
        ("pressure", {"bid_volume": None}, "Expected `float`, got `null`"),
        ("pressure", {"vwap": float("nan")}, "vwap is not finite"),
        ("pressure", {"underlying": "\ud800"}, "underlying is no text"),
        ("pressure", {"type": "\ud800"}, "no such message"),
        ("pressure_rollup", {"top_strikes": [{"expiration_ns": 1, "strike": 1, "option_type": "C",
                                              "log_ratio": float("inf"), "volume": 1}]}, "log_ratio is not finite"),
        ("pressure_rollup", {"top_strikes": [{"expiration_ns": -5, "strike": 1, "option_type": "C",
                                              "log_ratio": 1, "volume": 1}]}, "expiration_ns cannot be"),
        ("signal", {"components": {"raw": 1}}, "missing required field `base`"),
        ("signal", {"types": ["block", "\udc00"]}, "types is no text"),
        ("usage", {"day": "yesterday"}, "day is no date"),
        ("usage", {"day": "20231225"}, "day is no date"),
        ("usage", {"at_ns": 9e99}, "Expected `int`, got `float`"),
    ],
)  # fmt: skip
def test_what_no_store_takes(kind: str, wrong: dict[str, Any], says: str) -> None:
    bad = msgspec.to_builtins(OF_KIND[kind](1)) | wrong
    made = batch(raw(kind, msgspec.to_builtins(OF_KIND[kind](0)), bad), topic=TOPIC[kind])
    assert [r.message for r in made.messages[MESSAGE_TABLES[kind][0].name]] == [OF_KIND[kind](0)]
    (dead,) = made.dead
    assert says in dead.reason
    dead.reason.encode()
    json.loads(dead.body)


@pytest.mark.parametrize(
    "body",
    [b"", b"garbage", b"{}", b"5", b"null", b"[", b'[{"type":"pressure","underlying":"\xff"}]', b"[" * 100_000,
     b'[{"type":"pressure"}', b"\x00" * 40],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pressure", "usage", "gap", "no such kind"])
def test_a_body_that_is_no_array_is_one_dead_letter(kind: str, body: bytes) -> None:
    made = batch(said(pressure()), Frame(kind, 3, 0, 0, "x", body))
    assert [r.message for r in made.messages["pressure_metrics"]] == [pressure()]
    (dead,) = made.dead
    assert (dead.row, dead.table) == (-1, "pressure")
    assert "that is not JSON of messages" in dead.reason
    dead.reason.encode()


def test_values_that_are_no_messages_at_all() -> None:
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    made = batch(raw("signal", 5, None, [1], {}, {"type": "usage"}, {"type": "no"}, {"x": deep}), topic="signals")
    assert [(d.row, d.table) for d in made.dead] == [
        (n, "usage_log" if n == 4 else "signals") for n in range(7)
    ]  # fmt: skip
    assert not made.messages


def test_a_gap_that_cannot_be_beside_a_row_that_cannot_be() -> None:
    gap = {"type": "gap", "feed": "f", "start_ns": 1, "end_ns": 2, "reason": "x"}
    made = batch(raw("pressure", gap, gap | {"feed": "\ud800"}, float("nan"), msgspec.to_builtins(pressure())))
    assert [d.row for d in made.dead] == [1, 2]
    assert (len(made.gaps), made.rows) == (1, 2)


def test_an_unreadable_frame_is_a_dead_letter_with_its_reason() -> None:
    made = batch(unreadable("1 option trade without a definition", b"\x01\x02"), said(pressure()))
    assert [(d.row, d.table, d.reason) for d in made.dead] == [(-1, "pressure", "1 option trade without a definition")]
    assert made.rows == 1


keyed = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 99))


@given(st.lists(keyed, max_size=30))
def test_the_highest_revision_of_a_key_wins_and_of_these_the_last(found: list[tuple[int, int, int]]) -> None:
    (table,) = MESSAGE_TABLES["pressure"]
    rows = [
        MessageRow(Source("a", "pressure", 0, i, ""), i, pressure(n, revision=revision, premium=float(value)))
        for i, (n, revision, value) in enumerate(found)
    ]
    made = message_records(table, rows)
    want: dict[int, int] = {}
    for i, (n, revision, _) in enumerate(found):
        if n not in want or revision >= found[want[n]][1]:
            want[n] = i
    assert sorted(made.best) == sorted(want.values())
    assert sorted(made.best + made.spare) == list(range(len(found)))
    for n in range(4):
        revisions = [found[i][1] for i in made.spare if found[i][0] == n]
        assert revisions == sorted(revisions)


def test_keys_are_as_fine_as_the_store_keeps_them() -> None:
    """Two instants of one microsecond are one row of the usage log."""
    (log, daily) = MESSAGE_TABLES["usage"]
    rows = [
        MessageRow(Source("a", "usage", 0, i, ""), 0, usage(at_ns=T_WINDOW + at)) for i, at in enumerate((5, 999, 1000))
    ]
    assert message_records(log, rows).best == [1, 2]
    assert message_records(daily, rows).best == [2]


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'[{"type":"gap","feed":"\xff"}]', b'[{"type":"gap","x":' + b"[" * 100_000, b'[{"type":"no"}]']
)
def test_decoding_fails_in_one_way_only(body: bytes) -> None:
    """Whoever reads the bus catches just this."""
    with pytest.raises(msgspec.DecodeError):
        decode(body)
